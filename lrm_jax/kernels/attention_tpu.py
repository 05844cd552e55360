"""Attention on TPUs: JAX's splash kernel."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from lrm_jax.kernels.attention_plain import RESULT


def attention_by_splash(q_BLNK, k_BMNK, v_BMNK, num_keys_B, interpret=False):
    """JAX's fused kernel for TPUs, which never writes the scores to memory. Lengths are padded to whole blocks.

    `interpret`: runs on any platform, slowly.
    """
    B, L, N, K = q_BLNK.shape
    M = k_BMNK.shape[1]
    (size_L, pad_L), (size_M, pad_M) = _blocks(L), _blocks(M)
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([splash_attention.FullMask((L + pad_L, M + pad_M))] * N),
        block_sizes=splash_attention.BlockSizes(
            block_q=size_L, block_kv=size_M, block_q_dkv=size_L, block_kv_dkv=size_M, block_q_dq=size_L, block_kv_dq=size_M
        ),
        residual_checkpoint_name=RESULT,
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
    """(block size of the kernel, padding to whole blocks): the least padding first, then the largest blocks."""
    padding, size = min((-length % size, -size) for size in range(128, 513, 128))
    return -size, padding
