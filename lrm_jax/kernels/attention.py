"""Attention: one function with a kernel for each kind of device."""

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lrm_jax.kernels import attention_cpu, attention_cuda, attention_plain, attention_tpu
from lrm_jax.parallel import batch_axes, sharding


def attention(
    q_BLNK: Float[Array, "B L N K"],
    k_BMNK: Float[Array, "B M N K"],
    v_BMNK: Float[Array, "B M N K"],
    num_keys_B: Int[Array, "B"] | None = None,
) -> Float[Array, "B L N K"]:
    """Scaled dot-product attention, eq. 1 of https://arxiv.org/abs/1706.03762, softmax in float32.

    One kernel per platform: cuDNN's fused kernel for 16-bit inputs on a GPU, JAX's fused kernel (splash attention) on TPUs,
    per-head matrix products on a CPU, XLA in chunks elsewhere.

    Args:
      num_keys_B: how many keys of each sequence are attended to, 1 or more; the later ones are padding. None: all.
    """
    platform = sharding.platform()
    if platform == "tpu":
        kernel = attention_tpu.attention_by_splash
    elif platform == "gpu" and attention_cuda.can(q_BLNK):
        kernel = attention_cuda.attention_by_cudnn
    else:
        kernel = _attention_by_products
    # Each device works on its own scenes and heads. The compiler cannot split a kernel, and would split products along the width.
    return batch_axes.split_batch_and_heads(kernel, (q_BLNK, k_BMNK, v_BMNK), num_keys_B)


def keep_attention(primitive, *_, **params) -> bool:
    """A policy of `jax.checkpoint` that keeps what `attention` returns, and the statistics of the softmax that its gradient needs.

    So the backward pass does not run the fused kernels' forward pass again. Without them (by products), it computes the scores again.
    """
    return attention_cuda.is_forward(primitive) or _is_named(primitive, **params)


_is_named = jax.checkpoint_policies.save_only_these_names(attention_plain.RESULT)


def _attention_by_products(q_BLNK, k_BMNK, v_BMNK, num_keys_B):
    out_BLNK = jax.lax.platform_dependent(
        q_BLNK,
        k_BMNK,
        v_BMNK,
        num_keys_B,
        cpu=attention_cpu.attention_by_head,
        default=attention_plain.attention_by_xla,
    )
    return checkpoint_name(out_BLNK, attention_plain.RESULT)
