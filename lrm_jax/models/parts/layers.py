"""Transformer parts that the families share. Parameters are float32, compute is in `dtype`, norms and softmax in float32."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Float, Int

from lrm_jax import sharding

TOKENS = 512  # of `by_tokens`

# Of 2^f for |f| <= 1/2, from f^0 on: the least relative error, 2e-7, of all polynomials of degree 5 that are 1 at 0.
_EXP2 = (1.0, 0.69314706, 0.24022235, 0.055506788, 0.009671958, 0.0013274559)

_LOWEST = -126 * math.log(2)  # `_exp` of it is float32's smallest normal number

torch_linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def attention(
    q_BLNK: Float[Array, "B L N K"],
    k_BMNK: Float[Array, "B M N K"],
    v_BMNK: Float[Array, "B M N K"],
    num_keys_B: Int[Array, "B"] | None = None,
) -> Float[Array, "B L N K"]:
    """Scaled dot-product attention, eq. 1 of https://arxiv.org/abs/1706.03762, softmax in float32.

    One kernel a platform: cuDNN's fused one for 16-bit inputs on a GPU, JAX's fused one (splash attention) on TPUs, per-head matrix
    products on a CPU, XLA's in chunks elsewhere.

    Args:
      num_keys_B: how many keys of each sequence count, 1 or more; the later ones are padding. None: all.
    """
    platform = sharding.platform()
    # JAX has refused odd lengths to cuDNN's backward pass; this version does not, which is untried.
    even = q_BLNK.shape[1] % 2 == k_BMNK.shape[1] % 2 == 0
    if platform == "tpu":
        kernel = _attention_by_splash
    elif platform == "gpu" and q_BLNK.dtype in (jnp.bfloat16, jnp.float16) and even:
        kernel = _attention_by_cudnn
    else:
        kernel = _attention_by_products
    # Each device for its scenes and heads: a compiler cannot split a kernel, and splits products along the width, too.
    return sharding.split_batch_and_heads(kernel, (q_BLNK, k_BMNK, v_BMNK), num_keys_B)


def _attention_by_cudnn(q_BLNK, k_BMNK, v_BMNK, num_keys_B):
    return jax.nn.dot_product_attention(
        q_BLNK, k_BMNK, v_BMNK, key_value_seq_lengths=num_keys_B, implementation="cudnn"
    )


def _attention_by_products(q_BLNK, k_BMNK, v_BMNK, num_keys_B):
    return jax.lax.platform_dependent(
        q_BLNK, k_BMNK, v_BMNK, num_keys_B, cpu=_attention_by_head, default=_attention_by_xla
    )


def _attention_by_splash(q_BLNK, k_BMNK, v_BMNK, num_keys_B, interpret=False):
    """The fused kernel that JAX brings for TPUs: it never writes the scores. Lengths are padded to whole blocks.

    `interpret`: on any platform, slowly.
    """
    B, L, N, K = q_BLNK.shape
    M = k_BMNK.shape[1]
    (size_L, pad_L), (size_M, pad_M) = _blocks(L), _blocks(M)
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([splash_attention.FullMask((L + pad_L, M + pad_M))] * N),
        block_sizes=splash_attention.BlockSizes(
            block_q=size_L, block_kv=size_M, block_q_dkv=size_L, block_kv_dkv=size_M, block_q_dq=size_L, block_kv_dq=size_M
        ),
        interpret=interpret,
    )  # fmt: skip

    def heads_first(x_BLNK, padding):
        return jnp.pad(x_BLNK.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))

    segments = None
    if pad_M or num_keys_B is not None:
        counts_BM = jnp.arange(M + pad_M)[None] < (M if num_keys_B is None else num_keys_B[:, None])
        segments = splash_attention.SegmentIds(
            q=jnp.ones((B, L + pad_L), jnp.int32),
            kv=jnp.broadcast_to(counts_BM, (B, M + pad_M)).astype(jnp.int32),
        )
    out_BNLK = jax.vmap(kernel)(
        heads_first(q_BLNK * K**-0.5, pad_L), heads_first(k_BMNK, pad_M), heads_first(v_BMNK, pad_M), segments
    )  # fmt: skip
    return out_BNLK[:, :, :L].swapaxes(1, 2)


def _blocks(length):
    """(size of a kernel's blocks, padding to whole ones): the least padding, then the largest blocks."""
    padding, size = min((-length % size, -size) for size in range(128, 513, 128))
    return -size, padding


def _attention_by_xla(q_BLNK, k_BMNK, v_BMNK, num_keys_B, max_scores=2**20):
    """JAX's, for so many queries at a time that a head has at most `max_scores`: of all, they would not fit a training step."""

    @jax.checkpoint
    def attend(q_LBNK):
        return jax.nn.dot_product_attention(
            q_LBNK.swapaxes(0, 1), k_BMNK, v_BMNK, key_value_seq_lengths=num_keys_B
        ).swapaxes(0, 1)

    max_queries = max(1, max_scores // k_BMNK.shape[1])
    return _by_chunks(attend, q_BLNK.swapaxes(0, 1), max_queries).swapaxes(0, 1)


def _by_chunks(attend, q_LX, max_queries):
    """`attend(q_LX)` for at most `max_queries` queries at a time, in chunks of one size."""
    length = q_LX.shape[0]
    num_chunks = -(-length // max_queries)
    size = -(-length // num_chunks)
    if num_chunks == 1:
        return attend(q_LX)
    padding = ((0, num_chunks * size - length), *[(0, 0)] * (q_LX.ndim - 1))
    out = jax.lax.map(attend, jnp.pad(q_LX, padding).reshape(num_chunks, size, *q_LX.shape[1:]))
    return out.reshape(num_chunks * size, *out.shape[2:])[:length]


def _attention_by_head(q_BLNK, k_BMNK, v_BMNK, num_keys_B, max_scores=2**22):
    """Plain 2-D products, head after head: XLA's CPU back end runs them at full rate, unlike a batched product.

    At most `max_scores` at a time, so that they stay in the cache; keys beyond a multiple of 64 by themselves, as rows of odd
    length are slow. The division by the softmax's sum comes after the second product: L*K divisions instead of L*M. The
    largest score is only looked for where exp could overflow without it, by the bound |q| |k|.
    """
    num_heads, width = q_BLNK.shape[2:]
    M = k_BMNK.shape[1]
    whole = M // 64 * 64
    parts = [slice(*ends) for ends in ((0, whole), (whole, M)) if ends[0] < ends[1]]
    max_queries = max(1, max_scores // M)

    @jax.checkpoint  # the L x M scores of all heads would not fit a training step
    def head(inputs):
        q_LK, k_MK, v_MK, num_keys = inputs

        def attend(q_LK, shift):
            def score(part):
                scores_LM = (q_LK @ k_MK[part].T).astype(jnp.float32) * width**-0.5
                counts_M = True if num_keys is None else jnp.arange(M)[part] < num_keys
                return jnp.where(counts_M, scores_LM, -jnp.inf)

            scores = [score(part) for part in parts]
            if shift:
                largest = [jnp.max(x, axis=-1, keepdims=True) for x in scores]
                scores = [x - functools.reduce(jnp.maximum, largest) for x in scores]
            if shift or num_keys is not None:
                scores = [jnp.maximum(x, _LOWEST) for x in scores]
            weights = [_exp(x) for x in scores]
            total_L1 = sum(jnp.sum(x, axis=-1, keepdims=True) for x in weights)
            products = [
                x.astype(v_MK.dtype) @ v_MK[part] for x, part in zip(weights, parts, strict=True)
            ]
            return (sum(products) / total_L1).astype(v_MK.dtype)

        def attend_all(shift):
            return _by_chunks(lambda q_LK: attend(q_LK, shift), q_LK, max_queries)

        longest = [jnp.max(jnp.linalg.norm(x.astype(jnp.float32), axis=-1)) for x in (q_LK, k_MK)]
        # exp(60) of 2^30 keys is still finite in float32, and exp(-60) is no denormal.
        bounded = longest[0] * longest[1] * width**-0.5 < 60
        return jax.lax.cond(bounded, lambda: attend_all(False), lambda: attend_all(True))

    def heads_first(x_BLNK):
        return x_BLNK.transpose(0, 2, 1, 3).reshape(-1, *x_BLNK.shape[1::2])

    num_keys_Z = None if num_keys_B is None else jnp.repeat(num_keys_B, num_heads)
    out_ZLK = jax.lax.map(head, (*map(heads_first, (q_BLNK, k_BMNK, v_BMNK)), num_keys_Z))
    return out_ZLK.reshape(-1, num_heads, *out_ZLK.shape[1:]).transpose(0, 2, 1, 3)


@jax.custom_jvp
def _exp(x):
    """exp(x) of float32 from _LOWEST to 88 as 2^n 2^f, n whole and |f| <= 1/2: half of the time of XLA's on a CPU.

    To 3e-7, beside the rounding of x log2(e).
    """
    y = x * math.log2(math.e)
    # float32 from 2^23 to 2^24 are the whole numbers: the sum is rounded to one, and counts up with its bits.
    n = _bits(y + 1.5 * 2**23) - _bits(jnp.float32(1.5 * 2**23))
    f = y - n.astype(jnp.float32)
    *coefficients, series = _EXP2
    for coefficient in reversed(coefficients):
        series = series * f + coefficient
    return jax.lax.bitcast_convert_type(_bits(series) + (n << 23), jnp.float32)  # the exponent + n


@_exp.defjvp
def _exp_jvp(primals, tangents):
    value = _exp(*primals)
    return value, value * tangents[0]


def _bits(x):
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def layer_norm(epsilon: float, name: str) -> nn.LayerNorm:
    """Layer normalisation over the last axis, in and to float32; the linear layer that follows casts to its own dtype.

    `epsilon` has no default: the references use 1e-5, 1e-6 and 1e-12.
    """
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=jnp.float32, name=name)


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
            y = nn.Dense(
                width, use_bias=self.qkv_bias, kernel_init=init, dtype=self.dtype, name=name
            )(y_BMD)
            return y.reshape(*y.shape[:-1], self.num_heads, width // self.num_heads)

        out_BLNK = attention(
            project("q", x_BLD), project("k", context_BMD), project("v", context_BMD)
        )
        return nn.Dense(width, use_bias=self.out_bias, dtype=self.dtype, name="out")(
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
    x_BLF = nn.Dense(width * module.expansion, dtype=module.dtype, name="fc1")(x_BLD)
    return nn.Dense(width, dtype=module.dtype, name="fc2")(gelu(x_BLF))


def gelu(x):
    """Exact GELU (https://arxiv.org/abs/1606.08415, section 2) by erf, in float32, as PyTorch has it.

    JAX's goes by erfc, which costs several times as much on a CPU and differs where the result is nearly 0.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 2**-0.5))).astype(x.dtype)


def by_tokens(module: nn.Module, function: Callable, x_BLD):
    """`function(module, x_BLD)`, which treats each token by itself and makes layers of the module.

    On a CPU TOKENS at a time: what they have in the wide layer stays in the cache.
    """
    B, L, D = x_BLD.shape
    if sharding.platform() != "cpu" or L <= TOKENS or L % TOKENS:
        return function(module, x_BLD)
    scanned = nn.scan(
        lambda module, carry, x_BLD: (carry, function(module, x_BLD)),
        variable_broadcast="params",
        split_rngs={"params": False},
        in_axes=1,
        out_axes=1,
    )
    _, y_BZLD = scanned(module, None, x_BLD.reshape(B, -1, TOKENS, D))
    return y_BZLD.reshape(B, L, -1)


def sincos_code(length: int, channels: int) -> Float[Array, "length channels"]:
    """Sine-cosine codes of places along an axis (https://arxiv.org/abs/1706.03762, section 3.5), channels even.

    Wavelengths run from 2 to 200 sixteenths of the axis, so that grids of different lengths have equal codes for equal places.
    """
    frequency = jnp.pi * 10.0 ** -jnp.linspace(0.0, 2.0, channels // 2)[None]
    angle = (jnp.arange(length) + 0.5)[:, None] * (16 / length) * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def sincos_grid(rows: Float[Array, "h C"], columns: Float[Array, "w C"]) -> Float[Array, "h w 2*C"]:
    """The codes of a grid: the row's, then the column's."""
    shape = (rows.shape[0], columns.shape[0], rows.shape[1])
    return jnp.concatenate(
        [jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None], shape)], axis=-1
    )


def stack(block: type[nn.Module], depth: int, remat: bool = True, **fields) -> nn.Module:
    """`depth` blocks with stacked parameters in a scan: called as (x, *context) -> (x, None).

    A block's `__call__(x, *context)` returns (x, None); the further arguments are the same for every block. `remat`: the
    backward pass computes each block again, so that only the blocks' inputs are kept.
    """
    scanned = nn.scan(
        nn.remat(block, prevent_cse=False) if remat else block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=depth,
    )
    return scanned(**fields)
