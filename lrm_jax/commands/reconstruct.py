"""`lrm reconstruct`: images in, coloured surfaces, contact sheets, viewer pages and turntables out.

    lrm reconstruct                                     the bundled examples with the bundled model
    lrm reconstruct chair.png photos/ --out out --video --weights hf:stabilityai/TripoSR

Leaves `out/<image>/surface.glb` (and the other formats), `contact_sheet.png`, `viewer.html`, `turntable.mp4`, and
`out/report.json`. All files of an image are written, or none.

Frame of the surface files: the world turned about its vertical so that the source camera stands at -y, looks along +y, and
has z up. In the y-up axes of `.glb` and `.obj` that is at +z: viewers open on the side that the image shows.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from lrm_jax.commands import arguments
from lrm_jax.commands.versions import versions
from lrm_jax.images import cutout, load, sheets, video
from lrm_jax.images.png import to_uint8
from lrm_jax.mesh import formats, lattice, surface, texture, viewer
from lrm_jax.ops import cameras
from lrm_jax.parallel import messages, sharding, whole_files
from lrm_jax.types import Cameras, InputError
from lrm_jax.weights import loading

EXAMPLES = Path(__file__).parents[1] / "assets" / "examples"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FORMATS = ("glb", "obj", "ply")
SIZE = 256  # pixels along a side of a rendered view
FRAMES = 72  # of a turntable, at least: three seconds
_log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Runs `lrm reconstruct`. Returns the exit code: 0, or 2 where some images failed; the others are done then."""
    args = parse(argv)
    stages, failures, done = messages.Stages(), {}, {}
    whole_files.check_writable(args.out)
    paths = find_images(args.images)
    args.batch = min(args.batch, len(paths))
    images = read_images(paths, args.remove_background, stages, failures)
    # A mistyped name is told at once, not after the model has been loaded.
    first = list(itertools.islice(images, 1))
    if not first:
        return 2
    images = itertools.chain(first, images)

    with stages("load", f" {args.weights or 'the bundled model'}"):
        model, params, info = loading.load_weights(args.weights)
        apply = compiled(model, params)
    while group := list(itertools.islice(images, args.batch)):
        for (name, path, _), files in reconstruct(model, apply, group, args, stages, failures):
            with stages("write", f" {args.out / name}"):
                whole_files.write_files(args.out / name, files)
            done[name] = {"source": str(path)} | {file: len(data) for file, data in files.items()}
    if not done:
        return 2
    summary = {
        "images": done,
        "failures": failures,
        "seconds": {**stages.seconds, "total": stages.elapsed()},
        "model": {**info, "parameters": sum(x.size for x in jax.tree.leaves(params))},
        "arguments": vars(args),
        "versions": versions(),
    }
    text = json.dumps(summary, indent=2, default=str)
    whole_files.write_file(args.out / "report.json", text.encode())
    stages.say(f"done: {len(done)} in {args.out}, {len(failures)} failed")
    return 2 if failures else 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(prog="lrm reconstruct", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="images or folders of them; without any, the bundled examples",
    )
    add("--out", type=Path, default=Path("out"), help="folder for the results (default: out)")
    add(
        "--weights",
        help="model file, reference checkpoint, folder, or hf:ORG/NAME (default: the bundled model)",
    )
    add("--formats", default="glb", help=f"comma-separated, of {', '.join(FORMATS)} (default: glb)")
    add(
        "--resolution",
        type=int,
        default=256,
        help="lattice points along an axis of the surface's grid (default: 256)",
    )
    add("--views", type=int, default=8, help="views on the contact sheet (default: 8)")
    add("--video", action="store_true", help="also a turntable.mp4")
    add("--texture", type=int, metavar="N", help="bake the colours into an N x N texture")
    add(
        "--batch",
        type=int,
        default=1,
        help="images that go through the model together (default: 1)",
    )
    add("--dense", action="store_true", help="evaluate the whole grid, not only around the surface")
    add(
        "--remove-background",
        action="store_true",
        help="cut out objects with rembg where there is no alpha channel",
    )
    args = parser.parse_args(argv)
    args.formats = [x.strip() for x in args.formats.split(",")]
    if unknown := [x for x in args.formats if x not in FORMATS]:
        raise InputError(f"--formats {unknown[0]!r} is not known: choose of {', '.join(FORMATS)}")
    arguments.check_ranges(
        args, resolution=(8, 2048), views=(1, 64), batch=(1, 1024), texture=(16, 8192)
    )
    return args


def find_images(names: list[str]) -> list[Path]:
    """The files that were named, and the images in the folders that were named; the bundled examples if nothing was.

    Raises:
      InputError: a folder without images.
    """
    paths = []
    for path in map(Path, names or [EXAMPLES]):
        if path.is_dir():
            found = sorted(x for x in path.iterdir() if x.suffix.lower() in SUFFIXES)
            if not found:
                raise InputError(
                    f"{path} has no images: name a folder with {', '.join(sorted(SUFFIXES))} files"
                )
            paths += found
        else:
            paths.append(path)
    return paths


def read_images(
    paths: list[Path], remove_background: bool, stages: messages.Stages, failures: dict
) -> Iterator[tuple[str, Path, np.ndarray]]:
    """Yields (folder name, path, uint8 [H W 4]) of all good images; tells of the bad ones, and puts them in `failures`."""
    taken = {"report.json"}
    for path in paths:
        try:
            with stages("read", f" {path}"):
                rgba = cut_out(load.load_image(path), path, remove_background)
        except InputError as error:
            fail(failures, path, error)
            continue
        stem = whole_files.printable(path.stem).strip(".") or "image"
        names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        yield name, path, rgba


def fail(failures: dict, path: Path, error: InputError) -> None:
    """One line for an image that is given up."""
    message = str(error) if str(path) in str(error) else f"{path}: {error}"
    failures[str(path)] = message
    print(f"lrm: error: {message}", file=sys.stderr, flush=True)


def cut_out(rgba: np.ndarray, path: Path, remove_background: bool) -> np.ndarray:
    """The image with its background transparent: by its own alpha channel, by rembg, or by its one colour.

    Raises:
      InputError: nothing, or nobody, tells what the object is.
    """
    if not load.has_alpha(rgba):
        if remove_background:
            rgba = run_rembg(rgba)
        else:
            keyed = cutout.key_out_background(rgba)
            if keyed is None:
                raise InputError(
                    f"{path} has no alpha channel, and its background is not of one colour: "
                    "add --remove-background, or cut the object out and save it as PNG"
                )
            _log.warning(
                "%s has no alpha channel: the colour of its border is taken as background", path
            )
            rgba = keyed
    if not rgba[..., 3].any():
        raise InputError(f"{path} shows no object, all is background: give an image with one")
    return rgba


def run_rembg(rgba: np.ndarray) -> np.ndarray:
    """Removes the background with rembg's U2-Net (fetched by rembg when it is first used)."""
    try:
        import rembg
    except (ImportError, SystemExit):  # rembg exits where its runtime is missing
        raise InputError(
            "--remove-background needs rembg: pip install 'lrm_jax[background]'"
        ) from None
    try:
        # Named, as rembg's default model changes between versions.
        return np.asarray(rembg.remove(rgba[..., :3], session=_rembg_session()))
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"rembg failed ({reason}): check the network, or cut the object out yourself"
        ) from None


@functools.cache
def _rembg_session():
    import rembg

    return rembg.new_session("u2net")


def compiled(model, params) -> dict[str, Callable]:
    """The model's encode, render and query as jitted functions; each is compiled for one shape.

    Raises:
      InputError: a family that has no surface, or does not take single images.
    """
    if not (hasattr(model, "prepare") and hasattr(model, "query")):
        raise InputError(
            f"{type(model).__name__} does not make surfaces from single images: give weights of another family"
        )
    variables = {"params": params}

    def render(variables, scene, view: Cameras):
        rays = cameras.pixel_rays(view, SIZE, SIZE)
        return model.apply(variables, scene, rays, method="render"), rays

    def query(variables, scene, xyz):
        field, rgb = model.apply(variables, scene, xyz[None], method="query")
        return field[0], rgb[0]

    methods = {
        "encode": functools.partial(model.apply, method="encode"),
        "render": render,
        "query": query,
    }
    return {
        name: functools.partial(sharding.jit(method), variables) for name, method in methods.items()
    }


def reconstruct(
    model, apply, group: list[tuple[str, Path, np.ndarray]], args, stages, failures
) -> Iterator[tuple[tuple, dict[str, bytes]]]:
    """Reconstructs up to `args.batch` images at once and yields each with its files."""
    prepared = []
    for image in group:
        try:
            prepared.append((image, model.prepare([image[2]])))
        except InputError as error:
            fail(failures, image[1], error)
    if not prepared:
        return
    group, views = zip(*prepared, strict=True)
    # Padded, so that a last group of fewer images is not compiled anew.
    padded = views + views[-1:] * (args.batch - len(views))
    with stages("encode", f" {', '.join(name for name, _, _ in group)} (the first time, compiled)"):
        source = jax.tree.map(lambda *x: np.concatenate(x), *padded)
        scene = jax.block_until_ready(apply["encode"](source))
    orbit = Orbit.of(jax.tree.map(lambda x: x[0, 0], source.cameras))
    # The contact sheet shows every so many of the turntable's frames.
    step = -(-FRAMES // args.views) if args.video else 1
    with stages("render", f" {step * args.views} views (the first one compiled)"):
        frames = render_orbit(apply["render"], scene, orbit, args.views, step, len(padded))
    for i, image in enumerate(group):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], scene)
        try:
            with stages("surface", f" of {image[0]}, {args.resolution}^3"):
                triangles = surface_of(model, apply["query"], one, args)
            triangles = turned(triangles, -90 - orbit.azimuth_deg)
            with stages("files"):
                own = {key: values[i] for key, values in frames.items()}
                files = files_of(image, triangles, own, orbit, args)
        except InputError as error:
            fail(failures, image[1], error)
            continue
        yield image, files


@dataclasses.dataclass(frozen=True)
class Orbit:
    """Where a source camera stands: the turntable starts there."""

    distance: float
    elevation_deg: float
    azimuth_deg: float
    fov_y_deg: float

    @staticmethod
    def of(camera: Cameras) -> "Orbit":
        x, y, z = np.asarray(camera.c2w)[:3, 3].tolist()
        distance = float(np.linalg.norm([x, y, z]))
        return Orbit(
            distance=distance,
            elevation_deg=float(np.degrees(np.arcsin(z / distance))),
            azimuth_deg=float(np.degrees(np.arctan2(y, x))),
            fov_y_deg=float(np.degrees(2 * np.arctan(0.5 / float(camera.fxfycxcy[1])))),
        )


def render_orbit(
    render: Callable, scene, orbit: Orbit, num_views: int, step: int, batch: int
) -> dict[str, np.ndarray]:
    """Renders all scenes from `num_views * step` cameras around them, one camera a call, so that only one is compiled.

    Returns:
      `frames` uint8 [B V*step H W 3] on white; and of every `step`-th float32 `alpha`, `depth` [B V H W], `origins`, `dirs`
      [B V H W 3].
    """
    views = cameras.orbit(num_views * step, **dataclasses.asdict(orbit))
    views = jax.tree.map(np.asarray, views)
    kept = {"frames": [], "alpha": [], "depth": [], "origins": [], "dirs": []}
    for v in messages.progress(range(num_views * step), num_views * step, "views"):
        view = jax.tree.map(lambda x, v=v: np.broadcast_to(x[v], (batch, 1, *x.shape[1:])), views)
        rendering, rays = jax.tree.map(np.asarray, render(scene, view))
        white = rendering.rgb + (1 - rendering.alpha[..., None])
        if not np.isfinite(white).all():
            raise InputError(
                "what the model renders is not finite: its weights are damaged, take others"
            )
        kept["frames"].append(to_uint8(white))
        if v % step == 0:
            kept["alpha"].append(rendering.alpha)
            kept["depth"].append(rendering.depth)
            kept["origins"].append(rays.origins)
            kept["dirs"].append(rays.dirs)
    return {key: np.concatenate(values, axis=1) for key, values in kept.items()}


def surface_of(model, query: Callable, scene, args) -> surface.Surface:
    """The coloured surface of one scene [1 ...], in the world of the model."""

    def field(xyz):
        return query(scene, xyz)[0]

    def color(xyz):
        return query(scene, xyz)[1]

    vertices, faces = lattice.extract(
        field,
        args.resolution,
        model.radius,
        model.surface_level,
        dense=args.dense,
        progress=messages.progress,
    )
    triangles = surface.paint(vertices, faces, color, progress=messages.progress)
    if args.texture:
        return texture.bake_texture(triangles, color, args.texture, progress=messages.progress)
    return triangles


def turned(triangles: surface.Surface, degrees: float) -> surface.Surface:
    """The surface turned about the world's z axis, counter-clockwise seen from above."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], np.float32)
    return dataclasses.replace(
        triangles, vertices=triangles.vertices @ rotation.T, normals=triangles.normals @ rotation.T
    )


def files_of(
    image: tuple, triangles: surface.Surface, frames: dict, orbit: Orbit, args
) -> dict[str, bytes]:
    """All files of one image: name -> content."""
    name, _, rgba = image
    glb = formats.to_glb(triangles)
    files = {}
    if "glb" in args.formats:
        files["surface.glb"] = glb
    if "obj" in args.formats:
        files |= formats.to_obj(triangles)
    if "ply" in args.formats:
        files["surface.ply"] = formats.to_ply(triangles)
    alpha, depth = frames["alpha"], frames["depth"]
    step = len(frames["frames"]) // args.views
    rows = {
        "view": frames["frames"][::step],
        "depth (near is bright)": sheets.depth_images(depth, alpha),
        "normal (xyz as rgb)": sheets.normal_images(
            depth, alpha, frames["origins"], frames["dirs"]
        ),
    }
    columns = [f"{360 * i / args.views:.0f}°" for i in range(args.views)]
    source = cutout.composite(rgba, 1.0)
    files["contact_sheet.png"] = sheets.contact_sheet(source, rows, columns, name)
    files["viewer.html"] = viewer.viewer_html(glb, name, orbit.distance, orbit.fov_y_deg)
    if args.video:
        files["turntable.mp4"] = video.turntable(frames["frames"])
    return files
