"""What a training step takes and must do, known without weights or data."""

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from lrm_jax import flops, losses, step
from lrm_jax.ops import cameras


def abstract_networks(loss_weights) -> dict:
    """Shapes of the frozen networks that the losses look through: their files need not be there."""
    return {
        name: unflatten_dict(
            {
                path: jax.ShapeDtypeStruct(shape, jnp.float32)
                for path, shape in network.SHAPES.items()
            },
            sep=".",
        )
        for name, network in losses.NETWORKS.items()
        if loss_weights.get(name)
    }


def needed_flops(model, patch: int, params, batch) -> float:
    """Operations of a step that repeats none: three times the model's forward products, as the gradient has twice as many."""

    def forward(params, batch):
        rays = cameras.pixel_rays(batch.target.cameras, patch, patch)
        source = step.on_background(batch.source, 0.0)
        return model.apply({"params": params}, source, rays)

    return 3 * flops.count(forward, params, batch)
