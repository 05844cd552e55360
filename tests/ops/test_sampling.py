"""Ray-box intersection and samples along rays, compared with closed forms."""

import jax
import jax.numpy as jnp
import numpy as np

from lrm_jax.ops import sampling


def random_rays(num, seed=0):
    rng = np.random.default_rng(seed)
    origins = rng.uniform(-3, 3, (num, 3)).astype(np.float32)
    dirs = rng.normal(size=(num, 3)).astype(np.float32)
    return jnp.asarray(origins), jnp.asarray(dirs / np.linalg.norm(dirs, axis=-1, keepdims=True))


def test_entry_and_exit_lie_on_the_box_and_the_middle_inside():
    origins, dirs = random_rays(4000)
    near, far = sampling.ray_box(origins, dirs, 0.8)
    hit = np.asarray(far > near)
    assert 100 < hit.sum() < 3900
    outside = hit & (np.abs(origins).max(-1) > 0.8)
    for t in (near, far):
        point = np.abs(origins + t[:, None] * dirs).max(-1)[outside]
        np.testing.assert_allclose(point, 0.8, atol=2e-5)  # float32 over distances of up to 6
    middle = np.abs(origins + (0.5 * (near + far))[:, None] * dirs).max(-1)
    assert (middle[hit] <= 0.8 + 1e-5).all()


def test_a_miss_never_comes_inside():
    origins, dirs = random_rays(500, seed=1)
    near, far = sampling.ray_box(origins, dirs, 0.8)
    t = np.linspace(0, 10, 400, dtype=np.float32)
    path = np.asarray(origins)[:, None] + t[None, :, None] * np.asarray(dirs)[:, None]
    enters = (np.abs(path).max(-1) < 0.8 - 1e-3).any(-1)
    assert not (enters & ~np.asarray(far > near)).any()


def test_camera_inside_the_box_starts_at_zero():
    near, far = sampling.ray_box(jnp.zeros((1, 3)), jnp.array([[0.0, 0.0, 1.0]]), 0.5)
    assert near[0] == 0 and abs(far[0] - 0.5) < 1e-6


def test_rays_along_an_axis_are_finite_with_finite_gradients():
    origins = jnp.array([[-2.0, 0.1, 0.2], [-2.0, 2.0, 0.0]])
    dirs = jnp.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    near, far = sampling.ray_box(origins, dirs, 1.0)
    np.testing.assert_allclose([near[0], far[0]], [1, 3], atol=1e-5)
    assert far[1] <= near[1]
    grad = jax.grad(lambda o: sampling.ray_box(o, dirs, 1.0)[0][0])(origins)
    assert np.isfinite(grad).all()


def test_each_ray_is_intersected_on_its_own():
    origins, dirs = random_rays(64)
    near, far = sampling.ray_box(origins, dirs, 1.0)
    alone = [sampling.ray_box(origins[i], dirs[i], 1.0) for i in range(64)]
    np.testing.assert_array_equal(near, [n for n, _ in alone])
    np.testing.assert_array_equal(far, [f for _, f in alone])


def test_uniform_edges_reach_from_near_to_far_in_equal_steps():
    edges = sampling.uniform_edges(jnp.array([1.0, 2.0]), jnp.array([3.0, 2.5]), 8)
    assert edges.shape == (2, 9)
    np.testing.assert_allclose(edges[:, 0], [1, 2])
    np.testing.assert_allclose(edges[:, -1], [3, 2.5])
    np.testing.assert_allclose(np.diff(edges, axis=-1), [[0.25] * 8, [0.0625] * 8], rtol=1e-5)


def test_stratified_samples_have_one_in_each_interval_and_midpoints_without_a_key():
    near, far = jnp.array([1.0]), jnp.array([4.0])
    t = sampling.stratified(near, far, 4, None)
    np.testing.assert_allclose(t[0], [1.5, 2.5, 3.5, 4.5], rtol=1e-6)
    jittered = np.asarray(
        sampling.stratified(jnp.full(200, 1.0), jnp.full(200, 4.0), 4, jax.random.key(0))
    )
    low = np.arange(1, 5)
    assert ((jittered >= low) & (jittered < low + 1)).all()
    assert jittered.std(axis=0).min() > 0.2  # 0.29 for a uniform variable


def test_importance_samples_gather_where_the_weight_is():
    t = jnp.linspace(0.0, 1.0, 65)[None]
    weights = jnp.where((t[:, :-1] > 0.6) & (t[:, :-1] < 0.7), 1.0, 0.0)
    fine = np.asarray(sampling.importance(t, weights, 128, None))[0]
    assert (np.diff(fine) >= 0).all()
    assert (
        (fine > 0.55) & (fine < 0.75)
    ).mean() > 0.85  # the rest comes from the floor of 0.01 in each of 64 bins
    drawn = np.asarray(sampling.importance(t, weights, 4096, jax.random.key(0)))[0]
    np.testing.assert_allclose(
        drawn.mean(), fine.mean(), atol=0.02
    )  # standard deviation 0.1 / 64 for 4096 draws


def test_importance_samples_of_flat_weights_are_uniform():
    t = jnp.linspace(0.0, 1.0, 33)[None]
    fine = np.asarray(sampling.importance(t, jnp.ones((1, 32)), 100, None))[0]
    np.testing.assert_allclose(
        np.diff(fine), np.diff(fine).mean(), rtol=1e-2
    )  # float32 sums of 30 equal masses


def test_importance_samples_have_no_gradient():
    t = jnp.linspace(0.0, 1.0, 17)[None]
    grad = jax.grad(lambda w: sampling.importance(t, w, 8, None).sum())(jnp.ones((1, 16)))
    assert not np.asarray(grad).any()


def test_sorted_uniform_draws_are_sorted_and_uniform():
    u = np.asarray(sampling.sorted_uniform(jax.random.key(0), (4000,), 3))
    assert (np.diff(u) >= 0).all() and u.min() >= 0 and u.max() < 1
    # The i-th of n has the mean i / (n + 1), and the variance i (n + 1 - i) / ((n + 1)^2 (n + 2)).
    np.testing.assert_allclose(u.mean(0), [0.25, 0.5, 0.75], atol=0.01)
    np.testing.assert_allclose(u.var(0), [3 / 80, 4 / 80, 3 / 80], rtol=0.08)
    assert abs(np.mean(u < 0.1) - 0.1) < 0.01
