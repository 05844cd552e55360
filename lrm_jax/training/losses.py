"""Loss terms by name. Each is a small pure function of the rendered and the target views, in float32.

A config lists terms and their weights: `losses = {"mse": 1.0, "mask": 0.05}`. Two terms, "lpips" and "perceptual", use a frozen
network, and the config must also name its file: `networks = {"lpips": "lpips_vgg16.safetensors"}`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from lrm_jax.metrics import lpips, perceptual
from lrm_jax.types import InputError, Rendering

NETWORKS = {
    "lpips": lpips,
    "perceptual": perceptual,
}  # by the name of the term, which is also that of the network
TERMS = ("mse", "mask", "mask_mse", "tv", *NETWORKS)


def terms(
    rendering: Rendering,
    target: Rendering,
    weights: Mapping[str, float],
    *,
    scene=None,
    networks: Mapping[str, Mapping] | None = None,
    dtype: str = "float32",
) -> dict[str, jax.Array]:
    """The value of every term with a non-zero weight, not multiplied by the weight. Other terms are not computed.

    Args:
      rendering: [B V H W], opaque colour, composited on the background of the target.
      target: what a perfect model would render.
      weights: weights by term.
      scene: the result of `encode`, for "tv".
      networks: parameters by term, for "lpips" and "perceptual". Pass them as arguments of the step, not as constants.
      dtype: of the convolutions of these networks: that of the model. All else is float32.

    Raises:
      InputError: a term does not exist, or lacks something that it needs. The message names the config key.
    """
    networks = networks or {}
    check(weights, networks)

    def of_features(name):
        network = NETWORKS[name]
        return network.distance(networks[name], rendering.rgb, target.rgb, dtype).mean()

    compute = {
        "mse": lambda: mse(rendering, target),
        "mask": lambda: mask(rendering, target),
        "mask_mse": lambda: mask_mse(rendering, target),
        "tv": lambda: tv(scene),
        "lpips": lambda: of_features("lpips"),
        "perceptual": lambda: of_features("perceptual"),
    }
    return {name: compute[name]() for name, weight in weights.items() if weight}


def check(
    weights: Mapping[str, float], networks: Mapping[str, object], own: tuple[str, ...] = ()
) -> None:
    """Raises InputError if a term does not exist, or if its network is missing from `networks` (files or parameters).

    Args:
      own: terms of the model family's `objective`.
    """
    known = (*TERMS, *own)
    if unknown := sorted(set(weights) - set(known)):
        raise InputError(f"no loss term {', '.join(unknown)}: choose from {', '.join(known)}")
    if not any(weights.values()):
        raise InputError(f"config.losses: no term has a weight: choose from {', '.join(known)}")
    for name, module in NETWORKS.items():
        if weights.get(name) and not networks.get(name):
            raise InputError(
                f"config.losses.{name}={weights[name]} needs a network file: {module.REMEDY}; then set"
                f" config.networks.{name}=FILE, or config.losses.{name}=0"
            )


def load_networks(
    weights: Mapping[str, float], files: Mapping[str, str], own: tuple[str, ...] = ()
) -> dict[str, dict]:
    """Loads the networks that terms with non-zero weights need: the argument `networks` of `terms`, as NumPy arrays.

    Raises:
      InputError: as in `check`; or a file is missing, or is not the file of this network.
    """
    check(weights, files, own)
    if unknown := sorted(set(files) - set(NETWORKS)):
        raise InputError(f"no network {', '.join(unknown)}: choose from {', '.join(NETWORKS)}")
    return {name: NETWORKS[name].load(files[name]) for name in NETWORKS if weights.get(name)}


def abstract_networks(weights: Mapping[str, float]) -> dict[str, dict]:
    """The shapes of the result of `load_networks`. Does not need the files."""

    def shapes(network):
        structs = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in network.SHAPES.items()}
        return unflatten_dict(structs, sep=".")

    return {name: shapes(NETWORKS[name]) for name in NETWORKS if weights.get(name)}


# -- the terms


def mse(rendering: Rendering, target: Rendering) -> jax.Array:
    """Mean squared error of colour, both on the same background. LRM, eq. 6 (https://arxiv.org/abs/2311.04400)."""
    return jnp.square(rendering.rgb.astype(jnp.float32) - target.rgb.astype(jnp.float32)).mean()


def mask(rendering: Rendering, target: Rendering) -> jax.Array:
    """Binary cross-entropy of alpha. TripoSR, section 2.3 (https://arxiv.org/abs/2403.02151), which weights it by 0.05.

    The prediction is scaled to [0.001, 0.999]: where a ray saturates, the loss stays finite and, unlike with clipping, the
    gradient is not 0.
    """
    alpha = 1e-3 + (1 - 2e-3) * _alpha(rendering, "mask")
    label = target.alpha.astype(jnp.float32)
    return -(label * jnp.log(alpha) + (1 - label) * jnp.log1p(-alpha)).mean()


def mask_mse(rendering: Rendering, target: Rendering) -> jax.Array:
    """Mean squared error of alpha, a milder form of `mask` (InstantMesh, src/model.py:243-257)."""
    return jnp.square(_alpha(rendering, "mask_mse") - target.alpha.astype(jnp.float32)).mean()


def tv(scene) -> jax.Array:
    """Total variation of the planes: the mean squared difference between neighbours in a column, plus the same in a row.

    As in OpenLRM, openlrm/losses/tvloss.py, which weights it by 5e-4. Each mean is over scenes, planes, channels and pairs.
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
