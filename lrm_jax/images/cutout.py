"""Cut-outs: removing the background of an image, and putting an object on a new background."""

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
    """The image with a transparent background: by its own alpha channel, by rembg, or because the background is of one colour.

    Args:
      name: of the image, for messages.
      remove_background: use rembg if there is no alpha channel.

    Raises:
      InputError: the object cannot be told from the background, or there is none; rembg is missing or fails.
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
                "%s has no alpha channel: the colour of its border is the background", name
            )
            rgba = keyed
    if not rgba[..., 3].any():
        raise InputError(f"{name} shows no object, all is background: give another image")
    return rgba


def run_rembg(rgba: np.ndarray) -> np.ndarray:
    """Removes the background with rembg's U2-Net, which rembg downloads on first use."""
    try:
        import rembg
    except (ImportError, SystemExit):  # rembg exits if its runtime is missing
        raise InputError(
            "--remove-background needs rembg: pip install 'lrm_jax[background]'"
        ) from None
    try:
        # The model is named because rembg's default changes between versions.
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
    """Makes a background of one colour transparent: the pixels that have the border's colour and are connected to it.

    Args:
      tolerance: levels (of 255) by which a background pixel may differ, in any channel.

    Returns:
      The image, or None if more than 2% of the border differs from its median colour: the background is not of one colour then.
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
    """The image on a grey background in [0, 1], as float32 in [0, 1]: the input of OpenLRM's resize."""
    straight = rgba.astype(np.float32) / 255
    alpha = straight[..., 3:]
    return straight[..., :3] * alpha + (1 - alpha) * np.float32(background)


def composite(rgba: UInt8[np.ndarray, "H W 4"], background: float) -> UInt8[np.ndarray, "H W 3"]:
    """`blend` in 8 bits, as in TripoSR (https://github.com/VAST-AI-Research/TripoSR/blob/d26e331/run.py#L139-L151)."""
    # Parity: truncated, not rounded.
    return (blend(rgba, background) * 255).astype(np.uint8)
