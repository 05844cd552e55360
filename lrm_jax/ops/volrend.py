"""Volume rendering: from densities along a ray to colour, opacity and depth. All in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lrm_jax.types import Rendering


def composite(
    density: Float[Array, "*B S"], rgb: Float[Array, "*B S 3"], t_edges: Float[Array, "*B S+1"]
) -> Rendering:
    """Alpha-composites S samples along each ray, front to back.

    Emission-absorption quadrature, eq. 3 of NeRF (https://arxiv.org/abs/2003.08934). The unit of `density` is the inverse of
    the unit of `t_edges`: TripoSR's checkpoints expect edges normalised to [0, 1].

    Args:
      density: extinction, >= 0.
      rgb: sRGB-encoded colour.
      t_edges: increasing interval edges along the ray.

    Returns:
      Premultiplied colour, alpha in [0, 1], and expected depth in the unit of `t_edges` (0 where alpha is 0).
    """
    weights = compositing_weights(density, t_edges)
    alpha = jnp.sum(weights, axis=-1)
    t_mid = 0.5 * (t_edges[..., :-1] + t_edges[..., 1:])
    depth = jnp.sum(weights * t_mid, axis=-1) / jnp.maximum(alpha, 1e-6)
    return Rendering(rgb=jnp.sum(weights[..., None] * rgb, axis=-2), alpha=alpha, depth=depth)


def compositing_weights(
    density: Float[Array, "*B S"], t_edges: Float[Array, "*B S+1"]
) -> Float[Array, "*B S"]:
    """The weight of each sample: the transmittance up to it times its own opacity. They sum to alpha <= 1.

    The transmittance is the exp of a float32 sum: a product of (1 - alpha) loses the last digits, and a bfloat16 sum decibels.
    """
    optical = density.astype(jnp.float32) * (t_edges[..., 1:] - t_edges[..., :-1])
    # An exclusive sum, not the inclusive sum minus the sample's own term: that cancels where a density is large.
    before = jnp.cumsum(optical[..., :-1], axis=-1)
    before = jnp.concatenate([jnp.zeros_like(optical[..., :1]), before], axis=-1)
    return jnp.exp(-before) * -jnp.expm1(-optical)
