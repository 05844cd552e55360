"""Resizing as the reference implementations do it. NumPy on the host, so that a new image size compiles nothing."""

import numpy as np
from jaxtyping import Float


def resize_bilinear(
    rgb: Float[np.ndarray, "*B H W 3"], size: int
) -> Float[np.ndarray, "*B size size 3"]:
    """Bilinear resize to a square, pixel centres at +0.5, with a low-pass filter when shrinking.

    TripoSR's: torch's `interpolate(mode="bilinear", align_corners=False, antialias=True)`. The aspect ratio is not kept.
    """
    return _apply(_bilinear_weights, rgb, size)


def resize_bicubic(
    rgb: Float[np.ndarray, "*B H W 3"], size: int
) -> Float[np.ndarray, "*B size size 3"]:
    """Bicubic resize to a square that maps corner pixels to corner pixels, without a low-pass filter, clamped to [0, 1].

    OpenLRM's: torch's `interpolate(mode="bicubic", align_corners=True)` and a clamp. The aspect ratio is not kept.
    """
    return _apply(bicubic_weights, rgb, size).clip(0, 1)


def _apply(weights, rgb, size):
    """Resizes the rows, then the columns, each by a product with a matrix [size_out size_in]."""
    height, width = rgb.shape[-3:-1]
    rows, columns = weights(height, size), weights(width, size)
    resized = rows @ rgb.reshape(*rgb.shape[:-3], height, width * 3)
    return columns @ resized.reshape(*rgb.shape[:-3], size, width, 3)


def _bilinear_weights(size_in: int, size_out: int) -> Float[np.ndarray, "size_out size_in"]:
    """A triangle filter as wide as an output pixel, or an input pixel if that is wider; cut off at the image's edges."""
    scale = size_in / size_out
    centre = (np.arange(size_out) + 0.5) * scale
    distance = np.abs(np.arange(size_in) + 0.5 - centre[:, None]) / max(scale, 1)
    weights = np.maximum(1 - distance, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def bicubic_weights(size_in: int, size_out: int) -> Float[np.ndarray, "size_out size_in"]:
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
