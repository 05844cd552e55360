"""A folder of images for tests of evaluation: three balls, rendered in closed form."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lrm_jax.ops import cameras
from lrm_jax.types import Cameras, Rays, Rendering

SIZE, FOV, DISTANCE = 48, 45.0, 2.8
SOURCE = (50.0, 20.0)  # azimuth, elevation
BALLS = np.array([[0.5, 0.1, -0.3], [-0.3, 0.4, 0.2], [-0.1, -0.4, 0.3]])
RADII = np.array([0.45, 0.3, 0.25])
COLORS = np.array([[0.9, 0.2, 0.1], [0.1, 0.8, 0.2], [0.2, 0.3, 0.9]])


@jax.numpy_rank_promotion("allow")
@jax.jit
def draw(rays: Rays, balls, radii) -> Rendering:
    """Renders the balls along rays, in flat colours."""
    offset = rays.origins[..., None, :] - balls
    along = (offset * rays.dirs[..., None, :]).sum(-1)
    squared = along**2 - (offset**2).sum(-1) + radii**2
    depth = jnp.where(squared > 0, -along - jnp.sqrt(jnp.maximum(squared, 0)), jnp.inf)
    hit = (squared > 0).any(-1)
    rgb = jnp.where(hit[..., None], jnp.asarray(COLORS)[depth.argmin(-1)], 0.0)
    return Rendering(rgb=rgb, alpha=hit.astype(jnp.float32))


@functools.cache
def image(azimuth: float, elevation: float) -> np.ndarray:
    seen = draw(cameras.pixel_rays(camera(azimuth, elevation), SIZE, SIZE), BALLS, RADII)
    rgba = np.concatenate([seen.rgb, seen.alpha[..., None]], -1)
    return np.rint(rgba * 255).astype(np.uint8)


def camera(azimuth: float, elevation: float) -> Cameras:
    one = cameras.orbit(1, DISTANCE, elevation, FOV, azimuth)
    return jax.tree.map(lambda x: np.asarray(x[0]), one)


def write_object(folder: Path, num_views: int = 5, points: bool = True, step: float = -5.0) -> None:
    """Writes the object. View 1 is the source: the other views are too high or, with a negative step, too low."""
    views = [(10.0, 60.0), SOURCE, *((70.0 * i, step * i) for i in range(1, num_views - 1))]
    for name in ("rgba", "pose"):
        (folder / name).mkdir(parents=True)
    for i, view in enumerate(views):
        one = camera(*view)
        Image.fromarray(image(*view)).save(folder / "rgba" / f"{i:03d}.png")
        blender = np.asarray(cameras.opencv_to_opengl(jnp.asarray(one.c2w)))[:3]
        np.save(folder / "pose" / f"{i:03d}.npy", blender)
    focal = one.fxfycxcy[0] * SIZE
    np.save(folder / "intrinsics.npy", np.array([[focal] * 2, [SIZE / 2] * 2, [SIZE] * 2]))
    if points:
        rng = np.random.default_rng(1)
        dirs = rng.normal(size=(12000, 3))
        dirs /= np.linalg.norm(dirs, axis=-1, keepdims=True)
        ball = rng.choice(3, len(dirs), p=RADII**2 / (RADII**2).sum())
        xyz = BALLS[ball] + RADII[ball, None] * dirs
        inside = (np.linalg.norm(xyz[:, None] - BALLS, axis=-1) < RADII - 1e-6).any(-1)
        np.save(folder / "points.npy", xyz[~inside].astype(np.float32))
