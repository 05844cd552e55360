"""The field: its order of rays and samples, and its kernels against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax.kernels import field
from lrm_jax.parallel import sharding

PLANES = jnp.zeros((3, 2, 2, 4))


@pytest.mark.parametrize("size", [(1, 8, 8), (2, 24, 16), (1, 1, 1), (3, 9, 21)])
def test_images_come_back_from_tiles(size):
    image = jnp.arange(np.prod(size) * 3, dtype=jnp.float32).reshape(*size, 3)
    tiled = field.in_tiles(image)
    assert tiled.shape[0] % 64 == 0
    np.testing.assert_array_equal(field.from_tiles(tiled, size), image)
    np.testing.assert_array_equal(field.from_tiles(tiled[:, 0], size), image[..., 0])


def test_tiles_are_neighbouring_rays_and_samples(monkeypatch):
    V, H, W, S = 2, 16, 24, 32
    v, row, column = np.meshgrid(np.arange(V), np.arange(H), np.arange(W), indexing="ij")
    rays = np.asarray(field.in_tiles(jnp.stack([v, row, column], axis=-1).astype(jnp.float32)))
    samples = np.stack(
        [*np.broadcast_arrays(100 * rays[:, None, 0] + rays[:, None, 1], rays[:, None, 2], np.arange(S)[None])], axis=-1
    )  # fmt: skip
    points = np.asarray(field.samples_in_tiles(jnp.asarray(samples)))
    for tile, extent in ((64 * 16, (7, 7, 15)), (16 * 8, (3, 3, 7))):
        spread = np.ptp(points.reshape(-1, tile, 3), axis=1)
        np.testing.assert_array_equal(spread, np.broadcast_to(extent, spread.shape))

    # What `field` returns for the points comes back in the order of the rays.
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    monkeypatch.setattr(
        field, "field", lambda planes, layers, xyz, *_: jnp.pad(xyz, [(0, 0), (1, 0)])
    )
    raw = field.along_rays(PLANES, [], jnp.asarray(samples), (), "relu")
    np.testing.assert_array_equal(raw[..., 1:], samples)


def test_numbers_of_rays_that_do_not_fill_tiles_are_not_reordered(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    monkeypatch.setattr(
        field, "field", lambda planes, layers, xyz, *_: jnp.pad(xyz, [(0, 0), (1, 0)])
    )
    samples = jax.random.normal(jax.random.key(0), (5, 6, 3))
    raw = field.along_rays(PLANES, [], samples, (), "relu")
    np.testing.assert_array_equal(raw[..., 1:], samples)
