"""PSNR, SSIM and IoU: how good an image is. Each metric is one float32 number per image."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lrm_jax.types import InputError

# Wang et al. 2004 (https://doi.org/10.1109/TIP.2003.819861): 11 x 11 pixels, sigma 1.5, constants for values in [0, 1].
SSIM_WINDOW = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


def psnr(rgb: Float[Array, "*B H W 3"], target: Float[Array, "*B H W 3"]) -> Float[Array, "*B"]:
    """Peak signal-to-noise ratio in dB, for values in [0, 1]; capped at 100 dB, to be finite for equal images."""
    error = jnp.square(rgb.astype(jnp.float32) - target.astype(jnp.float32)).mean((-3, -2, -1))
    return decibels(error)


def decibels(error: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The PSNR in dB of a mean squared error, for values in [0, 1]; capped at 100 dB."""
    return -10.0 * jnp.log10(jnp.maximum(error, 1e-10))


def ssim(rgb: Float[Array, "*B H W 3"], target: Float[Array, "*B H W 3"]) -> Float[Array, "*B"]:
    """Structural similarity for values in [0, 1]: the mean over channels and whole windows; 1 for equal images.

    Wang et al. 2004, the same as scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1)`. LVSM's and pixelSplat's tables leave `use_sample_covariance` at its default,
    which lowers the value by up to 0.001.

    Raises:
      InputError: images smaller than the window, 11 x 11.
    """
    if min(rgb.shape[-3:-1]) < SSIM_WINDOW.size:
        raise InputError(
            f"images of {rgb.shape[-3]} x {rgb.shape[-2]} pixels are too small for SSIM: make them 11 or larger"
        )
    x, y = rgb.astype(jnp.float32), target.astype(jnp.float32)
    mean_x, mean_y = _windowed(x), _windowed(y)
    variances = _windowed(x * x) - mean_x**2 + _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    contrast = (2 * covariance + SSIM_C2) / (variances + SSIM_C2)
    return (luminance * contrast).mean((-3, -2, -1))


def iou(alpha: Float[Array, "*B H W"], target: Float[Array, "*B H W"]) -> Float[Array, "*B"]:
    """Intersection over union of the regions where alpha is above 0.5; 1 if both are empty."""
    seen, wanted = alpha > 0.5, target > 0.5
    union = (seen | wanted).sum((-2, -1))
    return jnp.where(union > 0, (seen & wanted).sum((-2, -1)) / jnp.maximum(union, 1), 1.0)


def _windowed(x):
    """Gaussian means over the windows that lie inside the image: [*B H W C] -> [*B H-10 W-10 C].

    Sums of slices, which are float32 on every device: a convolution might be rounded to bfloat16 or TF32.
    """
    weights = SSIM_WINDOW / SSIM_WINDOW.sum()
    height, width = x.shape[-3] - 10, x.shape[-2] - 10
    x = sum(float(w) * x[..., i : i + height, :, :] for i, w in enumerate(weights))
    return sum(float(w) * x[..., i : i + width, :] for i, w in enumerate(weights))
