"""Normalisation by the statistics of a scene: each channel's mean and variance over its views' pixels, or over its voxels.

Running means of these statistics are parameters without a gradient, `mean`, `variance` and `num_batches`. When a module
normalises by the scene's own statistics, it also puts the new running means into the collection "statistics", at the same
paths, for a training step to write back.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from lrm_jax.models.parts import torch_layout

STATISTICS = ("mean", "variance", "num_batches")  # names of parameters that are not trained
MOMENTUM = 0.1  # share of the newest scene in the running statistics


class BatchNorm(nn.Module):
    """Batch normalisation (https://arxiv.org/abs/1502.03167) where a batch is one scene: (x - mean) / deviation * scale + bias."""

    leaky: bool = False  # "activated norm": a positive scale, and a leaky ReLU after it

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B *S C"],
        of_scene: bool,
        mask: Bool[Array, "B *S"] | None = None,
    ) -> Float[Array, "B *S C"]:
        """Normalises scenes.

        Args:
          of_scene: by the scene's statistics, not the running ones.
          mask: the values that count in the statistics. None: all.
        """
        B, C = x.shape[0], x.shape[-1]
        scale_C = self.param("scale", nn.initializers.ones, (C,))
        bias_C = self.param("bias", nn.initializers.zeros, (C,))
        mean_C = self.param("mean", nn.initializers.zeros, (C,))
        variance_C = self.param("variance", nn.initializers.ones, (C,))
        num_batches = self.param("num_batches", nn.initializers.zeros, ())
        x_BSC = x.reshape(B, -1, C).astype(jnp.float32)
        if of_scene:
            mean_BC, variance_BC, count_B1 = moments(x_BSC, mask)
            unbiased_BC = variance_BC * count_B1 / jnp.maximum(count_B1 - 1, 1)
            self._keep("mean", mean_C, mean_BC.mean(0))
            self._keep("variance", variance_C, unbiased_BC.mean(0))
            self._keep("num_batches", num_batches, num_batches + 1, 1.0)
        else:
            mean_BC, variance_BC = jax.lax.stop_gradient((mean_C[None], variance_C[None]))
        if self.leaky:
            # Parity: InPlaceABN (https://arxiv.org/abs/1712.02616) keeps its scale positive so that it can be inverted.
            scale_C = jnp.abs(scale_C) + 1e-5
        factor_BC = jax.lax.rsqrt(variance_BC + 1e-5) * scale_C[None]
        y_BSC = (x_BSC - mean_BC[:, None]) * factor_BC[:, None] + bias_C[None, None]
        if self.leaky:
            y_BSC = nn.leaky_relu(y_BSC, 0.01)
        return y_BSC.reshape(x.shape).astype(x.dtype)

    def _keep(self, name, old, new, share=MOMENTUM):
        running = jax.lax.stop_gradient((1 - share) * old + share * new)
        self.sow("statistics", name, running, reduce_fn=lambda _, x: x, init_fn=lambda: None)


def moments(
    x_BSC: Float[Array, "B S C"], mask: Bool[Array, "B *S"] | None
) -> tuple[Float[Array, "B C"], Float[Array, "B C"], Float[Array, "B 1"]]:
    """Mean and (biased) variance over the values that count, and their number."""
    if mask is None:
        count_B1 = jnp.full((x_BSC.shape[0], 1), x_BSC.shape[1], jnp.float32)
        return x_BSC.mean(1), x_BSC.var(1), count_B1
    weight_BS1 = mask.reshape(x_BSC.shape[0], -1, 1).astype(jnp.float32)
    count_B1 = jnp.maximum(weight_BS1.sum(1), 1.0)
    mean_BC = (x_BSC * weight_BS1).sum(1) / count_B1
    square_BSC = jnp.square(x_BSC - mean_BC[:, None]) * weight_BS1
    return mean_BC, square_BSC.sum(1) / count_B1, count_B1


def entries(torch: str, ours: str) -> list[torch_layout.Entry]:
    """torch's names of a `BatchNorm` with its running statistics."""
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "variance", "num_batches_tracked": "num_batches"}  # fmt: skip
    return [torch_layout.same(f"{torch}.{a}", f"{ours}.{b}") for a, b in names.items()]
