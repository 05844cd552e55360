"""Attention on any device: JAX's own in XLA, in chunks of queries."""

import jax
import jax.numpy as jnp

RESULT = "attention"  # the name of attention's results, for the policies of `jax.checkpoint`


def attention_by_xla(q_BLNK, k_BMNK, v_BMNK, num_keys_B, max_scores=2**20):
    """JAX's attention, with at most `max_scores` scores per head at a time: all of them would not fit a training step."""

    @jax.checkpoint
    def attend(q_LBNK):
        return jax.nn.dot_product_attention(
            q_LBNK.swapaxes(0, 1), k_BMNK, v_BMNK, key_value_seq_lengths=num_keys_B
        ).swapaxes(0, 1)

    max_queries = max(1, max_scores // k_BMNK.shape[1])
    return by_chunks(attend, q_BLNK.swapaxes(0, 1), max_queries).swapaxes(0, 1)


def by_chunks(attend, q_LX, max_queries):
    """Applies `attend(q_LX)` to chunks of equal size, of at most `max_queries` queries."""
    length = q_LX.shape[0]
    num_chunks = -(-length // max_queries)
    size = -(-length // num_chunks)
    if num_chunks == 1:
        return attend(q_LX)
    padding = ((0, num_chunks * size - length), *[(0, 0)] * (q_LX.ndim - 1))
    out = jax.lax.map(attend, jnp.pad(q_LX, padding).reshape(num_chunks, size, *q_LX.shape[1:]))
    return out.reshape(num_chunks * size, *out.shape[2:])[:length]
