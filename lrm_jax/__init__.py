"""Feed-forward 3D reconstruction in JAX. Start at `lrm_jax.types`, then `lrm_jax.models`."""

__version__ = "0.1.0"
