"""Functions of many rays or points, a part of them at a time, so that memory does not grow with their number."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def in_chunks(
    function: Callable[[Any, jax.Array | None], Any],
    inputs: Any,
    key: jax.Array | None,
    chunk: int,
    *,
    remat: bool = True,
    keep: str | None = None,
    multiple: int = 1,
) -> Any:
    """Applies `function` to chunks of its inputs in a scan.

    With `remat`, this is the deferred back-propagation of ARF (https://arxiv.org/abs/2206.06360): the backward pass computes the
    chunks again, one at a time. Without, what the backward pass needs of every chunk is kept.

    Args:
      function: from inputs [R 3] and a key for this chunk to a tree of arrays [R ...].
      inputs: a tree of arrays [*B 3]; their number is padded to a multiple of the chunk.
      key: None makes every chunk deterministic.
      chunk: the most inputs in a call of `function`.
      keep: with `remat`, the name of values that the forward pass keeps (`checkpoint_name`).
      multiple: of which a chunk's size is made a multiple.
    """
    shape = jax.tree.leaves(inputs)[0].shape[:-1]
    flat = jax.tree.map(lambda x: x.reshape(-1, 3), inputs)
    count = jax.tree.leaves(flat)[0].shape[0]
    num_chunks = -(-count // chunk) if count > chunk else 1
    size = -(-count // num_chunks)
    size += -size % multiple
    # Padding repeats the last input: a zero direction would make NaNs in the backward pass.
    flat = jax.tree.map(
        lambda x: jnp.pad(x, ((0, num_chunks * size - count), (0, 0)), mode="edge"), flat
    )
    chunks = jax.tree.map(lambda x: x.reshape(num_chunks, size, 3), flat)

    def one(index_and_inputs):
        index, some = index_and_inputs
        return function(some, None if key is None else jax.random.fold_in(key, index))

    if remat:
        policy = keep and jax.checkpoint_policies.save_only_these_names(keep)
        one = jax.checkpoint(one, policy=policy)
    results = jax.lax.map(one, (jnp.arange(num_chunks), chunks))

    def joined(x):
        return x.reshape(num_chunks * size, *x.shape[2:])[:count].reshape(*shape, *x.shape[2:])

    return jax.tree.map(joined, results)
