"""How good a picture is."""

import jax
import jax.numpy as jnp


def psnr(rgb: jax.Array, target: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB of each picture, [*B H W 3] -> [*B], for values in [0, 1]."""
    error = jnp.square(rgb.astype(jnp.float32) - target.astype(jnp.float32)).mean((-3, -2, -1))
    return -10.0 * jnp.log10(
        jnp.maximum(error, 1e-10)
    )  # at most 100 dB: equal pictures stay finite
