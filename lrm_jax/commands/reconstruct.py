"""Reconstruct objects from images: writes 3D meshes, contact sheets, viewer pages and videos.

    lrm reconstruct                                              the bundled examples, with the bundled model
    lrm reconstruct chair.png photos/ --weights hf:stabilityai/TripoSR --video
    lrm reconstruct --source capture/ --weights runs/one2345     one object from posed images
    lrm reconstruct chair.png --weights one2345/ --seed 1        views drawn around the image first

Each image gets a folder `out/<image>/` with `mesh.glb` (or the formats in --formats), `contact_sheet.png` (the image, views
around the object, depth and normals), `viewer.html` (opens in any browser, without a network) and, with --video, `turntable.mp4`.
`out/report.json` covers all images. Either all files of an image are written, or none.

The side shown in the image faces -y in `.ply` (z up), and +z in `.glb` and `.obj` (y up).

With --source, three or more posed images of one object give one mesh, in the world and unit of their cameras. `.glb` and `.obj`
files turn it as if z were up there. Each image shows what the object is by its alpha channel, or by a background of one colour. Its
middle square is used. The pages, sheets and videos are upright as the images are. A bad image stops the command.

If --weights is a folder with `parts.json` (or that file), {"views": "zero123-xl.ckpt", "reconstruction": "ckpt_215000.pth"}, Zero123 draws
40 views around the image, from which One-2-3-45 reconstructs the object. The views and the elevation of the image's camera, which is
estimated from them, are kept in `out/<image>/views/` as they come. Run again, the command goes on from there; if the elevation is unclear,
give it with --elevation. That folder is also a --source. "matcher" may name LoFTR's indoor_ds_new.ckpt, which matches views for the
elevation better than SIFT.

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

from lrm_jax import api, two_stage
from lrm_jax.commands import arguments
from lrm_jax.commands.object_files import COMPILES, files_of
from lrm_jax.commands.versions import versions
from lrm_jax.images import captures, cutout, load, model_input
from lrm_jax.mesh import formats
from lrm_jax.ops import conventions
from lrm_jax.parallel import messages, whole_files
from lrm_jax.types import InputError
from lrm_jax.weights.loading import DTYPES


def main(argv: list[str]) -> int:
    """Runs `lrm reconstruct`. Returns the exit code."""
    args = parse(argv)
    stages, failures, done = messages.Stages(), {}, {}
    whole_files.check_writable(args.out)
    summary = {"images": done, "failures": failures}
    if two_stage.is_one(args.weights):
        by_two_stages(args, stages, summary)
    elif args.source is None:
        of_images(args, stages, summary)
    else:
        of_capture(args, stages, summary)
    summary["seconds"] = {**stages.seconds, "total": stages.elapsed()}
    summary |= {"arguments": vars(args), "versions": versions()}
    text = json.dumps(summary, indent=2, default=str)
    whole_files.write_file(args.out / "report.json", text.encode())
    stages.say(f"done: {len(done)} in {args.out}, {len(failures)} failed, see report.json there")
    return 0 if not failures else 1 if done else 2


def of_images(args, stages: messages.Stages, summary: dict) -> None:
    """An object from each image. The good ones, the failures and the model go into `summary`."""
    done, failures = summary["images"], summary["failures"]
    paths = load.find_images(args.images or [arguments.EXAMPLES])
    batch = min(args.batch or jax.local_device_count(), len(paths))
    images = read_images(paths, args.remove_background, stages, failures)
    # Report a mistyped name at once, not after loading the model.
    first = list(itertools.islice(images, 1))
    if not first:
        return
    model = load_model(args, stages, summary)
    model.check_takes_images()
    images = itertools.chain(first, images)
    while group := list(itertools.islice(images, batch)):
        for (name, path, _), files in reconstruct(model, group, batch, args, stages, failures):
            write(args.out / name, files, stages)
            done[name] = {"source": str(path)} | {file: len(x) for file, x in files.items()}


def by_two_stages(args, stages: messages.Stages, summary: dict) -> None:
    """An object from each image, by views that are drawn first. The good ones, the failures and the models go into `summary`."""
    done, failures = summary["images"], summary["failures"]
    paths = load.find_images(args.images or [arguments.EXAMPLES])
    with stages("load", f" {args.weights}"):
        models = two_stage.load(args.weights, dtype=args.dtype)
    models.say = stages.say
    summary["model"] = models.info | {"parameters": models.num_params}
    for name, path, rgba in read_images(paths, args.remove_background, stages, failures):
        folder = args.out / name
        try:
            with stages("draw and encode", f" {name}", COMPILES):
                scene = models.reconstruct(
                    rgba, elevation=args.elevation, seed=args.seed or 0, redraw=args.redraw or (), steps=args.steps, folder=folder / "views"
                )  # fmt: skip
            files = files_of(name, scene, args, stages)
        except InputError as error:
            fail(failures, path, error)
            continue
        write(folder, files, stages)
        found = json.loads((folder / "views" / "views.json").read_text())["elevation"]
        stages.say(f"elevation of {name}: {found['degrees']:.0f} degrees ({found['status']})")
        done[name] = {"source": str(path), "elevation": found}
        done[name] |= {file: len(x) for file, x in files.items()}


def of_capture(args, stages: messages.Stages, summary: dict) -> None:
    """One object from a folder of posed images. It and the model go into `summary`."""
    with stages("read", f" {args.source}"):
        limit = model_input.MAX_VIEWS
        capture = captures.read_capture(args.source, args.source_views, args.convention, limit)
        capture = model_input.cut_out(capture, args.remove_background)
    model = load_model(args, stages, summary)
    model.check_reconstructs_captures()
    name = folder_name(args.source.resolve().name)
    with stages("encode", f" {len(capture.views)} views of {name}", COMPILES):
        scene = model.encode_capture(capture)
    inputs, _ = model_input.crop_images(capture, args.size)
    files = files_of(name, scene, args, stages, inputs)
    write(args.out / name, files, stages)
    source = {"source": str(args.source), "views": capture.views, "names": capture.names}
    source["to_model"] = scene.to_model.tolist()
    summary["images"][name] = source | {file: len(x) for file, x in files.items()}


def load_model(args, stages: messages.Stages, summary: dict) -> api.Model:
    """The model of --weights; what is known about it goes into `summary`."""
    with stages("load", f" {args.weights or 'the bundled model'}"):
        model = api.load(args.weights, dtype=args.dtype)
    summary["model"] = model.info | {"parameters": model.num_params}
    return model


def write(folder: Path, files: dict[str, bytes], stages: messages.Stages) -> None:
    """Writes an object's files to its folder, all or none of them."""
    with stages("write", f" {folder}"):
        whole_files.write_files(folder, files)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, checked."""
    parser = arguments.parser("lrm reconstruct", __doc__)
    add = parser.add_argument
    # fmt: off
    add("images", nargs="*", metavar="IMAGE", help="images, or folders of images (default: the bundled examples)")
    add("--source", type=Path, metavar="DIR", help="instead of images: folder of posed images of one object, with transforms.json, or with COLMAP's sparse/0 and images/; for models that take posed images (One-2-3-45)")
    add("--source-views", metavar="VIEWS", help=f"which images of --source to use: a number, for as many evenly spread images; or a list such as 0,3,7, counted in order of file name (default: all, at most {model_input.MAX_VIEWS})")
    add("--convention", choices=tuple(conventions.MEANINGS), help="axes and direction of the poses in --source, if they are not the usual ones of their format: opengl-c2w in transforms.json, opencv-w2c in COLMAP's files")
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
    add("--elevation", type=float, metavar="DEGREES", help="elevation of the camera that circles the object (default: that of the image); with two models, elevation of the image's camera (default: estimated)")
    add("--video", action="store_true", help="also write turntable.mp4")
    add("--frames", type=int, default=72, help="number of video frames, at 24 per second (default: 72)")
    add("--recenter", action=argparse.BooleanOptionalAction, help="move the object to the centre of the image and scale it to fill 85%% (default: as the original PyTorch code does)")
    add("--remove-background", action="store_true", help="cut out the object with rembg if an image has no alpha channel")
    add("--seed", type=int, help="with two models: random seed of the views (default: 0)")
    add("--redraw", type=view_numbers, metavar="VIEWS", help="with two models: views to draw once more with other random numbers, such as 3 or 3,17, and with them those that were drawn from them")
    add("--steps", type=int, help="with two models: about how many steps to draw a view in (default: 75 from the image, 50 from a view)")
    add("--batch", type=int, help="number of images to process together (default: one per device)")
    # fmt: on
    args = parser.parse_args(argv)
    check_kind(args)
    args.formats = [x.strip() for x in args.formats.split(",")]
    if unknown := [x for x in args.formats if x not in formats.FORMATS]:
        raise InputError(
            f"--formats {unknown[0]!r} is not known: choose from {', '.join(formats.FORMATS)}"
        )
    arguments.check_ranges(
        args, resolution=(8, 2048), views=(1, 64), batch=(1, 1024), texture=(16, 8192),
        size=(16, 4096), elevation=(-90, 90), frames=(2, 10_000), faces=(4, 10_000_000), seed=(0, 2**32 - 1), steps=(2, 500),
    )  # fmt: skip
    return args


def check_kind(args: argparse.Namespace) -> None:
    """Raises InputError if arguments are mixed that belong to single images, to posed images, or to two models."""
    posed = {"--source-views": args.source_views, "--convention": args.convention}
    two = {"--seed": args.seed, "--redraw": args.redraw, "--steps": args.steps}
    batch = {"--recenter": args.recenter, "--batch": args.batch}
    if two_stage.is_one(args.weights):
        useless = {f"with {two_stage.PARTS}": {"--source": args.source} | posed | batch}
        low, high = two_stage.ELEVATIONS
        if args.elevation is not None and not low <= args.elevation <= high:
            raise InputError(
                f"--elevation {args.elevation} is out of range: choose {low} to {high}"
            )
    elif args.source is None:
        useless = {"without --source": posed, f"without {two_stage.PARTS}": two}
    else:
        useless = {"with --source": {"IMAGE": args.images or None} | batch | two}
    for kind, arguments_of_it in useless.items():
        if given := [name for name, value in arguments_of_it.items() if value is not None]:
            raise InputError(f"{given[0]} has no effect {kind}: leave it out")


def view_numbers(text: str) -> list[int]:
    """Numbers of views, separated by commas."""
    try:
        return [int(x) for x in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError("give numbers of views, such as 3 or 3,17") from None


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
        stem = folder_name(path.stem)
        names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        yield name, path, rgba


def folder_name(stem: str) -> str:
    """The name of the output folder of an image or capture."""
    return whole_files.printable(stem).strip(".") or "image"


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
