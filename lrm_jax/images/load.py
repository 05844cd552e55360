"""Pictures from files to what encoders take: load, recentre the foreground, composite, resize.

Pictures are NumPy uint8 (H, W, 4), sRGB with straight alpha, until they are resized.
"""

import logging
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageOps
from scipy import ndimage

from lrm_jax.types import InputError

MAX_PIXELS = 100_000_000
_log = logging.getLogger(__name__)


def load_image(path: str | Path) -> UInt8[np.ndarray, "H W 4"]:
    """Reads a picture as 8-bit sRGB with straight alpha, 255 where the file has none.

    Any file that Pillow reads: 16-bit ones are scaled to 8 bits, grey, palette and CMYK ones become RGB, the EXIF
    orientation is applied, of an animation the first frame is taken, with a note to the log.

    Raises:
      InputError: no such file, not a picture, damaged, without a defined range (32-bit), or over 100 megapixels.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the picture files in it")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is an empty file (0 bytes): copy or export the picture again")
        with warnings.catch_warnings():
            # Pillow warns below its own limit; ours is checked before any pixel is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _decode(image, path)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: check the name") from None
    except PermissionError:
        raise InputError(f"{path} may not be read: give yourself permission (chmod u+r)") from None
    except Image.DecompressionBombError:
        raise _too_large(path) from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{path} is not a picture of a known format: convert it to PNG") from None
    except (
        Exception
    ) as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError ...
        cause = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path} is damaged or cut short ({cause}): copy or export it again"
        ) from None


def check_square(size: int) -> None:
    """Raises InputError for a square picture of too many pixels, which a long and narrow file becomes."""
    if size**2 > 2 * MAX_PIXELS:
        raise InputError(
            f"the picture is too long: its square has {size} pixels a side: scale it down, 1024 are plenty"
        )


def has_alpha(rgba: UInt8[np.ndarray, "H W 4"]) -> bool:
    """Whether any pixel is not opaque: a picture with an alpha channel of 255 throughout has no foreground cut out."""
    return bool((rgba[..., 3] < 255).any())


def key_out_background(
    rgba: UInt8[np.ndarray, "H W 4"], tolerance: int = 16
) -> UInt8[np.ndarray, "H W 4"] | None:
    """Makes a background of one colour transparent: what has the border's colour and is connected to the border.

    Args:
      tolerance: levels of 255 by which a background pixel may differ, in any channel.

    Returns:
      None where more than 2% of the border differ from its median colour: then the background is not of one colour.
    """
    rgb = rgba[..., :3].astype(np.int16)
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    colour = np.median(border, axis=0)
    background = (np.abs(rgb - colour) <= tolerance).all(-1)
    on_border = np.zeros_like(background)
    on_border[[0, -1]] = on_border[:, [0, -1]] = True
    if background[on_border].mean() < 0.98:
        return None
    regions, _ = ndimage.label(background)
    background &= np.isin(regions, regions[on_border])
    return np.concatenate([rgba[..., :3], np.where(background, 0, 255)[..., None]], -1).astype(
        np.uint8
    )


def recenter_foreground(
    rgba: UInt8[np.ndarray, "H W 4"], ratio: float
) -> UInt8[np.ndarray, "S S 4"]:
    """The square of `foreground_square`."""
    return foreground_square(rgba, ratio)[0]


def foreground_square(
    rgba: UInt8[np.ndarray, "H W 4"], ratio: float
) -> tuple[UInt8[np.ndarray, "S S 4"], tuple[int, int]]:
    """Crops to the foreground (alpha > 0) and pads it with transparency to a square that it fills to `ratio`.

    TripoSR's preparation (https://github.com/VAST-AI-Research/TripoSR/blob/d26e331/tsr/utils.py#L58-L81).

    Args:
      ratio: the longer side of the foreground over the side of the square, in (0, 1].

    Returns:
      The square, and the (row, column) in the picture of its upper left corner, which may lie outside.

    Raises:
      InputError: no pixel has alpha > 0, but in the last row and column of the foreground.
    """
    rows, columns = np.nonzero(rgba[..., 3])
    if rows.size == 0:
        raise InputError(
            "the picture is transparent everywhere: give one whose alpha channel shows the object"
        )
    # Parity: the reference's slice ends before the last row and column.
    bottom, right = max(rows.max(), rows.min() + 1), max(columns.max(), columns.min() + 1)
    foreground = rgba[rows.min() : bottom, columns.min() : right]
    if not foreground[..., 3].any():
        raise InputError("the picture's foreground is two pixels: give a larger picture")
    height, width = foreground.shape[:2]
    longer = max(height, width)
    size = max(int(longer / ratio), longer)
    check_square(size)
    # Parity: padded twice, to a square and then to the ratio, each time rounding down at the top and the left.
    margin = (size - longer) // 2
    top, left = margin + (longer - height) // 2, margin + (longer - width) // 2
    square = np.zeros((size, size, 4), np.uint8)
    square[top : top + height, left : left + width] = foreground
    return square, (int(rows.min()) - top, int(columns.min()) - left)


def blend(rgba: UInt8[np.ndarray, "H W 4"], background: float) -> Float[np.ndarray, "H W 3"]:
    """The picture on a background of one grey level in [0, 1], as float32 in [0, 1]: what OpenLRM resizes."""
    straight = rgba.astype(np.float32) / 255
    alpha = straight[..., 3:]
    return straight[..., :3] * alpha + (1 - alpha) * np.float32(background)


def composite(rgba: UInt8[np.ndarray, "H W 4"], background: float) -> UInt8[np.ndarray, "H W 3"]:
    """`blend` cut down to 8 bits, as TripoSR has it (https://github.com/VAST-AI-Research/TripoSR/blob/d26e331/run.py#L139-L151)."""
    # Parity: truncated, not rounded.
    return (blend(rgba, background) * 255).astype(np.uint8)


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


def _decode(image: Image.Image, path: Path) -> UInt8[np.ndarray, "H W 4"]:
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(path)
    if getattr(image, "n_frames", 1) > 1:
        _log.warning("%s has %d frames: the first is used", path, image.n_frames)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        alpha = np.where(values == image.info.get("transparency", -1), 0, 255)
        # The high byte, as Pillow itself reduces 16-bit colour pictures.
        return np.stack([values >> 8] * 3 + [alpha], axis=-1).astype(np.uint8)
    if image.mode in ("I", "F"):
        raise InputError(
            f"{path} has 32-bit pixels, whose range is not defined: save it with 8 or 16 bits"
        )
    if image.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa"):
        image = image.convert("RGB")
    return np.array(image.convert("RGBA"))


def _too_large(path: Path) -> InputError:
    return InputError(
        f"{path} has over {MAX_PIXELS // 10**6} megapixels: scale it down, 1024 pixels a side are plenty"
    )
