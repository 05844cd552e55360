"""Doubts about the convention that camera poses are said to be in: do the optical axes meet in front of the cameras?

A pose is written as camera to world or world to camera, with OpenCV's axes (x right, y down, z forward) or OpenGL's (x right, y up, z
backward). Nothing in four numbers by four tells which. But the axes of cameras that were turned towards one scene meet in front of them,
and, read in a wrong convention, behind them or nowhere. Cameras that look outwards from one place are no different from cameras that
look inwards with the axes reversed, so this is a doubt and not a proof; near parallel axes, as of a camera that moves ahead, tell nothing.
"""

import numpy as np
from jaxtyping import Float

from lrm_jax.ops import cameras, paths

MEANINGS = {
    "opengl-c2w": "camera to world, x right, y up, z backward",
    "opencv-c2w": "camera to world, x right, y down, z forward",
    "opengl-w2c": "world to camera, x right, y up, z backward",
    "opencv-w2c": "world to camera, x right, y down, z forward",
}
CLEAR_SPREAD = 8.0  # degrees, of `paths.focus`: two axes at 16
# Distance at which axes pass the point where they meet, over that of the cameras from their middle (root mean squares). Cameras
# turned towards a scene by hand have about 0.1; in a wrong direction of the poses, 0.6 to 1.
MAX_MISS = 0.3
AHEAD = 30.0  # degrees off an optical axis that the scene's middle may be


def read(matrices: Float[np.ndarray, "V 4 4"], convention: str) -> Float[np.ndarray, "V 4 4"]:
    """Camera to world with OpenCV's axes, of poses written in one of MEANINGS."""
    c2w = matrices if convention.endswith("c2w") else np.linalg.inv(matrices)
    return cameras.opengl_to_opencv(c2w) if convention.startswith("opengl") else c2w


def write(c2w: Float[np.ndarray, "V 4 4"], convention: str) -> Float[np.ndarray, "V 4 4"]:
    """The inverse of `read`."""
    c2w = cameras.opencv_to_opengl(c2w) if convention.startswith("opengl") else c2w
    return c2w if convention.endswith("c2w") else np.linalg.inv(c2w)


def doubt(c2w: Float[np.ndarray, "V 4 4"], convention: str) -> tuple[str, str] | None:
    """What speaks against a convention, and the one that it speaks for; None: nothing.

    Args:
      c2w: the poses, read in `convention`.
      convention: one of MEANINGS.
    """
    c2w = c2w[:: -(-len(c2w) // 200)]  # enough to tell
    angles = _angles_where_axes_meet(c2w)
    if angles is not None and (angles < 90).mean() > 0.5:
        return None
    matrices, shares = write(c2w, convention), {}
    for other in MEANINGS:
        turned = _angles_where_axes_meet(read(matrices, other))
        if other != convention and turned is not None:
            shares[other] = (turned < AHEAD).mean()
    best = max(shares, key=shares.get, default=None)
    if best is None or shares[best] < 0.9:
        return None
    found = (
        "do not meet in front of the cameras"
        if angles is None
        else f"meet behind {(angles > 90).sum()} of {len(c2w)} cameras"
    )
    text = (
        f"the optical axes {found}: expected are poses in {convention} ({MEANINGS[convention]});"
        f" read as {best} ({MEANINGS[best]}), the axes meet in front of {shares[best]:.0%} of the cameras"
    )
    return text, best


def _angles_where_axes_meet(c2w: np.ndarray) -> np.ndarray | None:
    """Degrees [V] off the axes of the point where these meet; None: they are parallel, or pass each other."""
    point, spread = paths.focus(c2w)
    eyes = c2w[:, :3, 3]
    miss = np.linalg.norm(np.cross(point - eyes, c2w[:, :3, 2]), axis=1)
    extent = np.linalg.norm(eyes - eyes.mean(0), axis=1)
    if spread < CLEAR_SPREAD or np.sqrt((miss**2).mean()) > MAX_MISS * np.sqrt((extent**2).mean()):
        return None
    return paths.angles_to(c2w, point)
