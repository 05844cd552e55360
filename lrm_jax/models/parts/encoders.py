"""Stand-alone DINO v1 and DINOv2 encoders: pretrained weights for a family's image encoder.

Files are written in the form of `transformers` (ViTModel, Dinov2Model, Dinov2WithRegistersModel), with its config.json. Both this
form and the torch-hub files are read; the latter's names are translated. Tensors that the encoders never use (pooler, mask token)
are dropped when reading and written as zeros.
"""

import re
from collections.abc import Mapping

import numpy as np

from lrm_jax.models.parts import torch_layout, vit

MODEL = vit.ViT
VARIANTS = vit.VARIANTS

# torch hub -> transformers; the packed q, k, v are handled separately.
_HUB_NAMES = (
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^(cls_token|register_tokens)$", r"embeddings.\1"),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
)
_DINO_NAMES = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_DINOV2_NAMES = ((r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),)

# The published sizes, by letter: width, depth, heads.
_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}


def own_tensors(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The encoder's own tensors: without name prefixes of wrappers, heads and tensors that it never uses."""
    for prefix in ("backbone.", "vit.", "dinov2.", "dinov2_with_registers."):
        if any(name.startswith(prefix) for name in state):
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    unused = ("pooler.", "head.", "mask_token", "embeddings.mask_token")
    return {k: v for k, v in state.items() if not k.startswith(unused)}


def transformers_names(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An encoder's own tensors under the names of `entries`, from these names or torch hub's."""
    if not _is_hub(state):
        return state
    of_blocks = _DINOV2_NAMES if "blocks.0.ls1.gamma" in state else _DINO_NAMES
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in (*_HUB_NAMES, *of_blocks):
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." not in name:
            renamed[name] = value
            continue
        for part, x in zip(("query", "key", "value"), np.array_split(value, 3), strict=True):
            renamed[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = x
    return renamed


def _is_hub(state):
    return any(name.startswith("patch_embed.proj.") for name in state)


def fields_from_torch(state: dict[str, np.ndarray]) -> dict:
    """The fields of `vit.ViT`, all from the names and shapes of an encoder's own tensors."""
    fields = vit.hub_fields("", state) if _is_hub(state) else vit.hf_fields("", state)
    return dict(num_registers=0, layer_scale=False) | fields


def fields_from_config(config: Mapping) -> dict:
    """The fields that only `transformers`' config.json states, not the shapes."""
    told = dict(num_heads=config["num_attention_heads"])
    return told | ({"norm_epsilon": config[k]} if (k := "layer_norm_eps") in config else {})


def config_to_torch(model: vit.ViT) -> dict:
    """The config.json that goes with `to_torch`."""
    config = {
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "patch_size": model.patch,
        "image_size": model.grid * model.patch,
        "num_channels": 3,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": model.norm_epsilon,
    }
    if not model.layer_scale:
        about = {"architectures": ["ViTModel"], "model_type": "vit"}
        return about | config | {"intermediate_size": 4 * model.width}
    config |= {"mlp_ratio": 4, "use_swiglu_ffn": False}
    if not model.num_registers:
        return {"architectures": ["Dinov2Model"], "model_type": "dinov2"} | config
    about = {
        "architectures": ["Dinov2WithRegistersModel"],
        "model_type": "dinov2_with_registers",
    }
    return about | config | {"num_register_tokens": model.num_registers}


def entries(model: vit.ViT) -> list[torch_layout.Entry]:
    """The encoder's names in `transformers`' files, without tensors that it never uses."""
    if not model.layer_scale:
        return vit.hf_entries("", "encoder", model.depth)
    return vit.hf_dinov2_entries("encoder", model.depth, model.num_registers > 0)


def from_torch(state: dict[str, np.ndarray], model: vit.ViT) -> dict:
    """Parameters of an encoder's state dict with the names of `entries`."""
    return torch_layout.from_torch(entries(model), state)["encoder"]


def to_torch(params: dict, model: vit.ViT) -> dict[str, np.ndarray]:
    """A state dict that `transformers` loads strictly."""
    state, width = torch_layout.to_torch(entries(model), {"encoder": params}), model.width
    if model.layer_scale:
        unused = {"embeddings.mask_token": (1, width)}
    else:
        unused = {"pooler.dense.weight": (width, width), "pooler.dense.bias": (width,)}
    return state | {name: np.zeros(shape, np.float32) for name, shape in unused.items()}


def published_name(encoder: Mapping) -> str | None:
    """The name of an encoder in the references' configs; None if no published encoder has these fields.

    For DINO v1 its name on Hugging Face, such as `facebook/dino-vitb16`; for DINOv2 torch hub's, such as `dinov2_vitb14_reg`.
    """
    encoder = {**dict(num_registers=0, layer_scale=False), **encoder}
    size = next(
        (k for k, v in _SIZES.items() if v == tuple(encoder[x] for x in ("width", "depth", "num_heads"))),
        None,
    )  # fmt: skip
    rest = {k: v for k, v in encoder.items() if k not in ("width", "depth", "num_heads", "patch")}
    patch, dino = encoder["patch"], dict(num_registers=0, layer_scale=False, resize="dino")
    if size in ("s", "b") and patch in (8, 16):
        if rest == dino | dict(grid=224 // patch, norm_epsilon=1e-12):
            return f"facebook/dino-vit{size}{patch}"
    dinov2 = dict(layer_scale=True, grid=37, norm_epsilon=1e-6)
    if size and patch == 14:
        if rest == dino | dinov2:
            return f"dinov2_vit{size}14"
        if rest == dinov2 | dict(num_registers=4, resize="dinov2"):
            return f"dinov2_vit{size}14_reg"
    return None
