"""Vision transformers: DINO v1 (https://arxiv.org/abs/2104.14294), DINOv2 with registers (https://arxiv.org/abs/2309.16588)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from lrm_jax.models.parts import torch_layout
from lrm_jax.models.parts.layers import MLP, Attention, layer_norm, sincos_code, sincos_grid, stack

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

VARIANTS = {
    # https://huggingface.co/facebook/dino-vitb16; its layer norms use 1e-12, the torch-hub file's 1e-6.
    "dino-vitb16": dict(
        patch=16, width=768, depth=12, num_heads=12, grid=14, resize="dino", norm_epsilon=1e-12
    ),
    # https://github.com/facebookresearch/dinov2, the *_reg4 models.
    "dinov2-vits14-reg": dict(
        patch=14, width=384, depth=12, num_heads=6, grid=37, resize="dinov2", norm_epsilon=1e-6,
        num_registers=4, layer_scale=True,
    ),
    "dinov2-vitb14-reg": dict(
        patch=14, width=768, depth=12, num_heads=12, grid=37, resize="dinov2", norm_epsilon=1e-6,
        num_registers=4, layer_scale=True,
    ),
    "tiny": dict(
        patch=16, width=32, depth=2, num_heads=2, grid=2, resize="dino", norm_epsilon=1e-12
    ),
}  # fmt: skip


class ViT(nn.Module):
    """Pre-norm vision transformer."""

    patch: int
    width: int
    depth: int
    num_heads: int
    grid: int  # side of the grid of learned positions
    resize: str  # how the learned positions are resized to another grid: "dino" or "dinov2"
    norm_epsilon: float
    num_registers: int = 0
    layer_scale: bool = False
    remat: str = "blocks"  # what is kept for the backward pass, one of `layers.REMAT`
    dtype: str = "float32"

    @nn.compact
    def __call__(self, rgb_BHW3: Float[Array, "B H W 3"]) -> Float[Array, "B L D"]:
        """Returns the normalised CLS token, then the patch tokens row by row; registers are dropped."""
        patch, width = self.patch, self.width
        kernel = self.param(
            "patch_kernel",
            nn.initializers.lecun_normal(in_axis=(0, 1, 2)),
            (patch, patch, 3, width),
        )
        bias = self.param("patch_bias", nn.initializers.zeros, (width,))
        cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, width))
        positions = self.param("positions", _init_positions, (1, 1 + self.grid**2, width))

        B, H, W, _ = rgb_BHW3.shape
        h, w = H // patch, W // patch
        x = rgb_BHW3[:, : h * patch, : w * patch].astype(self.dtype)
        x = x.reshape(B, h, patch, w, patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(B, h * w, -1)
        x_BLD = (
            x @ kernel.reshape(-1, width).astype(self.dtype) + bias.astype(self.dtype)[None, None]
        )
        positions_hwD = _resize_positions(positions[0, 1:], self.grid, h, w, self.resize)
        x_BLD = x_BLD + positions_hwD.reshape(1, h * w, width).astype(self.dtype)
        cls_BLD = jnp.broadcast_to(cls + positions[:, :1], (B, 1, width)).astype(self.dtype)
        tokens = [cls_BLD, x_BLD]
        if self.num_registers:
            registers = self.param(
                "registers", nn.initializers.normal(0.02), (1, self.num_registers, width)
            )
            tokens.insert(
                1, jnp.broadcast_to(registers, (B, self.num_registers, width)).astype(self.dtype)
            )
        x_BLD = jnp.concatenate(tokens, axis=1)
        x_BLD, _ = stack(
            _Block, self.depth, self.remat, num_heads=self.num_heads, norm_epsilon=self.norm_epsilon,
            layer_scale=self.layer_scale, dtype=self.dtype, name="blocks",
        )(x_BLD, None)  # fmt: skip
        x_BLD = layer_norm(self.norm_epsilon, "norm")(x_BLD).astype(self.dtype)
        return jnp.concatenate([x_BLD[:, :1], x_BLD[:, 1 + self.num_registers :]], axis=1)


class _Block(nn.Module):
    num_heads: int
    norm_epsilon: float
    layer_scale: bool
    dtype: str

    @nn.compact
    def __call__(self, x_BLD, _):
        def scaled(name, y_BLD):
            if not self.layer_scale:
                return y_BLD
            scale_D = self.param(name, nn.initializers.ones, y_BLD.shape[-1:])
            return y_BLD * scale_D[None, None].astype(self.dtype)

        attend = Attention(
            self.num_heads, qkv_bias=True, out_bias=True, dtype=self.dtype, name="attn"
        )
        x_BLD = x_BLD + scaled("scale1", attend(layer_norm(self.norm_epsilon, "norm1")(x_BLD)))
        mlp = MLP(expansion=4, dtype=self.dtype, name="mlp")
        x_BLD = x_BLD + scaled("scale2", mlp(layer_norm(self.norm_epsilon, "norm2")(x_BLD)))
        return x_BLD, None


def _init_positions(key, shape):
    """Zero for CLS, sine-cosine codes for the grid."""
    side = math.isqrt(shape[1] - 1)
    code = sincos_code(side, shape[2] // 2)
    codes = sincos_grid(code, code).reshape(1, side**2, -1)
    return jnp.concatenate([jnp.zeros((1, 1, shape[2])), codes], axis=1)


def _resize_positions(positions_LD, grid, h, w, resize):
    """Bicubic resize of the learned grid, as in each encoder's reference."""
    positions_hwD = positions_LD.reshape(grid, grid, -1)
    if (h, w) == (grid, grid):
        return positions_hwD
    if resize == "dinov2":  # Parity: antialiased, Keys' a = -0.5, as torch's antialiased bicubic.
        return jax.image.resize(
            positions_hwD, (h, w, positions_LD.shape[-1]), "cubic", antialias=True
        )
    # Parity: DINO adds 0.1 to the target size to guard against rounding, and so scales by (h + 0.1) / grid, not h / grid
    # (transformers 4.35, ViTEmbeddings.interpolate_pos_encoding).
    return jax.image.scale_and_translate(
        positions_hwD, (h, w, positions_LD.shape[-1]), (0, 1), jnp.array([h + 0.1, w + 0.1]) / grid,
        jnp.zeros(2), "cubic-pytorch", antialias=False,
    )  # fmt: skip


def normalize(rgb_BHW3: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """sRGB in [0, 1], normalised by ImageNet's mean and standard deviation."""
    return (rgb_BHW3 - jnp.array(IMAGENET_MEAN)[None, None, None]) / jnp.array(IMAGENET_STD)[
        None, None, None
    ]


def hf_entries(prefix: str, to: str, depth: int) -> list[torch_layout.Entry]:
    """Names in `transformers`' ViTModel (DINO v1), without the pooler."""
    linear, same, at = torch_layout.linear, torch_layout.same, prefix + "embeddings."
    entries = [
        same(at + "cls_token", f"{to}.cls_token"),
        same(at + "position_embeddings", f"{to}.positions"),
        torch_layout.permuted(
            at + "patch_embeddings.projection.weight", f"{to}.patch_kernel", (2, 3, 1, 0)
        ),
        same(at + "patch_embeddings.projection.bias", f"{to}.patch_bias"),
        *torch_layout.norm(prefix + "layernorm", f"{to}.norm"),
    ]
    names = {
        "attention.attention.query": "attn.q",
        "attention.attention.key": "attn.k",
        "attention.attention.value": "attn.v",
        "attention.output.dense": "attn.out",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    for i in range(depth):
        at = f"{prefix}encoder.layer.{i}."
        for theirs, ours in names.items():
            entries += linear(at + theirs, f"{to}.blocks.{ours}", layer=i)
        entries += torch_layout.norm(at + "layernorm_before", f"{to}.blocks.norm1", layer=i)
        entries += torch_layout.norm(at + "layernorm_after", f"{to}.blocks.norm2", layer=i)
    return entries


def hub_entries(
    prefix: str, to: str, depth: int, registers: bool, layer_scale: bool
) -> list[torch_layout.Entry]:
    """Names in the torch-hub files of DINO and DINOv2 (q, k, v are packed)."""
    linear, same = torch_layout.linear, torch_layout.same
    entries = [
        same(prefix + "cls_token", f"{to}.cls_token"),
        same(prefix + "pos_embed", f"{to}.positions"),
        torch_layout.permuted(
            prefix + "patch_embed.proj.weight", f"{to}.patch_kernel", (2, 3, 1, 0)
        ),
        same(prefix + "patch_embed.proj.bias", f"{to}.patch_bias"),
        *torch_layout.norm(prefix + "norm", f"{to}.norm"),
    ]
    if registers:
        entries.append(same(prefix + "register_tokens", f"{to}.registers"))
    for i in range(depth):
        at, block = f"{prefix}blocks.{i}.", f"{to}.blocks"
        qkv = tuple(f"{block}.attn.{x}" for x in "qkv")
        entries += linear(at + "attn.qkv", *qkv, layer=i)
        entries += linear(at + "attn.proj", f"{block}.attn.out", layer=i)
        entries += linear(at + "mlp.fc1", f"{block}.mlp.fc1", layer=i)
        entries += linear(at + "mlp.fc2", f"{block}.mlp.fc2", layer=i)
        for k in "12":
            entries += torch_layout.norm(at + f"norm{k}", f"{block}.norm{k}", layer=i)
            if layer_scale:
                entries.append(same(at + f"ls{k}.gamma", f"{block}.scale{k}", layer=i))
    return entries


def hf_dinov2_entries(to: str, depth: int, registers: bool) -> list[torch_layout.Entry]:
    """Names in `transformers`' Dinov2Model and Dinov2WithRegistersModel, without the mask token: ViTModel's outside blocks."""
    names = (
        (".layernorm_before.", ".norm1."),
        (".layernorm_after.", ".norm2."),
        (".intermediate.dense.", ".mlp.fc1."),
        # Not the attention's output layer.
        (".output.dense.", ".mlp.fc2."),
    )
    entries = []
    for entry in hf_entries("", to, depth):
        name = entry.torch
        for theirs, ours in names if ".attention." not in name else ():
            name = name.replace(theirs, ours)
        entries.append(dataclasses.replace(entry, torch=name))
    if registers:
        entries.append(torch_layout.same("embeddings.register_tokens", f"{to}.registers"))
    for i in range(depth):
        for k in "12":
            at = f"encoder.layer.{i}.layer_scale{k}.lambda1"
            entries.append(torch_layout.same(at, f"{to}.blocks.scale{k}", layer=i))
    return entries


def hf_fields(prefix: str, state: dict) -> dict:
    """A ViT's fields from shapes under its Hugging Face names: DINOv2 if it has layer scales, else DINO v1. Heads are 64 wide, as
    in every published ViT; if the width is not a multiple of 64 (none is published), there are 4 heads."""
    kernel = state[prefix + "embeddings.patch_embeddings.projection.weight"].shape
    positions = state[prefix + "embeddings.position_embeddings"].shape
    depth = torch_layout.count(state, prefix + "encoder.layer.")
    if prefix + "encoder.layer.0.layer_scale1.lambda1" in state:
        registers = state.get(prefix + "embeddings.register_tokens", np.zeros((1, 0, 1))).shape[1]
        return _dinov2_fields(kernel, positions, depth, registers)
    return _fields(kernel, positions, depth, resize="dino", norm_epsilon=1e-12)


def hub_fields(prefix: str, state: dict) -> dict:
    """As `hf_fields`, for torch-hub names."""
    kernel, positions = (
        state[prefix + "patch_embed.proj.weight"].shape,
        state[prefix + "pos_embed"].shape,
    )
    depth = torch_layout.count(state, prefix + "blocks.")
    if prefix + "blocks.0.ls1.gamma" not in state:
        return _fields(kernel, positions, depth, resize="dino", norm_epsilon=1e-6)
    registers = state.get(prefix + "register_tokens", np.zeros((1, 0, 1))).shape[1]
    return _dinov2_fields(kernel, positions, depth, registers)


def _dinov2_fields(kernel_shape, positions_shape, depth, registers):
    # Parity: only the models with registers use interpolate_antialias=True and interpolate_offset=0.
    resize = "dinov2" if registers else "dino"
    fields = _fields(kernel_shape, positions_shape, depth, resize=resize, norm_epsilon=1e-6)
    return fields | dict(num_registers=registers, layer_scale=True)


def _fields(kernel_shape, positions_shape, depth, **more):
    width, _, patch, _ = kernel_shape
    grid = math.isqrt(positions_shape[1] - 1)
    return dict(
        patch=patch,
        width=width,
        depth=depth,
        num_heads=4 if width % 64 else width // 64,
        grid=grid,
        **more,
    )
