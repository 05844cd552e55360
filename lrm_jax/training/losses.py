"""Loss terms by name: each a small pure function of the rendered and the target views, in float32.

A config names the terms that it wants and their weights: `losses = {"mse": 1.0, "mask": 0.05}`. Two of them look through a
frozen network, whose file the config names too: `networks = {"lpips": "lpips_vgg16.safetensors"}`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from lrm_jax.metrics import lpips, perceptual
from lrm_jax.types import InputError, Rendering

NETWORKS = {"lpips": lpips, "perceptual": perceptual}  # the term's name is the network's too
TERMS = ("mse", "mask", "mask_mse", "tv", *NETWORKS)


def terms(
    rendering: Rendering,
    target: Rendering,
    weights: Mapping[str, float],
    *,
    scene=None,
    networks: Mapping[str, Mapping] | None = None,
) -> dict[str, jax.Array]:
    """Every term whose weight is not 0, unweighted; the others are not computed.

    Args:
      rendering: [B V H W], opaque colour: composited on the background of the target.
      target: what a perfect model would render.
      weights: by term.
      scene: what `encode` returned, for "tv".
      networks: parameters by term, for "lpips" and "perceptual": arguments of the step, not constants in it.

    Raises:
      InputError: a term that does not exist, or that lacks what it needs; the message names the config's key.
    """
    networks = networks or {}
    check(weights, networks)
    compute = {
        "mse": lambda: mse(rendering, target),
        "mask": lambda: mask(rendering, target),
        "mask_mse": lambda: mask_mse(rendering, target),
        "tv": lambda: tv(scene),
        "lpips": lambda: lpips.distance(networks["lpips"], rendering.rgb, target.rgb).mean(),
        "perceptual": lambda: perceptual.distance(
            networks["perceptual"], rendering.rgb, target.rgb
        ).mean(),
    }
    return {name: compute[name]() for name, weight in weights.items() if weight}


def check(weights: Mapping[str, float], networks: Mapping[str, object]) -> None:
    """Raises InputError for a term that does not exist, and for one whose network is not in `networks` (files or parameters)."""
    if unknown := sorted(set(weights) - set(TERMS)):
        raise InputError(f"no loss term {', '.join(unknown)}: there are {', '.join(TERMS)}")
    for name, module in NETWORKS.items():
        if weights.get(name) and not networks.get(name):
            raise InputError(
                f"config.losses.{name}={weights[name]} needs the file of a network: {module.REMEDY}; then set"
                f" config.networks.{name}=FILE, or config.losses.{name}=0"
            )


def load_networks(weights: Mapping[str, float], files: Mapping[str, str]) -> dict[str, dict]:
    """The networks that the terms of non-zero weight need, from their files: `terms`'s `networks`, as NumPy arrays.

    Raises:
      InputError: as `check`, and for a file that is missing or holds something else.
    """
    check(weights, files)
    if unknown := sorted(set(files) - set(NETWORKS)):
        raise InputError(f"no network {', '.join(unknown)}: there are {', '.join(NETWORKS)}")
    return {name: NETWORKS[name].load(files[name]) for name in NETWORKS if weights.get(name)}


def abstract_networks(weights: Mapping[str, float]) -> dict[str, dict]:
    """The shapes of what `load_networks` returns: their files need not be there."""

    def shapes(network):
        structs = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in network.SHAPES.items()}
        return unflatten_dict(structs, sep=".")

    return {name: shapes(NETWORKS[name]) for name in NETWORKS if weights.get(name)}


# -- the terms


def mse(rendering: Rendering, target: Rendering) -> jax.Array:
    """Mean squared error of colour, both composited on the same background. LRM, eq. 6 (https://arxiv.org/abs/2311.04400)."""
    return jnp.square(rendering.rgb.astype(jnp.float32) - target.rgb.astype(jnp.float32)).mean()


def mask(rendering: Rendering, target: Rendering) -> jax.Array:
    """Binary cross-entropy of alpha. TripoSR, section 2.3 (https://arxiv.org/abs/2403.02151), which weights it by 0.05.

    The prediction is squeezed into [0.001, 0.999]: finite where a ray saturates, and, unlike clipping, with a gradient there.
    """
    alpha = 1e-3 + (1 - 2e-3) * _alpha(rendering, "mask")
    label = target.alpha.astype(jnp.float32)
    return -(label * jnp.log(alpha) + (1 - label) * jnp.log1p(-alpha)).mean()


def mask_mse(rendering: Rendering, target: Rendering) -> jax.Array:
    """Mean squared error of alpha, the milder form (InstantMesh, src/model.py:243-257)."""
    return jnp.square(_alpha(rendering, "mask_mse") - target.alpha.astype(jnp.float32)).mean()


def tv(scene) -> jax.Array:
    """Total variation of the planes: the mean squared difference of neighbours in a column, plus that of neighbours in a row.

    OpenLRM, openlrm/losses/tvloss.py, which weights it by 5e-4; each mean is over scenes, planes, channels and pairs.
    """
    if not isinstance(scene, Mapping) or "triplane" not in scene:
        raise InputError(
            "config.losses.tv: the scenes of this model family have no planes: set config.losses.tv=0"
        )
    planes_BPhwC = scene["triplane"].astype(jnp.float32)
    columns, rows = (jnp.square(jnp.diff(planes_BPhwC, axis=axis)).mean() for axis in (2, 3))
    return columns + rows


def _alpha(rendering, name):
    if rendering.alpha is None:
        raise InputError(
            f"config.losses.{name}: this model family renders no alpha: set config.losses.{name}=0"
        )
    return rendering.alpha.astype(jnp.float32)
