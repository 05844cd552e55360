"""Images as bytes: rounding to 8 bits, and PNG files."""

import tempfile

import numpy as np
from PIL import Image


def png(image: np.ndarray) -> bytes:
    """A PNG file of uint8 [H W 3] or [H W 4]."""
    with tempfile.SpooledTemporaryFile(max_size=2**26) as file:
        Image.fromarray(image).save(file, "png")
        file.seek(0)
        return file.read()


def to_uint8(image: np.ndarray) -> np.ndarray:
    """[0, 1] to [0, 255], rounded."""
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
