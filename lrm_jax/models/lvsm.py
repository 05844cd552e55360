"""LVSM (https://arxiv.org/abs/2410.17242): new views of a scene from given views, without a 3D representation.

A source image becomes tokens of its patches' colours and Plücker rays; a target view becomes tokens of its rays alone. A
transformer attends to both, and turns each target token into its patch of the image. The decoder-only model (`num_latents=0`)
shows the transformer the source tokens themselves. The encoder-decoder shows it `num_latents` tokens that a first transformer
has made from them. Only its rays mark a token's place, so tokens may come in any order, and any number and size of views fits
the same parameters.

Keys and values of the source are *not* cached between target views, beyond what `encode` does. In every block, attention is
bidirectional over scene and target
(https://github.com/Haian-Jin/LVSM/blob/2fea924/model/LVSM_scene_decoder_only.py#L213-L223), so from the first block's output on
the scene's tokens depend on the target, too. A mask that kept them apart would make another function, which no published weights
fit. What does not depend on the target is in `encode`: the tokeniser, the normalisation of the blocks' input and, in the
encoder-decoder, the whole encoder. The first block's projections to queries, keys and values do not depend on it either. But they
are a quarter of the weights of one block of 24, 1% of the products: not worth a second kind of block.

The published checkpoints expect scenes with normalised cameras (mean pose at the origin, farthest coordinate at 1/1.35). The data
pipeline has to do this.
"""

import math

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lrm_jax.kernels.attention import attention
from lrm_jax.kernels.tokens import by_tokens
from lrm_jax.models.parts import torch_layout
from lrm_jax.models.parts.layers import dense, gelu, stack
from lrm_jax.ops import cameras
from lrm_jax.types import InputError, Rays, Rendering, Views

# Sizes: https://github.com/Haian-Jin/LVSM/tree/2fea924/configs. The files are those of https://huggingface.co/coast01/LVSM. Image
# sizes are those of training; all else is the same at both sizes.
_DECODER_ONLY = dict(patch=8, width=768, num_heads=12, depth=24)
_ENCODER_DECODER = dict(
    patch=8, width=768, num_heads=12, depth=12, encoder_depth=12, num_latents=3072
)
VARIANTS = {
    "decoder-only-256": dict(**_DECODER_ONLY, image_size=256),  # scene_decoder_only_256.pt
    "encoder-decoder-256": dict(**_ENCODER_DECODER, image_size=256),  # scene_encoder_decoder_256.pt
    "decoder-only-512": dict(**_DECODER_ONLY, image_size=512),  # lvsm_scene_decoder_only_res512.pt
    # lvsm_scene_encoder_decoder_res512.pt
    "encoder-decoder-512": dict(**_ENCODER_DECODER, image_size=512),
    # Ours, for tests.
    "tiny": dict(patch=4, width=32, num_heads=2, depth=2, image_size=16),
}

# Prefix of the tensors in a checkpoint that are not the model's: the VGG19 of the training loss. They are dropped.
FROZEN = "loss_computer."


class LVSM(nn.Module):
    """Both architectures: one transformer over target tokens and source tokens, or latents made from the source tokens."""

    patch: int
    width: int
    num_heads: int
    depth: int  # blocks that see the target
    encoder_depth: int = 0  # blocks that make the latents
    num_latents: int = 0  # 0: decoder-only
    image_size: int = (
        256  # in training; images of any multiple of `patch` can be given and rendered
    )
    ray_chunk: int | None = None  # rays rendered at a time, in whole views; None: 8 views of 256 px
    remat: str = "blocks"  # what is kept for the backward pass, one of `layers.REMAT`
    dtype: str = "float32"
    normalize = "all_views"

    def setup(self):
        self.source_tokenizer = self._linear(self.width)
        self.target_tokenizer = self._linear(self.width)
        if self.num_latents:
            # Parity: not truncated; the reference truncates at 100 standard deviations.
            init = nn.initializers.normal(0.02)
            self.latents = self.param("latents", init, (self.num_latents, self.width))
            self.encoder = self._stack(self.encoder_depth)
        self.input_norm = _norm(name=None)
        self.blocks = self._stack(self.depth)
        self.head_norm = _norm(name=None)
        self.head = self._linear(3 * self.patch**2)

    def _linear(self, features):
        init = nn.initializers.normal(_deviation(self.width))
        return nn.Dense(features, use_bias=False, kernel_init=init, dtype=self.dtype)

    def _stack(self, depth):
        return stack(Block, depth, self.remat, num_heads=self.num_heads, dtype=self.dtype)

    def __call__(self, source: Views, rays: Rays, keys_B: jax.Array | None = None) -> Rendering:
        """Encodes the source views and renders rays [B V H W]."""
        return self.render(self.encode(source), rays, keys_B)

    def encode(
        self, source: Views, num_views: Int[Array, "B"] | None = None
    ) -> dict[str, Array | None]:
        """The tokens [B M D] that targets are rendered from, ready for the blocks, and how many of them are real.

        Args:
          source: opaque images [B V H W 3], sides multiples of `patch`. The unit of length is the checkpoint's.
          num_views: how many of each scene's V views are real. The later ones are padding, whatever they hold: scenes with
            different numbers of views can share a batch and a compiled program. None: all.

        Raises:
          InputError: the images do not divide into patches.
        """
        B, V, H, W, _ = source.rgb.shape
        rays = cameras.plucker(cameras.pixel_rays(source.cameras, H, W))
        patches_BVLC = self._patches(jnp.concatenate([2 * source.rgb - 1, rays], axis=-1))
        num_tokens = None
        if num_views is not None:
            # Zeroed before the first product, so that what padding holds (NaN, for all-zero cameras) is in no gradient either.
            given_BV = jnp.arange(V)[None] < num_views[:, None]
            patches_BVLC = jnp.where(given_BV[..., None, None], patches_BVLC, 0)
            num_tokens = num_views * patches_BVLC.shape[2]
        tokens_BMD = self.source_tokenizer(patches_BVLC.reshape(B, -1, patches_BVLC.shape[-1]))
        if self.num_latents:
            latents_BLD = jnp.broadcast_to(self.latents[None], (B, *self.latents.shape))
            # Parity: the encoder's input is not normalised.
            tokens_BMD = _attend_to(self.encoder, latents_BLD, tokens_BMD, num_tokens)
            num_tokens = None
        return {"tokens": self._normed(tokens_BMD), "num_tokens": num_tokens}

    def render(self, scene: dict, rays: Rays, keys_B: jax.Array | None = None) -> Rendering:
        """Renders rays [B V H W], each view independently; H and W are multiples of `patch`. `keys_B` has no effect.

        Views are rendered `ray_chunk` rays at a time, so that memory does not grow with their number.

        Raises:
          InputError: the rays do not divide into patches.
        """
        _, V, H, W, _ = rays.origins.shape
        num_chunks = -(-V // max((self.ray_chunk or 2**19) // (H * W), 1))
        size = -(-V // num_chunks)
        if num_chunks == 1:
            return Rendering(rgb=self._draw(scene, rays))

        def chunked(x):
            x = jnp.pad(x, ((0, 0), (0, num_chunks * size - V), *((0, 0),) * 3), mode="edge")
            return x.reshape(x.shape[0], num_chunks, size, *x.shape[2:])

        scan = nn.scan(
            lambda module, carry, scene, rays: (carry, module._draw(scene, rays)),
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=(nn.broadcast, 1),
            out_axes=1,
        )
        _, rgb = scan(self, None, scene, jax.tree.map(chunked, rays))
        return Rendering(rgb=rgb.reshape(rgb.shape[0], -1, *rgb.shape[3:])[:, :V])

    def _draw(self, scene: dict, rays: Rays) -> Float[Array, "B V H W 3"]:
        """The colours of views that are rendered together: each is a separate sequence of one batch."""
        B, V, H, W, _ = rays.origins.shape
        tokens_BVLD = self._normed(self.target_tokenizer(self._patches(cameras.plucker(rays))))
        tokens_ZLD = tokens_BVLD.reshape(B * V, *tokens_BVLD.shape[2:])
        context_ZMD, num_tokens = jax.tree.map(
            lambda x: jnp.repeat(x, V, axis=0), (scene["tokens"], scene["num_tokens"])
        )
        tokens_ZLD = _attend_to(self.blocks, tokens_ZLD, context_ZMD, num_tokens)
        patches_ZLC = nn.sigmoid(self.head(self.head_norm(tokens_ZLD)).astype(jnp.float32))
        return einops.rearrange(
            patches_ZLC, "(b v) (h w) (p q c) -> b v (h p) (w q) c",
            b=B, h=H // self.patch, p=self.patch, q=self.patch,
        )  # fmt: skip

    def _normed(self, tokens):
        return self.input_norm(tokens).astype(self.dtype)

    def _patches(self, x_BVHWC: Float[Array, "B V H W C"]) -> Float[Array, "B V L D"]:
        H, W = x_BVHWC.shape[2:4]
        if H % self.patch or W % self.patch:
            raise InputError(
                f"views of {W} x {H} pixels do not divide into LVSM's patches:"
                f" make both sides multiples of {self.patch}"
            )
        return einops.rearrange(
            x_BVHWC, "b v (h p) (w q) c -> b v (h w) (p q c)", p=self.patch, q=self.patch
        )


MODEL = LVSM


class Block(nn.Module):
    """Self-attention with normalised queries and keys, and MLP; both pre-norm and residual, without biases."""

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, x_and_index, num_keys):
        x_BLD, index = x_and_index
        width = x_BLD.shape[-1]

        def init(key, shape, dtype=jnp.float32):
            """The deeper a block in its stack, the less it adds (model/LVSM_scene_decoder_only.py#L90-L97)."""
            scale = _deviation(width) / jnp.sqrt(2 * (index + 1))
            return jax.random.normal(key, shape, dtype) * scale

        def linear(features, name):
            return dense(features, use_bias=False, kernel_init=init, dtype=self.dtype, name=name)

        def heads(name):
            return linear(width, name)(y_BLD).reshape(*x_BLD.shape[:-1], self.num_heads, -1)

        def normed_heads(name):
            norm = nn.RMSNorm(epsilon=1e-5, dtype=jnp.float32, name=f"{name}_norm")
            return norm(heads(name)).astype(self.dtype)

        def mlp(_, y_BLD):
            return linear(width, "fc2")(gelu(linear(4 * width, "fc1")(y_BLD)))

        y_BLD = _norm("norm1")(x_BLD)
        out_BLNK = attention(normed_heads("q"), normed_heads("k"), heads("v"), num_keys)
        x_BLD = x_BLD + linear(width, "out")(out_BLNK.reshape(x_BLD.shape))
        x_BLD = x_BLD + by_tokens(self, mlp, _norm("norm2")(x_BLD))
        return (x_BLD, index + 1), None


def _deviation(width):
    """Standard deviation of the initial weights: the reference's 0.02 at its width, 768, and equally large outputs at others."""
    return 0.02 * (768 / width) ** 0.5


def _norm(name):
    return nn.LayerNorm(
        epsilon=1e-5, use_bias=False, use_fast_variance=False, dtype=jnp.float32, name=name
    )


def _attend_to(blocks, x_BLD, context_BMD, num_context):
    """`x_BLD` after blocks over `x_BLD` and the first `num_context` [B] tokens of the context (None: all)."""
    L = x_BLD.shape[1]
    x_BLD = jnp.concatenate([x_BLD.astype(context_BMD.dtype), context_BMD], axis=1)
    num_keys = None if num_context is None else L + num_context
    (x_BLD, _), _ = blocks((x_BLD, jnp.float32(0)), num_keys)
    return x_BLD[:, :L]


# -- names of the reference


def entries(model: LVSM) -> list[torch_layout.Entry]:
    """Names of the reference's `ckpt["model"]`."""

    def linear(torch, *ours, layer=None):
        return torch_layout.linear(torch, *ours, layer=layer, bias=False)

    def norm(torch, ours, layer=None):
        return torch_layout.same(torch + ".weight", ours + ".scale", layer)

    table = [
        *linear("image_tokenizer.1", "source_tokenizer"),
        *linear("target_pose_tokenizer.1", "target_tokenizer"),
        norm("image_token_decoder.0", "head_norm"),
        *linear("image_token_decoder.1", "head"),
    ]
    if model.num_latents:
        stacks = [
            ("transformer_encoder", "encoder", model.encoder_depth),
            ("transformer_decoder", "blocks", model.depth),
        ]
        table.append(torch_layout.same("n_light_field_latent", "latents"))
        table.append(norm("transformer_input_layernorm_decoder", "input_norm"))
    else:
        stacks = [("transformer_blocks", "blocks", model.depth)]
        table.append(norm("transformer_input_layernorm", "input_norm"))
    for theirs, ours, depth in stacks:
        for i in range(depth):
            at, to = f"{theirs}.{i}.", f"{ours}."
            table += linear(at + "attn.to_qkv", to + "q", to + "k", to + "v", layer=i)
            table += linear(at + "attn.fc", to + "out", layer=i)
            table += linear(at + "mlp.mlp.0", to + "fc1", layer=i)
            table += linear(at + "mlp.mlp.2", to + "fc2", layer=i)
            for name in ("norm1", "norm2"):
                table.append(norm(at + name, to + name, layer=i))
            for name in ("q_norm", "k_norm"):
                table.append(norm(f"{at}attn.{name}", to + name, layer=i))
    return table


def from_torch(state: dict[str, np.ndarray], model: LVSM) -> dict:
    """Parameters of an LVSM state dict."""
    return torch_layout.from_torch(entries(model), state)


def to_torch(params: dict, model: LVSM) -> dict[str, np.ndarray]:
    """A state dict for the reference's `ckpt["model"]`, without the training loss's tensors, which inference does not use."""
    return torch_layout.to_torch(entries(model), params)


def fields_from_config(config: dict) -> dict:
    """The image size, which does not follow from the shapes."""
    return dict(image_size=config["image_size"])


def fields_from_torch(state: dict[str, np.ndarray]) -> dict:
    """The model's fields that follow from the shapes of an LVSM state dict: all but the image size."""
    width, inputs = state["image_tokenizer.1.weight"].shape
    latents = state.get("n_light_field_latent")
    blocks = "transformer_blocks." if latents is None else "transformer_decoder."
    (head_width,) = state[f"{blocks}0.attn.q_norm.weight"].shape
    return dict(
        patch=math.isqrt(inputs // 9),
        width=width,
        num_heads=width // head_width,
        depth=torch_layout.count(state, blocks),
        encoder_depth=torch_layout.count(state, "transformer_encoder."),
        num_latents=0 if latents is None else latents.shape[0],
    )
