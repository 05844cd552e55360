"""Lookup in planes, compared with closed forms and a slow loop."""

import jax
import jax.numpy as jnp
import numpy as np

from lrm_jax.ops import grids


def slow_lookup(plane, x, y):
    """One point: the definition of grid_sample(align_corners=False, padding_mode="zeros")."""
    h, w, channels = plane.shape
    column, row = (x + 1) / 2 * w - 0.5, (y + 1) / 2 * h - 0.5
    total = np.zeros(channels)
    for i in (int(np.floor(row)), int(np.floor(row)) + 1):
        for j in (int(np.floor(column)), int(np.floor(column)) + 1):
            if 0 <= i < h and 0 <= j < w:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * plane[i, j]
    return total


def test_lookup_equals_the_definition_inside_at_the_edge_and_outside():
    rng = np.random.default_rng(0)
    plane, xy = rng.normal(size=(5, 7, 3)), rng.uniform(-1.4, 1.4, (300, 2))
    xy[:4] = [[-1, -1], [1, 1], [1, -1], [0, 0]]
    result = grids.sample_plane(jnp.asarray(plane, jnp.float32), jnp.asarray(xy, jnp.float32))
    expected = [slow_lookup(plane, x, y) for x, y in xy]
    np.testing.assert_allclose(result, expected, atol=1e-5)  # float32


def test_linear_fields_are_reproduced_between_cell_centres():
    x, y = np.meshgrid((np.arange(8) + 0.5) / 4 - 1, (np.arange(6) + 0.5) / 3 - 1)
    plane = jnp.asarray(np.stack([2 * x - y + 0.3], axis=-1), jnp.float32)
    xy = jax.random.uniform(jax.random.key(0), (100, 2), minval=-0.8, maxval=0.8)
    expected = 2 * xy[:, 0] - xy[:, 1] + 0.3
    np.testing.assert_allclose(grids.sample_plane(plane, xy)[:, 0], expected, atol=1e-5)


def test_each_plane_is_looked_up_along_its_axes():
    height, width = 4, 6
    columns = jnp.broadcast_to(
        ((jnp.arange(width) + 0.5) / 3 - 1)[None, :, None], (height, width, 1)
    )
    rows = jnp.broadcast_to(((jnp.arange(height) + 0.5) / 2 - 1)[:, None, None], (height, width, 1))
    plane = jnp.concatenate([columns, rows], axis=-1)
    xyz = jnp.array([[0.1, -0.2, 0.3]])
    for p, expected in enumerate([[0.1, -0.2], [0.1, 0.3], [0.3, -0.2]]):
        triplane = jnp.zeros((3, height, width, 2)).at[p].set(plane)
        features = grids.sample_triplane(triplane, xyz, ((0, 1), (0, 2), (2, 1)))
        np.testing.assert_allclose(features[0], expected, atol=1e-6)


def test_the_gradient_of_the_plane_is_the_lookup_transposed():
    rng = np.random.default_rng(1)
    plane = jnp.asarray(rng.normal(size=(5, 7, 3)), jnp.float32)
    xy = jnp.asarray(rng.uniform(-1.2, 1.2, (40, 2)), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=(40, 3)), jnp.float32)
    _, pull = jax.vjp(lambda p: grids.sample_plane(p, xy), plane)
    direction = jnp.asarray(rng.normal(size=plane.shape), jnp.float32)
    forward = jnp.sum(grids.sample_plane(direction, xy) * cotangent)
    np.testing.assert_allclose(jnp.sum(pull(cotangent)[0] * direction), forward, rtol=1e-4)
