"""Triplane neural radiance fields: from plane tokens to planes, and from planes to the colours of rays."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from lrm_jax.kernels import field
from lrm_jax.models.parts import torch_layout
from lrm_jax.models.parts.layers import torch_linear_init
from lrm_jax.parallel import batch_axes, sharding
from lrm_jax.types import Rays, Rendering


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
    key: jax.Array | None,
    chunk: int | None,
) -> Rendering:
    """Renders rays [B V H W] of B scenes: maps `march(projected_PhwF, layers, rays[R], key)` over scenes and chunks of rays.

    On a CPU each device renders its scenes one after another, so that one scene's planes and their gradient stay in the cache.
    """
    tiled = field.orders_rays()

    def one_scene(layers, triplane_PhwC, rays, key):
        projected = project_planes(triplane_PhwC, layers, dtype)
        in_order = jax.tree.map(field.in_tiles, rays) if tiled else rays
        march_one = functools.partial(march, projected, layers)
        rendering = render_in_chunks(march_one, in_order, key, chunk)
        if not tiled:
            return rendering
        shape = rays.origins.shape[:-1]
        return jax.tree.map(lambda x: field.from_tiles(x, shape), rendering)

    def own_scenes(layers, scenes):
        one = functools.partial(one_scene, layers)
        if sharding.platform() == "cpu":
            return jax.lax.map(lambda scene: one(*scene), scenes)
        return jax.vmap(one)(*scenes)

    keys = None if key is None else jax.random.split(key, triplane_BPhwC.shape[0])
    # Each device renders its own scenes: the compiler cannot split a kernel.
    return batch_axes.split_batch(own_scenes, layers, (triplane_BPhwC, rays, keys))


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


def render_in_chunks(
    march: Callable[[Rays, jax.Array | None], Rendering],
    rays: Rays,
    key: jax.Array | None,
    chunk: int | None,
) -> Rendering:
    """Applies `march` to chunks of rays in a rematerialised scan, so that memory does not grow with the number of rays.

    Rematerialisation makes this the deferred back-propagation of ARF (https://arxiv.org/abs/2206.06360): the backward pass
    renders the chunks again, one at a time.

    Args:
      march: renders rays [R] with a key for this chunk.
      rays: any batch shape; their number is padded to a multiple of the chunk.
      chunk: the most rays in a call of `march`. None: chosen for the device.
      key: None makes every chunk deterministic.
    """
    # The activations of 128 rays fit in a CPU's cache; an accelerator needs more rays to be busy.
    chunk = chunk or (128 if sharding.platform() == "cpu" else 4096)
    shape = rays.origins.shape[:-1]
    flat = jax.tree.map(lambda x: x.reshape(-1, 3), rays)
    num_rays = flat.origins.shape[0]
    num_chunks = -(-num_rays // chunk) if num_rays > chunk else 1
    size = -(-num_rays // num_chunks)
    size += -size % field.TILE_SIDE**2 if field.orders_rays() else 0
    # Padding repeats the last ray: a zero direction would make NaNs in the backward pass.
    flat = jax.tree.map(
        lambda x: jnp.pad(x, ((0, num_chunks * size - num_rays), (0, 0)), mode="edge"), flat
    )
    chunks = jax.tree.map(lambda x: x.reshape(num_chunks, size, 3), flat)

    # A kernel's result is kept, because its gradient needs none of the activations that rendering again would make.
    @functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(field.RAW)
    )
    def one(index_and_rays):
        index, rays = index_and_rays
        return march(rays, None if key is None else jax.random.fold_in(key, index))

    rendering = jax.lax.map(one, (jnp.arange(num_chunks), chunks))
    return jax.tree.map(
        lambda x: x.reshape(num_chunks * size, *x.shape[2:])[:num_rays].reshape(
            *shape, *x.shape[2:]
        ),
        rendering,
    )


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
