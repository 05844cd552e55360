"""Straight and premultiplied alpha, and compositing of views and renderings on backgrounds."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from lrm_jax.types import Rendering, Views


def as_float(x: Num[Array | np.ndarray, "*B"]) -> Float[Array | np.ndarray, "*B"]:
    """Images in [0, 1]; 8-bit images are divided by 255."""
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x


def on_background(views: Views, background: float) -> Views:
    """Opaque float views; those with an alpha channel are composited on a grey background."""
    whole = premultiplied(views)
    return views.replace(rgb=whole.rgb + background * (1 - whole.alpha[..., None]), alpha=None)


def premultiplied(views: Views) -> Rendering:
    """What a perfect model would render for these views: premultiplied colour, and alpha (1 if they have none)."""
    rgb = as_float(views.rgb)
    if views.alpha is None:
        return Rendering(rgb=rgb, alpha=jnp.ones(rgb.shape[:-1]))
    alpha = as_float(views.alpha)
    return Rendering(rgb=rgb * alpha[..., None], alpha=alpha)


def blend(rendering: Rendering, background: Float[Array | np.ndarray, "*B"] | float) -> Rendering:
    """Composites a rendering on `background` ([B V 1 1 3], or a grey). Unchanged if the family draws its own background."""
    if rendering.alpha is None:
        return rendering
    return rendering.replace(rgb=rendering.rgb + background * (1 - rendering.alpha[..., None]))
