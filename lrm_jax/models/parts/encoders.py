"""DINO v1 and DINOv2 encoders on their own, in the names of their published files: what a family's encoder can start from.

Three layouts: `transformers`' ViTModel and the torch-hub files, both in `vit`, and `transformers`' Dinov2Model, which is renamed
to the torch-hub one. What the encoders never use (pooler, mask token) is dropped, and made again as zeros.
"""

import re

import numpy as np

from lrm_jax.models.parts import torch_layout, vit

MODEL = vit.ViT
VARIANTS = vit.VARIANTS

# transformers' Dinov2Model -> torch hub; the packed q, k, v are treated apart.
_DINOV2_NAMES = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)
_QUERY = ".attention.attention.query."


def normalize_names(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The encoder's own tensors, in the names of `entries`: without wrappers, heads and what the encoder never uses."""
    for prefix in ("backbone.", "vit.", "dinov2."):
        if any(name.startswith(prefix) for name in state):
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    unused = ("pooler.", "head.", "mask_token", "embeddings.mask_token")
    state = {k: v for k, v in state.items() if not k.startswith(unused)}
    if not any(".layer_scale1." in name for name in state):
        return state
    hub = {}
    for name, value in state.items():
        if _QUERY in name:
            parts = [
                state.get(name.replace("query", x), value[:0]) for x in ("query", "key", "value")
            ]
            name, value = name.replace(_QUERY, ".attn.qkv."), np.concatenate(parts)
        elif re.search(r"\.attention\.attention\.(key|value)\.", name):
            continue
        for pattern, replacement in _DINOV2_NAMES:
            name = re.sub(pattern, replacement, name)
        hub[name] = value
    return hub


def fields_from_torch(state: dict[str, np.ndarray]) -> dict:
    """What the names and shapes of an encoder's state dict tell of the fields of `vit.ViT`: all of them."""
    hub = "patch_embed.proj.weight" in state
    fields = vit.hub_fields("", state) if hub else vit.hf_fields("", state)
    return dict(num_registers=0, layer_scale=False) | fields


def entries(model: vit.ViT) -> list[torch_layout.Entry]:
    """The names of the encoder's published file: `transformers`' for DINO v1 with its epsilon of 1e-12, else torch hub's."""
    if model.norm_epsilon == 1e-12:
        return vit.hf_entries("", "encoder", model.depth)
    return vit.hub_entries("", "encoder", model.depth, model.num_registers > 0, model.layer_scale)


def from_torch(state: dict[str, np.ndarray], model: vit.ViT) -> dict:
    """Parameters of an encoder's state dict, in the names of `entries`."""
    return torch_layout.from_torch(entries(model), state)["encoder"]


def to_torch(params: dict, model: vit.ViT) -> dict[str, np.ndarray]:
    """A state dict that the encoder's reference loads strictly."""
    state, width = torch_layout.to_torch(entries(model), {"encoder": params}), model.width
    if model.norm_epsilon == 1e-12:
        unused = {"pooler.dense.weight": (width, width), "pooler.dense.bias": (width,)}
    else:
        unused = {"mask_token": (1, width)} if model.layer_scale else {}
    return state | {name: np.zeros(shape, np.float32) for name, shape in unused.items()}
