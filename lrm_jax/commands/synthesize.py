"""`lrm synthesize`: posed images of a scene in, new views along a camera path out.

    lrm synthesize --source garden --weights scene_decoder_only_256.pt --out out
    lrm synthesize --source garden --weights runs/lvsm --views 0,3,7 --path spiral --frames 120

The source folder has `transforms.json` (NeRF, instant-ngp, nerfstudio: OpenGL's axes) or COLMAP's `sparse/0` and `images/`. Images
are resized and cropped to the middle square of the model's size. Paths:

    orbit        a full turn around the point that the cameras look at, at their mean height and distance
    spiral       two turns around the mean camera, looking where the cameras look
    interpolate  through the source cameras in their order: a Catmull-Rom spline, rotations by slerp
    FILE         the poses of a transforms.json, in the world of the source's

Frames of orbit, spiral and FILE have the mean intrinsics of the source images. Leaves `out/frames/0000.png` ..., `synthesis.mp4`,
`contact_sheet.png`, `report.json`, and `path.json`: the frames' poses as a transforms.json, in the source's own world.

The model's world is the one that it was trained in. Scenes (and the references' checkpoints): the mean source camera at the origin, the
largest coordinate of one at 1 / 1.35. Objects, after training by `lrm train` on objects: the poses' own, with the object around
the origin, turned as `data.normalize` of the training has it.
"""

import argparse
import dataclasses
import functools
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lrm_jax.commands import arguments
from lrm_jax.commands.versions import versions
from lrm_jax.data import elements, scene_files, scenes
from lrm_jax.images import png, sheets, video
from lrm_jax.images.png import to_uint8
from lrm_jax.ops import cameras as ops_cameras
from lrm_jax.ops import conventions, paths
from lrm_jax.ops.compositing import blend
from lrm_jax.parallel import messages, sharding, whole_files
from lrm_jax.types import Cameras, InputError, Views
from lrm_jax.weights import loading

PATHS = ("orbit", "spiral", "interpolate")
MAX_VIEWS = (
    16  # of a scene, where nothing is said: attention takes time with the square of their number
)
TRANSFORMS = "opengl-c2w"  # the convention of transforms.json
COLMAP = "opencv-w2c"

_log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Runs `lrm synthesize`. Returns the exit code."""
    args = parse(argv)
    stages = messages.Stages()
    whole_files.check_writable(args.out)
    with stages("read", f" {args.source}"):
        scene = read_scene(args.source, args.views, args.convention)
        poses, position = camera_path(scene, args.path, args.frames, args.convention)
    with stages("load", f" {args.weights}"):
        model, params, info = loading.load_weights(args.weights)
    if hasattr(model, "prepare"):
        raise InputError(
            f"{args.weights}: {info['family']} reconstructs from one image: use lrm reconstruct, or give weights of LVSM"
        )
    motion, scale, description = model_motion(scene, info["training"])
    source, images = source_views(scene, model.image_size, motion, scale)
    with stages("encode", f" {len(images)} views (compiled first)"):
        encode = sharding.jit(functools.partial(model.apply, method="encode"))
        encoded = jax.block_until_ready(encode({"params": params}, source))
    intrinsics = intrinsics_along(position, source.cameras.fxfycxcy[0], len(poses))
    path = Cameras(c2w=to_model(poses, motion, scale), fxfycxcy=intrinsics)
    with stages("render", f" {len(poses)} frames (compiled first)"):
        frames = render(model, params, encoded, path, args.batch)
    summary = {
        "source": {"path": str(args.source), "views": scene.views, "images": scene.names},
        "path": args.path,
        "frames": len(frames),
        "world": description,
        "model": {**info, "parameters": sum(x.size for x in jax.tree.leaves(params))},
        "arguments": vars(args),
        "versions": versions(),
    }
    with stages("write", f" {args.out}"):
        write(args, scene, images, frames, poses)
    summary["seconds"] = {**stages.seconds, "total": stages.elapsed()}
    text = json.dumps(summary, indent=2, default=str)
    whole_files.write_file(args.out / "report.json", text.encode())
    stages.say(f"done: {len(frames)} frames in {args.out}")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        prog="lrm synthesize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--source",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of posed images: transforms.json, or COLMAP's sparse/0 and images/",
    )
    add(
        "--weights",
        required=True,
        help="model file, reference checkpoint, folder, training workdir, or hf:ORG/NAME, of a family that takes posed views (LVSM)",
    )
    add("--out", type=Path, default=Path("out"), help="folder for the results (default: out)")
    add(
        "--views",
        help="images that are given to the model: how many, evenly spread, or which ones, as 0,3,7: they are sorted by name "
        f"(default: all, at most {MAX_VIEWS})",
    )
    add("--path", default="interpolate", metavar="|".join((*PATHS, "FILE")), help="where the camera goes (default: interpolate)")  # fmt: skip
    add("--frames", type=int, default=60, help="frames of the path; not of a FILE (default: 60)")
    add("--fps", type=float, default=24.0, help="frames of the video in a second (default: 24)")
    add("--batch", type=int, default=4, help="frames that are rendered together (default: 4)")
    add(
        "--convention",
        choices=tuple(conventions.MEANINGS),
        help="what the poses are, of DIR and of FILE, and no doubt that they are; needed where they are not what their format has "
        f"(default: {TRANSFORMS} for transforms.json, {COLMAP} for COLMAP)",
    )
    args = parser.parse_args(argv)
    arguments.check_ranges(args, frames=(1, 10_000), fps=(0.1, 1000), batch=(1, 1024))
    return args


# -- what is given


@dataclasses.dataclass(frozen=True)
class Scene:
    """The views that are given to the model."""

    views: list[int]  # V, their numbers in the folder
    names: list[str]
    images: list[np.ndarray]  # V of uint8 [H W 3]
    c2w: np.ndarray  # [V 4 4] float64, OpenCV axes, in the folder's world
    fxfycxcy: np.ndarray  # [V 4] of the whole images


def read_scene(folder: Path, views: str | None, convention: str | None) -> Scene:
    """The chosen views of a folder, whose cameras make sense together.

    Raises:
      InputError: with the folder's name: no cameras, bad ones or in another convention, no such view, a missing or damaged
        image.
    """
    try:
        frames = scene_files.read_folder(folder)
        stated = COLMAP
        if any((folder / name).is_file() for name in scene_files.TRANSFORMS):
            stated = TRANSFORMS
        check_rigid(frames.c2w)
        c2w = in_convention(frames.c2w, stated, convention)
        chosen = choose(views, len(c2w))
        images = [scene_files.read_image(frames, view) for view in chosen]
    except InputError as error:
        message = str(error)
        raise InputError(message if str(folder) in message else f"{folder}: {message}") from None
    names = [Path(frames.images[view]).name for view in chosen]
    return Scene(chosen, names, images, c2w[chosen], frames.fxfycxcy[chosen])


def check_rigid(matrices: np.ndarray) -> None:
    """Raises InputError where poses [V 4 4] are no rotations and translations."""
    if not np.isfinite(matrices).all():
        raise InputError("a pose is not finite: remove its frame")
    if (wrong := np.abs(matrices[:, 3] - [0, 0, 0, 1]).max(1) > 1e-6).any():
        raise InputError(
            f"the last row of pose {wrong.argmax()} is not 0 0 0 1: are the matrices transposed?"
        )
    if (wrong := ~scene_files.is_rotation(matrices[:, :3, :3])).any():
        raise InputError(
            f"pose {wrong.argmax()} is no rotation and translation: is it scaled, or are its axes left-handed?"
        )


def in_convention(c2w: np.ndarray, stated: str, convention: str | None) -> np.ndarray:
    """Poses [V 4 4] that were read in their format's convention, in the one that they are said to have, if any.

    Raises:
      InputError: nothing is said, and they seem to be in another convention than their format's.
    """
    if convention is not None:
        c2w = conventions.read(conventions.write(c2w, stated), convention)
    if found := conventions.doubt(c2w, convention or stated):
        problem, other = found
        if convention is None:
            raise InputError(
                f"{problem}: add --convention {other}, or --convention {stated} if the cameras do look outwards"
            )
        _log.warning("%s", problem)
    return c2w


def choose(views: str | None, count: int) -> list[int]:
    """The numbers of the views that `--views` asks for, of `count`.

    Raises:
      InputError: it does not say which, or there is no such view.
    """
    try:
        numbers = [int(x) for x in (views or str(min(count, MAX_VIEWS))).split(",") if x.strip()]
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers):
        raise InputError(f"--views {views!r}: give a number of views, or which ones, as 0,3,7")
    if "," in (views or ""):
        if bad := [x for x in numbers if not 0 <= x < count]:
            raise InputError(f"--views: there is no view {bad[0]}: choose of 0 to {count - 1}")
        return numbers
    if not 1 <= numbers[0] <= count:
        raise InputError(f"--views {views}: choose 1 to {count}, as many as there are")
    return np.linspace(0, count - 1, numbers[0]).round().astype(int).tolist()


# -- where it is drawn from


def camera_path(
    scene: Scene, name: str, num_frames: int, convention: str | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The poses [N 4 4] of the frames, in the world of the scene, and where they are between the views [N]; None: nowhere.

    Raises:
      InputError: the source cameras do not determine the path, or its file is bad.
    """
    c2w = scene.c2w
    if name not in PATHS:
        if not Path(name).is_file():
            raise InputError(f"--path {name}: no such file, and none of {', '.join(PATHS)}")
        return read_path(Path(name), convention), None
    if len(c2w) < 2:
        raise InputError(
            f"{scene.names[0]} is the only source view: a path takes two or more, or --path FILE"
        )
    if name == "interpolate":
        position = paths.positions(len(c2w), num_frames)
        return paths.interpolate(c2w, position), position
    if name == "orbit":
        return paths.orbit(c2w, num_frames), None
    motion, _ = scenes.world_motion(c2w, len(c2w), "source_views")
    return paths.spiral(c2w, np.linalg.inv(motion), num_frames), None


def read_path(path: Path, convention: str | None) -> np.ndarray:
    """The poses [N 4 4] of a transforms.json, in its order; nothing else of it counts.

    A path may look wherever it likes: its convention is not doubted.
    """
    try:
        content = json.loads(path.read_text())
        matrices = np.array([frame["transform_matrix"] for frame in content["frames"]], float)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no transforms.json ({type(error).__name__}: {error})") from None  # fmt: skip
    if matrices.shape[1:] != (4, 4):
        raise InputError(f"{path}: transform_matrix {list(matrices.shape)}: must be some of [4, 4]")
    try:
        check_rigid(matrices)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return conventions.read(matrices, convention or TRANSFORMS)


# -- through the model


def model_motion(scene: Scene, training: dict) -> tuple[np.ndarray, float, str]:
    """(rigid motion [4 4] from the scene's world to the model's, factor of positions after it, what it is in words).

    Raises:
      InputError: the source cameras do not determine it.
    """
    normalize = loading.training_data(training).get("normalize", "source_views")
    if normalize not in ("all_views", "source_views"):
        words = f"the poses' own, turned as in training (data.normalize={normalize})"
        return (
            elements.world_motion(scene.c2w[0], scene.fxfycxcy[0], normalize).astype(float),
            1.0,
            words,
        )
    if len(scene.c2w) < 2:
        raise InputError(
            f"{scene.names[0]} is the only source view: give two or more, whose distance is the unit of length"
        )
    # Not "all_views": a frame would depend on what other frames there are.
    motion, scale = scenes.world_motion(scene.c2w, len(scene.c2w), "source_views")
    return motion, scale, "that of the mean source camera"


def to_model(c2w: np.ndarray, motion: np.ndarray, scale: float) -> np.ndarray:
    """Poses [N 4 4] of the scene's world in the model's, float32."""
    model_c2w = motion @ c2w
    model_c2w[:, :3, 3] *= scale
    return model_c2w.astype(np.float32)


def source_views(
    scene: Scene, size: int, motion: np.ndarray, scale: float
) -> tuple[Views, np.ndarray]:
    """What the model is given, [1 V size size 3], and its images uint8 [V size size 3]."""
    cropped, boxes = zip(*(scenes.crop(image, size) for image in scene.images), strict=True)
    cameras = Cameras(
        c2w=to_model(scene.c2w, motion, scale),
        fxfycxcy=elements.crop_intrinsics(scene.fxfycxcy, np.stack(boxes)),
    )
    images = np.stack(cropped)
    rgb = images.astype(np.float32) / 255
    return jax.tree.map(lambda x: x[None], Views(rgb=rgb, cameras=cameras)), images


def intrinsics_along(
    position: np.ndarray | None, fxfycxcy: np.ndarray, num_frames: int
) -> np.ndarray:
    """[N 4], between those of the views [V 4], or, where frames are not between views, their mean."""
    if position is None:
        return np.tile(fxfycxcy.mean(0), (num_frames, 1))
    columns = [np.interp(position, np.arange(len(fxfycxcy)), x) for x in fxfycxcy.T]
    return np.stack(columns, axis=1).astype(np.float32)


def render(model, params, encoded, path: Cameras, batch: int) -> np.ndarray:
    """Frames uint8 [N S S 3] of a scene, `batch` at a time.

    Raises:
      InputError: they are not finite.
    """
    size, batch = model.image_size, min(batch, len(path.c2w))

    @sharding.jit
    def draw(params, encoded, some: Cameras):
        rays = ops_cameras.pixel_rays(some, size, size)
        rendering = model.apply({"params": params}, encoded, rays, method="render")
        return blend(rendering, jnp.ones((1, 1, 1, 1, 3))).rgb[0]

    frames = []
    for start in messages.progress(range(0, len(path.c2w), batch), label="batches of frames"):
        # The last batch is filled up with the last camera, so that nothing is compiled anew.
        which = np.minimum(np.arange(start, start + batch), len(path.c2w) - 1)
        some = jax.tree.map(lambda x, which=which: x[which][None], path)
        rgb = np.asarray(draw(params, encoded, some))[: len(path.c2w) - start]
        if not np.isfinite(rgb).all():
            raise InputError(
                "what the model renders is not finite: its weights are damaged, take others"
            )
        frames.append(to_uint8(rgb))
    return np.concatenate(frames)


# -- what is left behind


def write(
    args: argparse.Namespace,
    scene: Scene,
    images: np.ndarray,
    frames: np.ndarray,
    poses: np.ndarray,
) -> None:
    """All files but the report."""
    shown = np.linspace(0, len(frames) - 1, len(images)).round().astype(int)
    rows = {"given": images, "drawn": frames[shown]}
    columns = [f"view {v}, frame {f}" for v, f in zip(scene.views, shown, strict=True)]
    title = args.source.resolve().name
    matrices = conventions.write(poses, TRANSFORMS).tolist()
    files = {
        "contact_sheet.png": sheets.contact_sheet(images[0], rows, columns, title),
        "synthesis.mp4": video.turntable(frames, args.fps),
        "path.json": json.dumps({"frames": [{"transform_matrix": x} for x in matrices]}).encode(),
    }  # fmt: skip
    names = [f"{i:04}.png" for i in range(len(frames))]
    folder = args.out / "frames"
    whole_files.write_files(folder, dict(zip(names, map(png.png, frames), strict=True)))
    # Of an earlier, longer run: they would pass for the end of this one.
    for old in folder.glob("[0-9]" * 4 + ".png"):
        if old.name not in names:
            old.unlink()
    whole_files.write_files(args.out, files)
