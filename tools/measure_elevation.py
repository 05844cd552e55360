"""Measures `lrm_jax.two_stage.elevation` on rendered objects: `measure_elevation.py IN [IN ...] --objects 20`.

IN is what `tools/render_objects.py` takes: a 3D file, a .zip of them, or a folder. From each IN, N objects are taken, evenly
spread by name. Each is rendered with One-2-3-45's protocol for a random elevation in each band. What is rendered is not the view at
this elevation but its four neighbours, which a view-synthesis model would have to guess. The elevation is then estimated from
SIFT's matches, and, to test the geometry alone, from true ones: points of the visible surface projected into the images.

Prints a table. The median is over the elevations that were found. An error counts for "within" only if its status is "found". Exit
code: 0; 1 if some objects could not be read; 2 if none, or for wrong usage.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # too little work to start an accelerator for

import argparse  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
from rendering import embree  # noqa: E402
from rendering.objects import cause_of  # noqa: E402
from rendering.output import View  # noqa: E402
from rendering.protocols import PROTOCOLS, choose_lighting, rng_of  # noqa: E402
from rendering.sources import find_objects, opened  # noqa: E402
from rendering.surfaces import Triangles, load_triangles  # noqa: E402

from lrm_jax.ops import cameras as cameras_lib  # noqa: E402
from lrm_jax.parallel import messages  # noqa: E402
from lrm_jax.two_stage import sift  # noqa: E402
from lrm_jax.two_stage.elevation import (  # noqa: E402
    PAIRS,
    SIDE,
    Elevation,
    Matches,
    estimate,
    off_white,
    on_foreground,
)
from lrm_jax.types import Cameras, InputError  # noqa: E402

SETTINGS = PROTOCOLS["one2345"]
BANDS = ((0, 15), (15, 30), (30, 45), (45, 60))
POINTS = 60  # true ones, of each image
Rows = dict[tuple[str, tuple[int, int]], list[tuple[float, Elevation]]]


def evenly(names: list[str], count: int) -> list[str]:
    """`count` of the names, or all if there are fewer."""
    return [names[i * len(names) // count] for i in range(count)] if count < len(names) else names


def neighbours(triangles: Triangles, uid: str, elevation: float) -> tuple[Cameras, list[View]]:
    """The four neighbours of the view at an elevation."""
    rig = cameras_lib.one2345_rig(90 - elevation)
    cameras = Cameras(c2w=rig.c2w[8:12], fxfycxcy=rig.fxfycxcy[8:12])
    lighting = choose_lighting(SETTINGS, uid)
    return cameras, list(embree.render(triangles, cameras, lighting, SETTINGS))


def on_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:] / 255
    return np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def true_matches(cameras: Cameras, views: list[View], rng: np.random.Generator) -> Matches:
    """Projections of points that two images see, with confidence 1. The points are the surface behind random pixels."""
    xyz = []
    for c2w, view in zip(cameras.c2w, views, strict=True):
        rows, columns = np.nonzero(view.depth)
        chosen = rng.permutation(len(rows))[:POINTS]
        uv = np.column_stack([columns[chosen], rows[chosen]]) + 0.5
        local = (uv / SIDE - cameras.fxfycxcy[0, 2:]) / cameras.fxfycxcy[0, :2]
        local = np.column_stack([local, np.ones(len(local))])
        local *= view.depth[rows[chosen], columns[chosen], None]
        xyz.append(local @ c2w[:3, :3].T + c2w[:3, 3])
    local = (np.concatenate(xyz) - cameras.c2w[:, None, :3, 3]) @ cameras.c2w[:, :3, :3]
    z = local[..., 2]
    uv = local[..., :2] / z[..., None] * cameras.fxfycxcy[0, :2] + cameras.fxfycxcy[0, 2:]
    column, row = np.floor(uv * SIDE).astype(int).clip(0, SIDE - 1).transpose(2, 0, 1)
    depth = np.stack([view.depth for view in views])
    seen = np.abs(depth[np.arange(4)[:, None], row, column] - z) < 0.01
    seen &= ((uv > 0) & (uv < 1)).all(-1)
    matches = {}
    for i, j in PAIRS:
        both = seen[i] & seen[j]
        matches[i, j] = np.column_stack(
            [uv[i, both] * SIDE, uv[j, both] * SIDE, np.ones(both.sum())]
        )
    return matches


def measure(uid: str, path: Path, member: str | None, rows: Rows) -> None:
    """Adds the estimates of one object to `rows`."""
    with opened(path, member) as file:
        triangles = load_triangles(file, SETTINGS.box, file_normals=SETTINGS.file_normals)
    for band in BANDS:
        rng = rng_of(uid, band[0])
        truth = rng.uniform(*band)
        cameras, views = neighbours(triangles, uid, truth)
        images = on_white(np.stack([view.rgba for view in views]))
        found = on_foreground(sift.matches(images), off_white(images))
        rows.setdefault(("SIFT", band), []).append((truth, estimate(found)))
        known = estimate(true_matches(cameras, views, rng))
        rows.setdefault(("true matches", band), []).append((truth, known))


def table(rows: Rows) -> str:
    """The rows of all bands, and of all together, as Markdown."""
    lines = [
        "| matches | elevation | objects | median error | within 1° | within 5° | not found (no matches, no tracks, ambiguous) | of these, within 5° |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for matcher in ("true matches", "SIFT"):
        bands = {f"{low} to {high}": rows[matcher, (low, high)] for low, high in BANDS}
        for name, row in {**bands, "all": sum(bands.values(), [])}.items():
            states = [x.status for _, x in row]
            errors = np.array([np.nan if x.degrees is None else abs(x.degrees - t) for t, x in row])
            found = np.array([state == "found" for state in states])
            counts = [states.count(state) for state in ("no matches", "no tracks", "ambiguous")]
            lines.append(
                f"| {matcher} | {name} | {len(row)} | {np.median(errors[found]):.1f}° "
                f"| {np.mean(found & (errors <= 1)):.0%} | {np.mean(found & (errors <= 5)):.0%} "
                f"| {sum(counts)} ({', '.join(map(str, counts))}) | {np.sum(~found & (errors <= 5))} |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    first, *_, last = __doc__.strip().split("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=" ".join(last.split()))
    parser.add_argument("sources", type=Path, nargs="+", metavar="IN", help="3D file, .zip, folder")
    parser.add_argument("--objects", type=int, default=20, help="number from each IN (default: 20)")
    parser.add_argument("--misses", action="store_true", help="also list errors over 5 degrees")
    args = parser.parse_args(argv)
    if args.objects < 1:
        parser.error(f"--objects {args.objects}: must be at least 1")
    rows, skipped = {}, 0
    try:
        objects = [find_objects(source) for source in args.sources]
    except InputError as error:
        print(f"measure_elevation: {error}", file=sys.stderr)
        return 2
    chosen = [(uid, *x[uid]) for x in objects for uid in evenly(list(x), args.objects)]
    for uid, path, member in messages.progress(chosen, len(chosen), "objects"):
        try:
            measure(uid, path, member, rows)
        except Exception as error:  # 3D files can be broken in more ways than can be listed
            skipped += 1
            print(f"skipped {uid}: {cause_of(error)}", file=sys.stderr)
            continue
        for (matcher, _), row in rows.items() if args.misses else ():
            truth, x = row[-1]
            if x.degrees is None or abs(x.degrees - truth) > 5:
                print(f"{uid}: {matcher}: {truth:.1f} taken for {x.degrees}: {x.status}")
    if not rows:
        print("measure_elevation: no object could be rendered", file=sys.stderr)
        return 2
    print(table(rows))
    return 1 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
