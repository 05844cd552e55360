"""From an image file to an array [H W 4]."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from lrm_jax.images.png import to_uint8
from lrm_jax.types import InputError

MAX_PIXELS = 100_000_000
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_log = logging.getLogger(__name__)


def load_image(image: str | Path | Image.Image | np.ndarray) -> UInt8[np.ndarray, "H W 4"]:
    """Loads an image as 8-bit sRGB with straight alpha (255 if it has no alpha channel).

    Any file that Pillow reads will do. 16-bit images are scaled to 8 bits; grey, palette and CMYK images become RGB; the
    EXIF orientation is applied. Of an animation the first frame is used, with a warning in the log.

    Args:
      image: a path, a PIL image, or an array [H W], [H W 3] or [H W 4]: uint8, or floats in [0, 1].

    Raises:
      InputError: an array of another shape or range; a file that is missing, not an image, damaged, 32-bit (its range is not
        defined), or over 100 megapixels.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        return _decode(image, "the image")
    path = Path(image)
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the image files in it")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is an empty file (0 bytes): copy or export the image again")
        with warnings.catch_warnings():
            # Pillow warns below its own limit. We check ours before any pixel is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                return _decode(opened, path)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: check the name") from None
    except PermissionError:
        raise InputError(f"{path} cannot be read: give yourself permission (chmod u+r)") from None
    except Image.DecompressionBombError:
        raise _too_large(path) from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{path} is not an image of a known format: convert it to PNG") from None
    except (
        Exception
    ) as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError ...
        cause = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path} is damaged or cut short ({cause}): copy or export it again"
        ) from None


def find_images(names: Sequence[str | Path]) -> list[Path]:
    """The named files, and the images in the named folders.

    Raises:
      InputError: a folder has no images.
    """
    paths = []
    for path in map(Path, names):
        if path.is_dir():
            found = sorted(x for x in path.iterdir() if x.suffix.lower() in SUFFIXES)
            if not found:
                raise InputError(
                    f"{path} has no images: give a folder with {', '.join(sorted(SUFFIXES))} files"
                )
            paths += found
        else:
            paths.append(path)
    return paths


def has_alpha(rgba: UInt8[np.ndarray, "H W 4"]) -> bool:
    """Whether any pixel is not opaque. An alpha channel of 255 everywhere does not count: nothing is cut out."""
    return bool((rgba[..., 3] < 255).any())


def _from_array(image: np.ndarray) -> UInt8[np.ndarray, "H W 4"]:
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=-1)
    if image.ndim != 3 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        raise InputError(
            f"an array of shape {list(image.shape)} is not an image: give [height, width, 3 or 4]"
        )
    if np.issubdtype(image.dtype, np.floating):
        if not (image.min() >= 0 and image.max() <= 1):  # NaN fails both
            raise InputError("an array of floats must lie in [0, 1]: divide by 255, or give uint8")
        image = to_uint8(image)
    elif image.dtype != np.uint8:
        raise InputError(
            f"an array of {image.dtype} is not an image: give uint8, or floats in [0, 1]"
        )
    opaque = np.full((*image.shape[:2], 1), 255, np.uint8)
    return image.copy() if image.shape[-1] == 4 else np.concatenate([image, opaque], axis=-1)


def _decode(image: Image.Image, path: Path | str) -> UInt8[np.ndarray, "H W 4"]:
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(path)
    if getattr(image, "n_frames", 1) > 1:
        _log.warning("%s has %d frames: the first is used", path, image.n_frames)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        alpha = np.where(values == image.info.get("transparency", -1), 0, 255)
        # The high byte, as Pillow itself converts 16-bit colour images.
        return np.stack([values >> 8] * 3 + [alpha], axis=-1).astype(np.uint8)
    if image.mode in ("I", "F"):
        raise InputError(
            f"{path} has 32-bit pixels, whose range is not defined: save it with 8 or 16 bits"
        )
    if image.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa"):
        image = image.convert("RGB")
    return np.array(image.convert("RGBA"))


def _too_large(path: Path | str) -> InputError:
    return InputError(
        f"{path} has over {MAX_PIXELS // 10**6} megapixels: scale it down, 1024 pixels a side is plenty"
    )
