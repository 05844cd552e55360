"""The families, compared with tensors of the PyTorch references (tests/goldens/README.md): `from_torch` and the forward pass together.

Tolerances are those stated with the goldens: 1e-4 relative for features and planes, 5e-4 for pixels, 1e-3 relative for gradients. The
differences come from float32 sums in another order; an independent float64 port agrees to 1e-5. On a GPU they are larger, see
tests/tolerances.py.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from tolerances import tolerance

from lrm_jax.models import lrm, triposr
from lrm_jax.models.lrm import LRM
from lrm_jax.models.parts import torch_layout, vit
from lrm_jax.models.triposr import TripoSR
from lrm_jax.ops import cameras
from lrm_jax.types import Cameras, Rays, Views

OPENLRM = ["openlrm_dino_tiny", "openlrm_dinov2_tiny", "openlrm_v10_tiny"]
OPENLRM_1_1 = OPENLRM[:2]


def read(folder, name):
    with safe_open(folder / f"{name}.safetensors", "np") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}
        meta = json.loads(f.metadata()["golden"])
    parts = {"state": {}, "in": {}, "out": {}, "act": {}, "grad": {}}
    for key, value in tensors.items():
        kind, rest = key.split(".", 1)
        parts[kind][rest] = value
    return parts, meta


def encoder_overrides(meta):
    """The number of heads of the ViT, which shapes do not give. The heads of the tiny models are not 64 wide."""
    if isinstance(meta["vit"], str):
        return {"num_heads": int(re.search(r"heads (\d+)", meta["vit"])[1])}
    return {
        "num_heads": meta["vit"]["num_attention_heads"],
        "norm_epsilon": meta["vit"]["layer_norm_eps"],
    }


def openlrm(folder, name):
    golden, meta = read(folder, name)
    fields = lrm.fields_from_torch(golden["state"])
    config = {"transformer_heads": 4, **meta["config"]}
    fields |= lrm.fields_from_config(config)
    fields["encoder"] |= encoder_overrides(meta)
    model = LRM(image_size=80, source_distance=2.0, source_focal=0.75, **fields)
    return golden, meta, model, lrm.from_torch(golden["state"], model)


def cameras_of_16(vector):
    """Cameras from OpenLRM's 16 numbers: rows of an OpenGL c2w, then fractional intrinsics."""
    pose = vector[..., :12].reshape(*vector.shape[:-1], 3, 4)
    bottom = np.broadcast_to(np.array([0, 0, 0, 1], np.float32), (*pose.shape[:-2], 1, 4))
    c2w = cameras.opengl_to_opencv(jnp.asarray(np.concatenate([pose, bottom], axis=-2)))
    return Cameras(c2w=c2w, fxfycxcy=jnp.asarray(vector[..., 12:]))


def openlrm_source(golden):
    rgb = golden["in"]["image"].transpose(0, 2, 3, 1)[:, None]
    return Views(
        rgb=jnp.asarray(rgb), cameras=cameras_of_16(golden["in"]["source_camera"][:, None])
    )


def openlrm_rays(golden, size):
    """The rays of the golden's views: whole views, or crops placed by row and column in an image of `resolutions` pixels."""
    vector = golden["in"]["render_cameras"]  # 25 numbers: a 4x4 pose, then 3x3 intrinsics
    pose, matrix = (
        vector[..., :16].reshape(*vector.shape[:2], 4, 4),
        vector[..., 16:].reshape(*vector.shape[:2], 3, 3),
    )
    intrinsics = np.stack(
        [matrix[..., 0, 0], matrix[..., 1, 1], matrix[..., 0, 2], matrix[..., 1, 2]], axis=-1
    )
    views = Cameras(
        c2w=cameras.opengl_to_opencv(jnp.asarray(pose)), fxfycxcy=jnp.asarray(intrinsics)
    )
    if "anchors" in golden["in"]:
        resolution = golden["in"]["resolutions"]
        views = cameras.crop_cameras(
            views, jnp.asarray(golden["in"]["anchors"] / resolution),
            jnp.asarray(np.broadcast_to(size / resolution, golden["in"]["anchors"].shape)),
        )  # fmt: skip
    return cameras.pixel_rays(views, size, size)


def apply(model, params, *arguments, method=None):
    """Runs a method, compiled as a whole, because compiling 160 operations one by one is slowest on a GPU."""
    return jax.jit(functools.partial(model.apply, method=method))({"params": params}, *arguments)


def close(actual, expected, rtol):
    rtol, scale = tolerance(rtol), float(np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("name", OPENLRM)
def test_openlrm_features_and_planes(goldens, name):
    golden, _, model, params = openlrm(goldens, name)
    source = openlrm_source(golden)
    rgb = source.rgb[:, 0]

    def features(module, rgb):
        return module.image_encoder(vit.normalize(rgb) if module.normalize_image else rgb)

    close(apply(model, params, rgb, method=features), golden["out"]["image_feats"], 1e-4)
    scene = apply(model, params, source, method="encode")
    close(scene["triplane"].transpose(0, 1, 4, 2, 3), golden["out"]["planes"], 1e-4)


def openlrm_rendering(golden, model, params):
    size = golden["out"]["rgb"].shape[-1]
    rays = openlrm_rays(golden, size)
    rendering = apply(model, params, openlrm_source(golden), rays)
    background = golden["in"]["bg"][..., None, None] if "bg" in golden["in"] else np.float32(1)
    background = jnp.broadcast_to(background, rendering.rgb.shape)
    return rendering, rendering.rgb + (1 - rendering.alpha[..., None]) * background


@pytest.mark.parametrize("name", OPENLRM)
def test_openlrm_pixels(goldens, name):
    golden, _, model, params = openlrm(goldens, name)
    rendering, rgb = openlrm_rendering(golden, model, params)
    np.testing.assert_allclose(
        rgb.transpose(0, 1, 4, 2, 3), golden["out"]["rgb"], atol=tolerance(5e-4)
    )
    weight = golden["out"]["weight"][:, :, 0]
    np.testing.assert_allclose(rendering.alpha, weight, atol=tolerance(5e-4))
    seen = weight > 0.01  # elsewhere the reference clamps depth to limits of the whole batch
    assert seen.any()
    np.testing.assert_allclose(
        rendering.depth[seen], golden["out"]["depth"][:, :, 0][seen], atol=tolerance(5e-4)
    )


@pytest.mark.parametrize("name", OPENLRM_1_1)
def test_openlrm_field(goldens, name):
    golden, _, model, params = openlrm(goldens, name)
    scene = apply(model, params, openlrm_source(golden), method="encode")
    points = jnp.asarray(golden["in"]["points"])
    density, rgb = apply(model, params, scene, points, method="query")
    close(density, golden["out"]["points_sigma"][..., 0], 1e-4)
    close(rgb, golden["out"]["points_rgb"], 1e-4)


@pytest.mark.parametrize("name", OPENLRM_1_1)
def test_openlrm_gradients(goldens, name):
    golden, _, model, params = openlrm(goldens, name)
    source, target = openlrm_source(golden), jnp.asarray(golden["in"]["target"])
    rays = openlrm_rays(golden, target.shape[-1])
    background = jnp.asarray(golden["in"]["bg"])[..., None, None]

    def loss(params):
        scene = model.apply({"params": params}, source, method="encode")
        rendering = model.apply({"params": params}, scene, rays, method="render")
        rgb = rendering.rgb + (1 - rendering.alpha[..., None]) * background
        planes = scene["triplane"]
        pixel = jnp.mean((rgb.transpose(0, 1, 4, 2, 3) - target) ** 2)
        tv = jnp.mean(jnp.diff(planes, axis=2) ** 2) + jnp.mean(jnp.diff(planes, axis=3) ** 2)
        return pixel + 5e-4 * tv, (pixel, tv)

    grads, (pixel, tv) = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(pixel, golden["out"]["loss_pixel"][0], rtol=tolerance(1e-3))
    np.testing.assert_allclose(tv, golden["out"]["loss_tv"][0], rtol=tolerance(1e-3))
    state = lrm.to_torch(jax.tree.map(np.asarray, grads), model)
    norm = np.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in state.values()))
    np.testing.assert_allclose(norm, golden["out"]["grad_norm"][0], rtol=tolerance(1e-3))
    assert golden["grad"]
    for key, expected in golden["grad"].items():
        close(state[key], expected, 1e-3)


def tripo(folder):
    golden, meta = read(folder, "triposr_tiny")
    fields = triposr.fields_from_torch(golden["state"]) | triposr.fields_from_config(meta["config"])
    fields["encoder"] |= encoder_overrides(meta)
    model = TripoSR(surface_level=25.0, source_distance=1.9, source_fov=40.0, **fields)
    return golden, model, triposr.from_torch(golden["state"], model)


def tripo_source(golden):
    rgb = jnp.asarray(golden["out"]["preprocessed"])[:, None]
    return Views(rgb=rgb, cameras=cameras.orbit(1, 1.9, 0.0, 40.0))


def test_triposr_planes_field_and_pixels(goldens):
    golden, model, params = tripo(goldens)
    scene = apply(model, params, tripo_source(golden), method="encode")
    close(scene["triplane"].transpose(0, 1, 4, 2, 3), golden["out"]["scene_codes"], 1e-4)

    points = jnp.broadcast_to(golden["in"]["points"], (2, *golden["in"]["points"].shape))
    density, rgb = apply(model, params, scene, points, method="query")
    close(density[0], golden["out"]["density_act"][:, 0], 1e-4)
    close(rgb[0], golden["out"]["color"], 1e-4)

    rays = Rays(origins=golden["in"]["rays_o"], dirs=golden["in"]["rays_d"])
    rays = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, *x.shape)), rays)
    rendering = apply(model, params, scene, rays, method="render")
    white = rendering.rgb + 1 - rendering.alpha[..., None]
    expected = golden["out"]["rgb"]
    if expected.shape[2] == 3:
        expected = expected.transpose(0, 1, 3, 4, 2)
    np.testing.assert_allclose(white, expected, atol=tolerance(5e-4))


@pytest.mark.parametrize("name", OPENLRM)
def test_openlrm_state_round_trips_to_the_bit(goldens, name):
    golden, _, model, params = openlrm(goldens, name)
    check_identical(lrm.to_torch(params, model), golden["state"])


def test_triposr_state_round_trips_to_the_bit_except_for_the_pooler(goldens):
    golden, model, params = tripo(goldens)
    state = triposr.to_torch(params, model)
    for name in triposr.pooler_shapes(model):
        assert not state.pop(name).any() and name in golden["state"]
        golden["state"].pop(name)
    check_identical(state, golden["state"])


def check_identical(state, expected):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and state[name].shape == value.shape
        assert state[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize(
    "name",
    ["openlrm-small-1.1", "openlrm-base-1.1", "openlrm-large-1.1", "openlrm-large-dino", "triposr"],
)
def test_published_variant_has_exactly_the_published_names_and_shapes(goldens, name):
    manifest = json.loads((goldens / "manifests" / f"{name}.json").read_text())
    family = triposr if name == "triposr" else lrm
    model = family.MODEL(**family.VARIANTS[name])
    views = Views(
        rgb=jax.ShapeDtypeStruct((1, 1, model.image_size, model.image_size, 3), jnp.float32),
        cameras=Cameras(
            c2w=jax.ShapeDtypeStruct((1, 1, 4, 4), jnp.float32),
            fxfycxcy=jax.ShapeDtypeStruct((1, 1, 4), jnp.float32),
        ),
    )
    ray = jax.ShapeDtypeStruct((1, 1, 2, 2, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), views, Rays(ray, ray))["params"]
    shapes = torch_layout.torch_shapes(family.entries(model), params)
    if family is triposr:
        shapes |= triposr.pooler_shapes(model)
    assert shapes == {key: tuple(shape) for key, (shape, _) in manifest["tensors"].items()}
    assert sum(np.prod(shape) for shape in shapes.values()) == manifest["parameters"]
    assert sum(x.size for x in jax.tree.leaves(params)) == sum(
        np.prod(shape) for key, shape in shapes.items() if "pooler" not in key
    )
