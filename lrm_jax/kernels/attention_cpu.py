"""Attention on CPUs: plain matrix products whose scores stay in the cache."""

import functools
import math

import jax
import jax.numpy as jnp

from lrm_jax.kernels.attention_plain import by_chunks

# Coefficients of 2^f for |f| <= 1/2, from f^0 up: the least relative error, 2e-7, of all degree-5 polynomials that are 1 at 0.
_EXP2 = (1.0, 0.69314706, 0.24022235, 0.055506788, 0.009671958, 0.0013274559)
_LOWEST = -126 * math.log(2)  # `_exp(_LOWEST)` is float32's smallest normal number


def attention_by_head(q_BLNK, k_BMNK, v_BMNK, num_keys_B, max_scores=2**22):
    """Plain 2-D products, one head at a time: XLA's CPU backend runs them at full rate, unlike a batched product.

    At most `max_scores` scores are computed at a time, so that they stay in the cache. Keys beyond a multiple of 64 are
    handled separately, because rows of odd length are slow. The division by the softmax's sum comes after the second
    product: L*K divisions instead of L*M. The maximum score is subtracted only if exp could overflow without it, judged by
    the bound |q| |k|.
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
            # If nothing was subtracted, weights go up to exp(60): beyond float16, whose maximum is about exp(11).
            wide = jnp.float32 if v_MK.dtype == jnp.float16 else v_MK.dtype
            products = [
                x.astype(wide) @ v_MK[part].astype(wide)
                for x, part in zip(weights, parts, strict=True)
            ]
            return (sum(products) / total_L1).astype(v_MK.dtype)

        def attend_all(shift):
            return by_chunks(lambda q_LK: attend(q_LK, shift), q_LK, max_queries)

        longest = [jnp.max(jnp.linalg.norm(x.astype(jnp.float32), axis=-1)) for x in (q_LK, k_MK)]
        # The sum of exp(60) over 2^30 keys is still finite in float32, and exp(-60) is not denormal.
        bounded = longest[0] * longest[1] * width**-0.5 < 60
        return jax.lax.cond(bounded, lambda: attend_all(False), lambda: attend_all(True))

    def heads_first(x_BLNK):
        return x_BLNK.transpose(0, 2, 1, 3).reshape(-1, *x_BLNK.shape[1::2])

    num_keys_Z = None if num_keys_B is None else jnp.repeat(num_keys_B, num_heads)
    out_ZLK = jax.lax.map(head, (*map(heads_first, (q_BLNK, k_BMNK, v_BMNK)), num_keys_Z))
    return out_ZLK.reshape(-1, num_heads, *out_ZLK.shape[1:]).transpose(0, 2, 1, 3)


@jax.custom_jvp
def _exp(x):
    """exp(x) for float32 from _LOWEST to 88 as 2^n 2^f, n an integer and |f| <= 1/2. Takes half the time of XLA's exp on a CPU.

    Accurate to 3e-7, apart from the rounding of x log2(e).
    """
    y = x * math.log2(math.e)
    # Between 2^23 and 2^24, float32 numbers are the integers: the sum is rounded to one, and its bits count up with it.
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
