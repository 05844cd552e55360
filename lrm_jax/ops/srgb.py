"""The transfer curve of sRGB (IEC 61966-2-1), for NumPy and JAX arrays. Both sides are in [0, 1]."""

import numpy as np
from jaxtyping import Array, Float


def to_linear(srgb: Float[Array | np.ndarray, "*B"]) -> Float[Array | np.ndarray, "*B"]:
    """Encoded values to linear light."""
    xp = srgb.__array_namespace__()
    return xp.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def from_linear(linear: Float[Array | np.ndarray, "*B"]) -> Float[Array | np.ndarray, "*B"]:
    """Linear light to encoded values."""
    xp = linear.__array_namespace__()
    # The power's gradient must be finite even where `where` picks the line.
    curve = 1.055 * xp.maximum(linear, 1e-6) ** (1 / 2.4) - 0.055
    return xp.where(linear <= 0.0031308, linear * 12.92, curve)
