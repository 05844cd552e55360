"""Attention on GPUs: cuDNN's fused kernel."""

import jax


def attention_by_cudnn(q_BLNK, k_BMNK, v_BMNK, num_keys_B):
    """Calls cuDNN's fused kernel through JAX. `attention.attention` describes the arguments and when it is used."""
    return jax.nn.dot_product_attention(
        q_BLNK, k_BMNK, v_BMNK, key_value_seq_lengths=num_keys_B, implementation="cudnn"
    )
