"""The contract of a family (lrm_jax/models/__init__.py), tested for every family and variant."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import models
from lrm_jax.kernels import attention, attention_cuda
from lrm_jax.models.parts import norms
from lrm_jax.ops import cameras
from lrm_jax.parallel import sharding
from lrm_jax.training import optim
from lrm_jax.types import Views
from lrm_jax.weights import references

# Attention to one token: queries and keys have no influence.
ONE_TOKEN = re.compile(r"^context/\w+/(q|k|norm)/")

VARIANTS = [(name, variant) for name in models.FAMILIES for variant in models.family(name).VARIANTS]


def image(size=40):
    y, x = np.mgrid[:size, :size] - size / 2
    alpha = np.where(x**2 + y**2 < (size / 3) ** 2, 255, 0)
    return (
        np.stack([128 + 3 * x, 128 + 3 * y, 0 * x + 60, alpha], axis=-1)
        .clip(0, 255)
        .astype(np.uint8)
    )


def source_of(model, num_scenes):
    """Images for `prepare`, or two posed views per scene."""
    if hasattr(model, "prepare"):
        return model.prepare([image(), image(32)][:num_scenes])
    rgb = jax.random.uniform(
        jax.random.key(2), (num_scenes, 2, model.image_size, model.image_size, 3)
    )
    return Views(rgb=rgb, cameras=spread(cameras.orbit(2, 2.0, 0.0, 40.0), num_scenes))


def rays_of(num_scenes, num_views, height, width):
    """Rays of views. Their sides are multiples of the tiny families' patches."""
    return spread(
        cameras.pixel_rays(cameras.orbit(num_views, 2.0, 15.0, 40.0), height, width), num_scenes
    )


def spread(tree, num_scenes):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_scenes, *x.shape)), tree)


@functools.cache
def tiny(name):
    model = models.build(name, "tiny")
    rays = jax.jit(lambda: rays_of(2, 3, 8, 4))()
    source, rays = jax.tree.map(np.asarray, (source_of(model, 2), rays))
    return model, jax.jit(model.init)(jax.random.key(0), source, rays)["params"], source, rays


JITTED = {}  # by model and method, so that each is compiled once for all tests of this file


def apply(model, params, *args, method):
    if (repr(model), method) not in JITTED:
        JITTED[repr(model), method] = jax.jit(functools.partial(model.apply, method=method))
    return JITTED[repr(model), method]({"params": params}, *args)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_variant_has_the_contract_s_shapes(name, variant):
    model = models.build(name, variant)
    source, rays = source_of(model, 1), jax.eval_shape(lambda: rays_of(1, 2, 8, 16))
    if hasattr(model, "prepare"):
        assert source.rgb.shape == (1, 1, model.image_size, model.image_size, 3)
        assert source.cameras.c2w.shape == (1, 1, 4, 4)
    params = jax.eval_shape(model.init, jax.random.key(0), source, rays)["params"]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    scene = jax.eval_shape(lambda p, s: apply(model, p, s, method="encode"), params, source)
    rendering = jax.eval_shape(
        lambda p, s, r: apply(model, p, s, r, method="render"), params, scene, rays
    )
    assert rendering.rgb.shape == (1, 2, 8, 16, 3) and rendering.rgb.dtype == jnp.float32
    # A family that renders its own background has no surface either.
    assert (rendering.alpha is None) == (not hasattr(model, "query"))
    if rendering.alpha is None:
        return
    assert rendering.alpha.shape == rendering.depth.shape == (1, 2, 8, 16)
    points = jax.ShapeDtypeStruct((1, 7, 3), jnp.float32)
    field, rgb = jax.eval_shape(
        lambda p, s, x: apply(model, p, s, x, method="query"), params, scene, points
    )
    assert field.shape == (1, 7) and rgb.shape == (1, 7, 3)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_rendering_split_by_views_scenes_or_chunks_equals_rendering_all(name):
    model, params, source, rays = tiny(name)
    scene = jax.tree.map(np.asarray, apply(model, params, source, method="encode"))
    whole = apply(model, params, scene, rays, method="render")
    by_view = [
        apply(
            model,
            params,
            scene,
            jax.tree.map(lambda x, v=v: x[:, v : v + 1], rays),
            method="render",
        )
        for v in range(3)
    ]
    by_scene = [
        apply(model, params, *jax.tree.map(lambda x, b=b: x[b : b + 1], (scene, rays)), method="render") for b in range(2)
    ]  # fmt: skip
    chunks = {"ray_chunk": 7} if hasattr(model, "ray_chunk") else {}
    chunked = apply(model.clone(**chunks), params, scene, rays, method="render")
    for field in ("rgb", "alpha", "depth") if whole.alpha is not None else ("rgb",):
        expected = getattr(whole, field)
        # Each ray has the same operations, but products of other shapes may sum in another order.
        np.testing.assert_allclose(
            np.concatenate([getattr(r, field) for r in by_view], axis=1), expected, atol=1e-5
        )
        np.testing.assert_allclose(
            np.concatenate([getattr(r, field) for r in by_scene]), expected, atol=1e-5
        )
        np.testing.assert_allclose(getattr(chunked, field), expected, atol=1e-5)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_rendering_is_deterministic_without_keys_and_random_with_them_where_it_samples(name):
    model, params, source, rays = tiny(name)
    scene = apply(model, params, source, method="encode")
    first, second = (apply(model, params, scene, rays, method="render") for _ in range(2))
    np.testing.assert_array_equal(first.rgb, second.rgb)
    one, two = (
        apply(model, params, scene, rays, jax.random.split(jax.random.key(k), 2), method="render")
        for k in range(2)
    )
    draws = hasattr(model, "num_steps")  # a diffusion: every key gives another image
    assert (np.abs(one.rgb - two.rgb).max() > 1e-6) == (hasattr(model, "query") or draws)
    if not draws:  # jitter moves samples only within their intervals
        np.testing.assert_allclose(one.rgb, first.rgb, atol=0.3)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_bfloat16_is_finite_and_near_float32(name):
    model, params, source, rays = tiny(name)
    full = apply(model, params, source, rays, method="__call__")
    half = apply(model.clone(dtype="bfloat16"), params, source, rays, method="__call__")
    assert half.rgb.dtype == jnp.float32
    np.testing.assert_allclose(
        half.rgb, full.rgb, atol=0.05
    )  # the error of 8-bit mantissas through a tiny network


@pytest.mark.parametrize("name", models.FAMILIES)
def test_gradients_reach_every_parameter_and_are_finite(name):
    model, params, source, rays = tiny(name)
    if name == "zero123":  # layers that begin at zero let no gradient through
        params = jax.tree.map(
            lambda x: x + 0.02 * np.random.default_rng(0).normal(size=x.shape).astype(np.float32),
            params,
        )

    def loss(params):
        rendering = apply(
            model, params, source, rays, jax.random.split(jax.random.key(1), 2), method="__call__"
        )
        return sum(jnp.sum(x) for x in (rendering.rgb, rendering.alpha) if x is not None)

    grads = jax.jit(jax.grad(loss))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        unused = path[-1].key in norms.STATISTICS or ONE_TOKEN.search(optim.name_of(path))
        assert (np.abs(grad).max() > 0) != bool(unused), path


@pytest.mark.parametrize(
    ("platform", "dtype"), [("tpu", "bfloat16"), ("gpu", "float32"), ("gpu", "bfloat16")]
)
@pytest.mark.parametrize("name", models.FAMILIES)
def test_the_model_and_its_gradient_lower_for(name, platform, dtype, monkeypatch):
    """Traces and lowers for the platform. cuDNN's attention cannot be lowered without a GPU, so there only its call is tested."""
    model, params, source, rays = tiny(name)
    model = model.clone(dtype=dtype)
    calls = []

    def cudnn(q_BLNK, *_):
        calls.append(q_BLNK.dtype)
        return q_BLNK

    monkeypatch.setattr(attention_cuda, "attention_by_cudnn", cudnn)
    target, kind = {"tpu": ("tpu", ""), "gpu": ("cuda", "NVIDIA H100 80GB HBM3")}[platform]

    def loss(params, source, rays):
        return jnp.mean(model.apply({"params": params}, source, rays).rgb)

    with jax.sharding.use_abstract_mesh(sharding.abstract_device_mesh((1, 1, 1), platform, kind)):
        traced = jax.jit(jax.grad(loss)).trace(params, source, rays)
        lowered = traced.lower(lowering_platforms=(target,))
    assert len(jax.tree.leaves(lowered.out_info)) == len(jax.tree.leaves(params))
    assert bool(calls) == (dtype == "bfloat16" and platform == "gpu" and name != "one2345")
    fused = "xla.gpu.triton" in lowered.as_text()
    assert fused == (platform == "gpu" and name in ("lrm", "triposr"))


# One-2-3-45 has no attention; Zero123's autoencoder has a head that is too wide, see its own test.
@pytest.mark.parametrize(
    ("name", "variant"), [x for x in VARIANTS if x[0] not in ("one2345", "zero123")]
)
def test_every_attention_of_a_16_bit_model_on_a_gpu_is_cudnn_s(name, variant, monkeypatch):
    """Also in the encoders, whose lengths are odd."""
    calls = []

    def cudnn(q_BLNK, k_BMNK, *_):
        calls.append((q_BLNK.shape[1], k_BMNK.shape[1]))
        return q_BLNK

    def products(*_):
        raise AssertionError("not cuDNN's")

    monkeypatch.setattr(attention_cuda, "attention_by_cudnn", cudnn)
    monkeypatch.setattr(attention, "_attention_by_products", products)
    model = models.build(name, variant, dtype="bfloat16")
    source, rays = source_of(model, 1), jax.eval_shape(lambda: rays_of(1, 1, 8, 16))
    with jax.sharding.use_abstract_mesh(sharding.abstract_device_mesh((1, 1, 1), "gpu")):
        jax.eval_shape(model.init, jax.random.key(0), source, rays)
    assert len(calls) >= 2


@pytest.mark.parametrize("name", models.FAMILIES)
def test_a_scene_does_not_depend_on_the_rest_of_the_batch(name):
    model, params, source, _ = tiny(name)
    both = apply(model, params, source, method="encode")
    alone = apply(model, params, jax.tree.map(lambda x: x[1:], source), method="encode")
    # A norm over few voxels amplifies rounding.
    atol = 1e-4 if name == "one2345" else 1e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1:], b, atol=atol), both, alone)


def test_errors_about_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="no model family 'nerf'; there are lrm, triposr"):
        models.build("nerf", "tiny")
    with pytest.raises(ValueError, match="triposr has no variant 'huge'; it has triposr"):
        models.build("triposr", "huge")
    with pytest.raises(ValueError, match="triposr has no field widht"):
        models.build("triposr", "tiny", widht=3)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_shardings_and_weight_decay_of_every_variant_are_what_they_were(name, variant, same_text):
    """On 2 x 4 x 2 devices, with one parameter per line."""
    device_mesh = sharding.abstract_device_mesh((2, 4, 2), "cpu")
    params = references.param_shapes(models.build(name, variant))
    decayed = dict(optim.named(optim.decay_mask(params)))
    lines = []
    for path, leaf in optim.named(params):
        spec = sharding.spec_for(path, leaf.shape, device_mesh)
        shape = "x".join(map(str, leaf.shape))
        lines.append(
            f"{path} {shape} {','.join(str(axis or '-') for axis in spec)}{' decay' * decayed[path]}\n"
        )
    same_text(f"models/variants/{name}-{variant}.txt", "".join(lines))
