"""LVSM, compared with tensors of the PyTorch reference (tests/goldens/README.md), and properties that follow from having no positions."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from tolerances import tolerance

from lrm_jax import models
from lrm_jax.commands import convert
from lrm_jax.models import lvsm
from lrm_jax.models.lvsm import LVSM
from lrm_jax.models.parts import torch_layout
from lrm_jax.ops import cameras
from lrm_jax.types import Cameras, InputError, Views
from lrm_jax.weights import model_file, references, tensor_files

GOLDENS = ["lvsm_deconly_tiny", "lvsm_encdec_tiny"]
ARCHITECTURES = {"decoder-only": {}, "encoder-decoder": dict(num_latents=5, encoder_depth=1)}
PUBLISHED = [name for name in lvsm.VARIANTS if name != "tiny"]


def read(folder, name):
    """State, inputs, outputs, model and parameters of a golden."""
    with safe_open(folder / f"{name}.safetensors", "np") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}
        config = json.loads(f.metadata()["golden"])["config"]
    state, inputs, out = (
        {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(kind)}
        for kind in ("state.", "in.", "out.")
    )
    model = LVSM(**lvsm.fields_from_torch(state), image_size=config["image_size"])
    return state, inputs, out, model, lvsm.from_torch(state, model)


def views_of(inputs, which):
    """Views of a golden, whose intrinsics are in pixels."""
    rgb = jnp.asarray(inputs["image"][:, which].transpose(0, 1, 3, 4, 2))
    fxfycxcy = jnp.asarray(inputs["fxfycxcy"][:, which] / rgb.shape[2])
    return Views(rgb=rgb, cameras=Cameras(jnp.asarray(inputs["c2w"][:, which]), fxfycxcy))


def rays_of(views):
    return cameras.pixel_rays(views.cameras, *views.rgb.shape[2:4])


@pytest.mark.parametrize("name", GOLDENS)
def test_pixels_equal_the_reference_s(goldens, name):
    _, inputs, out, model, params = read(goldens, name)
    source, target = (views_of(inputs, which) for which in (slice(2), slice(2, None)))
    rays = rays_of(source)
    # Directions are sums of a few products, which the reference computes in another order.
    np.testing.assert_allclose(
        rays.dirs.transpose(0, 1, 4, 2, 3), out["input_ray_d"], atol=tolerance(1e-6)
    )
    np.testing.assert_allclose(rays.origins.transpose(0, 1, 4, 2, 3), out["input_ray_o"])
    rendering = jax.jit(model.apply)({"params": params}, source, rays_of(target))
    assert rendering.alpha is None and rendering.depth is None
    # float32 sums in another order.
    np.testing.assert_allclose(
        rendering.rgb.transpose(0, 1, 4, 2, 3), out["render"], atol=tolerance(1e-5)
    )
    mse = jnp.square(rendering.rgb - target.rgb).mean()
    np.testing.assert_allclose(mse, out["l2_loss"][0], rtol=tolerance(1e-5))


@pytest.mark.parametrize("name", GOLDENS)
def test_state_round_trips_to_the_bit(goldens, name):
    state, _, _, model, params = read(goldens, name)
    back = lvsm.to_torch(params, model)
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert back[key].dtype == value.dtype and back[key].shape == value.shape
        assert back[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize("name", GOLDENS)
def test_a_training_checkpoint_loads_without_its_loss_s_network_and_other_tensors_are_refused(
    goldens, name, tmp_path, caplog
):
    state, _, _, model, params = read(goldens, name)
    frozen = {"loss_computer.perceptual_loss_module.vgg.conv1_1.weight": np.ones((2, 3))}
    content = {"model": state | frozen, "optimizer": {"state": {0: {"step": 3}}}}
    found, found_params, assumed = references.from_checkpoint(content, tmp_path)
    # Nothing gives the image size here, so it is that of the first published model.
    assert found == model.clone(image_size=256) and "256 pixels are assumed" in caplog.text
    assert assumed == ["image size 256: LVSM's"]
    for name, size in [
        ("a_512.pt", 512),
        ("model_res16.pt", 16),
        ("ckpt_0000000000000512.pt", 256),
    ]:
        found, _, assumed = references.from_checkpoint(content, tmp_path / name)
        assert found.image_size == size
        assert bool(assumed) == name.startswith("ckpt")  # the name does not give it
    with pytest.raises(InputError, match="not .*multiple|divide"):
        references.from_checkpoint(content, tmp_path / "model_res15.pt")
    jax.tree.map(np.testing.assert_array_equal, found_params, params)
    extra = {"image_tokenizer.1.bias": np.ones(3)}
    with pytest.raises(InputError, match="of LVSM: 1 extra: image_tokenizer.1.bias: use"):
        references.from_reference(state | extra)
    with pytest.raises(InputError, match="of LVSM: 1 missing: image_token_decoder.0.weight: use"):
        references.from_reference(
            {k: v for k, v in state.items() if k != "image_token_decoder.0.weight"}
        )


@pytest.mark.parametrize("name", GOLDENS)
def test_lrm_convert_round_trips_a_checkpoint_to_the_bit(goldens, name, tmp_path):
    state, _, _, model, params = read(goldens, name)
    tensor_files.write_torch(tmp_path / "published.pt", {"model": state})
    ours = tmp_path / "ours.safetensors"
    assert convert.main([str(tmp_path / "published.pt"), str(ours)]) == 0
    assert convert.main([str(ours), str(tmp_path / "back"), "--to", "torch"]) == 0
    back, _ = tensor_files.read(tmp_path / "back" / "model_res256.pt")
    assert back["model"].keys() == state.keys()
    for key, value in state.items():
        assert back["model"][key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_variant_has_exactly_the_published_names_and_shapes(goldens, variant):
    architecture = variant.rsplit("-", 1)[0]
    manifest = json.loads((goldens / "manifests" / f"lvsm-{architecture}.json").read_text())
    model = models.build("lvsm", variant)
    params = param_shapes(model)
    shapes = torch_layout.torch_shapes(lvsm.entries(model), params)
    assert shapes == {key: tuple(shape) for key, (shape, _) in manifest["tensors"].items()}
    assert sum(x.size for x in jax.tree.leaves(params)) == manifest["parameters"]
    state = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    told = lvsm.fields_from_torch(state)
    assert {name: getattr(model, name) for name in told} == told
    assert LVSM(**told, image_size=model.image_size) == model
    path = Path(f"lvsm_scene_res{model.image_size}.pt")
    found, _, _ = references.recognise(state, references.name_config(path))
    assert model_file.variant_of(found) == variant


def param_shapes(model):
    source, rays = jax.eval_shape(lambda: scene_of(model, num_source=1, num_target=1))
    return jax.eval_shape(model.init, jax.random.key(0), source, rays)["params"]


def scene_of(model, num_source, num_target, num_scenes=1):
    """Source views of noise, and target rays. All cameras differ."""

    def views(count, azimuth):
        ring = cameras.orbit(num_scenes * count, 2.5, 20.0, 40.0, azimuth_deg=azimuth)
        return jax.tree.map(lambda x: x.reshape(num_scenes, count, *x.shape[1:]), ring)

    size = model.image_size
    shape = (num_scenes, num_source, size, size, 3)
    rgb = jax.random.uniform(jax.random.key(1), shape)
    source = Views(rgb=rgb, cameras=views(num_source, 0.0))
    return source, cameras.pixel_rays(views(num_target, 10.0), size, 2 * size)


def tiny(architecture, num_source=3, num_target=2, num_scenes=1):
    """A model with random parameters as large as trained ones. At initial values, pixels hardly depend on the inputs."""
    model = models.build("lvsm", "tiny", remat="none", **ARCHITECTURES[architecture])
    rng = np.random.default_rng(0)

    def draw(path, x):
        mean, deviation = (1, 0.1) if path[-1].key == "scale" else (0, 0.2)
        return jnp.asarray(rng.normal(mean, deviation, x.shape), jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, param_shapes(model))
    return model, params, *scene_of(model, num_source, num_target, num_scenes)


@functools.cache
def drawing(model):
    """One compiled program for all renderings of a test with arguments of the same shapes."""

    def draw(params, source, rays, num_views=None):
        scene = model.apply({"params": params}, source, num_views, method="encode")
        return model.apply({"params": params}, scene, rays, method="render").rgb

    return jax.jit(draw)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_order_of_source_views_has_no_influence_but_their_content_does(architecture):
    model, params, source, rays = tiny(architecture)
    first = drawing(model)(params, source, rays)
    assert first.shape == (1, 2, 16, 32, 3) and first.std() > 0.05
    turned = jax.tree.map(lambda x: x[:, jnp.array([2, 0, 1])], source)
    other = drawing(model)(params, turned, rays)
    np.testing.assert_allclose(other, first, atol=1e-5)  # sums in another order
    # If the images swap places, they are another scene.
    swapped = turned.replace(cameras=source.cameras)
    other = drawing(model)(params, swapped, rays)
    assert np.abs(other - first).max() > 1e-2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_target_views_rendered_one_by_one_in_chunks_or_at_once_are_the_same(architecture):
    model, params, source, rays = tiny(architecture, num_source=2, num_target=5, num_scenes=2)
    at_once = drawing(model)(params, source, rays)
    # Two views of 16 x 32 rays at a time, so that one is left over.
    chunked = drawing(model.clone(ray_chunk=1100))(params, source, rays)
    np.testing.assert_allclose(chunked, at_once, atol=1e-5)  # products of other shapes
    one = drawing(model)(params, source, jax.tree.map(lambda x: x[:, 3:4], rays))
    np.testing.assert_allclose(one, at_once[:, 3:4], atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_padded_source_view_has_no_influence(architecture):
    model, params, source, rays = tiny(architecture, num_source=3, num_scenes=2)
    num_views = jnp.array([1, 3])
    # Real padding: zeros, whose rays are NaN.
    is_view = jnp.arange(3)[None] < num_views[:, None]
    padded = jax.tree.map(
        lambda x: jnp.where(is_view.reshape(*is_view.shape, *(1,) * (x.ndim - 2)), x, 0), source
    )
    together = drawing(model)(params, padded, rays, num_views)
    for scene, count in enumerate((1, 3)):
        one_source, one_rays = jax.tree.map(lambda x, s=scene: x[s : s + 1], (source, rays))
        one_source = jax.tree.map(lambda x, n=count: x[:, :n], one_source)
        alone = drawing(model)(params, one_source, one_rays)
        # The sums have another length.
        np.testing.assert_allclose(together[scene : scene + 1], alone, atol=1e-5)


def test_padding_that_is_not_finite_gives_finite_gradients():
    model, params, source, rays = tiny("decoder-only", num_source=2, num_target=1)
    model = model.clone(depth=1)
    params = params | {"blocks": jax.tree.map(lambda x: x[:1], params["blocks"])}
    source = jax.tree.map(lambda x: x.at[:, 1].set(jnp.nan), source)

    def loss(params):
        return drawing(model)(params, source, rays, jnp.array([1])).sum()

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, path


def test_memory_of_a_video_does_not_grow_with_its_length():
    model = models.build("lvsm", "tiny", ray_chunk=512)

    def temporary_bytes(num_target):
        shapes = jax.eval_shape(lambda: scene_of(model, 1, num_target))
        params = {"params": param_shapes(model)}
        return jax.jit(model.apply).lower(params, *shapes).compile().memory_analysis().temp_size_in_bytes  # fmt: skip

    # Only the rays and the images themselves grow, by 36 bytes per ray.
    assert temporary_bytes(9) - temporary_bytes(3) < 6 * 512 * 4 * 36


@pytest.mark.parametrize("width", [128, 768])
def test_initial_weights_are_scaled_by_width_and_by_the_depth_in_their_stack(width):
    """At the reference's width of 768, the deviation is the reference's 0.02. With 0.02 at width 128, training stayed on a plateau."""
    model = models.build("lvsm", "tiny", width=width, depth=4, num_latents=64, encoder_depth=3)
    deviation = 0.02 * np.sqrt(768 / width)
    params = jax.jit(model.init)(jax.random.key(0), *scene_of(model, 1, 1))["params"]
    for stack, depth in (("encoder", 3), ("blocks", 4)):
        expected = deviation / np.sqrt(2 * np.arange(1, depth + 1))
        for name in ("q", "k", "v", "out", "fc1", "fc2"):
            std = params[stack][name]["kernel"].std(axis=(1, 2))
            # With 16384 numbers or more, a deviation is known to 0.6%.
            np.testing.assert_allclose(std, expected, rtol=0.03)
    for kernel in ("source_tokenizer", "target_tokenizer", "head"):
        np.testing.assert_allclose(params[kernel]["kernel"].std(), deviation, rtol=0.05)
    np.testing.assert_allclose(params["latents"].std(), 0.02, rtol=0.05)


def test_views_that_do_not_divide_into_patches_are_refused():
    model, params, source, rays = tiny("decoder-only")
    narrow = jax.tree.map(lambda x: x[:, :, :, :30], rays)
    with pytest.raises(InputError, match="30 x 16 pixels .* multiples of 4"):
        jax.eval_shape(drawing(model), params, source, narrow)
    low = source.replace(rgb=source.rgb[:, :, :15])
    with pytest.raises(InputError, match="16 x 15 pixels .* multiples of 4"):
        jax.eval_shape(drawing(model), params, low, rays)


def test_other_image_sizes_and_numbers_of_views_fit_the_same_parameters():
    model, params, _, _ = tiny("decoder-only")
    source, rays = scene_of(model.clone(image_size=24), num_source=4, num_target=1)
    rgb = jax.eval_shape(drawing(model), params, source, rays)
    assert rgb.shape == (1, 1, 24, 48, 3)
