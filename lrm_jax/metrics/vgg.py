"""The convolutions of VGG (https://arxiv.org/abs/1409.1556), whose features two losses compare, and files of their weights.

A frozen network's parameters are a dict: `conv<block>_<number>` with `kernel` [3 3 in out] and `bias` [out].
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from lrm_jax.types import InputError
from lrm_jax.weights import tensor_files

WIDTHS = (64, 128, 256, 512, 512)  # of the five blocks
FORMAT = {"format": "lrm_jax network", "version": "1"}


def features(
    params: Mapping,
    x: Float[Array, "N H W 3"],
    num_convs: tuple[int, ...],
    taps: tuple[int, ...],
    pool: Callable[[jax.Array], jax.Array],
) -> list[jax.Array]:
    """The activations after one convolution of each block, [N H/2^i W/2^i C], computed in the dtype of `x`.

    With float32 images, TPUs still multiply in bfloat16 and GPUs in TF32, which is enough for a loss. For a metric, use
    `jax.default_matmul_precision("highest")`.

    Args:
      params: of one network, float32.
      x: images in the network's input range, float32 or bfloat16.
      num_convs: the number of convolutions in each block; those after its tap are needed only for the next block.
      taps: for each block, the number, from 1, of the convolution whose activation is returned.
      pool: halves height and width between the blocks.

    Raises:
      InputError: the images are so small that they vanish in the last block.
    """
    smallest = 2 ** (len(taps) - 1)
    if min(x.shape[1:3]) < smallest:
        raise InputError(
            f"images of {x.shape[1]} x {x.shape[2]} pixels are too small for VGG, which halves them"
            f" {len(taps) - 1} times: make them {smallest} or larger (config.train.patch), or set its loss weight to 0"
        )
    found = []
    for block, (count, tap) in enumerate(zip(num_convs, taps, strict=True), 1):
        x = pool(x) if block > 1 else x
        for number in range(1, count + 1):
            x = jax.nn.relu(_conv(params[f"conv{block}_{number}"], x))
            if number == tap:
                found.append(x)
    return found


def _conv(params, x):
    kernel, bias = (params[name].astype(x.dtype) for name in ("kernel", "bias"))
    x = jax.lax.conv_general_dilated(
        x, kernel, window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )  # fmt: skip
    return x + bias[None, None, None]


def max_pool(x: Float[Array, "N H W C"]) -> Float[Array, "N H/2 W/2 C"]:
    """The maximum of each 2 x 2 pixels; an odd last row or column is left out.

    Not `reduce_window`, whose gradient is a scatter: on a GPU in 16 bits, this takes longer than all else in a training step.
    """
    N, H, W, C = x.shape
    blocks = x[:, : H // 2 * 2, : W // 2 * 2].reshape(N, H // 2, 2, W // 2, 2, C)
    return blocks.max((2, 4))


def average_pool(x: Float[Array, "N H W C"]) -> Float[Array, "N H/2 W/2 C"]:
    """The mean of each 2 x 2 pixels; an odd last row or column is left out."""
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4


# -- weights


def conv_shapes(num_convs: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters, for the number of convolutions in each block."""
    shapes, width_in = {}, 3
    for block, (width, count) in enumerate(zip(WIDTHS, num_convs, strict=True), 1):
        for number in range(1, count + 1):
            shapes[f"conv{block}_{number}.kernel"] = (3, 3, width_in, width)
            shapes[f"conv{block}_{number}.bias"] = (width,)
            width_in = width
    return shapes


def save(path: Path, params: Mapping, network: str) -> None:
    """Writes the parameters of `network`, whole or not at all.

    Raises:
      InputError: a parameter is not finite.
    """
    tensors = {k: np.asarray(v, np.float32) for k, v in flatten_dict(params, sep=".").items()}
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise InputError(f"{name} has numbers that are not finite: download the file again")
    tensor_files.write_safetensors(path, tensors, FORMAT | {"network": network})


def load(
    path: str | os.PathLike, network: str, shapes: Mapping[str, tuple], remedy: str
) -> dict[str, dict[str, np.ndarray]]:
    """Reads a file that `save` wrote for `network`, as NumPy arrays.

    Args:
      shapes: of the tensors that the file must hold, by dotted name.
      remedy: how to make such a file, for the message.

    Raises:
      InputError: the file is missing, holds something else, or has other tensors than `shapes`.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file, expected the weights of {network}: {remedy}")
    content, metadata = tensor_files.read(path)
    if metadata.get("network") != network or metadata.get("version") != FORMAT["version"]:
        what = metadata.get("network") or metadata.get("family") or "another kind of file"
        raise InputError(f"{path}: not the weights of {network} but {what}: {remedy}")
    found = {name: value.shape for name, value in content.items()}
    try:
        tensor_files.check_names(found, shapes, network)
    except InputError as error:
        raise InputError(f"{path}: {error}; {remedy}") from error
    return unflatten_dict({k: np.asarray(v, np.float32) for k, v in content.items()}, sep=".")
