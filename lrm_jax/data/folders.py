"""Reads OpenLRM's folder layout, which `tools/render_objects.py` writes, object by object.

    root/<uid>/rgba/000.png ...   sRGB with straight alpha
    root/<uid>/pose/000.npy ...   [3 4] camera to world, Blender's camera axes; world z up, object around the origin
    root/<uid>/intrinsics.npy     [3 2] (fx, fy), (cx, cy), (width, height) in pixels
    root/<uid>/<other>/000.png ... optional: another model's predictions of some views, in any size of the same proportions

(https://github.com/3DTopia/OpenLRM/blob/3108b69/openlrm/datasets/objaverse.py#L53-L70)
"""

import dataclasses
from pathlib import Path

import numpy as np

from lrm_jax.images.load import load_image
from lrm_jax.ops.cameras import opengl_to_opencv
from lrm_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Cameras:
    """The views of one object."""

    images: tuple[Path, ...]  # V files
    c2w: np.ndarray  # [V 4 4] float64, OpenCV axes
    fxfycxcy: np.ndarray  # [V 4] float64
    size: tuple[int, int]  # (width, height) of the images


def find(root: Path) -> list[str]:
    """The uids of the objects in a folder, sorted.

    Raises:
      InputError: the folder does not exist, or holds no object.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder: render one with tools/render_objects.py")
    uids = sorted(
        folder.name
        for folder in root.iterdir()
        if not folder.name.startswith(".") and (folder / "rgba").is_dir()
    )
    if not uids:
        raise InputError(
            f"{root}: no object (<uid>/rgba, pose, intrinsics.npy) in this folder: render some with tools/render_objects.py"
        )
    return uids


def fingerprint(
    root: Path, uids: list[str], source_images: str
) -> dict[str, list[tuple[str, int, int]]]:
    """uid -> (name, size, modification time) of its files, to identify their contents. `source_images`: see `elements.Recipe`."""
    files = {}
    for uid in uids:
        folder = root / uid
        patterns = ("*.npy", "pose/*.npy", *(f"{name}/*.png" for name in {"rgba", source_images}))
        found = [path for pattern in patterns for path in folder.glob(pattern)]
        stats = ((path.relative_to(folder).as_posix(), path.stat()) for path in sorted(found))
        files[uid] = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return files


def read_cameras(folder: Path) -> Cameras:
    """The cameras of one object.

    Raises:
      InputError: a file is missing or damaged, or has the wrong shape or values that are not finite. The message does not name
        the object.
    """
    images = tuple(sorted(folder.glob("rgba/*.png")))
    if not images:
        raise InputError("no rgba/*.png")
    posed = {path.stem for path in folder.glob("pose/*.npy")}
    if lost := posed - {path.stem for path in images}:
        raise InputError(f"rgba/{min(lost)}.png is missing")
    focal, centre, size = intrinsics = _load_array(folder / "intrinsics.npy", (3, 2))
    if (intrinsics[[0, 2]] <= 0).any():
        raise InputError("intrinsics.npy: a focal length or a size is not positive")
    poses = np.stack([_load_array(folder / "pose" / f"{p.stem}.npy", (3, 4)) for p in images])
    c2w = np.concatenate([poses, np.tile([[[0, 0, 0, 1.0]]], (len(poses), 1, 1))], axis=1)
    fxfycxcy = np.tile(np.concatenate([focal / size, centre / size]), (len(poses), 1))
    return Cameras(images, opengl_to_opencv(c2w), fxfycxcy, (int(size[0]), int(size[1])))


def read_image(cameras: Cameras, view: int) -> np.ndarray:
    """[H W 4] uint8, sRGB with straight alpha.

    Raises:
      InputError: the file cannot be read, or its size differs from that in intrinsics.npy.
    """
    path = cameras.images[view]
    rgba = load_image(path)
    if rgba.shape[1::-1] != cameras.size:
        raise InputError(
            f"rgba/{path.name} is {rgba.shape[1]}x{rgba.shape[0]}, "
            f"intrinsics.npy says {cameras.size[0]}x{cameras.size[1]}"
        )
    return rgba


def read_prediction(cameras: Cameras, view: int, source_images: str) -> np.ndarray:
    """[H W 4] uint8: a view as the folder `source_images` beside rgba has it.

    Raises:
      InputError: the file is missing or cannot be read, or its proportions are not those in intrinsics.npy.
    """
    image = cameras.images[view]
    path = image.parents[1] / source_images / image.name
    if not path.exists():
        raise InputError(
            f"{source_images}/{path.name} is missing: predict this view, or set data.source_images=rgba"
        )
    rgba = load_image(path)
    height, width = rgba.shape[:2]
    if width * cameras.size[1] != height * cameras.size[0]:
        raise InputError(
            f"{source_images}/{path.name} is {width}x{height}: its proportions are not those of intrinsics.npy, "
            f"{cameras.size[0]}x{cameras.size[1]}"
        )
    return rgba


def _load_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    name = "/".join(path.parts[-2:]) if path.parent.name == "pose" else path.name
    try:
        array = np.asarray(np.load(path), np.float64)
    except FileNotFoundError:
        raise InputError(f"{name} is missing") from None
    except Exception as error:  # numpy raises ValueError, EOFError, OSError, SyntaxError ...
        raise InputError(f"{name} cannot be read ({type(error).__name__})") from None
    if array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}, not {shape}")
    if not np.isfinite(array).all():
        raise InputError(f"{name} has values that are not finite")
    return array
