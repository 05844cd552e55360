"""What a training step takes and must do, known without weights or data."""

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from lrm_jax import losses


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
