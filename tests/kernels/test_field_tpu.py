"""The TPUs' field, interpreted on a CPU, against the plain form."""

import functools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax.kernels import field, field_plain, field_tpu
from lrm_jax.models import lrm, triposr
from lrm_jax.parallel import batch_axes, sharding

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import chips  # noqa: E402

AXES = lrm.PLANE_AXES
kernel = functools.partial(field_tpu.field_by_windows, interpret=True)


def make(Q, spread=0.3, F=64, dtype="float32", h=20, w=24, depth=3):
    """Planes, layers, points within `spread` of a place, and a gradient of the result."""
    keys = iter(jax.random.split(jax.random.key(0), 32))
    sizes = [(6, F)] + [(F, F)] * (depth - 1) + [(F, 4)]
    layers = [
        (0.15 * jax.random.normal(next(keys), size), jax.random.normal(next(keys), size[1:]))
        for size in sizes
    ]
    planes = jax.random.normal(next(keys), (3, h, w, F)).astype(dtype)
    place = jnp.array([[0.2, -0.3, 0.4]])
    xyz = place + spread * jax.random.uniform(next(keys), (Q, 3), minval=-1.0, maxval=1.0)
    return planes, layers, xyz, jax.random.normal(next(keys), (Q, 4))


def value_and_gradients(function, planes, layers, xyz, grad, axes=AXES, activation="silu"):
    value, pull = jax.vjp(lambda p, ls: function(p, ls, xyz, axes, activation), planes, layers)
    return value, pull(grad)


def assert_same(got, expected, tolerance):
    """Relative errors, as norms: single values of a gradient may cancel."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("axes", "activation", "F"), [(lrm.PLANE_AXES, "relu", 64), (triposr.PLANE_AXES, "silu", 16)]
)
def test_values_and_gradients_are_those_of_the_plain_form(axes, activation, F):
    arguments = make(1500, F=F)  # not a whole number of tiles
    got = value_and_gradients(kernel, *arguments, axes, activation)
    expected = value_and_gradients(field_plain.field_by_xla, *arguments, axes, activation)
    assert_same(got, expected, 1e-5)


def test_tiles_in_more_than_a_window_are_right():
    planes, layers, xyz, grad = make(1024, spread=1.5)
    windows = np.asarray(field_tpu._tiles(planes, xyz, AXES)[0]).reshape(-1, 3, 2, 2)[..., 1]
    assert windows.min() >= 2
    assert 0.2 < float(jnp.mean(jnp.any(jnp.abs(xyz) > 1, axis=-1))) < 0.9  # misses
    got = value_and_gradients(kernel, planes, layers, xyz, grad)
    expected = value_and_gradients(field_plain.field_by_xla, planes, layers, xyz, grad)
    assert_same(got, expected, 1e-5)


def test_points_that_miss_all_planes_give_the_field_of_zeros():
    planes, layers, xyz, grad = make(1024)
    value, (grad_planes, _) = value_and_gradients(kernel, planes, layers, xyz + 5.0, grad)
    expected = field_plain.field_by_xla(0 * planes, layers, xyz, AXES, "silu")
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    assert not np.asarray(grad_planes).any()


def test_16_bits_are_as_exact_as_the_plain_form():
    planes, layers, xyz, grad = make(2048, dtype="bfloat16")
    exact = value_and_gradients(
        field_plain.field_by_xla, planes.astype(jnp.float32), layers, xyz, grad
    )
    got = value_and_gradients(kernel, planes, layers, xyz, grad)
    assert got[1][0].dtype == jnp.bfloat16
    plain = value_and_gradients(field_plain.field_by_xla, planes, layers, xyz, grad)
    for a, b, c in zip(*map(jax.tree.leaves, (got, plain, exact)), strict=True):
        a, b, c = (np.asarray(x, np.float32) for x in (a, b, c))
        assert np.linalg.norm(a - c) <= max(1e-2 * np.linalg.norm(c), np.linalg.norm(b - c))


def test_samples_of_rays_that_enter_at_different_distances_are_right():
    """As importance samples do, they lie close together on some rays of a tile, and far apart on others."""
    planes, layers, _, _ = make(1)
    near, spread = jax.random.uniform(jax.random.key(1), (2, 64, 1))
    t_RS = -0.5 + near + spread * jnp.sort(jax.random.uniform(jax.random.key(2), (64, 16))) ** 3
    dirs = jnp.array([[0.6, 0.64, 0.48]]) + 0.1 * jax.random.normal(jax.random.key(3), (64, 3))
    xyz = field.samples_in_tiles(t_RS[..., None] * dirs[:, None])
    grad = jax.random.normal(jax.random.key(4), (1024, 4))
    got = value_and_gradients(kernel, planes, layers, xyz, grad)
    expected = value_and_gradients(field_plain.field_by_xla, planes, layers, xyz, grad)
    assert_same(got, expected, 1e-5)


def test_points_have_the_gradient_of_the_plain_form():
    planes, layers, xyz, grad = make(200)

    def pulled(function):
        value, pull = jax.vjp(lambda p, x: function(p, layers, x, AXES, "silu"), planes, xyz)
        return value, pull(grad)

    assert_same(pulled(kernel), pulled(field_plain.field_by_xla), 1e-5)


def scenes_in_chunks(function, shared, scenes):
    """The loss of scenes, each in a rematerialised scan over two chunks of points, as `triplane.render` calls the field."""

    def one(planes, xyz):
        @functools.partial(
            jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(field.RAW)
        )
        def chunk(xyz):
            return jnp.sum(jnp.sin(function(planes, shared, xyz, AXES, "relu")), axis=-1)

        return jnp.sum(jax.lax.map(chunk, xyz.reshape(2, -1, 3)))

    return jax.vmap(one)(*scenes)


@pytest.fixture
def scenes():
    """Layers; planes and points of eight scenes."""
    planes, layers, xyz, _ = make(2 * 600, h=16, w=16, depth=2)
    factors = jnp.arange(1.0, 9.0)
    return (
        layers,
        (planes[None] * factors[:, None, None, None, None], xyz[None] / factors[:, None, None]),
    )


def test_scenes_in_chunks_have_the_gradients_of_the_plain_form_and_run_once(scenes):
    layers, batch = scenes
    batch = jax.tree.map(lambda x: x[:2], batch)

    def gradient(function):
        def loss(layers, planes):
            return jnp.sum(scenes_in_chunks(function, layers, (planes, batch[1])))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    got = gradient(kernel)(layers, batch[0])
    assert_same(got, gradient(field_plain.field_by_xla)(layers, batch[0]), 1e-5)
    # One kernel forward, one backward. What rematerialisation repeats of the first has no use, so that compilers drop it.
    text = str(jax.make_jaxpr(gradient(kernel))(layers, batch[0]))
    results = re.findall(r"(\w+):\S+ = pallas_call\[", text)
    assert len([x for x in results if len(re.findall(rf"\b{x}\b", text)) > 1]) == 2


def test_devices_work_on_their_own_scenes(scenes):
    layers, batch = scenes
    device_mesh = sharding.make_device_mesh(data=2, fsdp=4)

    def gradient(function):
        def loss(layers, batch):
            split = functools.partial(scenes_in_chunks, function)
            return jnp.sum(batch_axes.split_batch(split, layers, batch))

        return jax.jit(jax.grad(loss))

    with jax.set_mesh(device_mesh):
        got = gradient(kernel)(layers, batch)
        assert "shard_map" in str(jax.make_jaxpr(gradient(kernel))(layers, batch))
    assert_same(got, gradient(field_plain.field_by_xla)(layers, batch), 1e-5)


@pytest.mark.parametrize("size", [dict(F=72), dict(h=160, w=160)])
def test_what_does_not_fit_on_the_chip_takes_the_plain_form(size):
    planes, layers, xyz, _ = make(100, **size)
    jaxpr = jax.make_jaxpr(lambda p: kernel(p, layers, xyz, AXES, "relu"))(planes)
    assert "pallas_call" not in str(jaxpr)
    assert "gather" in str(jaxpr)


def test_tpus_take_the_kernel(monkeypatch):
    planes, layers, xyz, _ = make(100)
    traced = jax.make_jaxpr(lambda p: field.field(p, layers, xyz, AXES, "relu"))
    assert "pallas_call" not in str(traced(planes))
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    traced = jax.make_jaxpr(lambda p: field.field(p, layers, xyz, AXES, "relu"))
    assert "pallas_call" in str(traced(planes))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v6e:2x2"])
def test_the_kernel_fits_on_chips_and_needs_no_gathers_or_scatters(topology, dtype):
    pytest.importorskip("libtpu")
    place = jax.sharding.SingleDeviceSharding(chips.open_topology(topology)[0])
    planes, layers, xyz, grad = jax.eval_shape(
        lambda: make(16384, h=64, w=64, depth=10, dtype=dtype)
    )
    planes, xyz, grad = (
        jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in (planes, xyz, grad)
    )  # scenes

    def gradient(planes, layers, xyz, grad):
        def one(planes, layers, xyz):
            return field_tpu.field_by_windows(planes, layers, xyz, AXES, "silu")

        field_of = jax.vmap(one, (0, None, 0))
        value, pull = jax.vjp(lambda p, ls: field_of(p, ls, xyz), planes, layers)
        return value, pull(grad)

    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (planes, layers, xyz, grad),
    )
    compiled = jax.jit(gradient).trace(*arguments).lower().compile()
    assert (
        compiled.memory_analysis().temp_size_in_bytes < 64e6
    )  # a layer's activations: 4 MB or 8 MB
    text = compiled.as_text()
    assert " gather(" not in text and " scatter(" not in text
    assert "field_forward" in text and "field_backward" in text
