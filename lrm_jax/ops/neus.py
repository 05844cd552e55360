"""Volume rendering of signed distances: NeuS (https://arxiv.org/abs/2106.10689), as SparseNeuS uses it. All in float32.

A ray's samples have distances `t` along it and signed distances `sdf` (negative inside). `inside` tells which samples count: in
SparseNeuS, those in voxels that the source views see. The opacity of an interval is the relative fall of a sigmoid of the signed
distance, `sigmoid(sharpness * sdf)`, over the interval.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lrm_jax.ops import sampling

FAR_OUTSIDE = 100.0  # the signed distance of a sample that does not count


def weights(alpha: Float[Array, "*B S"]) -> Float[Array, "*B S"]:
    """The weight of each sample: its opacity times the transmittance before it."""
    passed = jnp.cumprod(1 - alpha + 1e-7, axis=-1)
    return alpha * jnp.concatenate([jnp.ones_like(passed[..., :1]), passed[..., :-1]], axis=-1)


def refined(
    t: Float[Array, "*B S"],
    sdf: Float[Array, "*B S"],
    inside: Bool[Array, "*B S"],
    sharpness: float,
    count: int,
) -> Float[Array, "*B {count}"]:
    """`count` more distances where the surface seems to be: one of NeuS's up-sampling rounds (appendix, hierarchical sampling).

    Args:
      t: increasing distances.
      sharpness: of the sigmoid, fixed in each round: 64, 128, 256, 512.
    """
    step = t[..., 1:] - t[..., :-1]
    middle = 0.5 * (sdf[..., 1:] + sdf[..., :-1])
    both = (inside[..., 1:] & inside[..., :-1]).astype(t.dtype)
    slope = (sdf[..., 1:] - sdf[..., :-1]) / (step + 1e-5)
    # The steeper of this interval's fall and the one before it.
    before = jnp.concatenate([jnp.zeros_like(slope[..., :1]), slope[..., :-1]], axis=-1)
    slope = jnp.clip(jnp.minimum(before, slope), -10.0, 0.0) * both
    alpha = opacity(middle, slope * step, sharpness) * both
    u = sampling.middles(count, t.shape[:-1]).astype(t.dtype)
    return sampling.inverse_cdf(t, weights(alpha) + 1e-5, u)


def opacity(
    middle: Float[Array, "*B S"], change: Float[Array, "*B S"], sharpness: Float[Array, ""] | float
) -> Float[Array, "*B S"]:
    """The opacity of intervals with signed distance `middle` in the middle, which changes by `change` (<= 0) from end to end."""
    first = jax.nn.sigmoid((middle - 0.5 * change) * sharpness)
    last = jax.nn.sigmoid((middle + 0.5 * change) * sharpness)
    return (first - last + 1e-5) / (first + 1e-5)


def surface_opacity(
    sdf: Float[Array, "*B S"],
    gradient: Float[Array, "*B S 3"],
    dirs: Float[Array, "*B 3"],
    length: Float[Array, "*B S"],
    inside: Bool[Array, "*B S"],
    sharpness: Float[Array, ""],
    anneal: Float[Array, ""] | float,
) -> Float[Array, "*B S"]:
    """The opacity of the intervals around samples in their middle, from the signed distance and its gradient there.

    Args:
      sdf: FAR_OUTSIDE where a sample does not count.
      gradient: not normalised; 0 where a sample does not count.
      length: of the intervals.
      anneal: 0 to 1. Early in training, at 0, a surface that is seen from behind has opacity too, and therefore a gradient.
    """
    # Parity: the cosine is of the gradient itself, not of the unit normal.
    cos = jnp.sum(gradient * dirs[..., None, :], axis=-1)
    facing = jax.nn.relu(0.5 - 0.5 * cos) * (1 - anneal) + jax.nn.relu(-cos) * anneal
    slope = -jnp.minimum(facing, 10.0)
    alpha = jnp.clip(opacity(sdf, slope * length, sharpness), 0.0, 1.0)
    return jnp.where(inside, alpha, 0.0)
