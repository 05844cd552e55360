"""Gives a trained TripoSR smaller patches and more tokens per plane, as a starting point for further training.

    python tools/finer_tokens.py runs/nano runs/start.safetensors --variant nano-fine
    lrm train --config configs/nano.py:fine --workdir runs/fine --config.train.init_from=runs/start.safetensors

This does not train. It keeps what the model has learnt, as far as possible:

* The ViT's patches of p pixels become patches of p / k. The new kernel gives what the old one gives for an image enlarged k times by
  repeating pixels (https://arxiv.org/abs/2212.08013, section 3.3, for this enlargement).
* The ViT's grid of positions and the planes' queries are interpolated linearly between the centres of the tokens.
* A token of a plane now covers a smaller square. The upsampler's new kernel is the interpolated middle of the old one.

All other fields of the models must be the same.

Exit code: 0 written; 2 nothing was written.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lrm_jax import models
from lrm_jax.types import InputError
from lrm_jax.weights import loading, model_file


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", help="trained model, as for `lrm reconstruct --weights`")
    parser.add_argument("dst", type=Path, help="model file to write")
    parser.add_argument("--variant", required=True, help="variant of TripoSR to write")
    args = parser.parse_args(argv)
    try:
        fine = models.build("triposr", args.variant)
        coarse, params, info = loading.load_weights(args.src)
        model_file.save_model(args.dst, fine, refine(params, coarse, fine), info["training"])
    except (InputError, ValueError, OSError) as error:
        print(f"finer_tokens: {error}", file=sys.stderr)
        return 2
    print(args.dst)
    return 0


def refine(params: dict, coarse, fine) -> dict:
    """Parameters with which `fine` gives about the same output for an image as `coarse` with `params`.

    Raises:
      InputError: `coarse` is not a TripoSR, or the models differ in more than their tokens.
    """
    if models.name_of(coarse) != "triposr":
        raise InputError(f"the model is of the family {models.name_of(coarse)}: give a TripoSR")
    tokens = dict(plane_tokens=fine.plane_tokens, upsample=fine.upsample)
    encoder = {**coarse.encoder, **{k: fine.encoder[k] for k in ("patch", "grid")}}
    there, wanted = (
        model_file.fields_of(x) for x in (coarse.clone(encoder=encoder, **tokens), fine)
    )
    if wrong := [k for k in wanted if there[k] != wanted[k]]:
        raise InputError(
            f"{wrong[0]} is {there[wrong[0]]} in the given model and {wanted[wrong[0]]} in the variant: the two may differ only in their tokens"
        )
    flat = {name: np.asarray(x) for name, x in flatten_dict(params, sep="/").items()}
    kernel, positions = "image_tokenizer/patch_kernel", "image_tokenizer/positions"
    flat[kernel] = smaller_patches(flat[kernel], fine.encoder["patch"])
    flat[positions] = finer_positions(flat[positions], fine.encoder["grid"])
    queries = centres(fine.plane_tokens, coarse.plane_tokens)
    flat["plane_queries"] = resampled(flat["plane_queries"], queries)
    ratio = coarse.plane_tokens / fine.plane_tokens
    cells = centres(fine.upsample, ratio * coarse.upsample) + (1 - ratio) * coarse.upsample / 2
    flat["upsampler/kernel"] = resampled(flat["upsampler/kernel"], cells)
    return unflatten_dict(flat, sep="/")


def smaller_patches(kernel: np.ndarray, patch: int) -> np.ndarray:
    """The kernel [patch patch 3 D] that gives for an image what `kernel` [p p 3 D] gives for the image enlarged p / patch times."""
    factor, rest = divmod(len(kernel), patch)
    if rest:
        raise InputError(
            f"patches of {len(kernel)} pixels cannot be divided into patches of {patch}"
        )
    blocks = kernel.reshape(patch, factor, patch, factor, *kernel.shape[2:])
    return blocks.sum((1, 3))


def finer_positions(positions: np.ndarray, grid: int) -> np.ndarray:
    """Positions [1 1+grid^2 D] from [1 1+g^2 D]. The first one belongs to CLS."""
    cls, old = positions[:, :1], math.isqrt(positions.shape[1] - 1)
    table = resampled(positions[:, 1:].reshape(1, old, old, -1), centres(grid, old))
    return np.concatenate([cls, table.reshape(1, grid**2, -1)], axis=1)


def centres(count: int, length: float) -> np.ndarray:
    """The centres of `count` equal cells that divide `length`. The origin is the centre of a cell of length 1 at the beginning."""
    return (np.arange(count) + 0.5) * length / count - 0.5


def resampled(table: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Samples a table [A h w C] at places [n] along both axes, by linear interpolation, or extrapolation outside: [A n n C]."""
    size = table.shape[1]
    below = np.clip(np.floor(places), 0, size - 2).astype(int)
    weights = np.zeros((len(places), size), np.float32)
    weights[np.arange(len(places)), below] = below + 1 - places
    weights[np.arange(len(places)), below + 1] = places - below
    return np.einsum("iy,jx,ayxc->aijc", weights, weights, table).astype(np.float32)


if __name__ == "__main__":
    sys.exit(main())
