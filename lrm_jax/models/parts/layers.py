"""Transformer layers that the families share. Parameters are float32; computation is in `dtype`, norms and softmax in float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lrm_jax.kernels.attention import attention, keep_attention
from lrm_jax.kernels.tokens import by_tokens
from lrm_jax.types import InputError

_PRODUCT = "product"  # the name of a `dense` layer's result, for the policies of `jax.checkpoint`
# What the forward pass of a block keeps for the backward pass, besides the block's input. The rest is computed again.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,  # for small models: memory traffic more than doubles in large ones
    "products": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(_PRODUCT), keep_attention
    ),
    "attention": keep_attention,
    "blocks": jax.checkpoint_policies.nothing_saveable,
}

torch_linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def layer_norm(epsilon: float, name: str) -> nn.LayerNorm:
    """Layer normalisation over the last axis, computed and returned in float32; the next linear layer casts to its own dtype.

    `epsilon` has no default, because the references use 1e-5, 1e-6 and 1e-12.
    """
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=jnp.float32, name=name)


def dense(features: int, **fields) -> Callable:
    """`nn.Dense(features, **fields)` for a block: its result can be kept for the backward pass, see REMAT."""
    layer = nn.Dense(features, **fields)
    return lambda x: checkpoint_name(layer(x), _PRODUCT)


class Attention(nn.Module):
    """Multi-head attention of `x_BLD` to `context_BMD` (None: to itself)."""

    num_heads: int
    qkv_bias: bool
    out_bias: bool
    dtype: str = "float32"
    qk_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x_BLD, context_BMD=None):
        context_BMD = x_BLD if context_BMD is None else context_BMD
        width = x_BLD.shape[-1]

        def project(name, y_BMD):
            init = nn.initializers.lecun_normal() if name == "v" else self.qk_init
            y = dense(width, use_bias=self.qkv_bias, kernel_init=init, dtype=self.dtype, name=name)(
                y_BMD
            )
            return y.reshape(*y.shape[:-1], self.num_heads, width // self.num_heads)

        out_BLNK = attention(
            project("q", x_BLD), project("k", context_BMD), project("v", context_BMD)
        )
        return dense(width, use_bias=self.out_bias, dtype=self.dtype, name="out")(
            out_BLNK.reshape(x_BLD.shape)
        )


class MLP(nn.Module):
    """Two linear layers with an exact (erf) GELU between them."""

    expansion: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BLD):
        return by_tokens(self, _mlp, x_BLD)


def _mlp(module, x_BLD):
    width = x_BLD.shape[-1]
    x_BLF = dense(width * module.expansion, dtype=module.dtype, name="fc1")(x_BLD)
    return dense(width, dtype=module.dtype, name="fc2")(gelu(x_BLF))


def geglu(module: nn.Module, x_BLD):
    """Equation 6 of https://arxiv.org/abs/2002.05202, with biases: layers `fc1` and `fc2` of a module with a `dtype`."""
    return by_tokens(module, _geglu, x_BLD)


def _geglu(module, x_BLD):
    width = x_BLD.shape[-1]
    hidden = dense(8 * width, dtype=module.dtype, name="fc1")(x_BLD)
    value, gate = jnp.split(hidden, 2, axis=-1)
    return dense(width, dtype=module.dtype, name="fc2")(value * gelu(gate))


def gelu(x):
    """Exact GELU (https://arxiv.org/abs/1606.08415, section 2) by erf, in float32, as in PyTorch.

    JAX's GELU uses erfc, which takes several times as long on a CPU and differs where the result is nearly 0.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 2**-0.5))).astype(x.dtype)


def sincos_code(length: int, channels: int) -> Float[Array, "length channels"]:
    """Sine-cosine codes of positions along an axis (https://arxiv.org/abs/1706.03762, section 3.5); `channels` is even.

    Wavelengths run from 2 to 200 sixteenths of the axis, so that grids of different lengths have equal codes at equal positions.
    """
    frequency = jnp.pi * 10.0 ** -jnp.linspace(0.0, 2.0, channels // 2)[None]
    angle = (jnp.arange(length) + 0.5)[:, None] * (16 / length) * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def sincos_grid(rows: Float[Array, "h C"], columns: Float[Array, "w C"]) -> Float[Array, "h w 2*C"]:
    """The codes of a grid: the row's code, then the column's."""
    shape = (rows.shape[0], columns.shape[0], rows.shape[1])
    return jnp.concatenate(
        [jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None], shape)], axis=-1
    )


def stack(block: type[nn.Module], depth: int, remat: str = "blocks", **fields) -> nn.Module:
    """A scan over `depth` blocks with stacked parameters, called as (x, *context) -> (x, None).

    A block's `__call__(x, *context)` returns (x, None); `context` is the same for every block.

    Args:
      remat: what is kept for the backward pass, one of REMAT.

    Raises:
      InputError: `remat` is not one of them.
    """
    if remat not in REMAT:
        raise InputError(f"model.remat={remat!r}: choose one of {', '.join(REMAT)}")
    scanned = nn.scan(
        block if remat == "none" else nn.remat(block, prevent_cse=False, policy=REMAT[remat]),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=depth,
    )
    return scanned(**fields)
