"""Motions of a scene's world that bring its first source camera, or all its cameras, to where a model expects them.

NumPy, computed once on the host.
"""

import numpy as np

from lrm_jax.ops import cameras
from lrm_jax.types import InputError

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
