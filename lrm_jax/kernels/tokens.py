"""Token-wise layers, applied to a few tokens at a time where that is faster."""

from collections.abc import Callable

from flax import linen as nn

from lrm_jax.parallel import sharding

TOKENS = 512  # per step of `by_tokens`


def by_tokens(module: nn.Module, function: Callable, x_BLD):
    """Applies `function(module, x_BLD)`, which acts on each token separately and creates layers in `module`.

    On a CPU, TOKENS tokens at a time, so that their activations in the wide layer stay in the cache.
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
