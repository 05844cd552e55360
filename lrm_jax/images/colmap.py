"""Cameras of COLMAP's sparse reconstructions, binary or text (https://colmap.github.io/format.html).

COLMAP's cameras already have OpenCV axes. Its poses are world to camera, and its pixels have their centres at +0.5.
"""

import dataclasses
import struct
from pathlib import Path

import numpy as np

from lrm_jax.types import InputError

# COLMAP's model number -> (name, number of parameters, how many of them, at the start, are focal lengths).
_MODELS = {
    0: ("SIMPLE_PINHOLE", 3, 1), 1: ("PINHOLE", 4, 2), 2: ("SIMPLE_RADIAL", 4, 1), 3: ("RADIAL", 5, 1),
    4: ("OPENCV", 8, 2), 5: ("OPENCV_FISHEYE", 8, 2), 6: ("FULL_OPENCV", 12, 2), 7: ("FOV", 5, 2),
    8: ("SIMPLE_RADIAL_FISHEYE", 4, 1), 9: ("RADIAL_FISHEYE", 5, 1), 10: ("THIN_PRISM_FISHEYE", 12, 2),
}  # fmt: skip
_NUMBERS = {name: number for number, (name, _, _) in _MODELS.items()}
# Displacement at the corners as a fraction of the larger side. It grows with the third power of the distance from the middle:
# where objects are, halfway out, it is an eighth.
MAX_DISTORTION = 0.02


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """The posed images, sorted by name."""

    names: tuple[str, ...]  # V files, relative to the folder of images
    c2w: np.ndarray  # [V 4 4] float64, OpenCV axes, in the reconstruction's own world and unit
    fxfycxcy: np.ndarray  # [V 4] float64, fractions of width, height, width, height
    sizes: np.ndarray  # [V 2] (width, height) in pixels


def read(folder: Path) -> Reconstruction:
    """Reads `cameras` and `images`, `.bin` or `.txt`.

    Lens distortion below MAX_DISTORTION is not corrected.

    Raises:
      InputError: a file is missing or cut short, a camera is not finite, there is no image, or a lens is too far from a pinhole.
    """
    suffix = ".bin" if (folder / "cameras.bin").exists() else ".txt"
    parse_cameras = _binary_cameras if suffix == ".bin" else _text_cameras
    parse_images = _binary_images if suffix == ".bin" else _text_images
    cameras = {
        number: (pinhole(model, width, height, params), (width, height))
        for number, model, width, height, params in _parse(
            folder / f"cameras{suffix}", parse_cameras
        )
    }
    images = sorted(_parse(folder / f"images{suffix}", parse_images))
    if not images:
        raise InputError(f"{folder.name}/images{suffix} has no image")
    for name, camera, _, _ in images:
        if camera not in cameras:
            raise InputError(f"{name} was taken with camera {camera}, which cameras{suffix} lacks")
    names, numbers, quaternions, translations = zip(*images, strict=True)
    c2w = _camera_to_world(np.array(quaternions), np.array(translations))
    if not np.isfinite(c2w).all():
        raise InputError(f"images{suffix} has a pose that is not finite")
    intrinsics = np.array([cameras[number][0] for number in numbers])
    return Reconstruction(names, c2w, intrinsics, np.array([cameras[n][1] for n in numbers]))


def _parse(path: Path, parse) -> list:
    try:
        return parse(path)
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing") from None
    except InputError:
        raise
    except (OSError, ValueError, IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} cannot be read ({type(error).__name__})") from None


def _binary_cameras(path: Path) -> list[tuple]:
    """(number, model, width, height, parameters) of each camera."""
    data, cameras = path.read_bytes(), []
    (count,), at = struct.unpack_from("<Q", data), 8
    for _ in range(count):
        number, model, width, height = struct.unpack_from("<iiQQ", data, at)
        num_params = _MODELS[model][1]
        params = struct.unpack_from(f"<{num_params}d", data, at + 24)
        cameras.append((number, model, width, height, params))
        at += 24 + 8 * num_params
    return cameras


def _binary_images(path: Path) -> list[tuple]:
    """(name, camera, quaternion, translation) of each image."""
    data, images = path.read_bytes(), []
    (count,), at = struct.unpack_from("<Q", data), 8
    for _ in range(count):
        _, *pose, camera = struct.unpack_from("<i7di", data, at)
        end = data.index(b"\0", at + 64)
        (num_points,) = struct.unpack_from("<Q", data, end + 1)
        images.append((data[at + 64 : end].decode(), camera, pose[:4], pose[4:]))
        at = end + 9 + 24 * num_points
    if at > len(data):
        raise InputError(f"{path.name} is cut short")
    return images


def _text_cameras(path: Path) -> list[tuple]:
    cameras = []
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            number, model, width, height, *params = line.split()
            params = tuple(map(float, params))
            cameras.append((int(number), _NUMBERS[model], int(width), int(height), params))
    return cameras


def _text_images(path: Path) -> list[tuple]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    images = []
    for line in lines[::2]:  # every other line lists the points, or is empty
        if line.strip():
            _, *pose, camera, name = line.split(maxsplit=9)
            pose = list(map(float, pose))
            images.append((name, int(camera), pose[:4], pose[4:]))
    return images


def pinhole(model: int, width: int, height: int, params: tuple[float, ...]) -> np.ndarray:
    """(fx, fy, cx, cy) of a nearly pinhole camera, as fractions."""
    name, num_params, num_focal = _MODELS[model]
    if len(params) != num_params or not np.isfinite(params).all():
        raise InputError(f"a {name} camera has parameters {params}: it needs {num_params} numbers")
    fx, fy, cx, cy = ((params[0], *params) if num_focal == 1 else params)[:4]
    if min(fx, fy, width, height) <= 0:
        raise InputError("a camera's focal length or size is not positive")
    lens = params[num_focal + 2 :]
    if any(lens):
        corners = np.array([[x, y] for x in (0, width) for y in (0, height)])
        x, y = ((corners - [cx, cy]) / [fx, fy]).T
        displacement = _displacement(name, lens, x, y) * [fx, fy]
        if np.abs(displacement).max() > MAX_DISTORTION * max(width, height):
            raise InputError(
                f"a {name} lens moves the corners by {np.abs(displacement).max():.0f} pixels: run colmap image_undistorter first"
            )
    return np.array([fx / width, fy / height, cx / width, cy / height])


def _displacement(name: str, lens: tuple[float, ...], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far a lens displaces points (x, y) of the plane z = 1: [N 2]."""
    if name not in ("SIMPLE_RADIAL", "RADIAL", "OPENCV"):
        raise InputError(f"a {name} lens is not a pinhole: run colmap image_undistorter first")
    k1, k2, p1, p2 = (*lens, 0, 0, 0)[:4]
    r2 = x * x + y * y
    radial = k1 * r2 + k2 * r2**2
    return np.stack(
        [
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y),
        ],
        axis=1,
    )


def _camera_to_world(quaternions: np.ndarray, translations: np.ndarray) -> np.ndarray:
    """[V 4 4] from world-to-camera quaternions (w, x, y, z) [V 4] and translations [V 3]."""
    w, x, y, z = (quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)).T
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )  # [3 3 V]
    c2w = np.tile(np.eye(4), (len(w), 1, 1))
    c2w[:, :3, :3] = rotation.transpose(2, 1, 0)
    c2w[:, :3, 3] = -np.einsum("vij,vj->vi", c2w[:, :3, :3], translations)
    return c2w
