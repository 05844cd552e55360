"""The denoising U-Net of latent diffusion (https://arxiv.org/abs/2112.10752) with a context of a single token.

A softmax over one token is 1, so attention to it adds the same vector at every position, whatever the position holds. `Context`
computes these vectors once for all steps of sampling.
"""

import functools
import math

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lrm_jax.models.parts import layers

GROUPS = 32  # of the group norms


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice; with the code of the time step between them, if there is one."""

    width: int
    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"], time_BD: Float[Array, "B D"] | None = None):
        y_BHWC = self._layer(x_BHWC, "1", layers.torch_linear_init)
        if time_BD is not None:
            shift_BC = nn.Dense(self.width, dtype=self.dtype, name="time")(nn.silu(time_BD))
            y_BHWC = y_BHWC + shift_BC[:, None, None]
        y_BHWC = self._layer(y_BHWC, "2", nn.initializers.zeros)
        if x_BHWC.shape[-1] != self.width:
            x_BHWC = convolution(self.width, 1, self.dtype, "shortcut")(x_BHWC)
        return x_BHWC + y_BHWC

    def _layer(self, x_BHWC, number, init):
        x_BHWC = nn.silu(group_norm(self.epsilon, "norm" + number)(x_BHWC))
        return convolution(self.width, 3, self.dtype, "conv" + number, init)(x_BHWC)


class Transformer(nn.Module):
    """Self-attention among positions, the context's vector, and a GEGLU MLP; each residual."""

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"], vector_BC: Float[Array, "B C"]):
        width = x_BHWC.shape[-1]
        y_BHWC = group_norm(1e-6, "norm")(x_BHWC)
        y_BHWC = convolution(width, 1, self.dtype, "proj_in")(y_BHWC)
        y_BLD = y_BHWC.reshape(y_BHWC.shape[0], -1, width)
        attend = layers.Attention(
            self.num_heads, qkv_bias=False, out_bias=True, dtype=self.dtype, name="self_attn"
        )
        y_BLD = y_BLD + attend(layers.layer_norm(1e-5, "norm1")(y_BLD))
        y_BLD = y_BLD + vector_BC[:, None].astype(y_BLD.dtype)
        y_BLD = y_BLD + layers.geglu(self, layers.layer_norm(1e-5, "norm3")(y_BLD))
        out = convolution(width, 1, self.dtype, "proj_out", nn.initializers.zeros)
        return x_BHWC + out(y_BLD.reshape(x_BHWC.shape))


class UNet(nn.Module):
    """Predicts the noise in images or latents."""

    out_channels: int
    channels: int
    multiples: tuple[int, ...]  # of `channels`, at each level
    attention_levels: tuple[int, ...]
    num_blocks: int  # at each level, and one more on the way up
    num_heads: int
    remat: str
    dtype: str

    @nn.compact
    def __call__(
        self,
        x_BHWC: Float[Array, "B H W C"],
        t_B: Int[Array, "B"],
        vectors: dict[str, Float[Array, "B _"]],
    ) -> Float[Array, "B H W E"]:
        """The noise, float32.

        Args:
          x_BHWC: the noisy latents, and the condition's.
          t_B: time steps.
          vectors: what `Context` gives, one for each block with attention.
        """
        remat = functools.partial(nn.remat, prevent_cse=False, policy=layers.REMAT[self.remat])
        res_block, transformer = (
            (ResBlock, Transformer)
            if self.remat == "none"
            else (remat(ResBlock), remat(Transformer))
        )
        time_BD = self._time(t_B)

        def block(x, level, name, attention):
            width = self.channels * self.multiples[level]
            x = res_block(width, 1e-5, self.dtype, name=name)(x, time_BD)
            if attention:
                name = attention_of(name)
                x = transformer(self.num_heads, self.dtype, name=name)(x, vectors[name])
            return x

        x = convolution(self.channels, 3, self.dtype, "conv_in")(x_BHWC.astype(self.dtype))
        skips, last = [x], len(self.multiples) - 1
        for level in range(last + 1):
            for i in range(self.num_blocks):
                x = block(x, level, f"down{level}_{i}", level in self.attention_levels)
                skips.append(x)
            if level < last:
                x = convolution(x.shape[-1], 3, self.dtype, f"shrink{level}", stride=2)(x)
                skips.append(x)
        x = block(x, last, "middle_0", True)
        x = block(x, last, "middle_1", False)
        for level in reversed(range(last + 1)):
            for i in range(self.num_blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(x, level, f"up{level}_{i}", level in self.attention_levels)
            if level:
                x = convolution(x.shape[-1], 3, self.dtype, f"grow{level}")(doubled(x))
        x = nn.silu(group_norm(1e-5, "norm_out")(x))
        out = convolution(self.out_channels, 3, "float32", "conv_out", nn.initializers.zeros)
        return out(x)

    def _time(self, t_B):
        width = 4 * self.channels
        x_BD = time_code(t_B, self.channels)
        x_BD = nn.Dense(width, dtype=self.dtype, name="time_fc1")(x_BD)
        return nn.Dense(width, dtype=self.dtype, name="time_fc2")(nn.silu(x_BD))


class Context(nn.Module):
    """The vectors that attention to the one context token adds, in each transformer block of a U-Net."""

    widths: dict[str, int]  # of each block
    dtype: str

    @nn.compact
    def __call__(self, context_BD: Float[Array, "B D"] | None) -> dict[str, Float[Array, "_ _"]]:
        """The vectors of a context, or of zeros: [1 C], the biases."""
        return {
            name: OneToken(width, self.dtype, name=name)(context_BD)
            for name, width in self.widths.items()
        }


class OneToken(nn.Module):
    """Cross-attention to one token. Its queries, keys and their norm have no influence; checkpoints have them, so they are kept."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, context_BD):
        out = nn.Dense(self.width, dtype=self.dtype, name="out")
        if context_BD is None:
            return out(jnp.zeros((1, self.width), self.dtype))
        if self.is_initializing():
            layers.layer_norm(1e-5, "norm")(jnp.zeros((1, self.width)))
            nn.Dense(self.width, use_bias=False, name="q")(jnp.zeros((1, self.width)))
            nn.Dense(self.width, use_bias=False, name="k")(context_BD)
        return out(nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="v")(context_BD))


def attention_of(block: str) -> str:
    """The name of the transformer after a block."""
    return block + "_attention"


def attention_widths(
    channels: int, multiples: tuple[int, ...], attention_levels: tuple[int, ...], num_blocks: int
) -> dict[str, int]:
    """The width of each transformer of a U-Net, by name."""
    widths = {}
    for level in attention_levels:
        width = channels * multiples[level]
        for i in range(num_blocks):
            widths[attention_of(f"down{level}_{i}")] = width
        for i in range(num_blocks + 1):
            widths[attention_of(f"up{level}_{i}")] = width
    return widths | {attention_of("middle_0"): channels * multiples[-1]}


def time_code(t_B: Int[Array, "B"], channels: int) -> Float[Array, "B channels"]:
    """Cosines, then sines, of time steps (https://arxiv.org/abs/1706.03762, section 3.5), wavelengths from 2 pi to 10000 times that."""
    half = channels // 2
    # Parity: an exponential in float32. At t = 1000, other roundings are 1e-4 radians away.
    frequency = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = t_B.astype(jnp.float32)[:, None] * frequency[None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def doubled(x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
    """Each pixel becomes four."""
    B, H, W, C = x_BHWC.shape
    x = jnp.broadcast_to(x_BHWC[:, :, None, :, None], (B, H, 2, W, 2, C))
    return x.reshape(B, 2 * H, 2 * W, C)


def group_norm(epsilon: float, name: str) -> nn.GroupNorm:
    """Normalises groups of channels over all positions, in float32."""
    return nn.GroupNorm(
        GROUPS, epsilon=epsilon, use_fast_variance=False, dtype=jnp.float32, name=name
    )


def convolution(
    width: int, side: int, dtype: str, name: str, init=layers.torch_linear_init, stride: int = 1
) -> nn.Conv:
    """A square convolution that keeps the size, divided by `stride`."""
    return nn.Conv(
        width, (side, side), strides=stride, padding=side // 2, kernel_init=init, dtype=dtype, name=name
    )  # fmt: skip
