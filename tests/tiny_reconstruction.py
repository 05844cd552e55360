"""A tiny model with a surface and an image of a ball, shared by tests of reconstruction."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lrm_jax import models
from lrm_jax.weights import model_file, references


def ball(colour=(220, 120, 40), size: int = 48) -> np.ndarray:
    rgba = np.zeros((size, size, 4), np.uint8)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    rgba[x**2 + y**2 < (0.4 * size) ** 2] = [*colour, 255]
    return rgba


def random_model(path: Path, **fields) -> Path:
    """Writes a model file of TripoSR's tiny variant. Its weights are random, and its field crosses its level."""
    # exp(-1) is the density if the decoder returns 0.
    model = models.build("triposr", "tiny", **{"surface_level": 0.37} | fields)
    rng = np.random.default_rng(0)

    def draw(x):
        return rng.normal(scale=1 / np.sqrt(x.shape[-2] if x.ndim > 1 else 100), size=x.shape)

    params = jax.tree.map(lambda x: jnp.asarray(draw(x), x.dtype), references.param_shapes(model))
    model_file.save_model(path, model, params, {})
    return path
