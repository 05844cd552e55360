"""A signed distance from a point and the features around it, and its gradient: pure functions of explicit weights.

IDR's network (https://arxiv.org/abs/2003.09852) as SparseNeuS conditions it (https://arxiv.org/abs/2206.05737, section 3.1): the code
of the point, and after the first layer again and again the volume's features there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from lrm_jax.models.parts import torch_layout

NUM_FREQUENCIES = 6
CODE = 3 + 6 * NUM_FREQUENCIES  # numbers that encode a point
SHARPNESS = 100.0  # of the softplus


class SDF(nn.Module):
    """The weights of the network, as a list of (kernel, bias) for the functions below; `width` channels, `latent` features."""

    width: int = 128
    latent: int = 16

    @nn.compact
    def __call__(self) -> list[tuple]:
        """Kernels (in, out) of unit columns times their lengths (weight norm, https://arxiv.org/abs/1602.07868)."""
        sizes = (CODE, self.width + self.latent, self.width + self.latent)
        layers = []
        for i, size in enumerate(sizes):
            v = self.param(f"lin{i}_v", functools.partial(_init_kernel, i), (size, self.width))
            g = self.param(f"lin{i}_g", lambda _, v=v: jnp.linalg.norm(v, axis=0, keepdims=True))
            bias = self.param(f"lin{i}_bias", functools.partial(_init_bias, i), (self.width,))
            layers.append((v * (g / jnp.linalg.norm(v, axis=0, keepdims=True)), bias))
        # The last layer's other outputs have no use.
        layers[-1] = (layers[-1][0][:, :1], layers[-1][1][:1])
        return layers


def value(
    layers: list, xyz_Q3: Float[Array, "Q 3"], latent_QC: Float[Array, "Q C"]
) -> Float[Array, "Q"]:
    """The signed distance, negative inside."""
    x = code(xyz_Q3)
    for i, (kernel, bias) in enumerate(layers):
        if i:
            x = jnp.concatenate([softplus(x), latent_QC], axis=-1)
        x = jnp.dot(x, kernel, precision="highest") + bias[None]
    return x[:, 0]


def value_and_gradient(
    layers: list,
    xyz_Q3: Float[Array, "Q 3"],
    latent_QC: Float[Array, "Q C"],
    slope_Q3C: Float[Array, "Q 3 C"],
) -> tuple[Float[Array, "Q"], Float[Array, "Q 3"]]:
    """The signed distance and its gradient, by one derivative forward along each axis.

    Args:
      slope_Q3C: the derivative of the features along each axis.
    """

    def along(axis_3, slope_QC):
        point = (xyz_Q3, latent_QC)
        change = (jnp.broadcast_to(axis_3[None], xyz_Q3.shape), slope_QC)
        return jax.jvp(functools.partial(value, layers), point, change)

    vmapped = jax.vmap(along, in_axes=(0, 1), out_axes=(None, 1))
    return vmapped(jnp.eye(3), slope_Q3C)


def code(xyz_Q3: Float[Array, "Q 3"]) -> Float[Array, "Q 39"]:
    """The point, and the sines and cosines of its coordinates times 1, 2, 4 ... 32."""
    parts = [xyz_Q3]
    for k in range(NUM_FREQUENCIES):
        parts += [jnp.sin(2.0**k * xyz_Q3), jnp.cos(2.0**k * xyz_Q3)]
    return jnp.concatenate(parts, axis=-1)


@jax.custom_jvp
def softplus(x: Float[Array, "Q C"]) -> Float[Array, "Q C"]:
    """log(1 + exp(100 x)) / 100, with a derivative that is finite and smooth wherever x is."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-SHARPNESS * jnp.abs(x))) / SHARPNESS


@softplus.defjvp
def _softplus_jvp(primals, tangents):
    (x,), (change,) = primals, tangents
    return softplus(x), jax.nn.sigmoid(SHARPNESS * x) * change


# The geometric initialisation of IDR (SAL, https://arxiv.org/abs/1911.10414): nearly the distance to a sphere, for any features.


def _init_kernel(layer, key, shape):
    width = shape[1]
    if layer == 2:
        kernel = np.sqrt(np.pi / shape[0]) + 1e-4 * jax.random.normal(key, shape)
    else:
        kernel = jax.random.normal(key, shape) * np.sqrt(2 / width)
    known = 3 if layer == 0 else width
    return jnp.where(jnp.arange(shape[0])[:, None] < known, kernel, 0.0)


def _init_bias(layer, _, shape):
    if layer < 2:
        return jnp.zeros(shape)
    return jnp.where(jnp.arange(shape[0]) < shape[0] - 16, -0.5, 0.0)


def entries(torch: str, ours: str) -> list[torch_layout.Entry]:
    """An `SDF`."""
    return [
        entry
        for i in range(3)
        for entry in (
            torch_layout.same(f"{torch}lin{i}.bias", f"{ours}.lin{i}_bias"),
            torch_layout.permuted(f"{torch}lin{i}.weight_g", f"{ours}.lin{i}_g", (1, 0)),
            torch_layout.permuted(f"{torch}lin{i}.weight_v", f"{ours}.lin{i}_v", (1, 0)),
        )
    ]
