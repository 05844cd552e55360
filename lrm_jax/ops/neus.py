"""Volume rendering of signed distances: NeuS (https://arxiv.org/abs/2106.10689), as SparseNeuS uses it. All in float32.

A ray's samples have distances `t` along it and signed distances `sdf` (negative inside). `inside` tells which samples count: in
SparseNeuS, those in voxels that the source views see. The opacity of an interval is the relative fall of a sigmoid of the signed
distance, `sigmoid(sharpness * sdf)`, over the interval.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

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
    """`count` more distances where the surface seems to be: one of NeuS's up-sampling rounds  (appendix, hierarchical sampling).

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
    return inverse_cdf(t, weights(alpha), count)


def opacity(
    middle: Float[Array, "*B S"], change: Float[Array, "*B S"], sharpness: Float[Array, ""] | float
) -> Float[Array, "*B S"]:
    """The opacity of intervals with signed distance `middle` in the middle, which changes by `change` (<= 0) from end to end."""
    first = jax.nn.sigmoid((middle - 0.5 * change) * sharpness)
    last = jax.nn.sigmoid((middle + 0.5 * change) * sharpness)
    return (first - last + 1e-5) / (first + 1e-5)


def inverse_cdf(
    t: Float[Array, "*B S"], weight: Float[Array, "*B S-1"], count: int
) -> Float[Array, "*B {count}"]:
    """Distances at the middles of `count` equal parts of the weight of the intervals between `t`."""
    mass = weight + 1e-5
    cdf = jnp.cumsum(mass / jnp.sum(mass, axis=-1, keepdims=True), axis=-1)
    cdf = jnp.concatenate([jnp.zeros_like(cdf[..., :1]), cdf], axis=-1)
    u = jnp.broadcast_to((jnp.arange(count) + 0.5) / count, (*t.shape[:-1], count)).astype(t.dtype)
    # Finds the interval of u by comparing it with every edge: S is small, so no search is needed.
    above = jnp.sum(u[..., :, None] >= cdf[..., None, :], axis=-1)
    low, high = jnp.maximum(above - 1, 0), jnp.minimum(above, t.shape[-1] - 1)

    def at(values, index):
        return jnp.take_along_axis(values, index, axis=-1)

    span = at(cdf, high) - at(cdf, low)
    fraction = (u - at(cdf, low)) / jnp.where(span < 1e-5, 1.0, span)
    return at(t, low) + fraction * (at(t, high) - at(t, low))


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
