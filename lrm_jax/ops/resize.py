"""Resizing as the references do it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def resize_bilinear(rgb: Float[Array, "*B H W 3"], size: int) -> Float[Array, "*B size size 3"]:
    """Bilinear resize to a square, pixel centres at +0.5, with a low-pass filter where it shrinks.

    torch's `interpolate(mode="bilinear", align_corners=False, antialias=True)`: TripoSR's. The aspect is not kept.
    """
    return jax.image.resize(rgb, (*rgb.shape[:-3], size, size, 3), "linear", antialias=True)


def resize_bicubic(rgb: Float[Array, "*B H W 3"], size: int) -> Float[Array, "*B size size 3"]:
    """Bicubic resize to a square that maps corner pixels to corner pixels, without a low-pass filter, kept in [0, 1].

    torch's `interpolate(mode="bicubic", align_corners=True)` and a clamp: OpenLRM's. The aspect is not kept.
    """
    rows, columns = (jnp.asarray(_bicubic_weights(n, size)) for n in rgb.shape[-3:-1])
    resized = jnp.einsum("ih,jw,...hwc->...ijc", rows, columns, rgb, precision="highest")
    return resized.clip(0, 1)


def _bicubic_weights(size_in: int, size_out: int) -> Float[np.ndarray, "size_out size_in"]:
    """Cubic convolution with a = -0.75, edges repeated (Keys 1981, eq. 15, with torch's a)."""
    position = np.arange(size_out) * (size_in - 1) / max(size_out - 1, 1)
    taps = np.floor(position)[:, None] + np.arange(-1, 3)
    x = np.abs(position[:, None] - taps)
    near = ((-0.75 + 2) * x - (-0.75 + 3)) * x**2 + 1
    far = -0.75 * (((x - 5) * x + 8) * x - 4)
    weights = np.zeros((size_out, size_in), np.float32)
    index = np.clip(taps, 0, size_in - 1).astype(int)
    np.add.at(weights, (np.arange(size_out)[:, None], index), np.where(x <= 1, near, far))
    return weights
