"""Is the stated convention of the camera poses plausible: do the optical axes meet in front of the cameras?

A pose is written as camera to world or world to camera, with OpenCV axes (x right, y down, z forward) or OpenGL axes (x right, y
up, z backward). The 4x4 matrix itself does not show which. But the axes of cameras pointed at one scene meet in front of them;
read in a wrong convention, they meet behind them or nowhere. Cameras that look outwards from one place cannot be told from
cameras that look inwards with reversed axes, so this raises a doubt and proves nothing. Nearly parallel axes, as of a camera that
moves straight ahead, show nothing.
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
CLEAR_SPREAD = 8.0  # degrees, of `paths.focus`: that of two axes at 16 degrees
# Root mean square distance of the axes from their meeting point, over that of the cameras from their mean position. About 0.1
# for cameras pointed at a scene by hand; 0.6 to 1 if world to camera is read as camera to world, or the reverse.
MAX_MISS = 0.3
AHEAD = 30.0  # degrees: how far off an optical axis the scene's middle may be


def read(matrices: Float[np.ndarray, "V 4 4"], convention: str) -> Float[np.ndarray, "V 4 4"]:
    """Converts poses in one of MEANINGS to camera to world with OpenCV axes."""
    c2w = matrices if convention.endswith("c2w") else np.linalg.inv(matrices)
    return cameras.opengl_to_opencv(c2w) if convention.startswith("opengl") else c2w


def write(c2w: Float[np.ndarray, "V 4 4"], convention: str) -> Float[np.ndarray, "V 4 4"]:
    """The inverse of `read`."""
    c2w = cameras.opencv_to_opengl(c2w) if convention.startswith("opengl") else c2w
    return c2w if convention.endswith("c2w") else np.linalg.inv(c2w)


def doubt(c2w: Float[np.ndarray, "V 4 4"], convention: str) -> tuple[str, str] | None:
    """Evidence against a convention, in words, and the convention that fits better; None if there is none.

    Args:
      c2w: the poses, read in `convention`.
      convention: one of MEANINGS.
    """
    c2w = c2w[:: -(-len(c2w) // 200)]  # 200 are enough
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
        f"the optical axes {found}: poses in {convention} were expected ({MEANINGS[convention]});"
        f" read as {best} ({MEANINGS[best]}), the axes meet in front of {shares[best]:.0%} of the cameras"
    )
    return text, best


def _angles_where_axes_meet(c2w: np.ndarray) -> np.ndarray | None:
    """Degrees [V] between each axis and the way to the point where the axes meet; None if they are parallel or do not meet."""
    point, spread = paths.focus(c2w)
    eyes = c2w[:, :3, 3]
    miss = np.linalg.norm(np.cross(point - eyes, c2w[:, :3, 2]), axis=1)
    extent = np.linalg.norm(eyes - eyes.mean(0), axis=1)
    if spread < CLEAR_SPREAD or np.sqrt((miss**2).mean()) > MAX_MISS * np.sqrt((extent**2).mean()):
        return None
    return paths.angles_to(c2w, point)
