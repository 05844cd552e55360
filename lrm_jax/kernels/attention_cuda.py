"""Attention on GPUs: cuDNN's fused kernel."""

import re

import jax
import jax.numpy as jnp

from lrm_jax.parallel import sharding

HOPPER_OR_LATER = re.compile(r"\bG?[HB]\d+")  # H100, H200, GH200, B200: in names of devices
BLOCK = 64  # cuDNN has no gradient for odd lengths, and works on tiles of this size


def attention_by_cudnn(q_BLNK, k_BMNK, v_BMNK, num_keys_B):
    """JAX's call of cuDNN's fused kernel, for any lengths: they are padded to a multiple of BLOCK.

    Padded keys do not count. Padded queries are cut off, so they have no gradient and give none. See `attention.attention` for the
    arguments and for when it is called.
    """
    L, M = q_BLNK.shape[1], k_BMNK.shape[1]
    if M % BLOCK and num_keys_B is None:
        num_keys_B = jnp.full(k_BMNK.shape[:1], M, jnp.int32)
    padded = (_padded(x) for x in (q_BLNK, k_BMNK, v_BMNK))
    out = jax.nn.dot_product_attention(
        *padded, key_value_seq_lengths=num_keys_B, implementation="cudnn"
    )
    return out[:, :L]


def can(q_BLNK) -> bool:
    """Whether cuDNN has a kernel: for 16-bit numbers, and heads of whole 16 bytes, up to 128 wide, or 256 from Hopper on."""
    width, widest = q_BLNK.shape[-1], 256 if HOPPER_OR_LATER.search(sharding.device_kind()) else 128
    return q_BLNK.dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= widest


def is_forward(primitive) -> bool:
    """Whether a primitive of JAX is the call of cuDNN's forward kernel. Its results are the output, and in training the statistics of
    the softmax. They have no names of their own (`jax.ad_checkpoint.checkpoint_name`), so a policy of `jax.checkpoint` asks here."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


def _padded(x_BLNK):
    return jnp.pad(x_BLNK, ((0, 0), (0, -x_BLNK.shape[1] % BLOCK), (0, 0), (0, 0)))
