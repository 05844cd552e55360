"""Where rays enter and leave the volume, and where along them to sample."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def ray_box(
    origins: Float[Array, "*B 3"], dirs: Float[Array, "*B 3"], half_side: float
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Entry and exit distance of rays through the cube [-half_side, half_side]^3 (slab method, Kay and Kajiya 1986).

    Distances are in world units for unit `dirs`; entry is at least 0. A ray that misses has exit <= entry. For a ray that
    runs exactly in the plane of a face, the sign of the rounding error decides.
    """
    # Moves a vanishing component away from 0, so that 0 * inf appears neither in the value nor in the gradient.
    safe = jnp.where(jnp.abs(dirs) < 1e-9, jnp.where(dirs < 0, -1e-9, 1e-9), dirs)
    a, b = (-half_side - origins) / safe, (half_side - origins) / safe
    near = jnp.max(jnp.minimum(a, b), axis=-1)
    far = jnp.min(jnp.maximum(a, b), axis=-1)
    return jnp.maximum(near, 0.0), far


def uniform_edges(
    near: Float[Array, "*B"], far: Float[Array, "*B"], num_samples: int
) -> Float[Array, "*B {num_samples}+1"]:
    """`num_samples` equal intervals between `near` and `far`."""
    steps = jnp.linspace(0.0, 1.0, num_samples + 1)
    steps = steps.reshape((1,) * near.ndim + (-1,))
    return near[..., None] * (1 - steps) + far[..., None] * steps


def stratified(
    near: Float[Array, "*B"], far: Float[Array, "*B"], num_samples: int, key: jax.Array | None
) -> Float[Array, "*B S"]:
    """EG3D's stratified samples: the points of linspace(near, far), each moved forward by up to one spacing.

    Without a key, each moves by half a spacing. The last sample may lie beyond `far` (https://arxiv.org/abs/2112.07945,
    supplement).
    """
    spacing = ((far - near) / (num_samples - 1))[..., None]
    steps = jnp.arange(num_samples, dtype=near.dtype).reshape((1,) * near.ndim + (-1,))
    shape = (*near.shape, num_samples)
    jitter = jnp.full(shape, 0.5) if key is None else jax.random.uniform(key, shape)
    return near[..., None] + (steps + jitter) * spacing


def importance(
    t: Float[Array, "*B S"],
    weights: Float[Array, "*B S-1"],
    num_samples: int,
    key: jax.Array | None,
) -> Float[Array, "*B I"]:
    """Inverse-transform sampling: more samples where `weights` are high (NeRF, sec. 5.2), with EG3D's smoothing of the weights.

    Args:
      t: increasing distances of the coarse samples.
      weights: compositing weights of the S-1 intervals between them.
      num_samples: I, the number of new samples.
      key: draws u uniformly. None: u = (i + 0.5) / I.

    Returns:
      I increasing distances, not merged with `t`, without gradient.
    """
    # Parity: EG3D's max filter of 2, mean filter of 2 and floor of 0.01; then only the inner weights, on bins that start at
    # the first midpoint, so that bins and weights are off by one.
    padded = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(1, 1)], constant_values=-jnp.inf)
    highest = jnp.maximum(padded[..., :-1], padded[..., 1:])
    smooth = 0.5 * (highest[..., :-1] + highest[..., 1:]) + 0.01
    mass = smooth[..., 1:-1] + 1e-5
    bins = 0.5 * (t[..., :-1] + t[..., 1:])[..., : mass.shape[-1] + 1]
    if key is None:
        u = middles(num_samples, t.shape[:-1]).astype(t.dtype)
    else:
        u = sorted_uniform(key, t.shape[:-1], num_samples).astype(t.dtype)
    return jax.lax.stop_gradient(inverse_cdf(bins, mass, u))


def middles(count: int, shape: tuple[int, ...]) -> Float[Array, "*B I"]:
    """The middles of `count` equal parts of [0, 1], for each element of `shape`."""
    return jnp.broadcast_to((jnp.arange(count) + 0.5) / count, (*shape, count))


def inverse_cdf(
    edges: Float[Array, "*B S"], mass: Float[Array, "*B S-1"], u: Float[Array, "*B I"]
) -> Float[Array, "*B I"]:
    """The points below which shares `u` of the mass lie, if each interval's mass is spread evenly over it.

    In an interval with less than 1e-5 of the mass, points move with `u` itself, as in NeRF's code and its descendants.
    """
    cdf = jnp.cumsum(mass / jnp.sum(mass, axis=-1, keepdims=True), axis=-1)
    cdf = jnp.concatenate([jnp.zeros_like(cdf[..., :1]), cdf], axis=-1)
    # Finds the interval of u by comparing it with every edge: S is small, so no search is needed.
    above = jnp.sum((u[..., :, None] >= cdf[..., None, :]), axis=-1)
    low, high = jnp.maximum(above - 1, 0), jnp.minimum(above, mass.shape[-1])

    def at(values, index):
        return jnp.take_along_axis(values, index, axis=-1)

    span = at(cdf, high) - at(cdf, low)
    fraction = (u - at(cdf, low)) / jnp.where(span < 1e-5, 1.0, span)
    return at(edges, low) + fraction * (at(edges, high) - at(edges, low))


def sorted_uniform(key: jax.Array, shape: tuple[int, ...], count: int) -> Float[Array, "*B I"]:
    """`count` uniform draws from [0, 1), in increasing order, for each element of `shape`.

    The times of `count` events of a Poisson process, divided by that of the next event, have the distribution of sorted uniform
    draws (Devroye 1986, Non-Uniform Random Variate Generation, theorem V.2.2).
    """
    times = jnp.cumsum(jax.random.exponential(key, (*shape, count + 1)), axis=-1)
    # Stored: XLA would divide again in every comparison with a cumulative weight.
    return jax.lax.optimization_barrier(times[..., :-1] / times[..., -1:])
