"""The references' checkpoints: recognising their family, and reading them. Strict: every tensor is accounted for."""

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
from lrm_jax.types import Cameras, InputError, Rays, Views
from lrm_jax.weights import tensor_files

# The references' file names; weights in the order of search.
WEIGHTS_NAMES = ("model.safetensors", "model.ckpt", "model.pth", "pytorch_model.bin")
CONFIG_NAMES = {"triposr": "config.yaml", "lrm": "config.json", "vit": "config.json"}
TITLES = {
    "triposr": "TripoSR", "lrm": "OpenLRM", "lvsm": "LVSM", "one2345": "One-2-3-45", "zero123": "Zero123", "vit": "DINO"
}  # fmt: skip
# How the names of One-2-3-45's networks begin.
NETWORKS = (
    "pyramid_feature_network",
    "sdf_network_lod",
    "rendering_network_lod",
    "variance_network_lod",
)
# Fields of how a model is run, not of what it is.
RUN_FIELDS = ("dtype", "ray_chunk", "remat")
# Settings of the reference's classes and training, without effect on the result.
IGNORED_SETTINGS = re.compile(r".*_cls|.*model_name.*|encoder_freeze|architectures")
# Density activations with equal values; only their gradients differ.
EXP = ("exp", "trunc_exp")


def what_it_is(config: Mapping) -> dict:
    """A config's `model` without the fields of how it is run."""
    return {key: value for key, value in config.items() if key not in RUN_FIELDS}


def family(name: str) -> ModuleType:
    """The module of a family by the name of `models.name_of`: like `models.family`, but also "vit" for encoders alone."""
    return encoders if name == "vit" else models.family(name)


def _name(module):
    return module.MODEL.__module__.rsplit(".", 1)[-1]


# -- from a reference


def from_reference(
    state: Mapping[str, np.ndarray], config: Mapping | None = None
) -> tuple[nn.Module, dict]:
    """The model that a reference's state dict belongs to, and its parameters.

    Sizes come from the tensors' shapes. Fields that do not follow from shapes (heads, samples, image size, radius) come from
    `config`, or else from the published model of the same shapes.

    Args:
      state: NumPy arrays under the reference's names: TripoSR, OpenLRM 1.0 and 1.1, LVSM, Zero123 (of diffusers' folder as
        "component/name"), One-2-3-45, or a DINO v1 or DINOv2 encoder alone.
        Prefixes of wrappers (`module.`, `_orig_mod.`, `backbone.`) are removed, and 16-bit numbers widened.
      config: the reference's own: TripoSR's config.yaml, OpenLRM 1.1's config.json or 1.0's `kwargs["model"]`, with the key
        `source_size` if OpenLRM's image size differs from the published model of the same shapes. For LVSM:
        `{"image_size": pixels}`, which its published checkpoints state only in their file names.

    Raises:
      InputError: an unknown family, a field that follows from neither shapes nor config, a config of another model, or tensors
        that are missing, extra or mis-shaped.
    """
    model, state, _ = recognise(state, config)
    return model, family(models.name_of(model)).from_torch(state, model)


def recognise(
    state: Mapping[str, np.ndarray], config: Mapping | None = None
) -> tuple[nn.Module, dict[str, np.ndarray], list[str]]:
    """As `from_reference`, but instead of parameters the checked state dict: float32, with the names of `from_torch`.

    Returns:
      The model, its state dict, and readable lines on what was assumed because it follows from neither shapes nor `config`.
    """
    module, state = _own_tensors(state)
    name, title = _name(module), TITLES[_name(module)]
    fields = _fields_from_shapes(module, state, title)
    like, published = _published_like(module, fields)
    told = {} if config is None else _fields_from_config(module, config, published | fields)
    guessed = {}
    if name == "lrm" and config is not None and "image_size" not in published | told:
        # OpenLRM 1.1's config.json does not state it. At this size the encoder's positions are not resized.
        guessed["image_size"] = fields["encoder"]["grid"] * fields["encoder"]["patch"]
        logging.warning(
            "its config has no source_size: %d is assumed, its encoder's own", guessed["image_size"]
        )
    # Shapes do not depend on the fields that are still missing, so the tensors are checked first.
    model = module.MODEL(**{**like, **fields, **guessed, **told})
    state = _checked(state, model, title)
    needed = [
        k for k in like if module.MODEL.__dataclass_fields__[k].default is dataclasses.MISSING
    ]
    if missing := [k for k in needed if k not in published | fields | guessed | told]:
        raise InputError(
            f"neither its shapes nor a config determine its {', '.join(missing)}, and no published {title} has these sizes:"
            f" put its {CONFIG_NAMES[name]} beside it"
        )
    if name == "lvsm" and not told:
        logging.warning(
            "the file's name does not end in _256 or _res512: images of %d pixels are assumed",
            model.image_size,
        )
    elif config is not None and name in CONFIG_NAMES:
        _check_config(config, module.config_to_torch(model))
    assumed = [] if told else _assumed_heads(model)
    return model, state, assumed + _assumed(model, published is like, guessed, fields | told)


def _assumed_heads(model):
    """A line on an encoder's number of heads, which does not follow from shapes: see `vit.hf_fields`."""
    if isinstance(model, encoders.MODEL):
        heads, width = model.num_heads, model.width
    elif "encoder" in type(model).__dataclass_fields__:
        heads, width = model.encoder["num_heads"], model.encoder["width"]
    else:
        return []
    return [f"encoder heads {heads}: {width // heads} channels each"]


def _assumed(model, is_published, guessed, known):
    """A line for each field that is not in `known`: its value, and where it comes from."""
    module, lines = family(models.name_of(model)), []
    title = TITLES[_name(module)]
    for name in (k for k in _own_fields(module) if k not in known):
        whose = f"{title}'s"
        if name in guessed:
            whose = "that of its encoder, whose positions need no resizing then"
        elif is_published and name in _choices(module):
            whose = f"as in the published {title} of the same shapes"
        value = getattr(model, name)
        shown = f"{value:g}" if isinstance(value, float) else value
        lines.append(f"{name.replace('_', ' ')} {shown}: {whose}")
    return lines


def from_checkpoint(
    content: object, path: Path, described: nn.Module | None = None
) -> tuple[nn.Module, dict, list[str]]:
    """As `from_reference`, from a checkpoint file's content. Its config is in it (OpenLRM 1.0), beside it, or its name (LVSM).

    Args:
      described: the model, if it is known already; no config is read then.

    Returns:
      The model, its parameters, and what was assumed, as in `recognise`.
    """
    config, content = None, _joined(content)
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
    if described is not None:
        return described, _params_of(content, described), []
    name = _name(_family_of(_unwrapped(content)))
    if name == "lvsm":
        config = name_config(path)
    elif config is None and name in CONFIG_NAMES:
        beside = path.parent / CONFIG_NAMES[name]
        config = _read_config(beside) if beside.exists() else None
        if name == "vit" and config is not None and "model_type" not in config:
            config = None  # it is a reconstruction model's: torch hub's files have none
    model, state, assumed = recognise(content, config)
    return model, family(name).from_torch(state, model), assumed


def _params_of(state, model):
    module, state = _own_tensors(state)
    name = models.name_of(model)
    if _name(module) != name:
        raise InputError(f"the tensors of {TITLES[_name(module)]}, not of {TITLES[name]}")
    return module.from_torch(_checked(state, model, TITLES[name]), model)


def name_config(path: Path) -> dict | None:
    """The config of an LVSM checkpoint: its image size, which only the file name states, such as `..._256` or `..._res512`."""
    size = re.search(r"_(?:res(\d+)|(256|512))$", path.stem)
    return size and {"image_size": int(size[1] or size[2])}


def check_state_dict(content: object) -> None:
    """Raises InputError unless a file's content is a dict of named tensors."""
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
        # YAML reads JSON, except for numbers like 1e-12.
        load = json.loads if path.suffix == ".json" else yaml.safe_load
        config = load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"{path.name} beside it cannot be read: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(config, dict):
        raise InputError(
            f"{path.name} beside it is not a mapping of settings: put the checkpoint's own there"
        )
    return config


def _joined(content):
    """A checkpoint of several networks, such as One-2-3-45's, as one state dict. Drops what else it holds of the training."""
    if not (isinstance(content, dict) and any(str(k).startswith(NETWORKS) for k in content)):
        return content
    networks = {k: v for k, v in content.items() if isinstance(v, dict) and k.startswith(NETWORKS)}
    return {
        f"{k}.{name}": value for k, v in networks.items() for name, value in v.items()
    } or content


def _unwrapped(state):
    """Removes the prefixes that torch.compile and data-parallel wrappers add to names."""
    return {
        re.sub(r"(^|\.)((_orig_mod|module)\.)+", r"\1", name): value
        for name, value in state.items()
    }


def _own_tensors(state):
    """The family of a state dict, and the tensors of the model itself, without prefixes of wrappers."""
    state = _unwrapped(state)
    module = _family_of(state)
    if hasattr(module, "own_tensors"):
        try:
            return module, module.own_tensors(state)
        except KeyError as error:
            raise InputError(f"it lacks {error}: use an unchanged checkpoint") from error
    frozen = getattr(module, "FROZEN", ())
    return module, {k: v for k, v in state.items() if not k.startswith(frozen)}


def _checked(state, model, title):
    """A model's own tensors, float32, under the names of `entries`. Raises InputError if they are not the model's."""
    if isinstance(model, encoders.MODEL):
        state = encoders.transformers_names(state)
    try:
        wanted = torch_shapes(model)
    except (TypeError, ValueError, ArithmeticError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"no {title} has these sizes ({reason}): use an unchanged checkpoint with its own config"
        ) from error
    tensor_files.check_names({k: v.shape for k, v in state.items()}, wanted, title)
    return {k: np.asarray(v, np.float32) for k, v in state.items()}


def _family_of(state):
    """The family, judged by many names, so that a single missing or renamed tensor is reported as such."""

    def some(*prefixes):
        return any(name.startswith(prefixes) for name in state)

    if some("target_pose_tokenizer.", "image_token_decoder.", "transformer_input_layernorm"):
        return family("lvsm")
    if some(*NETWORKS):
        return family("one2345")
    if some("model.diffusion_model.", "model_ema.", "cc_projection.", "unet/"):
        return family("zero123")
    if some("image_tokenizer.", "backbone.transformer_blocks."):
        return family("triposr")
    if some("transformer.layers.", "synthesizer.", "camera_embedder."):
        return family("lrm")
    if any(
        re.match(
            r"((backbone|vit|dinov2(_with_registers)?)\.)?(embeddings\.patch_emb|patch_embed\.proj)",
            k,
        )
        for k in state
    ):
        return encoders
    if some("features.0.", "lin0."):
        raise InputError(
            "its tensors are of a loss network, not of a model: convert torchvision's VGG16 with LPIPS's heads, `lrm convert"
            " vgg16-397923af.pth lpips_vgg16.safetensors --linear vgg.pth`"
        )
    raise InputError(
        f"its tensors ({', '.join(list(state)[:3])}, ...) are of no known family: TripoSR, OpenLRM, LVSM, Zero123, One-2-3-45, DINO and DINOv2 can be read"
    )


def _fields_from_shapes(module, state, title):
    try:
        fields = module.fields_from_torch(state)
    except (KeyError, ValueError, IndexError) as error:

        def pattern(name):
            return re.sub(r"\.\d+\.", ".#.", name)

        usual = torch_shapes(module.MODEL(**next(iter(module.VARIANTS.values()))))
        named = encoders.transformers_names(state) if module is encoders else state
        extra = [name for name in named if pattern(name) not in {pattern(k) for k in usual}]
        if isinstance(error, KeyError):
            tensor_files.check_names(dict.fromkeys(extra), dict.fromkeys(error.args), title)
        raise InputError(
            f"not the tensors of {title}: one is of another rank ({error}): use an unchanged checkpoint"
        ) from error
    encoder = fields if module is encoders else fields.get("encoder")
    if encoder and encoder["width"] % 64:
        logging.warning(
            "the encoder's width %d is not a multiple of 64: %d heads are assumed",
            encoder["width"],
            encoder["num_heads"],
        )
    return fields


def _published_like(module, fields):
    """All fields of a published model, of the same shapes if there is one; and those of them that also apply to `fields`."""
    defaults = {k: module.MODEL.__dataclass_fields__[k].default for k in _own_fields(module)}
    published = [
        {k: v for k, v in (defaults | variant).items() if k not in RUN_FIELDS}
        for name, variant in module.VARIANTS.items()
        if not name.startswith(("nano", "tiny"))
    ]
    for like in published:
        if all(like[k] == v for k, v in fields.items()):
            return like, like
    like = published[0]
    if _name(module) not in CONFIG_NAMES:
        return like, {}
    # At other sizes, the reference's config may choose some fields for each checkpoint; the others are always the same.
    return like, {k: v for k, v in like.items() if k not in _choices(module)}


def _choices(module):
    """The fields that the reference's config states, or the file's name."""
    if _name(module) not in CONFIG_NAMES:
        return {"image_size"}
    model = module.MODEL(**next(iter(module.VARIANTS.values())))
    return {"image_size", *module.fields_from_config(module.config_to_torch(model))}


def _own_fields(module):
    """The names of the fields that define a model of a family."""
    skipped = ("parent", "name", *RUN_FIELDS)
    return [k for k in module.MODEL.__dataclass_fields__ if k not in skipped]


def _fields_from_config(module, config, fields):
    """The fields that `config` states, checked against `fields`."""
    try:
        told = module.fields_from_config(config)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"its config lacks {error}: put the checkpoint's own config beside it"
        ) from error
    if "source_size" in config:
        told["image_size"] = config["source_size"]
    for name, value in told.items():
        if not isinstance(value, int | float) or value <= 0:
            raise InputError(
                f"its config gives {value!r} for {name}: put the checkpoint's own config beside it"
            )
    least = {"image_size": (fields.get("encoder") or fields)["patch"], "num_samples": 2}
    for name, low in least.items():
        if told.get(name, low) < low:
            raise InputError(
                f"its config gives {told[name]} for {name}, at least {low} is needed: put the checkpoint's own config beside it"
            )
    if (heads := told.get("num_heads")) and fields["width"] % heads:
        raise InputError(
            f"its config's {heads} heads do not divide its width {fields['width']}: put the checkpoint's own config beside it"
        )
    return told


# -- strictness


def torch_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the reference's tensors for `model`. Allocates nothing."""
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
    """Raises InputError if the checkpoint's config contradicts its tensors, or asks for something that is not supported."""
    for key, value in ours.items():
        theirs = config.get(key, value)
        if IGNORED_SETTINGS.fullmatch(key):
            continue
        if isinstance(value, dict) and isinstance(theirs, Mapping):
            _check_config(theirs, value, f"{at}{key}.")
        elif theirs != value and not (theirs in EXP and value in EXP):
            raise InputError(
                f"its config says {at}{key}: {theirs}, but its tensors or the supported value say {value}: "
                "put the checkpoint's own config beside it"
            )
