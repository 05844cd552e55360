"""Loss terms by name: each a small pure function of the rendered and the target views, in float32.

A config names the terms that it wants and their weights: `losses = {"mse": 1.0, "mask": 0.05}`.
"""

import jax
import jax.numpy as jnp

from lrm_jax.types import Rendering


def mse(rendering: Rendering, target: Rendering) -> jax.Array:
    """Mean squared error of colour, both composited on the same background. LRM, eq. 6 (https://arxiv.org/abs/2311.04400)."""
    return jnp.square(rendering.rgb.astype(jnp.float32) - target.rgb.astype(jnp.float32)).mean()


def mask(rendering: Rendering, target: Rendering) -> jax.Array:
    """Binary cross-entropy of alpha. TripoSR, section 2.3 (https://arxiv.org/abs/2403.02151), which weights it by 0.05.

    The prediction is squeezed into [0.001, 0.999]: finite where a ray saturates, and, unlike clipping, with a gradient there.
    """
    alpha = 1e-3 + (1 - 2e-3) * rendering.alpha.astype(jnp.float32)
    label = target.alpha.astype(jnp.float32)
    return -(label * jnp.log(alpha) + (1 - label) * jnp.log1p(-alpha)).mean()


def mask_mse(rendering: Rendering, target: Rendering) -> jax.Array:
    """Mean squared error of alpha, the milder form (InstantMesh, src/model.py:243-257)."""
    return jnp.square(rendering.alpha.astype(jnp.float32) - target.alpha.astype(jnp.float32)).mean()


TERMS = {"mse": mse, "mask": mask, "mask_mse": mask_mse}


def terms(
    rendering: Rendering, target: Rendering, weights: dict[str, float]
) -> dict[str, jax.Array]:
    """Every term that has a weight, unweighted.

    Raises:
      ValueError: a term that does not exist.
    """
    if unknown := sorted(set(weights) - set(TERMS)):
        raise ValueError(f"no loss term {', '.join(unknown)}; there are {', '.join(TERMS)}")
    return {name: TERMS[name](rendering, target) for name in weights}
