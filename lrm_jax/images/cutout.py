"""Cut-outs: backgrounds removed where they are of one colour, and put behind an object."""

import functools
import logging

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

from lrm_jax.images.load import has_alpha
from lrm_jax.types import InputError

_log = logging.getLogger(__name__)


def cut_out(
    rgba: UInt8[np.ndarray, "H W 4"], name: str, remove_background: bool = False
) -> UInt8[np.ndarray, "H W 4"]:
    """The image with its background transparent: by its own alpha channel, by rembg, or by its one colour.

    Args:
      name: of the image, for messages.
      remove_background: whether rembg is asked where there is no alpha channel.

    Raises:
      InputError: nothing, or nobody, tells what the object is.
    """
    if not has_alpha(rgba):
        if remove_background:
            rgba = run_rembg(rgba)
        else:
            keyed = key_out_background(rgba)
            if keyed is None:
                raise InputError(
                    f"{name} has no alpha channel, and its background is not of one colour: "
                    "add --remove-background, or cut the object out and save it as PNG"
                )
            _log.warning(
                "%s has no alpha channel: the colour of its border is taken as background", name
            )
            rgba = keyed
    if not rgba[..., 3].any():
        raise InputError(f"{name} shows no object, all is background: give an image with one")
    return rgba


def run_rembg(rgba: np.ndarray) -> np.ndarray:
    """Removes the background with rembg's U2-Net (fetched by rembg when it is first used)."""
    try:
        import rembg
    except (ImportError, SystemExit):  # rembg exits where its runtime is missing
        raise InputError(
            "--remove-background needs rembg: pip install 'lrm_jax[background]'"
        ) from None
    try:
        # Named, as rembg's default model changes between versions.
        return np.asarray(rembg.remove(rgba[..., :3], session=_rembg_session()))
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"rembg failed ({reason}): check the network, or cut the object out yourself"
        ) from None


@functools.cache
def _rembg_session():
    import rembg

    return rembg.new_session("u2net")


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


def blend(rgba: UInt8[np.ndarray, "H W 4"], background: float) -> Float[np.ndarray, "H W 3"]:
    """The image on a background of one grey level in [0, 1], as float32 in [0, 1]: what OpenLRM resizes."""
    straight = rgba.astype(np.float32) / 255
    alpha = straight[..., 3:]
    return straight[..., :3] * alpha + (1 - alpha) * np.float32(background)


def composite(rgba: UInt8[np.ndarray, "H W 4"], background: float) -> UInt8[np.ndarray, "H W 3"]:
    """`blend` cut down to 8 bits, as TripoSR has it (https://github.com/VAST-AI-Research/TripoSR/blob/d26e331/run.py#L139-L151)."""
    # Parity: truncated, not rounded.
    return (blend(rgba, background) * 255).astype(np.uint8)
