"""A data source for tests: balls with random places and sizes, rendered in closed form."""

import jax
import numpy as np

from lrm_jax.data import Source, pipeline
from lrm_jax.ops import cameras
from lrm_jax.types import Batch, Views


def ball(rays, centre, radius):
    """Renders a ball of `centre` [3] and `radius` along rays [V H W]. Its colour depends on the world position."""
    offset = rays.origins - centre
    b = (offset * rays.dirs).sum(-1)
    discriminant = b**2 - (offset**2).sum(-1) + radius**2
    t = -b - np.sqrt(np.maximum(discriminant, 0))
    alpha = (discriminant > 0).astype(np.float32)
    return np.clip(0.5 + rays.origins + t[..., None] * rays.dirs, 0, 1), alpha


def sample(position, seed, num_views, source_size, target_size):
    """The scene at a position, without the B axis, with float images."""
    rng = np.random.default_rng((seed, position))
    centre = rng.uniform(-0.2, 0.2, 3).astype(np.float32)
    radius = np.float32(rng.uniform(0.3, 0.5))

    def views(count, size):
        orbit = jax.tree.map(np.asarray, cameras.orbit(count, 3.0, 20.0, 40.0))
        rays = jax.tree.map(np.asarray, cameras.pixel_rays(orbit, size, size))
        rgb, alpha = ball(rays, centre, radius)
        return Views(rgb=rgb, alpha=alpha, cameras=orbit)

    return Batch(source=views(1, source_size), target=views(num_views, target_size))


def batch(step, batch_size, num_views, source_size, target_size, seed=0):
    """A batch of these scenes."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    scenes = [sample(i, seed, num_views, source_size, target_size) for i in positions]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *scenes)


def make(*, split, seed, num_target, source_size, target_size, **unused):
    """The data source, by the contract of `lrm_jax.data`."""
    seed += split == "val"
    positions = pipeline.order(64, split, seed)
    return Source(
        positions.map(lambda i: sample(int(i), seed, num_target, source_size, target_size)),
        names=tuple(map(str, range(64))),
    )
