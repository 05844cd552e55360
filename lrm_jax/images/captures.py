"""Posed images of a folder: NeRF's transforms.json, or COLMAP's reconstruction.

folder/transforms.json             NeRF, instant-ngp, nerfstudio: camera to world, OpenGL's axes. Blender's scenes of NeRF have
                                   transforms_train.json instead
folder/sparse/0, folder/images     COLMAP's
"""

import dataclasses
import io
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lrm_jax.images import colmap
from lrm_jax.images.cutout import blend
from lrm_jax.images.load import has_alpha, load_image
from lrm_jax.ops import conventions
from lrm_jax.ops.cameras import opengl_to_opencv
from lrm_jax.types import InputError

WIDTH_STEP = 8  # LVSM's patch: what the width of a resized image is rounded to
TRANSFORMS = ("transforms.json", "transforms_train.json")
SPARSE = ("sparse/0", "sparse", "colmap/sparse/0")
# What a mismatch of the sides' ratio may be: rounding of sizes, not an image that lies on its side.
ASPECT_TOLERANCE = 0.03
# Source views, where nothing is said: attention takes time with the square of their number.
MAX_VIEWS = 16
TRANSFORMS_CONVENTION, COLMAP_CONVENTION = "opengl-c2w", "opencv-w2c"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Frames:
    """The posed images of one scene, in their order."""

    images: tuple[Path | np.ndarray, ...]  # V files, or their bytes
    c2w: np.ndarray  # [V 4 4] float64, OpenCV axes, in the scene's own world and unit
    fxfycxcy: np.ndarray  # [V 4] float64, fractions of width, height, width, height
    aspect: np.ndarray | None = None  # [V] width / height that the cameras are for; None: unknown


@dataclasses.dataclass(frozen=True)
class Capture:
    """Posed images that a model takes as its source views."""

    views: list[int]  # V, their numbers in the folder
    names: list[str]
    images: list[np.ndarray]  # V of uint8 [H W 3]
    c2w: np.ndarray  # [V 4 4] float64, OpenCV axes, in the folder's world
    fxfycxcy: np.ndarray  # [V 4] of the whole images


def is_scene(folder: Path) -> bool:
    """Whether `read_folder` finds cameras in a folder."""
    return any((folder / name).is_file() for name in TRANSFORMS) or _sparse(folder) is not None


def read_folder(folder: Path) -> Frames:
    """The frames, sorted by name, of a folder with transforms.json or COLMAP's reconstruction (the former, where there are both).

    Raises:
      InputError: neither is there, a file is missing or damaged, a camera is none or far from a pinhole.
    """
    return checked(read_frames(folder, folder.name))


def read_capture(
    folder: Path, views: str | int | Sequence[int] | None = None, convention: str | None = None
) -> Capture:
    """The chosen views of a folder, whose cameras make sense together.

    Args:
      views: how many, evenly spread, or the numbers of which ones; as text, as `--views` has it ("4", "0,3,7"). None: all, at most 16.
      convention: what the poses are, one of `ops.conventions.MEANINGS`; None: what their format has.

    Raises:
      InputError: with the folder's name: no cameras, bad ones or in another convention, no such view, a missing or damaged
        image.
    """
    try:
        frames = read_folder(folder)
        stated = COLMAP_CONVENTION
        if any((folder / name).is_file() for name in TRANSFORMS):
            stated = TRANSFORMS_CONVENTION
        check_rigid(frames.c2w)
        c2w = in_convention(frames.c2w, stated, convention)
        chosen = choose(views, len(c2w))
        images = [read_image(frames, view) for view in chosen]
    except InputError as error:
        message = str(error)
        raise InputError(message if str(folder) in message else f"{folder}: {message}") from None
    names = [Path(frames.images[view]).name for view in chosen]
    return Capture(chosen, names, images, c2w[chosen], frames.fxfycxcy[chosen])


def check_rigid(matrices: np.ndarray) -> None:
    """Raises InputError where poses [V 4 4] are no rotations and translations."""
    if not np.isfinite(matrices).all():
        raise InputError("a pose is not finite: remove its frame")
    if (wrong := np.abs(matrices[:, 3] - [0, 0, 0, 1]).max(1) > 1e-6).any():
        raise InputError(
            f"the last row of pose {wrong.argmax()} is not 0 0 0 1: are the matrices transposed?"
        )
    if (wrong := ~is_rotation(matrices[:, :3, :3])).any():
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


def choose(views: str | int | Sequence[int] | None, count: int) -> list[int]:
    """The numbers of the views that are asked for, of `count`: see `read_capture`.

    Raises:
      InputError: it does not say which, or there is no such view.
    """
    if not isinstance(views, str | int | None):
        views = ",".join(map(str, views)) + ","
    text = str(min(count, MAX_VIEWS) if views is None else views)
    try:
        numbers = [int(x) for x in text.split(",") if x.strip()]
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers):
        raise InputError(f"--views {text!r}: give a number of views, or which ones, as 0,3,7")
    if "," in text:
        if bad := [x for x in numbers if not 0 <= x < count]:
            raise InputError(f"--views: there is no view {bad[0]}: choose from 0 to {count - 1}")
        return numbers
    if not 1 <= numbers[0] <= count:
        raise InputError(f"--views {text}: choose 1 to {count}, as many as there are")
    return np.linspace(0, count - 1, numbers[0]).round().astype(int).tolist()


def read_image(frames: Frames, view: int) -> np.ndarray:
    """[H W 3] uint8 sRGB; what is transparent is white, as NeRF (https://arxiv.org/abs/2003.08934) has it.

    Raises:
      InputError: the image is missing, damaged or lies on its side.
    """
    image = frames.images[view]
    if isinstance(image, Path):
        rgba = load_image(image)
        # Rounded, and not changed where opaque.
        rgb = (blend(rgba, 1.0) * 255 + 0.5).astype(np.uint8) if has_alpha(rgba) else rgba[..., :3]
        name = image.name
    else:
        name = f"frame {view}"
        try:
            rgb = np.asarray(Image.open(io.BytesIO(image.tobytes())).convert("RGB"))
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error ...
            raise InputError(f"{name} cannot be decoded ({type(error).__name__})") from None
    if frames.aspect is not None:
        ratio = rgb.shape[1] / rgb.shape[0] / frames.aspect[view]
        if abs(ratio - 1) > ASPECT_TOLERANCE:
            raise InputError(
                f"{name} is {rgb.shape[1]}x{rgb.shape[0]}, which has not the proportions of its camera: turned or cropped?"
            )
    return rgb


def is_rotation(matrices: np.ndarray) -> np.ndarray:
    """Which of finite matrices [V 3 3] are rotations, to the precision that files have: bool [V]."""
    off = np.abs(matrices @ matrices.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
    return (off <= 0.01) & (np.linalg.det(matrices) >= 0)


def read_frames(folder: Path, name: str) -> Frames:
    """`read_folder` without the checks of cameras; `name` is not used: a reader of `data.scene_files`."""
    for file in TRANSFORMS:
        if (folder / file).is_file():
            return _read_transforms(folder / file)
    sparse = _sparse(folder)
    if sparse is None:
        raise InputError(f"{folder}: neither {' nor '.join((*TRANSFORMS, *SPARSE))} in it")
    read = colmap.read(sparse)
    order = sorted(range(len(read.names)), key=lambda view: _natural(read.names[view]))
    images = tuple(folder / "images" / read.names[view] for view in order)
    aspect = read.sizes[order, 0] / read.sizes[order, 1]
    return Frames(images, read.c2w[order], read.fxfycxcy[order], aspect)


def _sparse(folder: Path) -> Path | None:
    """The folder of COLMAP's reconstruction."""
    for name in SPARSE:
        if any((folder / name / f"cameras{suffix}").is_file() for suffix in (".bin", ".txt")):
            return folder / name
    return None


def _read_transforms(path: Path) -> Frames:
    """Cameras of NeRF's kind. nerfstudio does not write them in the order of the video."""
    content = load_json(path, path.name)
    try:
        frames = [{**content, **frame} for frame in content["frames"]]
        frames.sort(key=lambda frame: _natural(frame["file_path"]))
        images = tuple(_with_suffix(path.parent / frame["file_path"]) for frame in frames)
        c2w = np.array([frame["transform_matrix"] for frame in frames], float)
        cameras = [_pinhole(frame, file) for frame, file in zip(frames, images, strict=True)]
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path.name} cannot be read ({type(error).__name__}: {error})") from None
    if not frames or c2w.shape[1:] != (4, 4):
        raise InputError(f"{path.name}: transform_matrix {list(c2w.shape)} of {len(frames)} frames")
    fxfycxcy, aspect = zip(*cameras, strict=True)
    return Frames(images, opengl_to_opencv(c2w), np.array(fxfycxcy), np.array(aspect))


def _pinhole(frame: dict, image: Path) -> tuple[np.ndarray, float]:
    """(fx, fy, cx, cy) as fractions, and width / height, of a frame with the fields that all frames share."""
    if (model := frame.get("camera_model", "OPENCV")) not in (
        "OPENCV",
        "PINHOLE",
        "SIMPLE_PINHOLE",
        "PERSPECTIVE",
    ):
        raise InputError(f"a {model} camera is not a pinhole: undistort the images first")
    w, h = (frame["w"], frame["h"]) if "w" in frame and "h" in frame else image_size(image)
    if "fl_x" in frame:
        fx = frame["fl_x"]
    else:
        fx = 0.5 * w / np.tan(frame["camera_angle_x"] / 2)
    focal = (fx, frame.get("fl_y", fx), frame.get("cx", w / 2), frame.get("cy", h / 2))
    lens = [frame.get(name, 0.0) for name in ("k1", "k2", "p1", "p2", "k3", "k4")]
    if any(lens[4:]):
        raise InputError(
            f"a lens with k3={lens[4]}, k4={lens[5]} is not a pinhole: undistort the images first"
        )
    return colmap.pinhole(4, w, h, (*focal, *lens[:4])), w / h  # 4: OPENCV


def _with_suffix(path: Path) -> Path:
    """NeRF's own scenes leave the suffix out."""
    return path if path.is_file() or path.suffix else path.with_name(path.name + ".png")


def _natural(name: str) -> list:
    """To sort names by: numbers as numbers, so that a video's frames are in their order."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def image_size(image: Path) -> tuple[int, int]:
    """(width, height), without decoding."""
    try:
        with Image.open(image) as opened:
            return opened.size
    except OSError as error:
        raise InputError(f"{image.name} cannot be read ({type(error).__name__})") from None


def load_json(path: Path, name: str) -> dict:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{name} is missing") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be read ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise InputError(f"{name} is not a JSON object")
    return content


def inverse(w2c: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.inv(w2c)
    except np.linalg.LinAlgError:
        raise InputError("a pose cannot be inverted") from None


def checked(frames: Frames) -> Frames:
    """The frames, whose poses are rigid motions and whose intrinsics can be.

    Raises:
      InputError: they are not.
    """
    c2w, fxfycxcy = frames.c2w, frames.fxfycxcy
    if not len(c2w) or not (np.isfinite(c2w).all() and np.isfinite(fxfycxcy).all()):
        raise InputError("it has no frame, or a camera that is not finite")
    if (wrong := ~is_rotation(c2w[:, :3, :3])).any():
        raise InputError(f"the pose of frame {wrong.argmax()} is no rotation and translation")
    if (wrong := (fxfycxcy <= 0).any(1) | (fxfycxcy[:, 2:] >= 1).any(1)).any():
        raise InputError(
            f"frame {wrong.argmax()} has focal lengths and centre {fxfycxcy[wrong.argmax()].round(4).tolist()} "
            "as fractions of its sides: the centre must be in the image"
        )
    return frames


def crop(rgb: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The middle of an image [H W 3], [size size 3], and its (top, left, height, width) as fractions of the whole.

    The shorter side becomes `size`, the longer one the nearest multiple of WIDTH_STEP: not quite to scale, which the fractions
    account for.
    """
    height, width = rgb.shape[:2]
    if height <= width:
        height, width = size, _rounded(size / height * width, size)
    else:
        height, width = _rounded(size / width * height, size), size
    resized = Image.fromarray(rgb).resize((width, height), Image.Resampling.LANCZOS)
    top, left = (height - size) // 2, (width - size) // 2
    box = np.array([top / height, left / width, size / height, size / width])
    return np.asarray(resized)[top : top + size, left : left + size], box


def _rounded(length: float, size: int) -> int:
    return max(size, round(length / WIDTH_STEP) * WIDTH_STEP)
