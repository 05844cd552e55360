"""Our model file: a safetensors file of parameters, named by dotted path, with the family, its fields and a training summary in
its metadata. Beside a checkpoint that is written for a reference, `lrm_jax.json` records the same metadata.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from lrm_jax import models
from lrm_jax.types import InputError
from lrm_jax.weights import references, tensor_files
from lrm_jax.weights.references import (
    RUN_FIELDS,
    family,
)

FORMAT = {"format": "lrm_jax", "version": "1"}
RECORD = "lrm_jax.json"


def is_finite(array: np.ndarray) -> bool:
    """Whether all numbers of an array are finite, without a second array of its size."""
    # The maximum of an array with a NaN is NaN. np.isfinite of the whole array would make a temporary one.
    with np.errstate(invalid="ignore"):
        return np.isfinite(array.max(initial=0)) and np.isfinite(array.min(initial=0))


def save_model(
    path: str | Path, model: nn.Module, params: Mapping, training: Mapping, dtype: str = "float32"
) -> None:
    """Writes our model file, whole or not at all.

    Args:
      training: what users should know about where the parameters come from; JSON values.
      dtype: how numbers are stored: as "float32", or rounded to "float16" or "bfloat16".

    Raises:
      InputError: `path` cannot be written, or a parameter is not finite in `dtype`.
    """
    stored = {}
    for name, value in flatten_dict(dict(params), sep=".").items():
        with np.errstate(over="ignore"):  # reported below
            stored[name] = np.asarray(value).astype(jnp.dtype(dtype), copy=False)
        if not is_finite(stored[name]):
            raise InputError(
                f"{path}: {name} has numbers that are not finite in {dtype}: store it as float32, or train again"
            )
    fields = json.dumps(fields_of(model), default=dict)
    about = {"family": models.name_of(model), "variant": variant_of(model), "fields": fields}
    tensor_files.write_safetensors(
        Path(path), stored, FORMAT | about | {"training": json.dumps(training)}
    )


def load_model(path: str | Path) -> tuple[nn.Module, dict, dict]:
    """Reads a file of `save_model`: the module, float32 NumPy parameters, and the training summary.

    Raises:
      InputError: it is not such a file, is of a later version, or does not have the tensors of its fields.
    """
    content, metadata = tensor_files.read(path)
    try:
        return from_model_file(content, metadata)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def from_model_file(tensors: Mapping, metadata: Mapping) -> tuple[nn.Module, dict, dict]:
    """What `load_model` returns, from a file's content. Raises the same errors, without the file's name."""
    if metadata.get("format") != FORMAT["format"]:
        raise InputError("not a model file of lrm_jax: make one with `lrm convert`")
    if metadata.get("version") != FORMAT["version"]:
        raise InputError(f"a model file of version {metadata.get('version')}: update lrm_jax")
    with _description("its description"):
        model = _model_of(metadata["family"], json.loads(metadata["fields"]))
        training = json.loads(metadata["training"])
        wanted = {
            k: x.shape for k, x in flatten_dict(references.param_shapes(model), sep=".").items()
        }
    tensor_files.check_names(
        {name: x.shape for name, x in tensors.items()},
        wanted,
        f"{metadata['family']} with its fields",
    )
    params = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    return model, unflatten_dict(params, sep="."), training


def record_text(model: nn.Module, training: Mapping, weights: str) -> str:
    """The content of `lrm_jax.json` beside a reference's checkpoint.

    Args:
      training: as `save_model`'s.
      weights: the name of the checkpoint's file.
    """
    record = {
        **FORMAT,
        "weights": weights,
        "family": models.name_of(model),
        "variant": variant_of(model),
        "fields": fields_of(model),
        "training": training,
    }
    return json.dumps(record, indent=2, default=dict) + "\n"


def read_record(folder: Path) -> dict:
    """The content of a folder's `lrm_jax.json`. Raises InputError if it is damaged or of a later version."""
    path = folder / RECORD
    with _description(str(path)):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["version"] != FORMAT["version"]:
            raise InputError(f"{path}: of version {record['version']}: update lrm_jax")
        kinds = {"weights": str, "family": str, "fields": dict, "training": dict}
        if wrong := [key for key, kind in kinds.items() if not isinstance(record[key], kind)]:
            raise TypeError(f"{wrong[0]} is a {type(record[wrong[0]]).__name__}")
    return record


def described(weights: Path) -> tuple[nn.Module, dict] | None:
    """The model and training summary of a reference's checkpoint, from the `lrm_jax.json` beside it; None if there is none.

    A record that names another file does not count, unless that file is gone: then these weights were renamed.
    """
    if not (weights.parent / RECORD).exists():
        return None
    record = read_record(weights.parent)
    if record["weights"] != weights.name and (weights.parent / record["weights"]).exists():
        return None
    with _description(f"{RECORD} beside it"):
        model = _model_of(record["family"], record["fields"])
        references.param_shapes(model)
    return model, record["training"]


@contextlib.contextmanager
def _description(what):
    """Turns the exceptions of a damaged description into a one-line InputError."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"{what} is damaged or of a later lrm_jax ({str(error).splitlines()[0]}): update lrm_jax, or convert it again"
        ) from error


def _model_of(name, fields):
    return family(name).MODEL(**{k: _hashable(v) for k, v in fields.items()})


def variant_of(model: nn.Module) -> str:
    """The name of the model's variant, or "custom"."""
    module = family(models.name_of(model))
    for name, fields in module.VARIANTS.items():
        if fields_of(module.MODEL(**fields)) == fields_of(model):
            return name
    return "custom"


def fields_of(model: nn.Module) -> dict:
    """The fields that define a model, without those of how it is run."""
    names = [
        k for k in type(model).__dataclass_fields__ if k not in ("parent", "name", *RUN_FIELDS)
    ]
    return {k: dict(v) if isinstance(v := getattr(model, k), Mapping) else v for k in names}


def _hashable(value):
    """Lists as tuples: JSON has no tuples, and a module's fields must be hashable."""
    if isinstance(value, dict):
        return {k: _hashable(v) for k, v in value.items()}
    return tuple(_hashable(v) for v in value) if isinstance(value, list) else value
