"""Baked textures reproduce a known colour field, and survive being written to files and read back."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trimesh
from PIL import Image
from scipy import ndimage

from lrm_jax.mesh import formats, lattice, surface, texture
from lrm_jax.types import InputError

SIZE = 256


def field(xyz):
    return 0.6 - jnp.linalg.norm(xyz * jnp.array([[1.0, 1.3, 0.8]]), axis=-1)


def color(xyz):
    return 0.5 + 0.4 * jnp.sin(jnp.stack([5 * xyz[:, 0], 4 * xyz[:, 1] + 1, 6 * xyz[:, 2]], -1))


@pytest.fixture(scope="module")
def baked():
    vertices, faces = lattice.extract(jax.jit(field), 40, 0.87, 0.0)
    painted = surface.paint(vertices, faces, jax.jit(color), chunk=2**12)
    return texture.bake_texture(painted, jax.jit(color), SIZE, chunk=2**12)


def looked_up(image, uv):
    """The image at uv, bilinear, with texel centres at +0.5 and v down."""
    rows, columns = uv[:, 1] * len(image) - 0.5, uv[:, 0] * len(image) - 0.5
    channels = [
        ndimage.map_coordinates(
            image[..., c].astype(float), [rows, columns], order=1, mode="nearest"
        )
        for c in range(3)
    ]
    return np.stack(channels, -1) / 255


def points_on(faces, *attributes, count=20_000):
    """The attributes at random points of the faces."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(3), count)
    chosen = faces[rng.integers(0, len(faces), count)]
    return [np.einsum("kc,kcd->kd", weights, values[chosen]) for values in attributes]


def test_texture_reproduces_the_colour_field_everywhere(baked):
    xyz, uv = points_on(baked.faces, baked.vertices, baked.uv)
    error = np.abs(looked_up(baked.texture, uv) - color(xyz))
    # Bytes round by 0.5 / 255. At the borders of charts, filtering reads texels that repeat the border: one texel's change is 0.02.
    assert error.mean() < 0.5 / 255 and error.max() < 0.025


def test_baked_surface_is_the_same_surface(baked):
    shape = trimesh.Trimesh(baked.vertices, baked.faces, process=False)
    assert shape.volume == pytest.approx(4 / 3 * np.pi * 0.6**3 / (1.3 * 0.8), rel=0.01)
    outward = np.sum(baked.normals * baked.vertices, -1)
    assert outward.min() > 0
    assert baked.uv.min() >= 0 and baked.uv.max() <= 1
    np.testing.assert_allclose(baked.colors / 255, color(baked.vertices), atol=0.51 / 255)  # bytes


def test_decimation_bounds_the_faces_and_keeps_the_surface():
    vertices, faces = lattice.extract(jax.jit(field), 40, 0.87, 0.0)
    assert len(faces) > 3000
    few_vertices, few = surface.decimated(vertices, faces, 1000)
    assert len(few) <= 1000
    shape = trimesh.Trimesh(few_vertices, few, process=False)
    assert shape.is_watertight
    # A thousand flat faces lie inside the ellipsoid.
    assert shape.volume == pytest.approx(4 / 3 * np.pi * 0.6**3 / (1.3 * 0.8), rel=0.02)


def test_a_texture_coarser_than_the_faces_still_shows_their_colours():
    vertices, faces = lattice.extract(jax.jit(field), 24, 0.87, 0.0)
    painted = surface.paint(vertices, faces, jax.jit(color), chunk=2**12)
    baked = texture.bake_texture(painted, jax.jit(color), 32, chunk=2**12)
    xyz, uv = points_on(baked.faces, baked.vertices, baked.uv)
    error = np.abs(looked_up(baked.texture, uv) - color(xyz))
    assert error.mean() < 0.05  # the colours of unrelated points differ by 0.35


def test_textured_glb_reloads_with_its_image(baked):
    scene = trimesh.load(io.BytesIO(formats.to_glb(baked)), file_type="glb", process=False)
    (shape,) = scene.geometry.values()
    assert len(shape.vertices) == len(baked.vertices) and len(shape.faces) == len(baked.faces)
    material = shape.visual.material
    np.testing.assert_array_equal(np.asarray(material.baseColorTexture)[..., :3], baked.texture)
    assert material.doubleSided and material.metallicFactor == 0 and material.roughnessFactor == 1
    # trimesh puts the origin of uv at the bottom.
    np.testing.assert_allclose(
        shape.visual.uv, baked.uv * [[1, -1]] + [[0, 1]], atol=1e-6
    )  # float32
    xyz, uv = points_on(shape.faces, shape.vertices, shape.visual.uv * [[1, -1]] + [[0, 1]])
    world = np.stack([xyz[:, 0], -xyz[:, 2], xyz[:, 1]], -1)
    assert np.abs(looked_up(baked.texture, uv) - color(world)).mean() < 2 / 255


def test_textured_obj_reloads_with_its_image(baked, tmp_path):
    files = formats.to_obj(baked, "thing")
    assert sorted(files) == ["thing.mtl", "thing.obj", "thing.png"]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    shape = trimesh.load(tmp_path / "thing.obj", process=False)
    assert len(shape.vertices) == len(baked.vertices) and len(shape.faces) == len(baked.faces)
    image = np.asarray(shape.visual.material.image.convert("RGB"))
    np.testing.assert_array_equal(image, baked.texture)
    # .obj has the origin of uv at the bottom. The file has six decimals.
    np.testing.assert_allclose(shape.visual.uv, baked.uv * [[1, -1]] + [[0, 1]], atol=1e-6)


def test_png_of_obj_is_the_texture(baked):
    image = Image.open(io.BytesIO(formats.to_obj(baked)["mesh.png"]))
    np.testing.assert_array_equal(np.asarray(image), baked.texture)


@pytest.mark.parametrize(
    "program, cause",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "code -11"),
        ("raise RuntimeError('no charts')", "RuntimeError: no charts"),
    ],
)
def test_a_crash_of_xatlas_is_an_error_with_a_remedy(monkeypatch, program, cause):
    monkeypatch.setattr(texture, "UNWRAP", program)
    triangle = np.eye(3, dtype=np.float32)
    with pytest.raises(InputError, match=f"{cause}.*use vertex colours instead"):
        texture._unwrap(triangle, np.array([[0, 1, 2]], np.int32), 16)
