"""LPIPS with VGG16: how different two images look (Zhang et al. 2018, https://arxiv.org/abs/1801.03924).

Version 0.1 of https://github.com/richzhang/PerceptualSimilarity, with its `normalize=True`: the loss of LRM and OpenLRM, and
the metric of all families. The weights are two public files, converted once:

    lrm convert vgg16-397923af.pth lpips_vgg16.safetensors --linear vgg.pth
"""

import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float

from lrm_jax.metrics import vgg
from lrm_jax.weights import tensor_files

NETWORK = "lpips_vgg16"
NUM_CONVS = (2, 2, 3, 3, 3)
SHAPES = vgg.conv_shapes(NUM_CONVS) | {f"linear{i}": (c,) for i, c in enumerate(vgg.WIDTHS, 1)}
# From [-1, 1] to the range that VGG16 was trained on: lpips/lpips.py, class ScalingLayer.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
REMEDY = (
    "make it with `lrm convert vgg16-397923af.pth lpips_vgg16.safetensors --linear vgg.pth` from"
    " https://download.pytorch.org/models/vgg16-397923af.pth and lpips/weights/v0.1/vgg.pth of the PyPI package lpips"
)


def distance(
    params: Mapping,
    x: Float[Array, "*B H W 3"],
    y: Float[Array, "*B H W 3"],
    dtype: str = "float32",
) -> Float[Array, "*B"]:
    """The distance between each pair of images, in float32; its gradient is finite everywhere.

    Sec. 3.1 and eq. 1 of the paper: squared differences of unit-length features, weighted by channel, averaged over pixels
    and summed over the five blocks.

    Args:
      params: from `load`.
      x: sRGB in [0, 1], opaque; at least 16 pixels wide and high.
      y: the same for the other images.
      dtype: of the convolutions and their features: "float32", or "bfloat16" for a loss. All else is float32.

    Raises:
      InputError: the images are smaller.
    """
    total = jnp.zeros(x.shape[:-3], jnp.float32)
    features = (_features(params, images, dtype) for images in (x, y))
    for i, (fx, fy) in enumerate(zip(*features, strict=True), 1):
        weighted = jnp.square(_unit(fx) - _unit(fy)) * params[f"linear{i}"][None, None, None]
        total += weighted.sum(-1).mean((-2, -1)).reshape(total.shape)
    return total


def _features(params, rgb, dtype):
    rgb = rgb.astype(jnp.float32).reshape(-1, *rgb.shape[-3:])
    x = (2 * rgb - 1 - jnp.array(SHIFT)[None, None, None]) / jnp.array(SCALE)[None, None, None]
    return vgg.features(params, x.astype(dtype), NUM_CONVS, NUM_CONVS, vgg.max_pool)


def _unit(x):
    """Features of unit length, in float32.

    Parity: the reference adds 1e-10 to the length. The lower bound keeps the root's gradient finite if all are zero.
    """
    x = x.astype(jnp.float32)
    length = jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-30))
    return x / (length + 1e-10)


# -- weights


def load(path: str | os.PathLike) -> dict[str, jax.Array | dict]:
    """The parameters in a file that `lrm convert` made, as NumPy arrays.

    Raises:
      InputError: the file is missing or holds something else; the message has the remedy.
    """
    return vgg.load(path, NETWORK, SHAPES, REMEDY)


def from_torch(
    backbone: Mapping[str, np.ndarray], linear: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray | dict]:
    """The parameters from torchvision's VGG16 (`features.*`; `classifier.*` is not used) and LPIPS's heads (`lin*`).

    Raises:
      InputError: tensors are missing, extra or mis-shaped.
    """
    backbone = {k: v for k, v in backbone.items() if not k.startswith("classifier.")}
    names = _torch_names()
    wanted = {name: _torch_shape(SHAPES[ours]) for name, ours in names.items()}
    heads = {f"lin{i}.model.1.weight": f"linear{i + 1}" for i in range(len(vgg.WIDTHS))}
    wanted_heads = {name: (1, *SHAPES[ours], 1, 1) for name, ours in heads.items()}
    for found, shapes, title in (
        (backbone, wanted, "torchvision's VGG16"),
        (linear, wanted_heads, "LPIPS's linear heads for VGG16"),
    ):
        tensor_files.check_names({k: v.shape for k, v in found.items()}, shapes, title)
    params = {ours: _from_torch_layout(backbone[name]) for name, ours in names.items()}
    params |= {ours: linear[name].reshape(-1) for name, ours in heads.items()}
    return unflatten_dict({k: np.asarray(v, np.float32) for k, v in params.items()}, sep=".")


def _torch_names():
    """Maps torchvision's names to ours. Its index counts convolutions, ReLUs and pools together."""
    names, index = {}, 0
    for block, count in enumerate(NUM_CONVS, 1):
        for number in range(1, count + 1):
            names[f"features.{index}.weight"] = f"conv{block}_{number}.kernel"
            names[f"features.{index}.bias"] = f"conv{block}_{number}.bias"
            index += 2
        index += 1
    return names


def _torch_shape(shape):
    return shape if len(shape) == 1 else (shape[3], shape[2], *shape[:2])


def _from_torch_layout(value):
    return value if value.ndim == 1 else value.transpose(2, 3, 1, 0)
