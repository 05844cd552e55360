"""Renders 3D files into training images: `render_objects.py IN OUT --views 32 --size 256`.

IN is a .glb, .gltf, .obj or .ply file, a .zip of them, or a folder of such files. Each object becomes a folder in OpenLRM's
layout (https://github.com/3DTopia/OpenLRM/blob/3108b69/openlrm/datasets/objaverse.py#L53-L70), which `lrm_jax.data.objects` reads:

    OUT/<uid>/rgba/000.png ...   sRGB with straight (not premultiplied) alpha
    OUT/<uid>/pose/000.npy ...   [3 4] float32 camera to world, Blender's camera axes (x right, y up, z backward)
    OUT/<uid>/intrinsics.npy     [3 2] float32 (fx, fy), (cx, cy), (width, height) in pixels
    OUT/<uid>/points.npy         [10000 3] float32 random points of the true surface, uniform by area, in the same world
    OUT/render.json              the settings
    OUT/failures.json            cause -> uids of objects that could not be rendered

With --geometry (the default of --protocol one2345; --no-geometry: not), it also writes, for the rays through the pixels' centres, and 0 for the background:

    OUT/<uid>/depth/000.png ...  16 bits, steps of 1e-4 world units, along the optical axis (not along the ray)
    OUT/<uid>/normal/000.png ... 8-bit RGB = 127.5 n + 127.5 for the unit normal n, in the world's frame, of the visible side

`<uid>` is `<zip or folder stem>-<file stem>`. The world has z up (the files are y-up, as glTF requires), and the object's bounding
box is centred on the origin. `--protocol` sets the size of the object, the cameras and the light. The numbers are in
`tools/rendering/protocols.py`. By default the farthest vertex is at distance 1, so the object fills the bounding sphere of radius 1.
Views with even numbers then have an elevation in [5, 35] degrees, like photographs. Views with odd numbers have one in `--elevation`.

There are two back ends with the same cameras, light, depth and normals. embree runs on a CPU without OpenGL, and needs no other
installation. It renders matt surfaces without shadows. Blender's Cycles renders shadows, reflections and the file's whole material. It
needs bpy in a separate environment, see `--blender`. An interrupted run continues where it stopped.

Exit code: 0 every object was rendered; 1 some objects failed, the others were rendered; 2 no object could be rendered, wrong usage, or a
disk error stopped the run; 130 interrupted.
"""

import os

os.environ.setdefault(
    "JAX_PLATFORMS", "cpu"
)  # lrm_jax.ops makes the rays, which is too little work to start an accelerator for

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import functools  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from rendering import cycles  # noqa: E402
from rendering.objects import cause_of, is_finished, write_object  # noqa: E402
from rendering.output import DEPTH_UNIT, prepare_folder, write_failures  # noqa: E402
from rendering.processes import run_in_processes  # noqa: E402
from rendering.protocols import PROTOCOLS, Settings  # noqa: E402
from rendering.sources import find_objects  # noqa: E402

from lrm_jax.parallel import messages  # noqa: E402
from lrm_jax.types import InputError  # noqa: E402


def render_all(
    source: Path,
    out: Path,
    settings: Settings,
    workers: int,
    limit: int | None,
    blender: cycles.Blender | None = None,
) -> tuple[int, dict[str, list[str]]]:
    """Renders the objects that are missing. Returns the number of all objects, and cause -> uids of those that failed."""
    objects = dict(list(find_objects(source).items())[:limit])
    prepare_folder(out, settings)
    missing = {uid: where for uid, where in objects.items() if not is_finished(out, uid)}
    done = len(objects) - len(missing)
    print(f"{len(objects)} objects, {done} of them rendered already", file=sys.stderr)
    write = functools.partial(write_object, out=out, settings=settings, blender=blender)
    failures = {}
    try:
        results = run_in_processes(write, missing, out, workers)
        for uid, cause in messages.progress(results, len(missing), "objects"):
            if cause:
                failures[uid] = cause
    finally:
        causes = write_failures(out, failures)
    return len(objects), causes


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Settings that are not given are taken from the protocol. "
        + " ".join(__doc__.split("\n\n")[-1].split()),
    )
    add = parser.add_argument
    add("source", type=Path, metavar="IN", help="a 3D file, a .zip, or a folder")
    add("out", type=Path, metavar="OUT", help="output folder; objects that it already has are kept")
    add(
        "--protocol",
        choices=PROTOCOLS,
        default="default",
        help="cameras, box and light: the default, or those of a paper",
    )
    add("--views", type=int, help="images per object (default protocol: 32)")
    add("--size", type=int, help="height and width of an image in pixels (256)")
    pair = {"type": float, "nargs": 2, "metavar": ("LO", "HI")}
    add(
        "--distance",
        **pair,
        help="distance of the cameras from the origin (3 3; the object has radius 1)",
    )
    add(
        "--elevation",
        **pair,
        help="elevation of the odd views in degrees (-30 75); with --protocol one2345, of view 0 (30 30)",
    )
    add("--fov", type=float, help="full vertical field of view in degrees (40)")
    add("--lighting", choices=("fixed", "varied"), help="varied: different for each object (fixed)")
    add("--geometry", action=argparse.BooleanOptionalAction, help="also write depth and normals")
    add(
        "--backend",
        choices=("embree", "cycles"),
        default="embree",
        help="renderer: embree on a CPU, or Blender's Cycles (default: embree)",
    )
    add(
        "--blender",
        metavar="PYTHON",
        help=f"for Cycles: a Python that has bpy. To install it: {cycles.INSTALL}",
    )
    add("--samples", type=int, help="for Cycles: samples per pixel (32)")
    add("--workers", type=int, default=2, help="number of processes (default: 2)")
    add("--seed", type=int, default=0, help="random seed for cameras and light (default: 0)")
    add("--limit", type=int, metavar="N", help="render only the first N objects")
    args = parser.parse_args(argv)
    protocol = PROTOCOLS[args.protocol]
    if args.elevation is not None and protocol.elevation is None:
        parser.error(
            f"--elevation: the cameras of --protocol {args.protocol} are not set by elevation"
        )
    if args.samples is not None and args.backend != "cycles":
        parser.error("--samples: only for --backend cycles")
    chosen = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(Settings)}
    chosen = {name: tuple(v) if isinstance(v, list) else v for name, v in chosen.items()}
    settings = dataclasses.replace(protocol, **{k: v for k, v in chosen.items() if v is not None})
    if problem := _problem(args, settings):
        parser.error(problem)
    return args, settings


def _problem(args: argparse.Namespace, settings: Settings) -> str | None:
    """Describes what is wrong with the numbers, or returns None."""
    for name in ("views", "size", "samples"):
        if getattr(settings, name) < 1:
            return f"--{name} {getattr(settings, name)}: must be at least 1"
    for name in ("workers", "limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            return f"--{name} {value}: must be at least 1"
    if settings.rig:
        for name in ("views", "distance", "fov"):
            if getattr(settings, name) != getattr(PROTOCOLS["one2345"], name):
                return f"--{name}: --protocol one2345 has 40 fixed cameras: leave it out"
    near, far = settings.distance
    half = 1 if settings.box is None else settings.box / 2
    radius = 1 if settings.box is None else half * 3**0.5
    if not half < near <= far:
        what = "radius" if settings.box is None else "box's half side"
        return (
            f"--distance {near} {far}: needs {half:g} < LO <= HI: the object's {what} is {half:g}"
        )
    if settings.geometry and far + radius > 65535 * DEPTH_UNIT:
        reach = 65535 * DEPTH_UNIT - radius
        return f"--distance {near} {far}: with --geometry at most {reach:.2f}: depth has 16 bits"
    if settings.elevation is not None:
        low, high = settings.elevation
        if not -90 <= low <= high <= 90:
            return f"--elevation {low} {high}: needs -90 <= LO <= HI <= 90"
    if not 0 < settings.fov < 170:
        return f"--fov {settings.fov}: must be between 0 and 170 degrees"
    if settings.seed < 0:
        return f"--seed {settings.seed}: must not be negative"
    return None


def main(argv: list[str] | None = None) -> int:
    args, settings = parse_arguments(argv)
    try:
        blender = None
        if settings.backend == "cycles":
            threads = max(1, (os.cpu_count() or 1) // args.workers)
            blender = cycles.find_blender(args.blender, threads)
        count, causes = render_all(
            args.source, args.out, settings, args.workers, args.limit, blender
        )
    except InputError as error:
        print(f"render_objects: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        stopped = "interrupted"
    except OSError as error:
        stopped = f"stopped: {cause_of(error)}"
    else:
        return _report(args.out, count, causes)
    print(
        f"render_objects: {stopped}: rendered objects are kept, run again to continue",
        file=sys.stderr,
    )
    return 130 if stopped == "interrupted" else 2


def _report(out: Path, count: int, causes: dict[str, list[str]]) -> int:
    """Prints what was written and what was not. Returns the exit code."""
    for cause, uids in causes.items():
        names = ", ".join(uids[:3]) + (" ..." if len(uids) > 3 else "")
        print(f"skipped {len(uids)}: {cause}: {names}", file=sys.stderr)
    failed = sum(map(len, causes.values()))
    if failed == count:
        print(f"render_objects: none of {count} objects could be rendered", file=sys.stderr)
        return 2
    print(f"wrote {out}" + (f"; {failed} failed, see {out / 'failures.json'}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
