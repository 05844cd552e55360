"""Triplane neural radiance fields: from plane tokens to planes, and from planes to the colours of rays."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from lrm_jax.kernels import field
from lrm_jax.models.parts import chunks, torch_layout
from lrm_jax.models.parts.layers import torch_linear_init
from lrm_jax.parallel import batch_axes, sharding
from lrm_jax.types import Rays, Rendering

# Rays that a device renders at a time if nobody says how many. On a CPU, the activations of this number of rays fit in the cache.
# On a TPU, planes and their gradient pass through memory once for this number, which is little beside the work. The fused field of
# a GPU has no activations either, and its backward pass needs about 60 bytes of a sample.
RAYS = {"cpu": 128, "tpu": 8192, "gpu": 2**18}


class Upsample(nn.Module):
    """Transposed convolution whose kernel equals its stride: every token becomes a `factor` x `factor` block of the plane."""

    channels: int
    factor: int = 2
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens_BPhwD: Float[Array, "B P h w D"]) -> Float[Array, "B P H W C"]:
        f, width = self.factor, tokens_BPhwD.shape[-1]
        kernel_DyxC = self.param("kernel", torch_linear_init, (width, f, f, self.channels))
        bias_C = self.param("bias", nn.initializers.zeros, (self.channels,))
        B, P, h, w, _ = tokens_BPhwD.shape
        blocks = tokens_BPhwD.reshape(-1, width).astype(self.dtype) @ kernel_DyxC.reshape(
            width, -1
        ).astype(self.dtype)
        blocks = blocks.reshape(B, P, h, w, f, f, self.channels).transpose(0, 1, 2, 4, 3, 5, 6)
        return (
            blocks.reshape(B, P, h * f, w * f, self.channels)
            + bias_C.astype(self.dtype)[None, None, None, None]
        )


class Decoder(nn.Module):
    """The parameters of the field's MLP, as a list of (kernel, bias) for the pure functions below.

    The MLP maps the concatenated features of the three planes to raw density and colour.
    """

    in_channels: int
    width: int
    num_layers: int

    @nn.compact
    def __call__(self) -> list[tuple]:
        """Kernels (in, out) and biases, first layer first."""
        sizes = [self.in_channels] + [self.width] * (self.num_layers - 1) + [4]
        return [
            (
                self.param(f"kernel_{i}", nn.initializers.he_uniform(), (sizes[i], sizes[i + 1])),
                self.param(f"bias_{i}", nn.initializers.zeros, (sizes[i + 1],)),
            )
            for i in range(self.num_layers)
        ]


def project_planes(
    triplane_PhwC: Float[Array, "P h w C"], layers: list, dtype: str
) -> Float[Array, "P h w F"]:
    """The planes after the decoder's first layer, without its bias.

    Bilinear lookup commutes with a linear map. So looking these planes up and adding the three results is the same as looking
    up the original planes, concatenating, and multiplying by the first kernel. But the product is done once per cell, not once
    per sample.
    """
    P, _, _, C = triplane_PhwC.shape
    kernel_PCF = layers[0][0].reshape(P, C, -1)
    return jnp.einsum("phwc,pcf->phwf", triplane_PhwC.astype(dtype), kernel_PCF.astype(dtype))


def render(
    march: Callable,
    triplane_BPhwC: Float[Array, "B P h w C"],
    layers: list,
    dtype: str,
    rays: Rays,
    keys_B: jax.Array | None,
    chunk: int | None,
) -> Rendering:
    """Renders rays [B V H W] of B scenes: maps `march(projected_PhwF, layers, rays[R], key)` over scenes and chunks of rays.

    On a CPU each device renders its scenes one after another, so that one scene's planes and their gradient stay in the cache.
    """
    platform = sharding.platform()

    def one_scene(layers, rays_at_a_time, triplane_PhwC, rays, key):
        projected = project_planes(triplane_PhwC, layers, dtype)
        march_one = functools.partial(march, projected, layers)
        # The kernel of TPUs keeps its result: 16 bytes of a sample, which would be all of its work to compute again.
        render_chunks = functools.partial(
            chunks.in_chunks, march_one, key=key, chunk=rays_at_a_time, remat=not field.is_fused(projected), keep=field.RAW
        )  # fmt: skip
        if not field.orders_rays():
            return render_chunks(rays)
        rendering = render_chunks(jax.tree.map(field.in_tiles, rays), multiple=field.TILE_SIDE**2)
        shape = rays.origins.shape[:-1]
        return jax.tree.map(lambda x: field.from_tiles(x, shape), rendering)

    def own_scenes(layers, scenes):
        if platform == "cpu":
            one = functools.partial(one_scene, layers, chunk or RAYS[platform])
            return jax.lax.map(lambda scene: one(*scene), scenes)
        B = scenes[0].shape[0]
        one = functools.partial(one_scene, layers, chunk or max(RAYS[platform] // B, 64))
        return jax.vmap(one)(*scenes)

    # Each device renders its own scenes: the compiler cannot split a kernel.
    return batch_axes.split_batch(own_scenes, layers, (triplane_BPhwC, rays, keys_B))


def query(
    field_of: Callable,
    triplane_BPhwC: Float[Array, "B P h w C"],
    layers: list,
    dtype: str,
    xyz: Float[Array, "B Q 3"],
) -> tuple[Float[Array, "B Q"], Float[Array, "B Q 3"]]:
    """Evaluates `field_of(projected_PhwF, layers, xyz[Q 3])` for B scenes."""

    def own_scenes(layers, scenes):
        def one(triplane_PhwC, xyz_Q3):
            return field_of(project_planes(triplane_PhwC, layers, dtype), layers, xyz_Q3)

        return jax.vmap(one)(*scenes)

    return batch_axes.split_batch(own_scenes, layers, (triplane_BPhwC, xyz))


def decoder_entries(prefix: str, num_layers: int) -> list[torch_layout.Entry]:
    """Names in the references' `nn.Sequential`: linear layers with an activation after each but the last."""
    return [
        entry
        for i in range(num_layers)
        for entry in (
            torch_layout.permuted(f"{prefix}{2 * i}.weight", f"decoder.kernel_{i}", (1, 0)),
            torch_layout.same(f"{prefix}{2 * i}.bias", f"decoder.bias_{i}"),
        )
    ]
