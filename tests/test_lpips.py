"""LPIPS and LVSM's perceptual loss against their references, and their files. The goldens' weights are given by formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lrm_jax import lpips, perceptual, vgg

VGG19_CONVS = (2, 2, 4, 4, 4)


def convolutions(num_convs):
    """Kernels [out in 3 3] and biases by our layers' names, as tests/goldens/README.md and the goldens' metadata say."""
    layers, width_in = {}, 3
    names = [(b, k) for b, count in enumerate(num_convs) for k in range(count)]
    for i, (block, number) in enumerate(names):
        width = vgg.WIDTHS[block]
        kernel = np.random.default_rng(i).standard_normal((width, width_in, 3, 3))
        kernel *= np.sqrt(2 / (9 * width_in))
        bias = np.random.default_rng(1000 + i).standard_normal(width) * 0.1
        layers[f"conv{block + 1}_{number + 1}"] = kernel.astype("f4"), bias.astype("f4")
        width_in = width
    return layers


@pytest.fixture(scope="module")
def vgg16():
    """torchvision's state dict, with a classifier as empty as NumPy can."""
    indices = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    state = {}
    for index, (kernel, bias) in zip(indices, convolutions((2, 2, 3, 3, 3)).values(), strict=True):
        state |= {f"features.{index}.weight": kernel, f"features.{index}.bias": bias}
    return state | {"classifier.6.weight": np.zeros((3, 2), "f4")}


@pytest.fixture(scope="module")
def linear():
    def head(k, width):
        head = np.random.default_rng(2000 + k).standard_normal((1, width, 1, 1))
        return np.abs(head * 0.1).astype("f4")

    return {f"lin{k}.model.1.weight": head(k, width) for k, width in enumerate(vgg.WIDTHS)}


@pytest.fixture(scope="module")
def lpips_params(vgg16, linear):
    return jax.tree.map(jnp.asarray, lpips.from_torch(vgg16, linear))


@pytest.fixture(scope="module")
def vgg19():
    """A MatConvNet model, as scipy reads it, whose later layers are cut to nothing."""
    layers = []
    for name, (kernel, bias) in convolutions(VGG19_CONVS).items():
        weights = [kernel.transpose(2, 3, 1, 0), bias]
        layers.append({"name": name, "type": "conv", "weights": weights, "pad": np.ones((1, 4))})
        layers.append({"name": name.replace("conv", "relu"), "type": "relu"})
        if name.endswith(f"_{VGG19_CONVS[int(name[4]) - 1]}"):
            layers.append({"name": f"pool{name[4]}", "type": "pool", "method": "max"})
    fc6 = [np.zeros((7, 7, 2, 3), "f4"), np.zeros(3, "f4")]
    layers.append({"name": "fc6", "type": "conv", "weights": fc6})
    return {"layers": layers, "meta": {"classes": {"name": "tench"}}}


@pytest.fixture(scope="module")
def perceptual_params(vgg19):
    return jax.tree.map(jnp.asarray, perceptual.from_matconvnet(vgg19))


@pytest.fixture(scope="module")
def jitted():
    """Compiled once for all tests of this file: the gradient of the sum by x, and the values."""

    def of(distance):
        def total(params, x, y):
            values = distance(params, x, y)
            return values.sum(), values

        return jax.jit(jax.grad(total, argnums=1, has_aux=True))

    return {module: of(module.distance) for module in (lpips, perceptual)}


def pictures(golden, name):
    return jnp.asarray(golden[name].transpose(0, 2, 3, 1))


def test_lpips_and_its_gradient_are_the_references(goldens, lpips_params, jitted):
    golden = load_file(goldens / "lpips_vgg16.safetensors")
    x, y = pictures(golden, "in.x"), pictures(golden, "in.y")
    grad, values = jitted[lpips](lpips_params, x, y)
    np.testing.assert_allclose(values, golden["out.lpips"], rtol=1e-4)  # the goldens' own
    assert_same_gradient(grad, golden["grad.x"])


def test_perceptual_loss_and_its_gradient_are_lvsms(goldens, perceptual_params, jitted):
    golden = load_file(goldens / "lvsm_vgg19.safetensors")
    x, y = pictures(golden, "in.pred"), pictures(golden, "in.target")
    grad, values = jitted[perceptual](perceptual_params, x, y)
    assert values.shape == (2,)
    np.testing.assert_allclose(values.mean(), golden["out.loss"][0], rtol=1e-4)
    assert_same_gradient(grad / 2, golden["grad.pred"])  # the reference takes the mean of two


def assert_same_gradient(grad, expected):
    expected = expected.transpose(0, 2, 3, 1)
    print(np.abs(grad - expected).max() / np.abs(expected).max(), (grad / expected).mean())
    np.testing.assert_allclose(grad, expected, atol=1e-3 * np.abs(expected).max())
