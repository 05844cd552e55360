"""Writes models as their PyTorch references read them, and beside them a record of what the references' files cannot hold."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import yaml
from flax import linen as nn
from flax.traverse_util import flatten_dict

from lrm_jax import models
from lrm_jax.models import zero123
from lrm_jax.models.parts import encoders
from lrm_jax.parallel import whole_files
from lrm_jax.types import InputError
from lrm_jax.weights import tensor_files
from lrm_jax.weights.model_file import RECORD, read_record, record_text
from lrm_jax.weights.references import CONFIG_NAMES, TITLES, family

# Fields that the references' code fixes, so that no config can change them; besides the encoders.
FIXED = {
    "triposr": {"upsample": 2, "symmetric": False},
    "one2345": {
        "image_size": 256,
        "volume_side": 96,
        "num_samples": 64,
        "num_rounds": 4,
        "num_refined": 16,
        "unmasked": True,
        "statistics": "scene",
    },
    "zero123": zero123.VARIANTS["zero123"],
    "lrm": {"camera_numbers": 16, "decoder_layers": 4, "decoder_width": 64, "radius": 1.0},
}


def write_reference(
    folder: Path,
    model: nn.Module,
    params: Mapping,
    training: Mapping | None = None,
    force: bool = False,
) -> list[Path]:
    """Writes a model to `folder` in the files that its reference reads, all or none of them. Returns their paths.

    The last file is our record of the model's fields and training. It is separate because the references' configs have no room
    for it: TripoSR's structured config, and the constructor that OpenLRM passes its config to, refuse unknown keys.

    Args:
      force: write the model even if the reference's code cannot load it, with a warning.

    Raises:
      InputError: the reference cannot load the model, or has no names for some of its parameters; or `folder` has a record that
        belongs to other weights.
    """
    name = models.name_of(model)
    odd = not_loadable(model)
    if odd and not force:
        raise InputError(
            f"{TITLES[name]} cannot load this model ({', '.join(odd)}): --force writes it anyway, for lrm_jax to read back"
        )
    state = state_dict(model, params)
    weights_path = folder / _weights_name(model, name)
    record = folder / RECORD
    other = read_record(folder)["weights"] if record.exists() else weights_path.name
    if other != weights_path.name and (folder / other).exists():
        raise InputError(f"{folder}: its {RECORD} belongs to {other}: choose another folder")
    texts = {record: record_text(model, training or {}, weights_path.name)}
    if name in CONFIG_NAMES:
        texts = {folder / CONFIG_NAMES[name]: _config_text(model, name)} | texts
    paths = [weights_path, *texts]
    with whole_files.replacing(*paths) as (temporary, *others):
        _write_weights(temporary, model, state)
        for path, text in zip(others, texts.values(), strict=True):
            path.write_text(text, encoding="utf-8")
    if odd:
        logging.warning(
            "%s cannot load what is written (%s): only lrm_jax reads it back",
            TITLES[name],
            ", ".join(odd),
        )
    return paths


def not_loadable(model: nn.Module) -> list[str]:
    """The fields of `model`, with values, that its reference's code fixes to another value or has no name for."""
    name = models.name_of(model)
    if name not in FIXED:
        return []
    fixed, odd = dict(FIXED[name]), []
    if hasattr(model, "encoder"):
        published = encoders.published_name(model.encoder)
        dino = published is not None and published.startswith("facebook/")
        known = dino or (name == "lrm" and model.release == "1.1" and published is not None)
        odd = [] if known else ["encoder"]
    if name == "lrm":
        # OpenLRM splits its samples equally between the two passes, and normalises images as its encoder was trained.
        fixed |= {"num_importance": model.num_samples}
        fixed |= {"normalize_image": dino} if known else {}
    wrong = [field for field, value in fixed.items() if getattr(model, field) != value]
    return odd + [f"{field}={getattr(model, field)}" for field in wrong]


def state_dict(model: nn.Module, params: Mapping) -> dict:
    """The reference's state dict. Raises InputError if the reference has no names for some of the parameters."""
    module = family(models.name_of(model))
    root = {"encoder": params} if module is encoders else params
    named = {path for entry in module.entries(model) for path in entry.ours}
    if lost := [path for path in flatten_dict(root, sep=".") if path not in named]:
        raise InputError(
            f"{TITLES[models.name_of(model)]} has no names for {len(lost)} of its parameters ({', '.join(lost[:3])}):"
            " keep it as a model file of lrm_jax"
        )
    return module.to_torch(params, model)


def _weights_name(model, name):
    if name == "lvsm":
        return f"model_res{model.image_size}.pt"
    if name == "lrm" and model.release == "1.0":
        return "model.pth"
    if name == "one2345":
        return "ckpt_215000.pth"  # the name that its scripts load
    if name == "zero123":
        return "zero123-xl.ckpt"
    return "model.ckpt" if name == "triposr" else "model.safetensors"


def _config_text(model, name):
    config = family(name).config_to_torch(model)
    if name == "triposr":
        return yaml.safe_dump(config, sort_keys=False)
    return json.dumps(config, indent=2) + "\n"


def _write_weights(path, model, state):
    name = models.name_of(model)
    if name == "triposr":
        tensor_files.write_torch(path, state)
    elif name == "lvsm":
        tensor_files.write_torch(path, {"model": state})
    elif name == "one2345":
        networks = {}
        for key, value in state.items():
            network, _, rest = key.partition(".")
            networks.setdefault(network, {})[rest] = value
        tensor_files.write_torch(path, networks | {"iter_step": 215_000, "val_step": 0})
    elif name == "zero123":
        tensor_files.write_torch(path, {"state_dict": state})
    elif name == "lrm" and model.release == "1.0":
        # The render size matters only for the reference's own videos.
        infer = {"source_size": model.image_size, "render_size": 192}
        kwargs = {"model": family(name).config_to_torch(model), "infer": infer}
        tensor_files.write_torch(path, {"weights": state, "kwargs": kwargs})
    else:
        tensor_files.write_safetensors(path, state, {"format": "pt"})
