"""The references' checkpoints: recognising whose they are, and converting both ways. Strict: every tensor is accounted for."""

import contextlib
import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import yaml
from flax import linen as nn

from lrm_jax import models
from lrm_jax.models.parts import encoders, torch_layout
from lrm_jax.parallel import whole_files
from lrm_jax.types import Cameras, InputError, Rays, Views
from lrm_jax.weights import tensor_files

# The names that the references give their files; weights in the order in which they are looked for.
WEIGHTS_NAMES = ("model.safetensors", "model.ckpt", "model.pth", "pytorch_model.bin")
CONFIG_NAMES = {"triposr": "config.yaml", "lrm": "config.json"}
TITLES = {"triposr": "TripoSR", "lrm": "OpenLRM", "lvsm": "LVSM", "vit": "DINO"}
# What the references' code does not let a config choose, beside the encoders.
FIXED = {
    "triposr": {"upsample": 2, "symmetric": False},
    "lrm": {"camera_numbers": 16, "decoder_layers": 4, "decoder_width": 64},
}
# How a model is run, not what it is.
RUN_FIELDS = ("dtype", "ray_chunk", "remat")
# What a config says of the reference's classes and training, without effect on the result.
IGNORED_SETTINGS = re.compile(r".*_cls|.*model_name.*|encoder_freeze")
# Activations of the density with the same values: they differ in the gradient.
EXP = ("exp", "trunc_exp")


def what_it_is(config: Mapping) -> dict:
    """A config's `model` without how it is run."""
    return {key: value for key, value in config.items() if key not in RUN_FIELDS}


def family(name: str) -> ModuleType:
    """The module of a model's family by `models.name_of`: as `models.family`, and "vit" for encoders alone."""
    return encoders if name == "vit" else models.family(name)


def _name(module):
    return module.MODEL.__module__.rsplit(".", 1)[-1]


# -- from a reference


def from_reference(
    state: Mapping[str, np.ndarray], config: Mapping | None = None
) -> tuple[nn.Module, dict]:
    """The model that a reference's state dict belongs to, and its parameters.

    Sizes come from the tensors' shapes. What shapes cannot tell (heads, samples, image size, radius) comes from `config`,
    else from the published model of the same shapes.

    Args:
      state: NumPy arrays under the reference's names: TripoSR, OpenLRM 1.0 and 1.1, LVSM, or a DINO v1 or DINOv2 encoder alone.
        Wrappers of the names (`module.`, `_orig_mod.`, `backbone.`) are taken off, 16-bit numbers widened.
      config: the reference's own: TripoSR's config.yaml, OpenLRM 1.1's config.json, 1.0's `kwargs["model"]`; with the key
        `source_size` where OpenLRM's image size is not that of the published model of the same shapes. LVSM's:
        `{"image_size": pixels}`, which its published checkpoints tell only by their files' names.

    Raises:
      InputError: an unknown family, something that neither shapes nor config tell, a config of another model, or tensors that
        are missing, extra or mis-shaped.
    """
    model, state = recognise(state, config)
    return model, family(models.name_of(model)).from_torch(state, model)


def recognise(
    state: Mapping[str, np.ndarray], config: Mapping | None = None
) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """As `from_reference`, with the checked state dict, float32 and named as `from_torch` wants it, for the parameters."""
    state = _unwrapped(state)
    module = _family_of(state)
    if module is encoders:
        state = encoders.normalize_names(state)
    if frozen := getattr(module, "FROZEN", None):
        state = {k: v for k, v in state.items() if not k.startswith(frozen)}
    if module is encoders:  # shapes tell all
        config = None
    title = TITLES[_name(module)]
    fields = _fields_from_shapes(module, state, title)
    like, published = _published_like(module, fields)
    told = {} if config is None else _fields_from_config(module, config, published | fields)
    # Shapes do not depend on what they cannot tell, so the tensors are judged first, whatever else is missing.
    model = module.MODEL(**{**like, **fields, **told})
    try:
        wanted = torch_shapes(model)
    except (TypeError, ValueError, ArithmeticError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"no {title} has its sizes ({reason}): use an unchanged checkpoint with its own config"
        ) from error
    tensor_files.check_names({k: v.shape for k, v in state.items()}, wanted, title)
    needed = [
        k for k in like if module.MODEL.__dataclass_fields__[k].default is dataclasses.MISSING
    ]
    if missing := [k for k in needed if k not in published | fields | told]:
        raise InputError(
            f"neither its shapes nor a config tell its {', '.join(missing)}, and no published {title} is of these sizes:"
            f" put its {CONFIG_NAMES[_name(module)]} beside it"
        )
    if _name(module) == "lvsm" and not told:
        logging.warning(
            "the file's name does not end in _256 or _res512: images of %d pixels are taken",
            model.image_size,
        )
    elif config is not None and _name(module) in CONFIG_NAMES:
        _check_config(config, module.config_to_torch(model))
    return model, {k: np.asarray(v, np.float32) for k, v in state.items()}


def from_checkpoint(content: object, path: Path) -> tuple[nn.Module, dict]:
    """As `from_reference`, of what a checkpoint file holds; its config is in it (OpenLRM 1.0), beside it, or its name (LVSM)."""
    config = None
    while isinstance(content, dict) and not any(
        isinstance(v, np.ndarray) for v in content.values()
    ):
        wrappers = [
            k
            for k in ("weights", "state_dict", "model", "teacher")
            if isinstance(content.get(k), dict)
        ]
        if not wrappers:
            break
        kwargs = content.get("kwargs")
        if isinstance(kwargs, dict) and isinstance(kwargs.get("model"), dict):
            config = {**kwargs["model"], **(kwargs.get("infer") or {})}
        content = content[wrappers[0]]
    check_state_dict(content)
    name = _name(_family_of(_unwrapped(content)))
    if name == "lvsm":
        config = name_config(path)
    elif config is None and name in CONFIG_NAMES:
        beside = path.parent / CONFIG_NAMES[name]
        config = _read_config(beside) if beside.exists() else None
    return from_reference(content, config)


def name_config(path: Path) -> dict | None:
    """The config of an LVSM checkpoint: the size of its images, which only the file's name tells, as `..._256`, `..._res512`."""
    size = re.search(r"_(?:res(\d+)|(256|512))$", path.stem)
    return size and {"image_size": int(size[1] or size[2])}


def check_state_dict(content: object) -> None:
    """Raises InputError where what a file holds is not a dict of named tensors."""
    if not isinstance(content, dict) or not content:
        raise InputError(
            f"it holds a {type(content).__name__} where a state dict was expected: save the model's state_dict()"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise InputError(
                f"its entry {name!r} is a {type(value).__name__}, not a tensor: save the model's state_dict() alone"
            )


def _read_config(path):
    try:
        config = yaml.safe_load(path.read_text())  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"{path.name} beside it cannot be read: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(config, dict):
        raise InputError(
            f"{path.name} beside it is not a table of settings: put the checkpoint's own there"
        )
    return config


def _unwrapped(state):
    """Without the prefixes that torch.compile and data-parallel wrappers put before names."""
    return {
        re.sub(r"(^|\.)((_orig_mod|module)\.)+", r"\1", name): value
        for name, value in state.items()
    }


def _family_of(state):
    """Judged by many names, so that one that is missing or renamed is reported as such."""

    def some(*prefixes):
        return any(name.startswith(prefixes) for name in state)

    if some("target_pose_tokenizer.", "image_token_decoder.", "transformer_input_layernorm"):
        return family("lvsm")
    if some("image_tokenizer.", "backbone.transformer_blocks."):
        return family("triposr")
    if some("transformer.layers.", "synthesizer.", "camera_embedder."):
        return family("lrm")
    if any(
        re.match(r"((backbone|vit|dinov2)\.)?(embeddings\.patch_emb|patch_embed\.proj)", k)
        for k in state
    ):
        return encoders
    if some("features.0.", "lin0."):
        raise InputError(
            "of a loss's network, not of a model: give torchvision's VGG16 and LPIPS's heads, `lrm convert"
            " vgg16-397923af.pth lpips_vgg16.safetensors --linear vgg.pth`"
        )
    raise InputError(
        f"its tensors ({', '.join(list(state)[:3])}, ...) are of no known family: TripoSR, OpenLRM, LVSM, DINO and DINOv2 can be read"
    )


def _fields_from_shapes(module, state, title):
    try:
        fields = module.fields_from_torch(state)
    except (KeyError, ValueError, IndexError) as error:

        def pattern(name):
            return re.sub(r"\.\d+\.", ".#.", name)

        usual = torch_shapes(module.MODEL(**next(iter(module.VARIANTS.values()))))
        extra = [name for name in state if pattern(name) not in {pattern(k) for k in usual}]
        if isinstance(error, KeyError):
            tensor_files.check_names(dict.fromkeys(extra), dict.fromkeys(error.args), title)
        raise InputError(
            f"not the tensors of {title}: one is of another rank ({error}): use an unchanged checkpoint"
        ) from error
    encoder = fields if module is encoders else fields.get("encoder")
    if encoder and encoder["width"] % 64:
        logging.warning(
            "an encoder of width %d, not of heads of 64: %d taken",
            encoder["width"],
            encoder["num_heads"],
        )
    return fields


def _published_like(module, fields):
    """All fields of a published model, of the same shapes if there is one; and those of them that hold for `fields` too."""
    defaults = {k: f.default for k, f in module.MODEL.__dataclass_fields__.items()}
    published = [
        {k: v for k, v in (defaults | variant).items() if k not in ("parent", "name", *RUN_FIELDS)}
        for name, variant in module.VARIANTS.items()
        if not name.startswith(("nano", "tiny"))
    ]
    for like in published:
        if all(like[k] == v for k, v in fields.items()):
            return like, like
    like = published[0]
    if _name(module) not in CONFIG_NAMES:
        return like, {}
    # At other sizes, what the reference's config tells is a checkpoint's choice; the rest is the same for all.
    config = module.config_to_torch(module.MODEL(**like))
    choices = {"image_size", *module.fields_from_config(config)}
    return like, {k: v for k, v in like.items() if k not in choices}


def _fields_from_config(module, config, fields):
    """What `config` tells beyond `fields`."""
    try:
        told = module.fields_from_config(config)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"its config lacks {error}: put the checkpoint's own config beside it"
        ) from error
    if "source_size" in config:
        told["image_size"] = config["source_size"]
    elif "image_size" not in fields | told:
        # OpenLRM 1.1's config.json does not tell it. At this size the encoder's positions are not resized.
        told["image_size"] = fields["encoder"]["grid"] * fields["encoder"]["patch"]
        logging.warning(
            "its config tells no source_size: %d taken, its encoder's own", told["image_size"]
        )
    for name, value in told.items():
        if not isinstance(value, int | float) or value <= 0:
            raise InputError(
                f"its config gives {value!r} for {name}: put the checkpoint's own config beside it"
            )
    least = {"image_size": (fields.get("encoder") or fields)["patch"], "num_samples": 2}
    for name, low in least.items():
        if told.get(name, low) < low:
            raise InputError(
                f"its config gives {told[name]} for {name}, at least {low} are needed: put the checkpoint's own config beside it"
            )
    if (heads := told.get("num_heads")) and fields["width"] % heads:
        raise InputError(
            f"its config's {heads} heads do not divide its width {fields['width']}: put its own config there"
        )
    return told


# -- strictness


def torch_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the reference's tensors for `model`. Nothing is allocated."""
    module, shapes = family(models.name_of(model)), param_shapes(model)
    if module is encoders:
        return torch_layout.torch_shapes(module.entries(model), {"encoder": shapes})
    unused = module.pooler_shapes(model) if hasattr(module, "pooler_shapes") else {}
    return torch_layout.torch_shapes(module.entries(model), shapes) | unused


def param_shapes(model: nn.Module) -> dict:
    """The parameter tree of `model`, as ShapeDtypeStructs."""

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, np.float32)

    if isinstance(model, encoders.MODEL):
        side = model.grid * model.patch
        inputs = (array(1, side, side, 3),)
    else:
        camera = Cameras(c2w=array(1, 1, 4, 4), fxfycxcy=array(1, 1, 4))
        image = array(1, 1, model.image_size, model.image_size, 3)
        inputs = (Views(rgb=image, cameras=camera), Rays(origins=image, dirs=image))
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def _check_config(config, ours, at=""):
    """Raises InputError where the checkpoint's config says other than its tensors do, or asks for what is not built."""
    for key, value in ours.items():
        theirs = config.get(key, value)
        if IGNORED_SETTINGS.fullmatch(key):
            continue
        if isinstance(value, dict) and isinstance(theirs, Mapping):
            _check_config(theirs, value, f"{at}{key}.")
        elif theirs != value and not (theirs in EXP and value in EXP):
            raise InputError(
                f"its config says {at}{key}: {theirs}, but its tensors, or what is supported, {value}: put its own config there"
            )


# -- to a reference


def write_reference(folder: Path, model: nn.Module, params: Mapping) -> list[Path]:
    """Writes the files of a model as its reference reads them into `folder`, all or none of them. Returns their paths."""
    name = models.name_of(model)
    module = family(name)
    state = module.to_torch(params, model)
    if module is encoders:
        path = folder / "pytorch_model.bin"
        tensor_files.write_torch(path, state)
        return [path]
    if name == "lvsm":
        path = folder / f"model_res{model.image_size}.pt"
        tensor_files.write_torch(path, {"model": state})
        return [path]
    if odd := _fixed_otherwise(model, name):
        logging.warning(
            "%s cannot load what is written: it has no such %s", TITLES[name], ", ".join(odd)
        )
    config = module.config_to_torch(model)
    text = (
        yaml.safe_dump(config, sort_keys=False)
        if name == "triposr"
        else json.dumps(config, indent=2) + "\n"
    )
    with contextlib.ExitStack() as stack:
        config_path = folder / CONFIG_NAMES[name]
        stack.enter_context(whole_files.replacing(config_path))[0].write_text(text)
        if name == "triposr":
            path = folder / "model.ckpt"
            tensor_files.write_torch(path, state)
        elif model.release == "1.0":
            path = folder / "model.pth"
            # The render size is only that of the reference's own videos.
            kwargs = {
                "model": config,
                "infer": {"source_size": model.image_size, "render_size": 192},
            }
            tensor_files.write_torch(path, {"weights": state, "kwargs": kwargs})
        else:
            path = folder / "model.safetensors"
            tensor_files.write_safetensors(path, state, {"format": "pt"})
    return [path, config_path]


def _fixed_otherwise(model, name):
    """The fields of `model` that its reference has written into its code, with other values."""
    named = [fields for variant, fields in encoders.VARIANTS.items() if variant != "tiny"]
    odd = [] if dict(model.encoder) in named else ["encoder"]
    return odd + [field for field, value in FIXED[name].items() if getattr(model, field) != value]
