"""Reconstruct objects from images: writes 3D meshes, contact sheets, viewer pages and videos.

    lrm reconstruct                                              the bundled examples, with the bundled model
    lrm reconstruct chair.png photos/ --weights hf:stabilityai/TripoSR --video

Each image gets a folder `out/<image>/` with `mesh.glb` (or the formats in --formats), `contact_sheet.png` (the image, views
around the object, depth and normals), `viewer.html` (opens in any browser, without a network) and, with --video, `turntable.mp4`.
`out/report.json` covers all images. Either all files of an image are written, or none.

The side shown in the image faces -y in `.ply` (z up), and +z in `.glb` and `.obj` (y up).

Exit code: 0 all images are done; 1 some failed, the others are done; 2 none is done, or wrong usage.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from lrm_jax import api
from lrm_jax.commands import arguments
from lrm_jax.commands.versions import versions
from lrm_jax.images import cutout, load, sheets, video
from lrm_jax.images.png import to_uint8
from lrm_jax.mesh import formats, viewer
from lrm_jax.ops import cameras as ops_cameras
from lrm_jax.ops.compositing import blend
from lrm_jax.parallel import messages, whole_files
from lrm_jax.types import InputError
from lrm_jax.weights.loading import DTYPES

COMPILES = "; compiles first, later images are faster"


def main(argv: list[str]) -> int:
    """Runs `lrm reconstruct`. Returns the exit code."""
    args = parse(argv)
    stages, failures, done = messages.Stages(), {}, {}
    whole_files.check_writable(args.out)
    paths = load.find_images(args.images or [arguments.EXAMPLES])
    batch = min(args.batch or jax.local_device_count(), len(paths))
    images = read_images(paths, args.remove_background, stages, failures)
    # Report a mistyped name at once, not after loading the model.
    first = list(itertools.islice(images, 1))
    summary = {"images": done, "failures": failures}
    if first:
        with stages("load", f" {args.weights or 'the bundled model'}"):
            model = api.load(args.weights, dtype=args.dtype)
            model.check_takes_images()
        summary["model"] = model.info | {"parameters": model.num_params}
        images = itertools.chain(first, images)
        while group := list(itertools.islice(images, batch)):
            for (name, path, _), files in reconstruct(model, group, batch, args, stages, failures):
                with stages("write", f" {args.out / name}"):
                    whole_files.write_files(args.out / name, files)
                done[name] = {"source": str(path)} | {file: len(x) for file, x in files.items()}
    summary["seconds"] = {**stages.seconds, "total": stages.elapsed()}
    summary |= {"arguments": vars(args), "versions": versions()}
    text = json.dumps(summary, indent=2, default=str)
    whole_files.write_file(args.out / "report.json", text.encode())
    stages.say(f"done: {len(done)} in {args.out}, {len(failures)} failed, see report.json there")
    return 0 if not failures else 1 if done else 2


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, checked."""
    parser = arguments.parser("lrm reconstruct", __doc__)
    add = parser.add_argument
    # fmt: off
    add("images", nargs="*", metavar="IMAGE", help="images, or folders of images (default: the bundled examples)")
    add("--out", type=Path, default=Path("out"), help="folder to write to (default: out)")
    add("--weights", help=arguments.WEIGHTS)
    add("--dtype", choices=DTYPES, help="number format that the model computes in (default: float32)")
    add("--formats", default="glb", help=f"mesh formats, comma-separated: {', '.join(formats.FORMATS)} (default: glb)")
    add("--resolution", type=int, default=256, help="grid points along each axis for extracting the mesh (default: 256)")
    add("--level", type=float, help="value of the model's field at the surface; a lower value makes the object thicker (default: depends on the model)")
    add("--faces", type=int, metavar="N", help="reduce the mesh to about N triangles (default: keep all; with --texture 20000)")
    add("--texture", type=int, metavar="N", help="write an N x N texture instead of vertex colours; also reduces the mesh, see --faces")
    add("--dense", action="store_true", help="evaluate the whole grid, not only around the surface: slower, but finds small separate pieces too")
    add("--views", type=int, default=8, help="number of views on the contact sheet (default: 8)")
    add("--size", type=int, default=256, help="side of the rendered views and of the video, in pixels (default: 256)")
    add("--elevation", type=float, metavar="DEGREES", help="elevation of the camera that circles the object (default: that of the image)")
    add("--video", action="store_true", help="also write turntable.mp4")
    add("--frames", type=int, default=72, help="number of video frames, at 24 per second (default: 72)")
    add("--recenter", action=argparse.BooleanOptionalAction, help="move the object to the centre of the image and scale it to fill 85%% (default: as the original PyTorch code does)")
    add("--remove-background", action="store_true", help="cut out the object with rembg if an image has no alpha channel")
    add("--batch", type=int, help="number of images to process together (default: one per device)")
    # fmt: on
    args = parser.parse_args(argv)
    args.formats = [x.strip() for x in args.formats.split(",")]
    if unknown := [x for x in args.formats if x not in formats.FORMATS]:
        raise InputError(
            f"--formats {unknown[0]!r} is not known: choose from {', '.join(formats.FORMATS)}"
        )
    arguments.check_ranges(
        args, resolution=(8, 2048), views=(1, 64), batch=(1, 1024), texture=(16, 8192),
        size=(16, 4096), elevation=(-90, 90), frames=(2, 10_000), faces=(4, 10_000_000),
    )  # fmt: skip
    return args


def read_images(
    paths: list[Path], remove_background: bool, stages: messages.Stages, failures: dict
) -> Iterator[tuple[str, Path, np.ndarray]]:
    """Yields (folder name, path, uint8 [H W 4]) of each good image. Reports bad ones and adds them to `failures`."""
    taken = {"report.json"}
    for path in paths:
        try:
            with stages("read", f" {path}"):
                rgba = cutout.cut_out(load.load_image(path), str(path), remove_background)
        except InputError as error:
            fail(failures, path, error)
            continue
        stem = whole_files.printable(path.stem).strip(".") or "image"
        names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        yield name, path, rgba


def fail(failures: dict, path: Path, error: InputError) -> None:
    """Reports an image that failed, in one line."""
    message = str(error) if str(path) in str(error) else f"{path}: {error}"
    failures[str(path)] = message
    print(f"lrm: error: {message}", file=sys.stderr, flush=True)


def reconstruct(
    model: api.Model, group: list[tuple[str, Path, np.ndarray]], batch: int, args, stages, failures
) -> Iterator[tuple[tuple, dict[str, bytes]]]:
    """Reconstructs up to `batch` images at once. Yields each with its files."""
    prepared = []
    for image in group:
        try:
            prepared.append((image, model.place(image[2], args.recenter)))
        except InputError as error:
            fail(failures, image[1], error)
    if not prepared:
        return
    names = ", ".join(name for (name, _, _), _ in prepared)
    with stages("encode", f" {names}", COMPILES):
        scenes = model.encode([x for _, x in prepared], batch)
    for (image, _), scene in zip(prepared, scenes, strict=True):
        try:
            yield image, files_of(image[0], scene, args, stages)
        except InputError as error:
            fail(failures, image[1], error)


def files_of(name: str, scene: api.Scene, args, stages) -> dict[str, bytes]:
    """All files of one image: name -> content."""
    frames = args.frames if args.video else args.views
    path = scene.cameras(api.orbit(frames, elevation=args.elevation))
    on_sheet = np.arange(args.views) * frames // args.views
    white, kept = [], []
    with stages("render", f" {frames} views of {name}", COMPILES):
        for i, rendering in enumerate(scene.renderings(path, args.size)):
            white.append(to_uint8(blend(rendering, 1.0).rgb))
            kept += [rendering] * int((on_sheet == i).sum())
    with stages("mesh", f" of {name}, {args.resolution}^3 grid", COMPILES):
        mesh = scene.surface(args.resolution, args.level, args.texture, args.faces, args.dense)
    with stages("files"):
        files = {}
        for kind in args.formats:
            files |= formats.write(mesh, kind)
        glb = files.get("mesh.glb") or formats.to_glb(mesh)
        files["contact_sheet.png"] = contact_sheet(name, scene, path, on_sheet, white, kept)
        front = ops_cameras.orbit_of(scene.camera)
        files["viewer.html"] = viewer.viewer_html(glb, name, front["distance"], front["fov_y_deg"])
        if args.video:
            files["turntable.mp4"] = video.turntable(np.stack(white))
    return files


def contact_sheet(name: str, scene: api.Scene, path, on_sheet, white, kept) -> bytes:
    """A PNG of the image, and of the colour, depth and normals of each view on the sheet."""
    alpha, depth = (np.stack([getattr(x, key) for x in kept]) for key in ("alpha", "depth"))
    some = jax.tree.map(lambda x: np.asarray(x)[on_sheet], path)
    rays = jax.tree.map(np.asarray, ops_cameras.pixel_rays(some, *alpha.shape[1:]))
    rows = {
        "view": np.stack([white[i] for i in on_sheet]),
        "depth (near is bright)": sheets.depth_images(depth, alpha),
        "normal (xyz as rgb)": sheets.normal_images(depth, alpha, rays.origins, rays.dirs),
    }
    columns = [f"{360 * i / len(white):.0f}°" for i in on_sheet]
    return sheets.contact_sheet(cutout.composite(scene.image, 1.0), rows, columns, name)
