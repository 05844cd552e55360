"""Posed images of a two-coloured ball in an unusual world, and a model without weights that reconstructs silhouettes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from balls import ball
from flax import linen as nn
from PIL import Image
from scipy.spatial.transform import Rotation

from lrm_jax import api
from lrm_jax.ops import cameras, conventions
from lrm_jax.types import Cameras, Rendering, Views

RADIUS = 0.4
SCALE = 30.0
# From a world with z up and the ball at the origin to the capture's.
WORLD = np.eye(4)
WORLD[:3, :3] = SCALE * Rotation.from_euler("xyz", [100, 20, 65], degrees=True).as_matrix()
WORLD[:3, 3] = [60, -90, 20]
CENTRE = WORLD[:3, 3]
RED, BLUE = (210, 30, 30), (30, 30, 210)  # above and below


def ring(num_views: int = 8) -> Cameras:
    """Cameras that look at the ball from two elevations, in the world with z up."""
    low, high = (cameras.orbit(num_views, 2.5, elevation, 40.0) for elevation in (-20.0, 20.0))
    even = (np.arange(num_views) % 2 == 0)[:, None, None]
    c2w = np.where(even, np.asarray(low.c2w), np.asarray(high.c2w)).astype(float)
    return Cameras(c2w=c2w, fxfycxcy=np.asarray(low.fxfycxcy, float))


def posed(num_views: int = 8, size: int = 64) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Images uint8 [V H W 4] that are wider than high, poses in the capture's world, and intrinsics."""
    ringed = ring(num_views)
    square = jax.tree.map(lambda x: np.asarray(x, np.float32), ringed)
    rays = jax.tree.map(np.asarray, cameras.pixel_rays(square, size, size))
    hit, alpha = ball(rays, np.zeros(3, np.float32), np.float32(RADIUS))
    colour = np.where(hit[..., 2:] > 0.5, RED, BLUE) * alpha[..., None]
    rgba = np.concatenate([colour, 255 * alpha[..., None]], -1).astype(np.uint8)
    # Thirds of their height on both sides: `captures.crop` keeps the middle.
    side = size // 3
    wide = np.pad(rgba, ((0, 0), (0, 0), (side, side), (0, 0)))
    fxfycxcy = ringed.fxfycxcy * [size / (size + 2 * side), 1, 1, 1]
    return list(wide), cameras.move_poses(WORLD, ringed.c2w), fxfycxcy


def write_folder(folder: str | Path, images: list[np.ndarray], c2w, fxfycxcy) -> None:
    """Writes posed images as PNG files, in the layout of NeRF."""
    Path(folder, "images").mkdir(parents=True)
    frames = []
    for i, (image, matrix) in enumerate(
        zip(images, conventions.write(c2w, "opengl-c2w"), strict=True)
    ):
        Image.fromarray(image).save(Path(folder, "images", f"{i}.png"))
        h, w = image.shape[:2]
        fx, fy, cx, cy = fxfycxcy[i] * [w, h, w, h]
        frames.append({
            "file_path": f"images/{i}.png", "transform_matrix": matrix.tolist(),
            "w": w, "h": h, "fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy,
        })  # fmt: skip
    Path(folder, "transforms.json").write_text(json.dumps({"frames": frames}))


class Hull(nn.Module):
    """A family of posed images with a surface: what all source views show in front of white. It has no parameters."""

    image_size: int = 64
    dtype: str = "float32"
    radius: float = 1.0
    surface_level: float = 0.0
    normalize = "common_view"

    def encode(self, source: Views):
        return source

    def query(self, scene: Views, xyz):
        points = jnp.broadcast_to(xyz[:, None], (*scene.rgb.shape[:2], *xyz.shape[1:]))
        uv, z = cameras.project(scene.cameras, points)
        size = self.image_size
        column, row = jnp.moveaxis(jnp.clip(jnp.floor(uv * size), 0, size - 1).astype(int), -1, 0)
        flat = scene.rgb.reshape(*scene.rgb.shape[:2], -1, 3)
        rgb = jnp.take_along_axis(flat, (row * size + column)[..., None], axis=2)
        seen = (rgb.min(-1) < 0.9) & (z > 0) & (jnp.abs(uv - 0.5) < 0.5).all(-1)
        return jnp.where(seen.all(1), 0.5, -0.5), rgb.mean(1)

    def render(self, scene: Views, rays, keys_B=None):
        middle = -(rays.origins * rays.dirs).sum(-1)
        t = jnp.stack([middle + offset for offset in np.linspace(-1.2, 1.2, 96)], -1)
        xyz = rays.origins[..., None, :] + t[..., None] * rays.dirs[..., None, :]
        field, rgb = self.query(scene, xyz.reshape(len(xyz), -1, 3))
        field, rgb = field.reshape(t.shape), rgb.reshape(*t.shape, 3)
        first = jnp.argmax(field, -1)[..., None]
        alpha = (field.max(-1) > 0).astype(jnp.float32)
        depth = jnp.take_along_axis(t, first, -1)[..., 0] * alpha
        colour = jnp.take_along_axis(rgb, first[..., None], -2)[..., 0, :] * alpha[..., None]
        return Rendering(rgb=colour, alpha=alpha, depth=depth)


def hull(**training_data) -> api.Model:
    """The model, as if it had been trained with these fields of `data`."""
    training = {"config": {"data": training_data}} if training_data else {}
    info = {"family": "hull", "variant": "", "path": "hull", "training": training, "assumed": []}
    return api.Model(Hull(), {}, info)
