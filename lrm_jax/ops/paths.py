"""Camera paths through a scene, from the cameras that photographed it.

A few poses, computed once on the host: NumPy, float64. Poses are camera to world with OpenCV axes (x right, y down, z forward).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation, Slerp

from lrm_jax.ops import cameras
from lrm_jax.types import InputError

# Degrees, the spread of `focus`: below it, the axes are too parallel to have a known meeting point.
MIN_SPREAD = 1.0


def focus(c2w: Float[np.ndarray, "V 4 4"]) -> tuple[Float[np.ndarray, "3"], float]:
    """The point that the optical axes come closest to, and how well they determine it.

    Returns:
      The point with the least sum of squared distances from the axes. The axes are whole lines here, so it may be behind the
      cameras. And their spread: the root mean square angle in degrees between the axes and the line that fits them best. It is
      half the angle between two axes, 45 for a circle of cameras that look level at its centre, and 0 for parallel axes: many
      points are equally good then, and the one nearest to the cameras is returned.
    """
    point, system = nearest_point(c2w[:, :3, 3], c2w[:, :3, 2])
    least = np.linalg.eigvalsh(system)[0]
    return point, float(np.degrees(np.arcsin(np.sqrt(np.clip(least, 0, 1)))))


def nearest_point(
    origins: Float[np.ndarray, "V 3"], dirs: Float[np.ndarray, "V 3"]
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3 3"]]:
    """The point with the least sum of squared distances from lines with unit directions, and the matrix of its equations.

    Returns:
      The point (if several are equally good, the one nearest to the mean origin); and the mean of 1 - d d^T, which is
      singular for parallel lines.
    """
    middle = origins.mean(0)
    # Normal equations: sum (1 - d d^T) (p - origin) = 0.
    across = np.eye(3) - dirs[:, :, None] * dirs[:, None, :]
    system = across.mean(0)
    wanted = np.einsum("vij,vj->i", across, origins - middle) / len(origins)
    return middle + np.linalg.lstsq(system, wanted, rcond=1e-9)[0], system


def angles_to(
    c2w: Float[np.ndarray, "V 4 4"], point: Float[np.ndarray, "3"]
) -> Float[np.ndarray, "V"]:
    """Degrees between each optical axis and the way to a point: 0 ahead, over 90 behind, 90 for a camera at the point."""
    way, dirs = point - c2w[:, :3, 3], c2w[:, :3, 2]
    along, beside = (way * dirs).sum(1), np.linalg.norm(np.cross(way, dirs), axis=1)
    # At the point itself, the direction would be rounding error.
    on_it = np.linalg.norm(way, axis=1) <= 1e-6 * np.abs(c2w[:, :3, 3]).max()
    return np.where(on_it, 90.0, np.degrees(np.arctan2(beside, along)))


def up(c2w: Float[np.ndarray, "V 4 4"]) -> Float[np.ndarray, "3"]:
    """The upward direction of the scene, a unit vector: at right angles to the cameras' x axes (right in the images).

    The mean of the cameras' upward directions alone would be tilted, for example for a half circle of cameras that look down.
    It decides only if the cameras all look in one direction.
    """
    right = c2w[:, :3, 0]
    system = right.T @ right / len(right) + 0.01 * np.eye(3)
    direction = np.linalg.solve(system, -c2w[:, :3, 1].mean(0))
    return direction / np.linalg.norm(direction)


def meeting_point(c2w: Float[np.ndarray, "V 4 4"]) -> Float[np.ndarray, "3"] | None:
    """The point that the cameras look at: the `focus`, if it is well determined and in front of most of them; else None."""
    point, spread = focus(c2w)
    ahead = angles_to(c2w, point) < 90
    return point if spread >= MIN_SPREAD and ahead.mean() > 0.5 else None


def orbit(c2w: Float[np.ndarray, "V 4 4"], num_frames: int) -> Float[np.ndarray, "N 4 4"]:
    """A full turn around the point that the cameras look at, which stays in the middle of the image.

    It turns about the scene's upward direction, counter-clockwise seen from above, at the mean height and the mean horizontal
    distance of the cameras. It starts above or below view 0. Frame N would be frame 0 again.

    Raises:
      InputError: the cameras do not look at one point.
    """
    point = meeting_point(c2w)
    if point is None:
        raise InputError(
            "the cameras do not look at one point, so there is nothing to orbit: use --path spiral or interpolate"
        )
    axis = up(c2w)
    offset = c2w[:, :3, 3] - point
    height = offset @ axis
    level = offset - height[:, None] * axis
    distance = np.linalg.norm(level, axis=1)
    # For a camera straight above the point, up in its image is away from the centre of the turn.
    start = level[0] if distance[0] > 1e-3 * np.linalg.norm(offset[0]) else c2w[0, :3, 1]
    start = start - (start @ axis) * axis
    start /= np.linalg.norm(start)
    angle = 2 * np.pi * np.arange(num_frames)[:, None] / num_frames
    outward = np.cos(angle) * start + np.sin(angle) * np.cross(axis, start)
    return _look_at(point + distance.mean() * outward + height.mean() * axis, point, axis)


def spiral(
    c2w: Float[np.ndarray, "V 4 4"], mean: Float[np.ndarray, "4 4"], num_frames: int
) -> Float[np.ndarray, "N 4 4"]:
    """Two turns around the mean camera, while moving forward and back once, as far from it as the cameras are.

    After LLFF's spiral (https://github.com/Fyusion/LLFF, as in NeRF's `render_path_spiral`): the radii are the 90th percentile of
    the cameras' distances from the mean camera, across its axis and along it. The frames look at a point on that axis, at the
    depth of the point that the cameras look at. If there is no such point, all frames look in parallel. The path is closed: frame
    N would be frame 0 again.

    Args:
      c2w: the cameras.
      mean: the pose in the middle.
    """
    local = (c2w[:, :3, 3] - mean[:3, 3]) @ mean[:3, :3]
    beside = np.quantile(np.hypot(local[:, 0], local[:, 1]), 0.9)
    along = np.quantile(np.abs(local[:, 2]), 0.9)
    angle = 4 * np.pi * np.arange(num_frames) / num_frames
    offset = np.stack(
        [beside * np.cos(angle), beside * np.sin(angle), along * np.sin(angle / 2)], axis=1
    )
    eyes = mean[:3, 3] + offset @ mean[:3, :3].T
    point = meeting_point(c2w)
    depth = 0.0 if point is None else (point - mean[:3, 3]) @ mean[:3, 2]
    # If the point were among the cameras, the frames would swing around.
    if depth > along:
        return _look_at(eyes, mean[:3, 3] + depth * mean[:3, 2], -mean[:3, 1])
    poses = np.tile(mean, (num_frames, 1, 1))
    poses[:, :3, 3] = eyes
    return poses


def positions(num_views: int, num_frames: int) -> Float[np.ndarray, "N"]:
    """Positions of the frames on the way through views 0, 1, 2 ...: evenly spread, both ends included. One frame is view 0."""
    return np.linspace(0, num_views - 1, num_frames)


def interpolate(
    c2w: Float[np.ndarray, "V 4 4"], position: Float[np.ndarray, "N"]
) -> Float[np.ndarray, "N 4 4"]:
    """Poses between those of views: a uniform Catmull-Rom spline through the positions, slerp between the rotations.

    The spline's tangent at a view is half the step between its two neighbours; at the ends it is the step to the only
    neighbour. So the path passes through all views, and is straight and even if they are.

    Args:
      c2w: two or more poses, in the order of the path.
      position: in [0, V - 1]; 1.25 is a quarter of the way from view 1 to view 2.
    """
    eyes = c2w[:, :3, 3]
    tangents = np.gradient(eyes, axis=0)
    first = np.minimum(position.astype(int), len(c2w) - 2)
    t = (position - first)[:, None]
    # Cubic Hermite basis.
    places = (
        (1 + 2 * t) * (1 - t) ** 2 * eyes[first]
        + t * (1 - t) ** 2 * tangents[first]
        + t**2 * (3 - 2 * t) * eyes[first + 1]
        - t**2 * (1 - t) * tangents[first + 1]
    )
    rotations = Slerp(np.arange(len(c2w)), Rotation.from_matrix(c2w[:, :3, :3]))(position)
    poses = np.tile(np.eye(4), (len(position), 1, 1))
    poses[:, :3, :3] = rotations.as_matrix()
    poses[:, :3, 3] = places
    return poses


def _look_at(eyes: np.ndarray, point: np.ndarray, upward: np.ndarray) -> np.ndarray:
    """Poses [N 4 4], float64, of cameras at `eyes` [N 3] that look at one point."""
    # Relative to the point, because `cameras` computes in float32.
    offset = jnp.asarray(eyes - point, jnp.float32)
    up = jnp.asarray(upward, jnp.float32)
    poses = np.array(cameras.look_at(offset, jnp.zeros_like(offset), up), np.float64)
    poses[:, :3, 3] = eyes
    return poses
