"""Motions of a scene's world that bring its first source camera, or all its cameras, to where a model expects them.

NumPy, computed once on the host.
"""

import numpy as np
from jaxtyping import Float

from lrm_jax.ops import cameras, paths
from lrm_jax.types import InputError

BY_ALL_SOURCES = ("frusta", "common_view")  # what `views_motion` knows
NEAR, FAR = 5 / 12, 3 / 2  # One-2-3-45's depths 0.5 and 1.8, relative to its cameras' distance 1.2
VIEWS_MARGIN = 1.1  # of `views_motion`
MARGIN = 1.35  # the largest coordinate of a scene's cameras is 1 / MARGIN


def object_motion(
    c2w: np.ndarray,
    fxfycxcy: np.ndarray,
    normalize: str | None,
    assumed_camera: tuple[float, float] | None = None,
) -> np.ndarray:
    """The similarity [4 4], float32, that moves a scene, from the camera of its first source: see `data.elements.Recipe`.

    Raises:
      InputError: `normalize` is "image" and the camera looks away from the origin.
    """
    if normalize is None:
        return np.eye(4, dtype=np.float32)
    c2w, fxfycxcy = c2w.astype(float), fxfycxcy.astype(float)
    if normalize == "azimuth":
        motion = cameras.azimuth_motion(c2w)
    elif normalize == "source":
        motion = cameras.source_motion(c2w)
    else:
        motion = cameras.image_motion(c2w, fxfycxcy, *assumed_camera)
        if not np.linalg.det(motion[:3, :3]) > 0:
            raise InputError("the first source's camera looks away from the origin")
    return motion.astype(np.float32)


def sources_motion(
    c2w: Float[np.ndarray, "V 4 4"],
    fxfycxcy: Float[np.ndarray, "V 4"],
    normalize: str | None,
    assumed_camera: tuple[float, float] | None = None,
) -> Float[np.ndarray, "4 4"]:
    """The similarity, float64, that moves a scene, from the cameras of its sources: `views_motion`, or `object_motion` of the first.

    Raises:
      InputError: the cameras do not fit `normalize`.
    """
    if normalize in BY_ALL_SOURCES:
        return views_motion(c2w, fxfycxcy, normalize)
    return object_motion(c2w[0], fxfycxcy[0], normalize, assumed_camera).astype(float)


def views_motion(
    c2w: Float[np.ndarray, "V 4 4"], fxfycxcy: Float[np.ndarray, "V 4"], normalize: str
) -> Float[np.ndarray, "4 4"]:
    """The similarity, float64, from the world of some posed views of an object to the cube [-1, 1]^3 of a volume.

    Args:
      c2w, fxfycxcy: the cameras of the source images, V >= 2. The first one is the reference.
      normalize: "frusta", One-2-3-45's rule (https://arxiv.org/abs/2306.16928, from SparseNeuS): the axes become those of the
        first camera. The box around the frusta of all cameras, between the depths NEAR and FAR times the distance of each
        camera from the point where the optical axes meet, gives the centre; half its longest side becomes 1 / VIEWS_MARGIN.
        "common_view", ours, is tighter: the centre is the point where the axes meet. The scene's upward direction
        (`paths.up`) becomes z, and the first camera is at azimuth 0. The radius of the largest sphere around the centre that
        every camera sees whole becomes 1 / VIEWS_MARGIN.

    Raises:
      InputError: the axes do not meet in front of every camera, or, for "common_view", where one of them does not look.
    """
    c2w, fxfycxcy = c2w.astype(float), fxfycxcy.astype(float)
    point, spread = paths.focus(c2w)
    if spread < paths.MIN_SPREAD:
        raise InputError(
            f"{len(c2w)} source views look in the same direction: their axes do not meet: give views from several sides"
        )
    if (behind := paths.angles_to(c2w, point) >= 90).any():
        raise InputError(
            f"source view {int(behind.argmax())} looks away from the point where the optical axes meet: check the convention "
            "of its pose, or leave it out"
        )
    if normalize == "frusta":
        rotation = c2w[0, :3, :3].T
        point, radius = _frusta_box(c2w, fxfycxcy, point, rotation)
    elif normalize == "common_view":
        rotation = _azimuth_axes(c2w, point)
        radius = _seen_radius(c2w, fxfycxcy, point)
    else:
        raise ValueError(f"normalize={normalize!r}: must be one of {BY_ALL_SOURCES}")
    scale = 1 / (VIEWS_MARGIN * radius)
    motion = np.eye(4)
    motion[:3, :3] = scale * rotation
    motion[:3, 3] = -scale * rotation @ point
    return motion


def upright(c2w: Float[np.ndarray, "V 4 4"]) -> Float[np.ndarray, "4 4"]:
    """The rigid motion after which the optical axes meet at the origin, up is z, and the first camera is at azimuth 0."""
    point, _ = paths.focus(c2w)
    rotation = _azimuth_axes(c2w, point)
    motion = np.eye(4)
    motion[:3, :3], motion[:3, 3] = rotation, -rotation @ point
    return motion


def _frusta_box(
    c2w: np.ndarray, fxfycxcy: np.ndarray, point: np.ndarray, rotation: np.ndarray
) -> tuple[np.ndarray, float]:
    """The centre [3] of the box around all frusta, along the rows of `rotation`, and half its longest side."""
    distance = np.linalg.norm(point - c2w[:, :3, 3], axis=1)
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    xy = (corners - fxfycxcy[:, None, 2:]) / fxfycxcy[:, None, :2]
    dirs = np.concatenate([xy, np.ones((*xy.shape[:2], 1))], axis=-1)
    depths = distance[:, None] * np.array([NEAR, FAR])
    local = (depths[:, :, None, None] * dirs[:, None]).reshape(len(c2w), -1, 3)
    world = np.einsum("vij,vkj->vki", c2w[:, :3, :3], local) + c2w[:, None, :3, 3]
    turned = (world @ rotation.T).reshape(-1, 3)
    low, high = turned.min(0), turned.max(0)
    return rotation.T @ (low + high) / 2, float((high - low).max() / 2)


def _azimuth_axes(c2w: np.ndarray, point: np.ndarray) -> np.ndarray:
    """The rotation [3 3] after which up is z and the first camera is over the +x axis, seen from `point`."""
    z = paths.up(c2w)
    offset = c2w[0, :3, 3] - point
    level = offset - (offset @ z) * z
    # For a camera straight above, down in its image points to where it would stand if it were lower.
    if np.linalg.norm(level) <= 1e-3 * np.linalg.norm(offset):
        level = c2w[0, :3, 1] - (c2w[0, :3, 1] @ z) * z
    x = level / np.linalg.norm(level)
    return np.stack([x, np.cross(z, x), z])


def _seen_radius(c2w: np.ndarray, fxfycxcy: np.ndarray, point: np.ndarray) -> float:
    """The radius of the largest sphere around a point that every camera sees whole: its distance from the nearest side plane.

    Raises:
      InputError: a camera does not see the point.
    """
    x, y, z = np.einsum("vji,vj->iv", c2w[:, :3, :3], point - c2w[:, :3, 3])
    fx, fy, cx, cy = fxfycxcy.T
    sides = np.stack([
        (fx * x + cx * z) / np.hypot(fx, cx),
        ((1 - cx) * z - fx * x) / np.hypot(fx, 1 - cx),
        (fy * y + cy * z) / np.hypot(fy, cy),
        ((1 - cy) * z - fy * y) / np.hypot(fy, 1 - cy),
    ])  # fmt: skip
    nearest = sides.min(0)
    if nearest.min() <= 0:
        raise InputError(
            f"source view {int(nearest.argmin())} does not show the point where the optical axes meet: leave it out"
        )
    return float(nearest.min())


def scene_motion(
    c2w: np.ndarray, num_source: int, normalize: str | None
) -> tuple[np.ndarray, float]:
    """The normalisation of a scene: (rigid motion [4 4], to multiply all poses with from the left; scale of positions after it).

    The mean position becomes the origin, the mean forward direction z, and the mean downward direction y. The largest
    coordinate of any position becomes 1 / MARGIN.

    Args:
      c2w: [V 4 4]; the first `num_source` are the sources.
      normalize: which cameras count. "all_views": sources and targets, as LVSM's checkpoints were trained and evaluated; a
        prediction then depends on which other targets there are. "source_views": the sources alone; it does not. None: the
        world stays as it is.

    Raises:
      InputError: the cameras look in opposite directions, or all stand at one place.
    """
    if normalize is None:
        return np.eye(4), 1.0
    c2w = c2w[:num_source] if normalize == "source_views" else c2w
    forward = c2w[:, :3, 2].mean(0)
    right = np.cross(c2w[:, :3, 1].mean(0), forward)
    if np.linalg.norm(right) < 1e-6:
        raise InputError("the cameras look in opposite directions: their mean is not defined")
    forward /= np.linalg.norm(forward)
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    motion = np.eye(4)
    motion[:3, :3] = rotation
    motion[:3, 3] = -rotation @ c2w[:, :3, 3].mean(0)
    positions = c2w[:, :3, 3] @ rotation.T + motion[:3, 3]
    farthest = np.abs(positions).max()
    # Relative to the coordinates, this is rounding error.
    if farthest <= 1e-9 * max(1.0, np.abs(c2w[:, :3, 3]).max()):
        raise InputError("the cameras all stand at one place: there is no length to normalise by")
    return motion, 1 / (MARGIN * farthest)


def apply(motion: np.ndarray, scale: float, c2w: np.ndarray) -> np.ndarray:
    """Poses [N 4 4] in the world of `scene_motion`, float32."""
    c2w = motion @ c2w
    c2w[:, :3, 3] *= scale
    return c2w.astype(np.float32)
