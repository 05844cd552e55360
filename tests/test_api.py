"""The library: its inputs, its outputs, and when it compiles."""

import io

import jax
import numpy as np
import pytest
import trimesh
from PIL import Image
from tiny_reconstruction import ball, random_model

import lrm_jax
from lrm_jax import api, models
from lrm_jax.mesh import formats
from lrm_jax.ops import cameras
from lrm_jax.types import Cameras, InputError


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> lrm_jax.Model:
    return lrm_jax.load(random_model(tmp_path_factory.mktemp("weights") / "tiny.safetensors"))


@pytest.fixture(scope="module")
def scene(model) -> lrm_jax.Scene:
    return model.reconstruct(ball())


def same(a: lrm_jax.Scene, b: lrm_jax.Scene, atol: float = 0.0) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a.encoded, b.encoded)


def test_an_image_is_a_path_a_pil_image_or_an_array(model, scene, tmp_path):
    Image.fromarray(ball()).save(tmp_path / "a.png")
    opaque = np.where(ball()[..., 3:] > 0, ball()[..., :3], 255).astype(np.uint8)
    same(model.reconstruct(tmp_path / "a.png"), scene)
    same(model.reconstruct(str(tmp_path / "a.png")), scene)
    same(model.reconstruct(Image.open(tmp_path / "a.png")), scene)
    same(model.reconstruct(ball().astype(np.float64) / 255), scene)
    np.testing.assert_array_equal(model.reconstruct(opaque).image[..., 3], ball()[..., 3])


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((4, 4, 2), np.uint8), "is not an image"),
        (np.zeros((0, 4, 3), np.uint8), "is not an image"),
        (ball().astype(np.float32), "must lie in"),
        (ball() * np.float32(np.nan), "must lie in"),
        (ball().astype(np.int64), "array of int64"),
        (np.zeros((8, 8, 4), np.uint8), "shows no object"),
        ("nothing.png", "does not exist"),
    ],
)
def test_anything_that_is_not_an_image_is_an_error(model, image, message):
    with pytest.raises(InputError, match=message):
        model.reconstruct(image)


def test_a_list_gives_a_list_in_batches_that_the_devices_share(model, scene, monkeypatch):
    shapes = []
    encode = model._encode
    monkeypatch.setattr(
        model,
        "_encode",
        lambda params, source: shapes.append(source.rgb.sharding) or encode(params, source),
    )
    other = ball((20, 40, 200), 70)
    scenes = model.reconstruct([ball(), other] * 5)
    assert len(scenes) == 10 and len(shapes) == 1
    assert len(shapes[0].device_set) == jax.device_count() == 8
    same(scenes[8], scene, 1e-4)  # of values up to 20
    same(scenes[9], scenes[1], 1e-4)
    np.testing.assert_array_equal(scenes[9].image, other)
    assert np.abs(scenes[0].encoded["triplane"] - scenes[1].encoded["triplane"]).max() > 1e-3
    assert model.reconstruct([]) == []


def test_images_of_other_sizes_compile_nothing(tmp_path):
    """The first image compiles encode, render and query. Nineteen images of other sizes compile nothing."""
    model = lrm_jax.load(random_model(tmp_path / "tiny.safetensors"))
    compiled = []

    def listener(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def use(size):
        scene = model.reconstruct(ball(size=size))
        scene.render(lrm_jax.orbit(2), size=16)
        scene.mesh(resolution=16)

    use(40)
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for size in range(41, 60):
            use(size)
        assert not compiled
        model.reconstruct(ball()).render(size=24)
        assert compiled  # the listener works
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert model._encode._cache_size() == model._query._cache_size() == 1
    assert model._render._cache_size() == 2


def test_views_are_images_with_straight_alpha(scene):
    frames = scene.render(lrm_jax.orbit(3), size=20)
    assert frames.shape == (3, 20, 20, 4) and frames.dtype == np.uint8
    rendering = next(scene.renderings(lrm_jax.orbit(3), 20))
    straight = frames[0].astype(float) / 255
    # Half an 8-bit level for each factor.
    np.testing.assert_allclose(straight[..., 3], rendering.alpha, atol=0.51 / 255)
    np.testing.assert_allclose(
        straight[..., :3] * rendering.alpha[..., None], rendering.rgb, atol=0.51 / 255
    )


def test_an_orbit_starts_where_the_image_was_taken_from(scene):
    np.testing.assert_array_equal(scene.render(lrm_jax.orbit(4), 16)[0], scene.render(size=16)[0])
    given = lrm_jax.orbit(4, elevation=30, distance=2.5, fov=50)
    own = Cameras(*jax.tree.leaves(cameras.orbit(4, 2.5, 30.0, 50.0)))
    np.testing.assert_allclose(scene.cameras(given).c2w, own.c2w, atol=1e-6)
    np.testing.assert_array_equal(scene.render(given, 16), scene.render(own, 16))
    with pytest.raises(InputError, match="elevation 100 is out of range"):
        lrm_jax.orbit(4, elevation=100)


def test_a_mesh_is_a_trimesh_whose_files_are_upright(scene, tmp_path):
    mesh = scene.mesh(resolution=24)
    assert isinstance(mesh, trimesh.Trimesh) and len(mesh.faces) > 100
    for kind in ("glb", "obj", "ply"):
        mesh.export(tmp_path / f"a.{kind}")
    expected = formats.to_glb(scene.surface(24))
    assert (tmp_path / "a.glb").read_bytes() == expected == mesh.export(file_type="glb")
    assert mesh.export(file_type="ply") == (tmp_path / "a.ply").read_bytes()
    up = trimesh.load(tmp_path / "a.glb", force="mesh").bounds
    np.testing.assert_allclose(up[:, 1], mesh.bounds[:, 2], atol=1e-6)
    mesh.export(tmp_path / "a.stl")  # written by trimesh
    stl = trimesh.load(tmp_path / "a.stl")
    np.testing.assert_allclose(stl.bounds, mesh.bounds, atol=1e-6)
    mesh.apply_scale(2.0)
    twice = trimesh.load(io.BytesIO(mesh.export(file_type="glb")), file_type="glb", force="mesh")
    np.testing.assert_allclose(twice.bounds, 2 * up, atol=1e-6)


def test_level_faces_and_texture_make_another_mesh(scene, tmp_path):
    mesh = scene.mesh(resolution=24)
    assert scene.mesh(resolution=24, level=0.2).volume > 1.05 * mesh.volume
    few = scene.mesh(resolution=24, faces=80)
    assert len(few.faces) <= 80 < len(mesh.faces)
    textured = scene.mesh(resolution=24, texture=64, faces=200)
    assert len(textured.faces) <= 200
    textured.export(tmp_path / "b.obj")
    assert {p.name for p in tmp_path.iterdir()} == {"b.obj", "b.mtl", "b.png"}
    image = np.asarray(Image.open(tmp_path / "b.png"))
    np.testing.assert_array_equal(image, scene.surface(24, None, 64, 200).texture)
    loaded = trimesh.load(
        io.BytesIO(textured.export(file_type="glb")), file_type="glb", force="mesh"
    )
    np.testing.assert_array_equal(np.asarray(loaded.visual.material.baseColorTexture), image)
    with pytest.raises(InputError, match="does not cross the level 1e"):
        scene.mesh(resolution=24, level=1e9)


def test_recentring_can_be_turned_on_and_off(model, scene):
    aside = np.zeros((96, 96, 4), np.uint8)
    aside[:48, :48] = ball()
    same(model.reconstruct(aside), scene)  # TripoSR's default
    same(model.reconstruct(aside, recenter=True), scene)
    kept = model.reconstruct(aside, recenter=False)
    assert np.abs(kept.encoded["triplane"] - scene.encoded["triplane"]).max() > 1e-3
    lrm = api.Model(models.build("lrm", "tiny"), {}, {})
    whole, moved = (lrm.prepare(aside, recenter=x).source.rgb for x in (None, True))
    assert whole[0, 0, 17:, 17:].min() > 0.99 and moved[0, 0, 17:, 17:].min() < 0.9


def test_a_family_of_posed_images_says_what_to_use(model):
    with pytest.raises(InputError, match="triposr reconstructs from one image"):
        model.synthesize("garden")


def test_the_public_names_are_there():
    assert set(lrm_jax.__all__) <= set(dir(lrm_jax))
    assert lrm_jax.Cameras is Cameras and lrm_jax.load is api.load
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        lrm_jax.lode  # noqa: B018
