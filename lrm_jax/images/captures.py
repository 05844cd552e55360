"""Posed images from a folder: with NeRF's transforms.json, or a COLMAP reconstruction.

folder/transforms.json             NeRF, instant-ngp, nerfstudio: camera to world, OpenGL axes. NeRF's Blender scenes have
                                   transforms_train.json instead
folder/sparse/0, folder/images     COLMAP
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
from lrm_jax.images.png import to_uint8
from lrm_jax.ops import conventions
from lrm_jax.ops.cameras import opengl_to_opencv
from lrm_jax.types import InputError

WIDTH_STEP = 8  # the longer side of a resized image is rounded to a multiple of this: LVSM's patch
TRANSFORMS = ("transforms.json", "transforms_train.json")
SPARSE = ("sparse/0", "sparse", "colmap/sparse/0")
# Allowed mismatch of aspect ratios: enough for rounded sizes, not for a rotated image.
ASPECT_TOLERANCE = 0.03
# Source views by default: the time of attention grows with the square of their number.
MAX_VIEWS = 16
TRANSFORMS_CONVENTION, COLMAP_CONVENTION = "opengl-c2w", "opencv-w2c"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Frames:
    """The posed images of one scene, in order."""

    images: tuple[Path | np.ndarray, ...]  # V files, or their bytes
    c2w: np.ndarray  # [V 4 4] float64, OpenCV axes, in the scene's own world and unit
    fxfycxcy: np.ndarray  # [V 4] float64, fractions of width, height, width, height
    aspect: np.ndarray | None = None  # [V] width / height that the cameras expect; None: unknown


@dataclasses.dataclass(frozen=True)
class Capture:
    """Posed images that a model gets as its source views: from `read_capture` or `posed_images`."""

    views: list[int]  # V, their indices in the folder
    names: list[str]
    images: list[np.ndarray]  # V of uint8 [H W 4], straight alpha; sizes may differ
    c2w: np.ndarray  # [V 4 4] float64, OpenCV axes, in the folder's world
    fxfycxcy: np.ndarray  # [V 4] of the whole images


def is_scene(folder: Path) -> bool:
    """Whether a folder has cameras for `read_folder`."""
    return any((folder / name).is_file() for name in TRANSFORMS) or _sparse(folder) is not None


def read_folder(folder: Path) -> Frames:
    """The frames, sorted by name, of a folder with transforms.json or a COLMAP reconstruction (the former if it has both).

    Raises:
      InputError: it has neither, a file is missing or damaged, or a camera is invalid or far from a pinhole.
    """
    return checked(read_frames(folder, folder.name))


def read_capture(
    folder: str | Path,
    views: str | int | Sequence[int] | None = None,
    convention: str | None = None,
    most: int = MAX_VIEWS,
) -> Capture:
    """The chosen views of a folder, after checking that its cameras are plausible together.

    Args:
      views: how many, evenly spread, or the indices of the views; or either as text in the form of `--views` ("4", "0,3,7").
        None: all, but at most `most`, evenly spread.
      convention: of the poses, one of `ops.conventions.MEANINGS`. None: the convention of their file format.

    Raises:
      InputError: no cameras, bad cameras or cameras in another convention, no such view, or a missing or damaged image. The
        message has the folder's name.
    """
    folder = Path(folder)
    try:
        frames = read_folder(folder)
        stated = COLMAP_CONVENTION
        if any((folder / name).is_file() for name in TRANSFORMS):
            stated = TRANSFORMS_CONVENTION
        check_rigid(frames.c2w)
        c2w = in_convention(frames.c2w, stated, convention)
        chosen = choose(views, len(c2w), most)
        images = [read_rgba(frames, view) for view in chosen]
    except InputError as error:
        message = str(error)
        raise InputError(message if str(folder) in message else f"{folder}: {message}") from None
    names = [Path(frames.images[view]).name for view in chosen]
    return Capture(chosen, names, images, c2w[chosen], frames.fxfycxcy[chosen])


def posed_images(
    images: Sequence[np.ndarray] | np.ndarray, c2w: np.ndarray, fxfycxcy: np.ndarray
) -> Capture:
    """A capture from arrays.

    Args:
      images: V arrays [H W 3 or 4], uint8 or floats in [0, 1]; an alpha channel shows what the object is. Sizes may differ.
      c2w: [V 4 4] camera to world, OpenCV axes (x right, y down, z forward), in any world and unit.
      fxfycxcy: [V 4] focal lengths and principal point as fractions of width, height, width, height.

    Raises:
      InputError: a shape or range is wrong, or a pose is not a rotation and translation.
    """
    rgba = [load_image(np.asarray(image)) for image in images]
    c2w, fxfycxcy = np.asarray(c2w, float), np.asarray(fxfycxcy, float)
    if c2w.shape != (len(rgba), 4, 4) or fxfycxcy.shape != (len(rgba), 4):
        raise InputError(
            f"{len(rgba)} images with c2w {list(c2w.shape)} and fxfycxcy {list(fxfycxcy.shape)}: must be [V, 4, 4] and [V, 4]"
        )
    checked(Frames(tuple(rgba), c2w, fxfycxcy))
    check_rigid(c2w)
    names = [f"image {view}" for view in range(len(rgba))]
    return Capture(list(range(len(rgba))), names, rgba, c2w, fxfycxcy)


def check_rigid(matrices: np.ndarray) -> None:
    """Raises InputError unless all poses [V 4 4] are rotations and translations."""
    if not np.isfinite(matrices).all():
        raise InputError("a pose is not finite: remove its frame")
    if (wrong := np.abs(matrices[:, 3] - [0, 0, 0, 1]).max(1) > 1e-6).any():
        raise InputError(
            f"the last row of pose {wrong.argmax()} is not 0 0 0 1: are the matrices transposed?"
        )
    if (wrong := ~is_rotation(matrices[:, :3, :3])).any():
        raise InputError(
            f"pose {wrong.argmax()} is not a rotation and translation: is it scaled, or are its axes left-handed?"
        )


def in_convention(c2w: np.ndarray, stated: str, convention: str | None) -> np.ndarray:
    """Reads poses [V 4 4] again in `convention`, if given. They were first read in `stated`, their format's convention.

    Raises:
      InputError: `convention` is None, and the poses seem to be in another convention than `stated`.
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


def choose(views: str | int | Sequence[int] | None, count: int, most: int = MAX_VIEWS) -> list[int]:
    """The indices of the chosen views out of `count`: see `read_capture`.

    Raises:
      InputError: `views` cannot be understood, or there is no such view.
    """
    if not isinstance(views, str | int | None):
        views = ",".join(map(str, views)) + ","
    text = str(min(count, most) if views is None else views)
    try:
        numbers = [int(x) for x in text.split(",") if x.strip()]
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers):
        raise InputError(f"views {text!r}: give how many, or which ones, such as 0,3,7")
    if "," in text:
        if bad := [x for x in numbers if not 0 <= x < count]:
            raise InputError(
                f"views {text!r}: there is no view {bad[0]}: choose from 0 to {count - 1}"
            )
        return numbers
    if not 1 <= numbers[0] <= count:
        raise InputError(f"views {text} is out of range: choose 1 to {count}")
    return np.linspace(0, count - 1, numbers[0]).round().astype(int).tolist()


def read_image(frames: Frames, view: int) -> np.ndarray:
    """`read_rgba` on white: [H W 3] uint8 sRGB."""
    return on_white(read_rgba(frames, view))


def on_white(rgba: np.ndarray) -> np.ndarray:
    """[H W 3] uint8: transparent pixels become white, as in NeRF (https://arxiv.org/abs/2003.08934)."""
    # Opaque images stay as they are.
    return to_uint8(blend(rgba, 1.0)) if has_alpha(rgba) else rgba[..., :3]


def read_rgba(frames: Frames, view: int) -> np.ndarray:
    """[H W 4] uint8 sRGB with straight alpha.

    Raises:
      InputError: the image is missing, damaged, or not of its camera's aspect ratio.
    """
    image = frames.images[view]
    if isinstance(image, Path):
        rgba, name = load_image(image), image.name
    else:
        name = f"frame {view}"
        try:
            rgba = np.asarray(
                Image.open(io.BytesIO(image.tobytes())).convert("RGB").convert("RGBA")
            )
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error ...
            raise InputError(f"{name} cannot be decoded ({type(error).__name__})") from None
    if frames.aspect is not None:
        ratio = rgba.shape[1] / rgba.shape[0] / frames.aspect[view]
        if abs(ratio - 1) > ASPECT_TOLERANCE:
            raise InputError(
                f"{name} is {rgba.shape[1]}x{rgba.shape[0]}, not the aspect ratio of its camera: was it rotated or cropped?"
            )
    return rgba


def is_rotation(matrices: np.ndarray) -> np.ndarray:
    """Which of the finite matrices [V 3 3] are rotations, within the precision of files: bool [V]."""
    off = np.abs(matrices @ matrices.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
    return (off <= 0.01) & (np.linalg.det(matrices) >= 0)


def read_frames(folder: Path, name: str) -> Frames:
    """`read_folder` without checking the cameras. `name` is unused: this is one of the readers of `data.scene_files`."""
    for file in TRANSFORMS:
        if (folder / file).is_file():
            return _read_transforms(folder / file)
    sparse = _sparse(folder)
    if sparse is None:
        raise InputError(f"{folder} has neither {' nor '.join((*TRANSFORMS, *SPARSE))}")
    read = colmap.read(sparse)
    order = sorted(range(len(read.names)), key=lambda view: _natural(read.names[view]))
    images = tuple(folder / "images" / read.names[view] for view in order)
    aspect = read.sizes[order, 0] / read.sizes[order, 1]
    return Frames(images, read.c2w[order], read.fxfycxcy[order], aspect)


def _sparse(folder: Path) -> Path | None:
    """The folder of COLMAP's reconstruction, or None."""
    for name in SPARSE:
        if any((folder / name / f"cameras{suffix}").is_file() for suffix in (".bin", ".txt")):
            return folder / name
    return None


def _read_transforms(path: Path) -> Frames:
    """The frames of a transforms.json, sorted by name: nerfstudio does not write them in the order of the video."""
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
        raise InputError(
            f"{path.name}: transform_matrix {list(c2w.shape)} of {len(frames)} frames: must be [N, 4, 4]"
        )
    fxfycxcy, aspect = zip(*cameras, strict=True)
    return Frames(images, opengl_to_opencv(c2w), np.array(fxfycxcy), np.array(aspect))


def _pinhole(frame: dict, image: Path) -> tuple[np.ndarray, float]:
    """(fx, fy, cx, cy) as fractions, and width / height; `frame` includes the fields that all frames share."""
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
    """Adds .png if there is no suffix: NeRF's own scenes leave it out."""
    return path if path.is_file() or path.suffix else path.with_name(path.name + ".png")


def _natural(name: str) -> list:
    """A sort key for names that compares numbers as numbers, so that a video's frames are in order."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def image_size(image: Path) -> tuple[int, int]:
    """(width, height), without decoding."""
    try:
        with Image.open(image) as opened:
            return opened.size
    except OSError as error:
        raise InputError(f"{image.name} cannot be read ({type(error).__name__})") from None


def load_json(path: Path, name: str) -> dict:
    """The JSON object in a file. Raises InputError, which calls the file `name`, if it is missing or something else."""
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
    """Inverts poses [V 4 4]. Raises InputError if one is singular."""
    try:
        return np.linalg.inv(w2c)
    except np.linalg.LinAlgError:
        raise InputError("a pose cannot be inverted") from None


def checked(frames: Frames) -> Frames:
    """Returns the frames after checking that their poses are rigid motions and their intrinsics plausible.

    Raises:
      InputError: they are not.
    """
    c2w, fxfycxcy = frames.c2w, frames.fxfycxcy
    if not len(c2w) or not (np.isfinite(c2w).all() and np.isfinite(fxfycxcy).all()):
        raise InputError("it has no frames, or a camera that is not finite")
    if (wrong := ~is_rotation(c2w[:, :3, :3])).any():
        raise InputError(f"the pose of frame {wrong.argmax()} is not a rotation and translation")
    if (wrong := (fxfycxcy <= 0).any(1) | (fxfycxcy[:, 2:] >= 1).any(1)).any():
        raise InputError(
            f"frame {wrong.argmax()} has focal lengths and centre {fxfycxcy[wrong.argmax()].round(4).tolist()} "
            "as fractions of its sides: focal lengths must be positive, and the centre must be in the image"
        )
    return frames


def crop(rgb: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The middle square of an image [H W 3], as [size size 3], and its (top, left, height, width) as fractions of the whole.

    The image is resized first: the shorter side to `size`, the longer one to the nearest multiple of WIDTH_STEP. This changes the
    aspect ratio slightly; the fractions account for it.
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
