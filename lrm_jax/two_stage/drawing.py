"""Draws views of an object from one image, with a model that synthesizes them (Zero123)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from lrm_jax import api
from lrm_jax.images.camera_paths import orbit
from lrm_jax.ops import cameras as ops_cameras
from lrm_jax.parallel import batch_axes, messages, sharding
from lrm_jax.types import Cameras, InputError, Views

Program = Callable[[Views, Cameras, jax.Array], np.ndarray]


def check_draws(model: api.Model) -> None:
    """Raises InputError if a model does not draw views from one image."""
    if not model.draws_views:
        raise InputError(
            f"{model.info['path']}: {model.info['family']} does not draw views from one image: give weights of Zero123"
        )


def program(model: api.Model, steps: int) -> Program:
    """A function from views [N 1 S S 3] on white, cameras [N 1] and keys [N] to images, float32 [N S S 3] in [0, 1].

    Each image depends on its own view, camera and key alone.

    Args:
      steps: of sampling, about.

    Raises:
      InputError: from the function, if an image is not finite.
    """
    module = model.module.clone(num_steps=steps)

    def draw(params, batch):
        source, cameras, keys = batch
        scene = module.apply({"params": params}, source, method="encode")
        rays = ops_cameras.pixel_rays(cameras, module.image_size, module.image_size)
        rendering = module.apply({"params": params}, scene, rays, keys, method="render")
        return rendering.rgb[:, 0].astype(jnp.float32)

    compiled = sharding.jit(lambda params, batch: batch_axes.split_batch(draw, params, batch))

    def run(source: Views, cameras: Cameras, keys: jax.Array) -> np.ndarray:
        images = model.on_devices(compiled, (source, cameras, keys), len(keys))
        if not np.isfinite(images).all():
            raise InputError("a drawn view is not finite: the weights are damaged, use others")
        return images

    return run


def together() -> int:
    """How many views to draw at once: on accelerators, as many as One-2-3-45 has in its last stage, if they fit."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return 4
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    return 28 if memory > 14e9 else 4


def truncated(image: np.ndarray) -> UInt8[np.ndarray, "*B 3"]:
    """8 bits. Parity: rounded down."""
    return (image * 255).clip(0, 255).astype(np.uint8)


def turntable(
    model: api.Model, image: api.PreparedImage, num_frames: int, seed: int, steps: int
) -> UInt8[np.ndarray, "N S S 3"]:
    """A full turn around the object of an image at the image's own elevation. All frames start from the same noise."""
    check_draws(model)
    draw, step = program(model, steps), together()
    source = jax.tree.map(lambda x: np.repeat(x, step, axis=0), image.source)
    path = orbit(num_frames).around(jax.tree.map(lambda x: x[0, 0], image.source.cameras))
    frames = []
    for start in messages.progress(range(0, num_frames, step), -(-num_frames // step), "frames"):
        chosen = np.minimum(np.arange(start, start + step), num_frames - 1)
        cameras = jax.tree.map(lambda x, chosen=chosen: np.asarray(x)[chosen][:, None], path)
        keys = jnp.broadcast_to(jax.random.key(seed), (step,))
        frames.append(truncated(draw(source, cameras, keys)))
    return np.concatenate(frames)[:num_frames]
