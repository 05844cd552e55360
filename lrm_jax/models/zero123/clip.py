"""CLIP's image tower (https://arxiv.org/abs/2103.00020, section 2.4): an image to one vector."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from lrm_jax.models.parts import layers
from lrm_jax.ops import resize

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ImageTower(nn.Module):
    """A vision transformer whose class token is projected."""

    side: int  # pixels, to which images are resized
    patch: int
    width: int
    depth: int
    num_heads: int
    out: int  # width of the embedding
    remat: str
    dtype: str

    @nn.compact
    def __call__(self, rgb_BHW3: Float[Array, "B H W 3"]) -> Float[Array, "B out"]:
        """The embedding of images with colours in [0, 1]."""
        x_BHW3 = preprocessed(rgb_BHW3, self.side)
        patch = (self.patch, self.patch)
        embed = nn.Conv(
            self.width, patch, strides=patch, padding="VALID", use_bias=False, dtype=self.dtype, name="patches"
        )  # fmt: skip
        x_BLD = embed(x_BHW3.astype(self.dtype)).reshape(x_BHW3.shape[0], -1, self.width)
        scaled = nn.initializers.normal(self.width**-0.5)
        cls_D = self.param("cls_token", scaled, (self.width,))
        positions_LD = self.param("positions", scaled, (1 + x_BLD.shape[1], self.width))
        cls_BLD = jnp.broadcast_to(cls_D[None, None], (x_BLD.shape[0], 1, self.width))
        x_BLD = jnp.concatenate([cls_BLD.astype(self.dtype), x_BLD], axis=1)
        x_BLD = layers.layer_norm(1e-5, "norm_in")(x_BLD + positions_LD[None].astype(self.dtype))
        blocks = layers.stack(
            Block, self.depth, self.remat, num_heads=self.num_heads, dtype=self.dtype, name="blocks"
        )
        x_BLD, _ = blocks(x_BLD.astype(self.dtype), None)
        cls_BD = layers.layer_norm(1e-5, "norm_out")(x_BLD[:, 0])
        return nn.Dense(self.out, use_bias=False, dtype=self.dtype, name="projection")(cls_BD)


class Block(nn.Module):
    """Self-attention and an MLP; each pre-norm and residual."""

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, x_BLD, _):
        attend = layers.Attention(
            self.num_heads, qkv_bias=True, out_bias=True, dtype=self.dtype, name="attn"
        )
        x_BLD = x_BLD + attend(layers.layer_norm(1e-5, "norm1")(x_BLD))
        width = x_BLD.shape[-1]
        h_BLF = layers.dense(4 * width, dtype=self.dtype, name="fc1")(
            layers.layer_norm(1e-5, "norm2")(x_BLD)
        )
        # Parity: "quick GELU", a sigmoid's approximation.
        h_BLF = h_BLF * nn.sigmoid(1.702 * h_BLF)
        return x_BLD + layers.dense(width, dtype=self.dtype, name="fc2")(h_BLF), None


def preprocessed(rgb_BHW3: Float[Array, "B H W 3"], side: int) -> Float[Array, "B side side 3"]:
    """Images as Zero123 gives them to CLIP: bicubic, corner pixels to corner pixels, not antialiased, not clamped; normalised."""
    rows, columns = (resize.bicubic_weights(n, side) for n in rgb_BHW3.shape[1:3])
    resized = jnp.einsum(
        "ih,bhwc,jw->bijc", rows, rgb_BHW3.astype(jnp.float32), columns, precision="highest"
    )
    mean, std = (np.float32(x)[None, None, None] for x in (MEAN, STD))
    return (resized - mean) / std
