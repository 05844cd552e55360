"""Straight, premultiplied and composited: views and renderings on backgrounds."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from lrm_jax.types import Rendering, Views


def as_float(x: Num[Array | np.ndarray, "*B"]) -> Float[Array | np.ndarray, "*B"]:
    """Images in [0, 1]: 8-bit ones are divided by 255."""
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x


def on_background(views: Views, background: float) -> Views:
    """Opaque float views, composited on a grey where they have an alpha channel."""
    whole = premultiplied(views)
    return views.replace(rgb=whole.rgb + background * (1 - whole.alpha[..., None]), alpha=None)


def premultiplied(views: Views) -> Rendering:
    """Views as what a perfect model would render: premultiplied colour and alpha, 1 where the image has none."""
    rgb = as_float(views.rgb)
    if views.alpha is None:
        return Rendering(rgb=rgb, alpha=jnp.ones(rgb.shape[:-1]))
    alpha = as_float(views.alpha)
    return Rendering(rgb=rgb * alpha[..., None], alpha=alpha)


def blend(rendering: Rendering, background: Float[Array | np.ndarray, "*B"] | float) -> Rendering:
    """A rendering's premultiplied colour on `background` ([B V 1 1 3], or a grey); as it is where the family draws its own."""
    if rendering.alpha is None:
        return rendering
    return rendering.replace(rgb=rendering.rgb + background * (1 - rendering.alpha[..., None]))
