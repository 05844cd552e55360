"""Planes: fast implementations equal the plain ones."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lrm_jax.kernels import field
from lrm_jax.models.parts import chunks, triplane
from lrm_jax.ops import grids
from lrm_jax.parallel import sharding
from lrm_jax.training import flops
from lrm_jax.types import Rays, Rendering

AXES = ((0, 1), (0, 2), (1, 2))


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def decoder(channels, width, num_layers):
    sizes = [3 * channels] + [width] * (num_layers - 1) + [4]
    return [
        (random(i, a, b) / a**0.5, random(50 + i, b))
        for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
    ]


def test_projecting_planes_before_the_lookup_is_exact():
    planes, decoder_layers = random(0, 3, 9, 11, 5), decoder(5, 16, 4)
    xyz = jax.random.uniform(jax.random.key(1), (500, 3), minval=-1.2, maxval=1.2)
    x = jnp.concatenate(
        [grids.sample_plane(planes[p], xyz[:, jnp.array(AXES[p])]) for p in range(3)], axis=-1
    )
    for i, (kernel, bias) in enumerate(decoder_layers):
        x = (nn.silu(x) if i else x) @ kernel + bias[None]
    projected = triplane.project_planes(planes, decoder_layers, "float32")
    raw = field.field(projected, decoder_layers, xyz, AXES, "silu")
    np.testing.assert_allclose(raw, x, atol=2e-5)  # float32 sums in another order


def test_upsample_is_torch_s_transposed_convolution():
    tokens = random(0, 2, 3, 4, 5, 6)
    module = triplane.Upsample(channels=7)
    params = module.init(jax.random.key(1), tokens)["params"]
    params["bias"] = random(2, 7)
    planes = module.apply({"params": params}, tokens)
    assert planes.shape == (2, 3, 8, 10, 7)
    for i, j in [
        (0, 0),
        (3, 4),
        (7, 9),
        (2, 5),
    ]:  # pixel (i, j) is token (i // 2, j // 2) times kernel (i % 2, j % 2)
        expected = (
            tokens[:, :, i // 2, j // 2] @ params["kernel"][:, i % 2, j % 2]
            + params["bias"][None, None]
        )
        np.testing.assert_allclose(planes[:, :, i, j], expected, atol=1e-5)


def test_rays_that_do_not_fill_the_last_chunk_come_back_in_order():
    rays = Rays(
        origins=jnp.arange(3 * 7 * 3, dtype=jnp.float32).reshape(3, 7, 3), dirs=jnp.ones((3, 7, 3))
    )

    def march(rays, key):
        return Rendering(rgb=2 * rays.origins, alpha=rays.origins[:, 0], depth=rays.dirs[:, 0])

    for chunk in (1, 4, 5, 20, 21, 100):
        rendering = chunks.in_chunks(march, rays, None, chunk)
        np.testing.assert_array_equal(rendering.rgb, 2 * rays.origins)
        np.testing.assert_array_equal(rendering.alpha, rays.origins[..., 0])


@pytest.mark.parametrize("key", [None, jax.random.key(5)])
@pytest.mark.parametrize(("num_scenes", "sizes"), [(4, None), (4, (4, 1, 1)), (4, (2, 1, 2)), (3, (2, 1, 1))])  # fmt: skip
def test_scenes_one_after_another_on_their_devices_equal_all_at_once(
    num_scenes, sizes, key, monkeypatch
):
    planes, decoder_layers = random(0, num_scenes, 3, 4, 4, 5), decoder(5, 8, 2)
    rays = Rays(origins=random(1, num_scenes, 2, 8, 8, 3), dirs=random(2, num_scenes, 2, 8, 8, 3))

    def march(projected, layers, rays, key):
        xyz = rays.origins if key is None else rays.origins + jax.random.uniform(key, (3,))[None]
        raw = field.field(projected, layers, xyz, AXES, "silu")
        return Rendering(rgb=raw[:, 1:], alpha=raw[:, 0], depth=rays.dirs[:, 0])

    keys_B = None if key is None else jax.random.split(key, num_scenes)

    def total(planes, decoder_layers):
        rendering = triplane.render(
            march, planes, decoder_layers, "float32", rays, keys_B, chunk=64
        )
        return (rendering.rgb**2).sum() + (rendering.alpha * rendering.depth).sum()

    graded = jax.value_and_grad(total, argnums=(0, 1))
    in_use = contextlib.nullcontext()
    if sizes is not None:
        devices = jax.devices()[: math.prod(sizes)]
        in_use = jax.set_mesh(sharding.make_device_mesh(*sizes, devices=devices))
    with in_use:
        found = jax.jit(graded)(planes, decoder_layers)
        count = flops.count(graded, planes, decoder_layers)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    monkeypatch.setattr(
        field.field_cuda, "can", lambda planes: False
    )  # this CPU has no kernel of a GPU
    for actual, expected in zip(
        *map(jax.tree.leaves, (found, graded(planes, decoder_layers))), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)
    if num_scenes == 4:
        assert count == flops.count(graded, planes, decoder_layers)
