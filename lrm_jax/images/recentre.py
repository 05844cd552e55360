"""Crops that put an object in the middle of a square."""

import numpy as np
from jaxtyping import UInt8

from lrm_jax.images.load import MAX_PIXELS
from lrm_jax.types import InputError


def check_square(size: int) -> None:
    """Raises InputError if a square of this side has too many pixels: padding makes it large for a long, narrow image."""
    if size**2 > 2 * MAX_PIXELS:
        raise InputError(
            f"the image is too long, its square has {size} pixels a side: scale it down, 1024 is plenty"
        )


def pad_to_square(rgba: UInt8[np.ndarray, "H W 4"]) -> UInt8[np.ndarray, "S S 4"]:
    """Adds transparent pixels on both sides of the shorter axis."""
    height, width = rgba.shape[:2]
    check_square(max(height, width))
    down, right = max(width - height, 0), max(height - width, 0)
    return np.pad(rgba, ((down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0)))


def recenter_foreground(
    rgba: UInt8[np.ndarray, "H W 4"], ratio: float
) -> UInt8[np.ndarray, "S S 4"]:
    """The square of `foreground_square`."""
    return foreground_square(rgba, ratio)[0]


def foreground_square(
    rgba: UInt8[np.ndarray, "H W 4"], ratio: float
) -> tuple[UInt8[np.ndarray, "S S 4"], tuple[int, int]]:
    """Crops to the foreground (alpha > 0) and pads it with transparency to a square, of which it fills `ratio`.

    TripoSR's preparation (https://github.com/VAST-AI-Research/TripoSR/blob/d26e331/tsr/utils.py#L58-L81).

    Args:
      ratio: the longer side of the foreground over the side of the square, in (0, 1].

    Returns:
      The square, and (row, column) of its upper left corner in the image, which may lie outside.

    Raises:
      InputError: no pixel has alpha > 0, not counting the last row and column of the foreground.
    """
    rows, columns = np.nonzero(rgba[..., 3])
    if rows.size == 0:
        raise InputError(
            "the image is transparent everywhere: give one whose alpha channel shows the object"
        )
    # Parity: the reference's slice leaves out the last row and column.
    bottom, right = max(rows.max(), rows.min() + 1), max(columns.max(), columns.min() + 1)
    foreground = rgba[rows.min() : bottom, columns.min() : right]
    if not foreground[..., 3].any():
        raise InputError("the image's foreground is too thin: give a larger image")
    height, width = foreground.shape[:2]
    longer = max(height, width)
    size = max(int(longer / ratio), longer)
    check_square(size)
    # Parity: padded twice, to a square and then to the ratio; each time the top and left margins are rounded down.
    margin = (size - longer) // 2
    top, left = margin + (longer - height) // 2, margin + (longer - width) // 2
    square = np.zeros((size, size, 4), np.uint8)
    square[top : top + height, left : left + width] = foreground
    return square, (int(rows.min()) - top, int(columns.min()) - left)
