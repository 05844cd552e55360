"""Averages the weights of several models into one: a uniform soup (https://arxiv.org/abs/2203.05482, section 2).

    python tools/average_weights.py soup.safetensors runs/first runs/second nano.safetensors --variant nano-symmetric

The models must have been fine-tuned from the same model, otherwise their mean is useless. The result keeps the training record of the
first model. In this record, `averaged` lists all paths, and `steps` is the sum of all steps.

Exit code: 0 written; 2 nothing was written.
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np

from lrm_jax import models
from lrm_jax.types import InputError
from lrm_jax.weights import loading, model_file, references


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dst", type=Path, help="model file to write")
    parser.add_argument(
        "src", nargs="+", help="models to average, as for `lrm reconstruct --weights`"
    )
    parser.add_argument("--variant", help="write this variant of the family, which must have the same parameters (default: the variant of the first model)")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        model, params, training = average(args.src)
        if args.variant is not None:
            model = with_variant(model, args.variant)
        model_file.save_model(args.dst, model, params, training)
    except (InputError, ValueError, OSError) as error:
        print(f"average_weights: {error}", file=sys.stderr)
        return 2
    print(args.dst)
    return 0


def average(paths: list[str]) -> tuple:
    """Returns the model of the first path, the mean of all parameters, and the training record.

    Raises:
      InputError: a model cannot be read, or differs from the first.
    """
    model, params, info = loading.load_weights(paths[0])
    total, steps = jax.tree.map(np.float64, params), info["training"].get("steps", 0)
    for path in paths[1:]:
        other, params, its_info = loading.load_weights(path)
        if other != model:
            raise InputError(
                f"{path}: differs from {paths[0]} in its fields: models to average must be the same"
            )
        total = jax.tree.map(np.add, total, params)
        steps += its_info["training"].get("steps", 0)
    mean = jax.tree.map(lambda x: (x / len(paths)).astype(np.float32), total)
    return model, mean, info["training"] | {"steps": steps, "averaged": paths}


def with_variant(model, variant: str):
    """A variant of the family of `model`. It must have the same parameters."""
    family = models.name_of(model)
    named = models.build(family, variant)
    if references.param_shapes(named) != references.param_shapes(model):
        raise InputError(
            f"--variant {variant}: its parameters differ from those of the given {family}"
        )
    return named


if __name__ == "__main__":
    sys.exit(main())
