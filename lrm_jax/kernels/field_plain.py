"""The field of projected planes on any device: lookups and products that XLA compiles."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lrm_jax.ops import grids


def field_by_xla(
    projected_PhwF: Float[Array, "P h w F"],
    layers: list,
    xyz_Q3: Float[Array, "Q 3"],
    axes: tuple,
    activation: str,
) -> Float[Array, "Q 4"]:
    """See `field.field`."""
    (_, bias_F), *rest = layers
    activate = getattr(jax.nn, activation)
    x_QF = grids.sample_triplane(projected_PhwF, xyz_Q3, axes)
    x_QF = x_QF + bias_F.astype(x_QF.dtype)[None]
    for kernel, bias in rest:
        x_QF = _matmul(activate(x_QF), kernel.astype(x_QF.dtype)) + bias.astype(x_QF.dtype)[None]
    return x_QF.astype(jnp.float32)


def gradient_of_points(projected_PhwF, layers, xyz_Q3, axes, activation, grad_Q4) -> jax.Array:
    """The gradient [Q 3] with respect to the points, for kernels that have none: nothing that is trained moves points."""

    def at(xyz_Q3):
        return field_by_xla(projected_PhwF, layers, xyz_Q3, axes, activation)

    return jax.vjp(at, xyz_Q3)[1](grad_Q4)[0]


@jax.custom_vjp
def _matmul(x_QF, kernel_FG):
    """A matrix product whose gradient is fast in XLA's CPU backend: JAX's own transposes a Q x F array in each layer."""
    return x_QF @ kernel_FG


def _matmul_forward(x_QF, kernel_FG):
    return x_QF @ kernel_FG, (x_QF, kernel_FG)


def _matmul_backward(residuals, grad_QG):
    x_QF, kernel_FG = residuals
    return grad_QG @ kernel_FG.T, (grad_QG.T @ x_QF).T


_matmul.defvjp(_matmul_forward, _matmul_backward)
