"""LVSM's perceptual loss: differences of VGG19 features with average pooling (https://arxiv.org/abs/2410.17242, section 3.3).

The network and the weights of its layers in the loss are those of Chen and Koltun 2017 (https://arxiv.org/abs/1707.09405). The
file from https://www.vlfeat.org/matconvnet/pretrained is converted once:

    lrm convert imagenet-vgg-verydeep-19.mat vgg19.safetensors
"""

import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float

from lrm_jax.metrics import vgg
from lrm_jax.types import InputError
from lrm_jax.weights import tensor_files

NETWORK = "perceptual_vgg19"
NUM_CONVS = (2, 2, 4, 4, 2)  # VGG19 has two more in its last block, which are not used
TAPS = (2, 2, 2, 2, 2)
SHAPES = vgg.conv_shapes(NUM_CONVS)
MEAN = (123.68, 116.779, 103.939)  # ImageNet's RGB, in [0, 255]
DIVISORS = (2.6, 4.8, 3.7, 5.6, 1.5 / 10)  # LVSM's model/loss.py, lines 24-119
REMEDY = (
    "make it with `lrm convert imagenet-vgg-verydeep-19.mat vgg19.safetensors` from"
    " https://www.vlfeat.org/matconvnet/models/imagenet-vgg-verydeep-19.mat"
)


def distance(
    params: Mapping,
    x: Float[Array, "*B H W 3"],
    y: Float[Array, "*B H W 3"],
    dtype: str = "float32",
) -> Float[Array, "*B"]:
    """The mean absolute difference of each pair of images and of their features, in float32.

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
    for divisor, fx, fy in zip((1.0, *DIVISORS), *features, strict=True):
        difference = jnp.abs(fx.astype(jnp.float32) - fy.astype(jnp.float32))
        total += difference.mean((-3, -2, -1)).reshape(total.shape) / divisor
    return total / 255


def _features(params, rgb, dtype):
    """The images in VGG's input range (0 to 255, minus the mean) in float32, and the five activations."""
    rgb = rgb.astype(jnp.float32).reshape(-1, *rgb.shape[-3:])
    x = 255 * rgb - jnp.array(MEAN)[None, None, None]
    return [x, *vgg.features(params, x.astype(dtype), NUM_CONVS, TAPS, vgg.average_pool)]


# -- weights


def load(path: str | os.PathLike) -> dict[str, dict[str, jax.Array]]:
    """The parameters in a file that `lrm convert` made, as NumPy arrays.

    Raises:
      InputError: the file is missing or holds something else; the message has the remedy.
    """
    return vgg.load(path, NETWORK, SHAPES, REMEDY)


def from_matconvnet(content: Mapping) -> dict[str, dict[str, np.ndarray]]:
    """The parameters from a MatConvNet model, as `tensor_files.read` returns it: a list `layers` of structs.

    Its filters are [height width in out] (https://www.vlfeat.org/matconvnet/mfiles/vl_nnconv), like ours. Its layers have a
    `name`, a `type` and, if that is "conv", `weights`: filters and biases.

    Raises:
      InputError: the structure is different, or tensors are missing, extra or mis-shaped.
    """
    try:
        layers = {
            layer["name"]: layer["weights"]
            for layer in content["layers"]
            if layer["type"] == "conv" and layer["name"].startswith("conv")
        }
        found = {}
        for name, (kernel, bias) in layers.items():
            found |= {f"{name}.kernel": np.asarray(kernel), f"{name}.bias": np.ravel(bias)}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(
            f"not a MatConvNet model of VGG19 ({type(error).__name__}: {error}): {REMEDY}"
        ) from error
    found = {k: v for k, v in found.items() if not k.startswith(("conv5_3.", "conv5_4."))}
    tensor_files.check_names({k: v.shape for k, v in found.items()}, SHAPES, "MatConvNet's VGG19")
    return unflatten_dict({k: np.asarray(v, np.float32) for k, v in found.items()}, sep=".")
