"""The autoencoder of latent diffusion (https://arxiv.org/abs/2112.10752, section 3.1), regularised by a KL term: images to latents
of an eighth of their side, and back."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from lrm_jax.kernels.attention import attention
from lrm_jax.models.zero123.unet import ResBlock, convolution, doubled, group_norm

EPSILON = 1e-6
LATENT = 4  # channels


class Encoder(nn.Module):
    """An image to the mean and the log variance of its latent."""

    channels: int
    multiples: tuple[int, ...]  # of `channels`, at each level
    num_blocks: int
    dtype: str

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W 3"]) -> Float[Array, "B h w 8"]:
        """Mean, then log variance, float32.

        Args:
          x_BHWC: colours in [-1, 1].
        """
        x = convolution(self.channels, 3, self.dtype, "conv_in")(x_BHWC.astype(self.dtype))
        for level, multiple in enumerate(self.multiples):
            for i in range(self.num_blocks):
                x = ResBlock(
                    self.channels * multiple, EPSILON, self.dtype, name=f"down{level}_{i}"
                )(x)
            if level < len(self.multiples) - 1:
                # Parity: a row and a column of zeros on one side only.
                x = nn.Conv(
                    x.shape[-1], (3, 3), strides=2, padding=((0, 1), (0, 1)), dtype=self.dtype, name=f"shrink{level}"
                )(x)  # fmt: skip
        x = Middle(self.dtype, name="middle")(x)
        x = nn.silu(group_norm(EPSILON, "norm_out")(x))
        x = convolution(2 * LATENT, 3, "float32", "conv_out")(x)
        return convolution(2 * LATENT, 1, "float32", "quant")(x)


class Decoder(nn.Module):
    """A latent to an image."""

    channels: int
    multiples: tuple[int, ...]
    num_blocks: int
    dtype: str

    @nn.compact
    def __call__(self, z_BhwC: Float[Array, "B h w 4"]) -> Float[Array, "B H W 3"]:
        """Colours, about in [-1, 1], float32."""
        x = convolution(LATENT, 1, "float32", "post_quant")(z_BhwC)
        x = convolution(self.channels * self.multiples[-1], 3, self.dtype, "conv_in")(x)
        x = Middle(self.dtype, name="middle")(x)
        for level in reversed(range(len(self.multiples))):
            width = self.channels * self.multiples[level]
            for i in range(self.num_blocks + 1):
                x = ResBlock(width, EPSILON, self.dtype, name=f"up{level}_{i}")(x)
            if level:
                x = convolution(width, 3, self.dtype, f"grow{level}")(doubled(x))
        x = nn.silu(group_norm(EPSILON, "norm_out")(x))
        return convolution(3, 3, "float32", "conv_out")(x)


class Middle(nn.Module):
    """A block, attention among positions with one head, and a block."""

    dtype: str

    @nn.compact
    def __call__(self, x_BHWC):
        B, H, W, C = x_BHWC.shape
        x = ResBlock(C, EPSILON, self.dtype, name="block_0")(x_BHWC)
        y_BHWC = group_norm(EPSILON, "norm")(x)
        q, k, v = (
            convolution(C, 1, self.dtype, name)(y_BHWC).reshape(B, H * W, 1, C) for name in "qkv"
        )
        y_BHWC = convolution(C, 1, self.dtype, "out")(attention(q, k, v).reshape(B, H, W, C))
        return ResBlock(C, EPSILON, self.dtype, name="block_1")(x + y_BHWC)


def mode(moments: Float[Array, "*B 8"]) -> Float[Array, "*B 4"]:
    """The most likely latent."""
    return moments[..., :LATENT]


def drawn(moments: Float[Array, "*B 8"], noise: Float[Array, "*B 4"]) -> Float[Array, "*B 4"]:
    """A random latent, from standard normal noise."""
    deviation = jnp.exp(0.5 * jnp.clip(moments[..., LATENT:], -30.0, 20.0))
    return moments[..., :LATENT] + deviation * noise
