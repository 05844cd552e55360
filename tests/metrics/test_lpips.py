"""LPIPS and LVSM's perceptual loss, compared with their references, and their files. A formula gives the weights of the goldens."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io
from PIL import Image
from safetensors.numpy import load_file
from tolerances import tolerance

from lrm_jax import __main__
from lrm_jax.commands import convert
from lrm_jax.metrics import lpips, perceptual, vgg
from lrm_jax.types import InputError
from lrm_jax.weights import tensor_files

VGG19_CONVS = (2, 2, 4, 4, 4)
EXAMPLES = Path(vgg.__file__).parents[1] / "assets" / "examples"


def convolutions(num_convs):
    """Kernels [out in 3 3] and biases by our names of layers, from the formula in the metadata of the goldens."""
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
    """torchvision's state dict, with a classifier that takes almost no memory."""
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
    """A MatConvNet model as scipy reads it, with empty later layers."""
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
    """The gradient of the sum with respect to x, and the values. Compiled once for all tests of this file."""

    @functools.cache
    def of(module, dtype="float32"):
        def total(params, x, y):
            values = module.distance(params, x, y, dtype)
            return values.sum(), values

        return jax.jit(jax.grad(total, argnums=1, has_aux=True))

    return of


def images(golden, name):
    return jnp.asarray(golden[name].transpose(0, 2, 3, 1))


def test_lpips_and_its_gradient_are_the_references(goldens, lpips_params, jitted):
    golden = load_file(goldens / "lpips_vgg16.safetensors")
    x, y = images(golden, "in.x"), images(golden, "in.y")
    grad, values = jitted(lpips)(lpips_params, x, y)
    np.testing.assert_allclose(
        values, golden["out.lpips"], rtol=tolerance(1e-4)
    )  # stated with the goldens
    assert_same_gradient(grad, golden["grad.x"])


def test_perceptual_loss_and_its_gradient_are_lvsms(goldens, perceptual_params, jitted):
    golden = load_file(goldens / "lvsm_vgg19.safetensors")
    x, y = images(golden, "in.pred"), images(golden, "in.target")
    grad, values = jitted(perceptual)(perceptual_params, x, y)
    assert values.shape == (2,)
    np.testing.assert_allclose(values.mean(), golden["out.loss"][0], rtol=tolerance(1e-4))
    assert_same_gradient(grad / 2, golden["grad.pred"])  # the reference takes the mean over two


def assert_same_gradient(grad, expected):
    expected = expected.transpose(0, 2, 3, 1)
    np.testing.assert_allclose(grad, expected, atol=tolerance(1e-4) * np.abs(expected).max())


@pytest.fixture(scope="module")
def photos():
    """Two of the bundled images on white, [2 64 64 3]."""

    def photo(name):
        rgba = Image.open(EXAMPLES / name).convert("RGBA").resize((64, 64))
        rgba = np.asarray(rgba, np.float32) / 255
        return rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]

    return np.stack([photo("hydrant.png"), photo("plant.png")])


@pytest.mark.parametrize("module", [lpips, perceptual], ids=["lpips", "perceptual"])
def test_bfloat16_gives_nearly_the_distance_and_gradient_of_float32(
    module, jitted, photos, lpips_params, perceptual_params
):
    params = lpips_params if module is lpips else perceptual_params
    noise = 0.05 * np.random.default_rng(0).standard_normal(photos.shape, np.float32)
    for x in (photos[::-1], np.clip(photos + noise, 0, 1)):
        (low_grad, low), (grad, values) = (
            jitted(module, dtype)(params, x, photos) for dtype in ("bfloat16", "float32")
        )
        assert low.dtype == low_grad.dtype == jnp.float32
        assert (np.asarray(low) != np.asarray(values)).all()  # it was computed differently
        np.testing.assert_allclose(low, values, rtol=0.02)
        # Rounding moves maxima of LPIPS's pools to neighbours, and their gradient with them: compare means over 8 x 8 pixels.
        low_grad, grad = (g.reshape(2, 8, 8, 8, 8, 3).mean((2, 4)) for g in (low_grad, grad))
        assert np.linalg.norm(low_grad - grad) < 0.2 * np.linalg.norm(grad)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("module", [lpips, perceptual], ids=["lpips", "perceptual"])
def test_equal_images_have_distance_0_and_a_finite_gradient(
    module, dtype, jitted, lpips_params, perceptual_params
):
    params = lpips_params if module is lpips else perceptual_params
    flat = jnp.broadcast_to(jnp.array([0.0, 1.0])[:, None, None, None], (2, 64, 64, 3))
    grad, values = jitted(module, dtype)(params, flat, flat)
    # Not exactly 0, because the differentiated side may be compiled differently, and so rounded differently.
    np.testing.assert_allclose(values, 0, atol=1e-6 if dtype == "float32" else 1e-4)
    assert np.isfinite(grad).all()


def test_lpips_gradient_is_finite_where_all_features_are_zero(jitted, lpips_params):
    params = {k: v for k, v in lpips_params.items() if not k.startswith("conv")}
    for name, layer in lpips_params.items():
        if name.startswith("conv"):  # with negative biases, every ReLU gives 0 for a black image
            params[name] = layer | {"bias": jnp.full_like(layer["bias"], -100.0)}
    x, y = jnp.zeros((2, 64, 64, 3)), jnp.ones((2, 64, 64, 3))
    for dtype in ("float32", "bfloat16"):
        grad, values = jitted(lpips, dtype)(params, x, y)
        assert np.isfinite(values).all() and np.isfinite(grad).all()


def test_no_gradient_is_a_scatter(lpips_params, perceptual_params):
    """On a GPU, XLA adds the gradient of a pool by `reduce_window` with 16-bit atomics."""
    images = jnp.zeros((1, 32, 32, 3))
    for network, params in ((lpips, lpips_params), (perceptual, perceptual_params)):

        def loss(x, network=network, params=params):
            return network.distance(params, x, images, "bfloat16").sum()

        assert "scatter" not in jax.jit(jax.grad(loss)).lower(images).as_text()


def test_leading_axes_are_kept_and_distances_are_float32(lpips_params, perceptual_params):
    """Tests only shapes. Nothing is computed."""
    x = jax.ShapeDtypeStruct((2, 3, 16, 20, 3), jnp.bfloat16)
    for module, params in ((lpips, lpips_params), (perceptual, perceptual_params)):
        for dtype in ("float32", "bfloat16"):
            distance = functools.partial(module.distance, dtype=dtype)
            out = jax.eval_shape(distance, params, x, x)
            assert out.shape == (2, 3) and out.dtype == jnp.float32
        with pytest.raises(InputError, match="15 x 64 pixels are too small.*16 or larger"):
            small = jax.ShapeDtypeStruct((1, 15, 64, 3), jnp.float32)
            jax.eval_shape(module.distance, params, small, small)


# -- files


@pytest.fixture(scope="module")
def files(tmp_path_factory, vgg16, linear, vgg19):
    """The public files: two from torch, and one from MATLAB with a struct in each cell."""
    folder = tmp_path_factory.mktemp("public")
    tensor_files.write_torch(folder / "vgg16.pth", vgg16)
    tensor_files.write_torch(folder / "vgg.pth", linear)
    scipy.io.savemat(folder / "vgg19.mat", {**vgg19, "layers": cells(vgg19["layers"])})
    return folder


def cells(layers):
    """MATLAB's cell array of structs. `weights` is a cell array of arrays, and a bias is a row."""
    array = np.empty((1, len(layers)), object)
    for i, layer in enumerate(layers):
        array[0, i] = dict(layer)
        if "weights" in layer:
            weights = np.empty((1, 2), object)
            weights[0, 0], weights[0, 1] = layer["weights"][0], layer["weights"][1][None]
            array[0, i]["weights"] = weights
    return array


def test_lpips_is_converted_from_torchvision_and_its_heads(
    files, tmp_path, lpips_params, linear, capsys
):
    out = tmp_path / "lpips_vgg16.safetensors"
    command = [
        "convert",
        str(files / "vgg16.pth"),
        str(tmp_path),
        "--linear",
        str(files / "vgg.pth"),
    ]
    assert __main__.main(command) == 0
    assert f"wrote {out} (58.9 MB)" in capsys.readouterr().out
    params = lpips.load(out)
    jax.tree.map(np.testing.assert_array_equal, params, lpips_params)
    np.testing.assert_array_equal(params["linear2"], linear["lin1.model.1.weight"][0, :, 0, 0])
    with pytest.raises(
        InputError, match="not the weights of perceptual_vgg19 but lpips_vgg16.*mat"
    ):
        perceptual.load(out)


def test_lvsms_network_is_converted_from_matconvnet(files, tmp_path, perceptual_params):
    out = tmp_path / "perceptual_vgg19.safetensors"
    assert __main__.main(["convert", str(files / "vgg19.mat"), str(out)]) == 0
    params = perceptual.load(out)
    jax.tree.map(np.testing.assert_array_equal, params, perceptual_params)
    assert params.keys() == {name.partition(".")[0] for name in perceptual.SHAPES}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vgg16.pth", "out.safetensors"], "vgg16.pth: its tensors are of a loss network.*--linear vgg.pth"),
        (["vgg16.pth", "out.safetensors", "--linear", "none.pth"], "none.pth: cannot be read"),
        (["vgg.pth", "out.safetensors", "--linear", "vgg16.pth"], "not the tensors of torchvision's VGG16: 26 missing"),
        (["vgg16.pth", "out.safetensors", "--linear", "vgg16.pth"], "not the tensors of LPIPS's linear heads"),
        (["vgg19.mat", "out.safetensors", "--linear", "vgg.pth"], "not a tensor"),
        (["vgg19.mat", "out.safetensors", "--dtype", "float16"], "leave out --to and --dtype"),
        (["vgg19.mat", "out.bin"], "must end in .safetensors"),
    ],
)  # fmt: skip
def test_files_that_do_not_belong_together_are_one_line(
    files, tmp_path, capsys, arguments, message
):
    src, out, *rest = arguments
    rest = [str(files / x) if x.endswith(".pth") else x for x in rest]
    with pytest.raises(InputError, match=message) as error:
        convert.main([str(files / src), str(tmp_path / out), *rest])
    assert "\n" not in str(error.value)
    assert str(error.value).startswith((str(files), str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_another_matlab_file_is_not_a_vgg19(vgg19):
    with pytest.raises(InputError, match="not a MatConvNet model of VGG19.*'layers'"):
        perceptual.from_matconvnet({"x": np.ones(3)})
    old = [{"name": "conv1_1", "type": "conv", "filters": np.ones((3, 3, 3, 64))}]
    with pytest.raises(InputError, match="not a MatConvNet model of VGG19.*'weights'"):
        perceptual.from_matconvnet({"layers": old})
    fewer = [layer for layer in vgg19["layers"] if layer["name"] != "conv3_4"]
    with pytest.raises(InputError, match="2 missing: conv3_4.kernel, conv3_4.bias"):
        perceptual.from_matconvnet({"layers": fewer})


def test_a_number_that_is_not_finite_is_not_converted(tmp_path):
    with pytest.raises(InputError, match="conv1_1.bias has numbers that are not finite"):
        vgg.save(tmp_path / "x", {"conv1_1": {"bias": np.array([np.nan])}}, lpips.NETWORK)


def test_a_missing_or_wrong_network_file_is_an_error_that_names_the_command(tmp_path):
    remedy = "lrm convert vgg16-397923af.pth lpips_vgg16.safetensors --linear vgg.pth"
    other = tmp_path / "model.safetensors"
    tensor_files.write_safetensors(
        other, {"a": np.ones(2, "f4")}, {"format": "lrm_jax", "family": "lrm"}
    )
    torch = tmp_path / "vgg16.pth"
    tensor_files.write_torch(torch, {"a": np.ones(2, "f4")})
    for path, what in (
        (tmp_path / "none", "no such file"),
        (other, "but lrm"),
        (torch, "but another"),
    ):
        with pytest.raises(InputError, match=f"{path}.*{what}.*{remedy}"):
            lpips.load(path)


def test_a_networks_file_with_other_tensors_is_refused(tmp_path):
    path = tmp_path / "short.safetensors"
    vgg.save(path, {"conv1_1": {"bias": np.ones(64)}}, lpips.NETWORK)
    with pytest.raises(
        InputError, match=f"{path}: not the tensors of lpips_vgg16: 30 missing.*lrm convert"
    ):
        lpips.load(path)
