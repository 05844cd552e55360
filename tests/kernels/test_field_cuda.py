"""The GPU's field, interpreted, against the plain form, and lowered for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lrm_jax.kernels import field, field_cuda, field_plain
from lrm_jax.ops import cameras
from lrm_jax.parallel import sharding
from tests import tiny_models

AXES = ((0, 1), (0, 2), (1, 2))
LRM_AXES = ((0, 1), (0, 2), (2, 1))


def random_field(width, num_layers, size=(16, 16), dtype="float32"):
    """Projected planes, and layers whose activations neither grow nor vanish."""
    keys = jax.random.split(jax.random.key(0), 2 * num_layers + 1)
    planes = jax.random.normal(keys[0], (3, *size, width)).astype(dtype)
    sizes = [12] + [width] * (num_layers - 1) + [4]
    layers = [
        (1.5 * a**-0.5 * jax.random.normal(keys[2 * i + 1], (a, b)), 0.2 * jax.random.normal(keys[2 * i + 2], (b,)))
        for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
    ]  # fmt: skip
    return planes, layers


def points(kind, count):
    key = jax.random.key(7)
    if kind == "random":  # many windows in a tile, some points outside
        return jax.random.uniform(key, (count, 3), minval=-1.2, maxval=1.2)
    if kind == "outside":
        return 1.1 + jax.random.uniform(key, (count, 3))
    if kind == "corners":  # exactly on the borders, on cells, and between them
        values = jnp.array([-1.0, -0.9375, 0.0, 0.9375, 1.0, 1.0625, -1.0625])
        return jax.random.choice(key, values, (count, 3))
    steps = jnp.stack(jnp.meshgrid(*map(jnp.arange, (count // 128 * 4, 4, 8)), indexing="ij"), -1)
    return (-0.9 + 0.07 * steps.reshape(-1, 3)).astype(jnp.float32)


def relative(actual, expected):
    """The largest difference, as a share of the largest number."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-9)


def compare(planes, layers, xyz, axes, activation, tolerance):
    """Values, and gradients with respect to planes, kernels and biases."""

    def loss(which, planes, layers):
        raw = which(planes, layers, xyz, axes, activation)
        return jnp.sum(jnp.sin(raw) * jnp.arange(1.0, 5)[None]), raw

    fused = functools.partial(field_cuda.field_by_triton, interpret=True)
    graded = [
        jax.grad(loss, (1, 2), has_aux=True)(which, planes, layers)
        for which in (fused, field_plain.field_by_xla)
    ]
    for actual, expected in zip(*map(jax.tree.leaves, graded), strict=True):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        assert relative(actual, expected) <= tolerance


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(
    ("width", "num_layers", "size", "kind", "axes"),
    [
        (64, 10, (16, 16), "tiles", AXES),  # LRM, TripoSR
        (64, 4, (16, 16), "tiles", LRM_AXES),  # OpenLRM
        (32, 3, (40, 36), "random", LRM_AXES),
        (128, 2, (9, 21), "random", AXES),
        (24, 2, (16, 16), "corners", LRM_AXES),
        (16, 3, (16, 16), "outside", AXES),
    ],
)
def test_values_and_gradients_equal_those_of_the_plain_form(
    width, num_layers, size, kind, axes, activation
):
    planes, layers = random_field(width, num_layers, size)
    # Sums in another order.
    compare(planes, layers, points(kind, 300), axes, activation, 1e-5)


@pytest.mark.parametrize(("activation", "num_layers"), [("relu", 4), ("silu", 10)])
def test_in_bfloat16_they_are_as_close_as_its_rounding(activation, num_layers):
    planes, layers = random_field(64, num_layers, dtype="bfloat16")
    exact = random_field(64, num_layers)
    xyz = points("tiles", 256)

    def loss(which, planes, layers):
        return jnp.mean(which(planes, layers, xyz, AXES, activation) ** 2)

    fused = functools.partial(field_cuda.field_by_triton, interpret=True)
    actual, plain, expected = (
        jax.value_and_grad(loss, (1, 2))(which, *arguments)
        for which, arguments in (
            (fused, (planes, layers)),
            (field_plain.field_by_xla, (planes, layers)),
            (field_plain.field_by_xla, exact),
        )
    )
    for a, b, c in zip(*map(jax.tree.leaves, (actual, plain, expected)), strict=True):
        a, b, c = (np.asarray(x, np.float64).ravel() for x in (a, b, c))
        size = max(np.linalg.norm(c), 1e-9)
        # Errors of the whole array: a ReLU near 0 may switch a single one.
        assert np.linalg.norm(a - c) / size <= max(1e-2, 1.1 * np.linalg.norm(b - c) / size)


def test_points_have_the_gradient_of_the_plain_form():
    planes, layers = random_field(32, 3)
    xyz = points("random", 100)

    def loss(which, xyz):
        return jnp.sum(jnp.sin(which(planes, layers, xyz, AXES, "silu")))

    fused = functools.partial(field_cuda.field_by_triton, interpret=True)
    actual, expected = (jax.grad(loss, 1)(f, xyz) for f in (fused, field_plain.field_by_xla))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def rendered(family, jitter, **fields):
    """Renders two scenes on two devices. Returns the colours, and the gradients with respect to planes and decoder."""
    model, params = tiny_models.tiny(family, ray_chunk=64, **fields)
    # Some rays miss, and neither view is a multiple of a tile.
    rays = cameras.pixel_rays(cameras.orbit(2, 2.0, 15.0, 60.0), 12, 9)
    rays = jax.tree.map(lambda x: jnp.stack([x, x]), rays)
    side = 2 * model.plane_tokens
    planes = jax.random.normal(jax.random.key(1), (2, 3, side, side, model.plane_channels))
    decoder = jax.tree.map(lambda x: 0.3 * x, params["decoder"])
    keys = jax.random.split(jax.random.key(2), 2) if jitter else None

    def loss(planes, decoder):
        variables = {"params": params | {"decoder": decoder}}
        rendering = model.apply(variables, {"triplane": planes}, rays, keys, method="render")
        return jnp.mean((rendering.rgb - 0.3) ** 2) + jnp.mean(rendering.alpha), rendering.rgb

    with jax.set_mesh(sharding.make_device_mesh(2, devices=jax.devices()[:2])):
        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(planes, decoder)


@pytest.mark.parametrize(
    ("family", "jitter", "fields"),
    [
        ("triposr", True, dict(num_samples=16)),
        ("lrm", False, dict(num_samples=16, num_importance=16)),
        ("lrm", True, dict(num_samples=6, num_importance=5)),  # not in tiles
    ],
)
def test_a_model_renders_and_learns_the_same_with_either_form(family, jitter, fields, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    monkeypatch.setattr(field_cuda, "can", lambda planes: False)
    (*expected_grads, expected) = jax.tree.leaves(rendered(family, jitter, **fields))
    called, fused = [], functools.partial(field_cuda.field_by_triton, interpret=True)
    monkeypatch.setattr(field_cuda, "can", lambda planes: True)
    monkeypatch.setattr(field_cuda, "field_by_triton", lambda *x: called.append(1) or fused(*x))
    (*grads, actual) = jax.tree.leaves(rendered(family, jitter, **fields))
    assert called and np.ptp(expected) > 0.1
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        assert np.abs(b).max() > 0
        assert relative(a, b) < 1e-4  # sums of thousands of points in another order


def arrays(jaxpr):
    """The shapes of all arrays outside Pallas kernels."""
    for equation in jaxpr.eqns:
        yield from (x.aval.shape for x in equation.outvars)
        if equation.primitive.name != "pallas_call":
            for inner in jaxprs_in_params(equation.params):
                yield from arrays(inner)


@pytest.mark.parametrize(("activation", "num_layers"), [("silu", 10), ("relu", 4)])
def test_no_array_of_points_times_width_is_in_memory(activation, num_layers, monkeypatch):
    planes, layers = random_field(64, num_layers, (64, 64), "bfloat16")
    Q = 2**21

    def largest():
        def gradient(planes, layers, xyz):  # a new function: JAX would return the old one's trace
            def loss(planes, layers):
                return jnp.sum(field.field(planes, layers, xyz, AXES, activation))

            return jax.grad(loss, (0, 1))(planes, layers)

        traced = jax.make_jaxpr(gradient)(planes, layers, jax.ShapeDtypeStruct((Q, 3), jnp.float32))
        return max(map(np.prod, arrays(traced.jaxpr)))

    assert largest() >= Q * 64
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    assert largest() <= Q * 8


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_both_kernels_become_triton_programs(dtype):
    """JAX's part of the compilation, which needs no GPU. XLA's part: tests/tools/test_aot.py."""
    planes, layers = random_field(64, 4, dtype=dtype)

    def gradient(planes, layers, xyz):
        def loss(planes):
            return jnp.sum(field.field(planes, layers, xyz, AXES, "silu") ** 2)

        return jax.grad(loss)(planes)

    xyz = jax.ShapeDtypeStruct((2, 1000, 3), jnp.float32)
    gpu = sharding.abstract_device_mesh((1, 1, 1), "gpu", "NVIDIA H100 80GB HBM3")
    with jax.sharding.use_abstract_mesh(gpu):
        traced = jax.jit(jax.vmap(gradient, (None, None, 0))).trace(planes, layers, xyz)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 2
    assert "stablehlo.scatter" not in text
