"""Render a video along a camera path from posed images of a scene, or around the object of one image.

    lrm synthesize --source garden --weights scene_decoder_only_256.pt --out out
    lrm synthesize --source garden --weights runs/lvsm --views 0,3,7 --path spiral --frames 120
    lrm synthesize --source chair.png --weights zero123-xl.ckpt --frames 24

The source folder must hold `transforms.json` (NeRF, instant-ngp, nerfstudio: OpenGL axes), or COLMAP's `sparse/0` and `images/`.
Images are resized and centre-cropped to the square that the model takes. Paths:

    orbit        a full turn around the point that the cameras look at, at their mean height and distance
    spiral       two turns around the mean camera, looking where the cameras look
    interpolate  through the source cameras in order: a Catmull-Rom spline for positions, slerp for rotations
    FILE         the poses in a transforms.json, in the world of the source

Frames of orbit, spiral and FILE use the mean intrinsics of the source images. Writes `out/frames/0000.png` ..., `synthesis.mp4`,
`contact_sheet.png`, `report.json`, and `path.json`: the poses of the frames as a transforms.json, in the world of the source.

Poses are moved to the world in which the model was trained. For models trained on scenes (such as the published checkpoints), the
mean source camera is at the origin and the largest coordinate of any camera is 1 / 1.35. For models that `lrm train` trained on
objects, the poses must be in a world with the object around the origin; it is rotated as `data.normalize` says.

If the source is an image, the model must draw views from one image (Zero123). The path is an orbit at the elevation of the image. All
frames are drawn from the same noise; --seed gives another. Writes the same files, except `path.json`.

Exit code: 0 done; 2 nothing is done, or wrong usage.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from lrm_jax import api
from lrm_jax.commands import arguments
from lrm_jax.commands.versions import versions
from lrm_jax.images import camera_paths, captures, cutout, load, model_input, png, sheets, video
from lrm_jax.ops import conventions
from lrm_jax.ops.cameras import crop_intrinsics
from lrm_jax.parallel import messages, whole_files
from lrm_jax.two_stage import drawing
from lrm_jax.types import InputError
from lrm_jax.weights.loading import DTYPES


def main(argv: list[str]) -> int:
    """Runs `lrm synthesize`. Returns the exit code."""
    args = parse(argv)
    stages = messages.Stages()
    whole_files.check_writable(args.out)
    if args.source.is_file():
        return around_an_object(args, stages)
    if (
        name := next((x for x in ("seed", "steps") if getattr(args, x) is not None), None)
    ) is not None:
        raise InputError(f"--{name} has no effect unless the source is an image: leave it out")
    with stages("read", f" {args.source}"):
        capture = captures.read_capture(args.source, args.views, args.convention)
        args.path = args.path or "interpolate"
        path = camera_paths.camera_path(capture, args.path, args.frames, args.convention)
    with stages("load", f" {args.weights}"):
        model = api.load(args.weights, dtype=args.dtype)
        model.check_takes_captures()
    images, boxes = model_input.crop_images(capture, model.module.image_size)
    fxfycxcy = crop_intrinsics(capture.fxfycxcy, boxes)
    _, world = model_input.world(capture, fxfycxcy, model.normalize)
    with stages("render", f" {len(path.c2w)} frames from {len(capture.views)} views"):
        frames = model.synthesize(capture, path=path, together=args.batch)
    with stages("write", f" {args.out}"):
        write(args, capture, images, frames, path)
    source = {"path": str(args.source), "views": capture.views, "images": capture.names}
    return report(args, stages, model, frames, {"source": source, "path": args.path, "world": world})  # fmt: skip


def around_an_object(args: argparse.Namespace, stages: messages.Stages) -> int:
    """The frames of an orbit around the object of one image. Returns the exit code."""
    given = {"--views": args.views, "--convention": args.convention}
    if name := next((name for name, value in given.items() if value is not None), None):
        raise InputError(f"{name} has no effect if the source is an image: leave it out")
    if args.path not in (None, "orbit"):
        raise InputError(f"--path {args.path}: around the object of an image it is an orbit")
    with stages("read", f" {args.source}"):
        rgba = cutout.cut_out(load.load_image(args.source), str(args.source))
    with stages("load", f" {args.weights}"):
        model = api.load(args.weights, dtype=args.dtype)
        drawing.check_draws(model)
        image = model.place(rgba)
    with stages("draw", f" {args.frames} frames"):
        steps = args.steps or model.module.num_steps
        frames = drawing.turntable(model, image, args.frames, args.seed or 0, steps)
    with stages("write", f" {args.out}"):
        shown = np.arange(8) * args.frames // 8
        source = png.to_uint8(np.asarray(image.source.rgb[0, 0]))
        columns = [f"{360 * i / args.frames:.0f}°" for i in shown]
        sheet = sheets.contact_sheet(source, {"drawn": frames[shown]}, columns, args.source.stem)
        write_frames(args.out, frames)
        files = {"contact_sheet.png": sheet, "synthesis.mp4": video.turntable(frames, args.fps)}
        whole_files.write_files(args.out, files)
    return report(args, stages, model, frames, {"source": {"path": str(args.source)}, "path": "orbit"})  # fmt: skip


def report(
    args: argparse.Namespace,
    stages: messages.Stages,
    model: api.Model,
    frames: np.ndarray,
    about: dict,
) -> int:
    """Writes the report. Returns the exit code."""
    summary = about | {
        "frames": len(frames),
        "model": model.info | {"parameters": model.num_params},
        "arguments": vars(args),
        "versions": versions(),
        "seconds": {**stages.seconds, "total": stages.elapsed()},
    }
    text = json.dumps(summary, indent=2, default=str)
    whole_files.write_file(args.out / "report.json", text.encode())
    stages.say(f"done: {len(frames)} frames in {args.out}")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, checked."""
    parser = arguments.parser("lrm synthesize", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--source", type=Path, required=True, metavar="DIR|IMAGE", help="folder of posed images: with transforms.json, or with COLMAP's sparse/0 and images/; or an image")
    add("--weights", required=True, help="model file, checkpoint, folder that holds one, training run, or hf:ORG/NAME/FILE; the model must take posed images (LVSM), or draw views from one image (Zero123)")
    add("--out", type=Path, default=Path("out"), help="folder to write to (default: out)")
    add("--dtype", choices=DTYPES, help="number format that the model computes in (default: float32)")
    add("--views", help=f"images to give the model: a number, for as many evenly spread images; or a list such as 0,3,7, counted in order of file name (default: all, at most {captures.MAX_VIEWS})")
    add("--path", metavar="|".join((*camera_paths.PATHS, "FILE")), help="path of the camera (default: interpolate; around the object of an image: orbit)")
    add("--frames", type=int, default=60, help="number of frames; has no effect if the path is a FILE (default: 60)")
    add("--fps", type=float, default=24.0, help="frames per second of the video (default: 24)")
    add("--batch", type=int, default=4, help="number of frames that each device renders at once (default: 4)")
    add("--seed", type=int, help="random seed of frames drawn from an image (default: 0)")
    add("--steps", type=int, help="about how many steps to draw such a frame in (default: 50)")
    add("--convention", choices=tuple(conventions.MEANINGS), help="axes and direction of the poses in DIR and FILE, if they are not the usual ones of their format: opengl-c2w in transforms.json, opencv-w2c in COLMAP's files")
    # fmt: on
    args = parser.parse_args(argv)
    arguments.check_ranges(
        args,
        frames=(1, 10_000),
        fps=(0.1, 1000),
        batch=(1, 1024),
        seed=(0, 2**32 - 1),
        steps=(2, 500),
    )
    return args


def write(
    args: argparse.Namespace,
    capture: captures.Capture,
    images: np.ndarray,
    frames: np.ndarray,
    path: camera_paths.CameraPath,
) -> None:
    """Writes all files except the report."""
    shown = np.linspace(0, len(frames) - 1, len(images)).round().astype(int)
    rows = {"source": images, "rendered": frames[shown]}
    columns = [f"view {v}, frame {f}" for v, f in zip(capture.views, shown, strict=True)]
    title = args.source.resolve().name
    poses = conventions.write(path.c2w, captures.TRANSFORMS_CONVENTION).tolist()
    files = {
        "contact_sheet.png": sheets.contact_sheet(images[0], rows, columns, title),
        "synthesis.mp4": video.turntable(frames, args.fps),
        "path.json": json.dumps({"frames": [{"transform_matrix": x} for x in poses]}).encode(),
    }
    write_frames(args.out, frames)
    whole_files.write_files(args.out, files)


def write_frames(out: Path, frames: np.ndarray) -> None:
    """Writes the frames as numbered images."""
    names = [f"{i:04}.png" for i in range(len(frames))]
    folder = out / "frames"
    whole_files.write_files(folder, dict(zip(names, map(png.png, frames), strict=True)))
    # Delete frames of an earlier, longer run: they would look like the end of this one.
    for old in folder.glob("[0-9]" * 4 + ".png"):
        if old.name not in names:
            old.unlink()
