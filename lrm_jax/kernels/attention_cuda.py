"""Attention on GPUs: cuDNN's kernel."""

import jax


def attention_by_cudnn(q_BLNK, k_BMNK, v_BMNK, num_keys_B):
    """JAX's call of cuDNN's fused kernel; see `attention.attention` for the arguments and when it is taken."""
    return jax.nn.dot_product_attention(
        q_BLNK, k_BMNK, v_BMNK, key_value_seq_lengths=num_keys_B, implementation="cudnn"
    )
