"""Images as bytes: rounding to 8 bits, and PNG files."""

import tempfile

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lrm_jax.types import Rendering


def png(image: np.ndarray) -> bytes:
    """A PNG file of uint8 [H W 3] or [H W 4]."""
    with tempfile.SpooledTemporaryFile(max_size=2**26) as file:
        Image.fromarray(image).save(file, "png")
        file.seek(0)
        return file.read()


def to_uint8(image: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """[0, 1] to [0, 255], rounded. JAX arrays give JAX arrays, also in jitted code."""
    xp = image.__array_namespace__()
    return xp.round(xp.clip(image, 0, 1) * 255).astype(xp.uint8)


def to_rgba(rendering: Rendering) -> UInt8[np.ndarray, "*B 4"]:
    """Converts a rendering's premultiplied colour to sRGB with straight alpha."""
    alpha = rendering.alpha[..., None]
    straight = np.divide(rendering.rgb, alpha, out=np.zeros_like(rendering.rgb), where=alpha > 0)
    return to_uint8(np.concatenate([straight, alpha], axis=-1))
