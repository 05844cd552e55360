"""Compositing, compared with closed forms and a slow loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax.ops import volrend


def slow_composite(density, rgb, edges):
    """One ray, sample by sample, in float64."""
    light, color, depth = 1.0, np.zeros(3), 0.0
    for i in range(len(density)):
        alpha = 1 - np.exp(-density[i] * (edges[i + 1] - edges[i]))
        color += light * alpha * rgb[i]
        depth += light * alpha * 0.5 * (edges[i] + edges[i + 1])
        light *= 1 - alpha
    return color, 1 - light, depth / (1 - light)


def test_composite_equals_a_loop_over_samples():
    rng = np.random.default_rng(0)
    density, rgb = rng.uniform(0, 5, (6, 20)), rng.uniform(size=(6, 20, 3))
    edges = np.sort(rng.uniform(1, 3, (6, 21)), axis=-1)
    out = volrend.composite(*(jnp.asarray(x, jnp.float32) for x in (density, rgb, edges)))
    for i in range(6):
        color, alpha, depth = slow_composite(density[i], rgb[i], edges[i])
        np.testing.assert_allclose(out.rgb[i], color, atol=1e-5)  # float32 sums of 20
        np.testing.assert_allclose(out.alpha[i], alpha, atol=1e-5)
        np.testing.assert_allclose(out.depth[i], depth, atol=1e-4)


def test_constant_density_has_the_closed_form_opacity_for_any_edges():
    edges = jnp.array([[0.0, 0.1, 0.5, 0.55, 1.3]])
    out = volrend.composite(jnp.full((1, 4), 1.7), jnp.ones((1, 4, 3)), edges)
    np.testing.assert_allclose(out.alpha[0], 1 - np.exp(-1.7 * 1.3), rtol=1e-6)
    np.testing.assert_allclose(out.rgb[0], out.alpha[0], rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e4, 1e30])
def test_weights_and_transmittance_sum_to_one_at_any_density(scale):
    density = scale * jax.random.uniform(jax.random.key(0), (50, 32))
    edges = jnp.broadcast_to(jnp.linspace(0, 1, 33), (50, 33))
    weights = volrend.compositing_weights(density, edges)
    light = jnp.exp(-jnp.sum(density / 32, axis=-1))
    np.testing.assert_allclose(weights.sum(-1) + light, 1, atol=1e-5)
    assert (weights >= 0).all() and np.isfinite(weights).all()


def test_an_opaque_first_sample_hides_the_rest():
    density = jnp.array([[1e6, 3.0, 3.0]])
    rgb = jnp.eye(3)[None]
    out = volrend.composite(density, rgb, jnp.array([[0.0, 1.0, 2.0, 3.0]]))
    np.testing.assert_allclose(out.rgb[0], [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(out.depth[0], 0.5, atol=1e-6)


@pytest.mark.parametrize("density", [[5.0, 1e9, 3.0], [0.7, 2e6, 1.0], [5.0, np.inf, 3.0]])
def test_a_solid_behind_a_thin_sample_gets_the_rest_of_the_light(density):
    weights = volrend.compositing_weights(jnp.array([density]), jnp.arange(4.0)[None])
    first = 1 - np.exp(-density[0])
    np.testing.assert_allclose(weights[0], [first, 1 - first, 0], atol=1e-6)


def test_empty_rays_give_zeros_and_finite_gradients():
    edges = jnp.linspace(0.0, 1.0, 9)[None]

    def total(density):
        out = volrend.composite(density, jnp.ones((1, 8, 3)), edges)
        return out.rgb.sum() + out.alpha.sum() + out.depth.sum()

    assert total(jnp.zeros((1, 8))) == 0
    assert np.isfinite(jax.grad(total)(jnp.zeros((1, 8)))).all()


def test_bfloat16_densities_are_summed_in_float32():
    density = jnp.full((1, 512), 0.37, jnp.bfloat16)
    edges = jnp.linspace(0.0, 1.0, 513)[None]
    out = volrend.composite(density, jnp.ones((1, 512, 3)), edges)
    exact = 1 - np.exp(-float(density[0, 0]))
    np.testing.assert_allclose(out.alpha[0], exact, rtol=1e-5)
