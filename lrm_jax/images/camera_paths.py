"""Camera paths through a capture, and orbits around an object.

orbit        a full turn around the point that the cameras look at, at their mean height and distance
spiral       two turns around the mean camera, looking where the cameras look
interpolate  through the source cameras in order: positions by a Catmull-Rom spline, rotations by slerp
FILE         the poses of a transforms.json, in the world of the capture
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from lrm_jax.images import captures
from lrm_jax.ops import cameras, conventions, normalization, paths
from lrm_jax.types import Cameras, InputError

PATHS = ("orbit", "spiral", "interpolate")


@dataclasses.dataclass(frozen=True)
class CameraPath:
    """Camera poses for the frames of a video."""

    c2w: np.ndarray  # [N 4 4] float64, OpenCV axes, in the world of the capture
    # [N] positions between the capture's views, in [0, V - 1]; None: the path does not follow the views
    position: np.ndarray | None = None


def camera_path(
    capture: captures.Capture, name: str, num_frames: int, convention: str | None = None
) -> CameraPath:
    """The camera path `name`: one of PATHS, or a transforms.json file with poses in the world of the capture.

    Raises:
      InputError: the source cameras do not determine the path, or its file is missing or bad.
    """
    c2w = capture.c2w
    if name not in PATHS:
        if not Path(name).is_file():
            raise InputError(f"--path {name}: neither a file nor one of {', '.join(PATHS)}")
        return CameraPath(read_path(Path(name), convention))
    if len(c2w) < 2:
        raise InputError(
            f"{capture.names[0]} is the only source view: a path needs two or more, or --path FILE"
        )
    if name == "interpolate":
        position = paths.positions(len(c2w), num_frames)
        return CameraPath(paths.interpolate(c2w, position), position)
    if name == "orbit":
        return CameraPath(paths.orbit(c2w, num_frames))
    motion, _ = normalization.scene_motion(c2w, len(c2w), "source_views")
    return CameraPath(paths.spiral(c2w, np.linalg.inv(motion), num_frames))


def read_path(path: Path, convention: str | None) -> np.ndarray:
    """The poses [N 4 4] of a transforms.json, in its order; the rest of the file is ignored.

    The convention is not checked for plausibility, because a path may look anywhere.
    """
    try:
        content = json.loads(path.read_text())
        matrices = np.array([frame["transform_matrix"] for frame in content["frames"]], float)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a transforms.json file ({type(error).__name__}: {error})") from None  # fmt: skip
    if matrices.shape[1:] != (4, 4):
        raise InputError(f"{path}: transform_matrix {list(matrices.shape)}: must be [N, 4, 4]")
    try:
        captures.check_rigid(matrices)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return conventions.read(matrices, convention or captures.TRANSFORMS_CONVENTION)


def intrinsics_along(path: CameraPath, fxfycxcy: np.ndarray) -> np.ndarray:
    """Intrinsics [N 4] of the frames: interpolated from the views' [V 4], or their mean if the path does not follow the views."""
    if path.position is None:
        return np.tile(fxfycxcy.mean(0), (len(path.c2w), 1))
    columns = [np.interp(path.position, np.arange(len(fxfycxcy)), x) for x in fxfycxcy.T]
    return np.stack(columns, axis=1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Orbit:
    """Cameras around an object, the first at the azimuth of the image's assumed camera. A field that is None is that camera's."""

    num_views: int
    elevation: float | None = None  # degrees above the horizon
    distance: float | None = None  # from the origin, world units
    fov: float | None = None  # full vertical field of view, degrees

    def around(self, source: Cameras) -> Cameras:
        """Cameras[V], the first at the azimuth of `source` (Cameras[]), the others counter-clockwise from it, seen from above."""
        chosen = {
            "elevation_deg": self.elevation,
            "distance": self.distance,
            "fov_y_deg": self.fov,
        }
        chosen = {name: float(value) for name, value in chosen.items() if value is not None}
        return cameras.orbit(self.num_views, **cameras.orbit_of(source) | chosen)


def orbit(
    num_views: int,
    *,
    elevation: float | None = None,
    distance: float | None = None,
    fov: float | None = None,
) -> Orbit:
    """`num_views` cameras evenly spaced around an object, for `Scene.render`. The first one sees the side that the image shows.

    Args:
      elevation: degrees above the horizon, -90 to 90. None: the image's.
      distance: from the origin, or what posed images look at; in the unit of the scene's world. None: the image's.
      fov: full vertical field of view in degrees. None: the image's.

    Raises:
      InputError: a number is out of range.
    """
    limits = {"num_views": (1, 100_000), "elevation": (-90, 90), "distance": (1e-3, 1e6), "fov": (0.1, 179)}  # fmt: skip
    for name, (low, high) in limits.items():
        value = locals()[name]
        if value is not None and not low <= value <= high:
            raise InputError(f"orbit: {name} {value} is out of range: choose {low} to {high}")
    return Orbit(num_views, elevation, distance, fov)
