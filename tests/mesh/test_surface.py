"""Surfaces of known fields: their place, closedness and cost, and the contents of the mesh files."""

import io
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trimesh

from lrm_jax.mesh import formats, lattice, surface
from lrm_jax.ops import cameras
from lrm_jax.types import InputError

RADIUS = 0.87


def sphere(xyz):
    return 0.5 - jnp.linalg.norm(xyz, axis=-1)


def blob(xyz):
    """Two joined spheres, off centre, so that no symmetry hides swapped axes."""
    a = jnp.linalg.norm(xyz - jnp.array([[0.3, 0.1, -0.2]]), axis=-1)
    b = jnp.linalg.norm(xyz - jnp.array([[-0.2, 0.2, 0.3]]), axis=-1)
    return jnp.exp(-jnp.square(a / 0.3)) + jnp.exp(-jnp.square(b / 0.25)) - 0.4


def thin(shape, thickness):
    """Signed distances to sheets, rods and a gyroid shell, all `thickness` wide."""

    def sheets(xyz):
        normal = jnp.array([0.3, 0.5, 0.81]) / jnp.sqrt(0.09 + 0.25 + 0.6561)
        return thickness / 2 - jnp.abs((xyz @ normal + 0.11) % 0.4 - 0.2)

    def rods(xyz):
        q = (xyz + 0.013) % 0.25 - 0.125
        apart = [jnp.hypot(q[:, a], q[:, b]) for a, b in ((0, 1), (1, 2), (0, 2))]
        return thickness / 2 - jnp.min(jnp.stack(apart), 0)

    def gyroid(xyz):
        s, c = jnp.sin(6 * xyz), jnp.cos(6 * xyz)
        value = s[:, 0] * c[:, 1] + s[:, 1] * c[:, 2] + s[:, 2] * c[:, 0]
        return thickness / 2 - jnp.abs(value) / 7

    inside = {"sheets": sheets, "rods": rods, "gyroid": gyroid}[shape]
    return lambda xyz: jnp.minimum(inside(xyz), 0.8 - jnp.max(jnp.abs(xyz), -1))


def counted(field):
    """Returns the jitted field, and the list of the shapes that it was called with."""
    calls, jitted = [], jax.jit(field)

    def call(xyz):
        calls.append(xyz.shape)
        return jitted(xyz)

    return call, calls


def signed_volume(vertices, faces):
    a, b, c = np.moveaxis(vertices[faces].astype(np.float64), 1, 0)
    return np.einsum("ni,ni->", a, np.cross(b, c)) / 6


def cells(vertices, faces, resolution):
    """The grid cells that hold the faces, as sorted numbers."""
    middle = vertices[faces].astype(np.float64).mean(1)
    index = np.floor((middle / RADIUS + 1) / 2 * (resolution - 1)).astype(np.int64)
    return np.unique(np.ravel_multi_index(tuple(index.T), (resolution,) * 3))


@pytest.mark.parametrize("resolution", [48, 96])
def test_sphere_is_closed_with_its_area_and_volume_and_winds_outward(resolution):
    vertices, faces = lattice.extract(jax.jit(sphere), resolution, RADIUS, 0.0)
    shape = trimesh.Trimesh(vertices, faces, process=False)
    assert shape.is_watertight and shape.is_winding_consistent and shape.euler_number == 2
    # Chords lie up to cell^2 / (8 r) inside the sphere, which is 4e-3 of the volume at 48 points.
    np.testing.assert_allclose(signed_volume(vertices, faces), 4 / 3 * np.pi * 0.5**3, rtol=4e-3)
    np.testing.assert_allclose(shape.area, 4 * np.pi * 0.5**2, rtol=4e-3)
    # Linear interpolation of a distance is off by cell^2 / (8 r), a hundredth of the coarser cell.
    np.testing.assert_allclose(np.linalg.norm(vertices, axis=-1), 0.5, atol=4e-4)


def test_the_grid_ends_on_both_sides_of_the_cube():
    # A plane x = c crosses edges exactly at c, wherever the grid points are. The sheet ends at the ends of the grid.
    vertices, _ = lattice.extract(jax.jit(lambda xyz: 0.123 - xyz[:, 0]), 33, RADIUS, 0.0)
    np.testing.assert_allclose(vertices[:, 0], 0.123, atol=1e-6)  # float32
    np.testing.assert_allclose(vertices[:, 1:].min(0), -RADIUS, rtol=1e-6)  # float32
    np.testing.assert_allclose(vertices[:, 1:].max(0), RADIUS, rtol=1e-6)  # float32
    assert len(vertices) == 33**2


@pytest.mark.parametrize(
    "resolution", [65, 98, 103]
)  # one brick more or less, and partly filled bricks
@pytest.mark.parametrize("field", [sphere, blob])
def test_coarse_to_fine_equals_dense_to_the_bit(field, resolution):
    whole = lattice.extract(jax.jit(field), resolution, RADIUS, 0.0, dense=True)
    part = lattice.extract(jax.jit(field), resolution, RADIUS, 0.0)
    np.testing.assert_array_equal(part[0], whole[0])
    rows = [np.sort(faces, -1)[np.lexsort(np.sort(faces, -1).T)] for faces in (part[1], whole[1])]
    np.testing.assert_array_equal(*rows)


@pytest.mark.parametrize("profile", ["distance", "density", "step"])
@pytest.mark.parametrize("shape", ["sheets", "rods", "gyroid"])
def test_thin_structures_are_recovered(shape, profile):
    resolution = 112
    cell = 2 * RADIUS / (resolution - 1)
    distance = thin(shape, 1.7 * cell)
    field, level = {
        "distance": (distance, 0.0),
        # Like a trained density: it changes tenfold within a third of a cell, and is flat outside.
        "density": (lambda xyz: 25 * jnp.exp(jnp.clip(8 * distance(xyz) / cell, -12, 8)), 25.0),
        # Contains no information about the distance to the surface.
        "step": (lambda xyz: jnp.where(distance(xyz) > 0, 1.0, 0.0), 0.5),
    }[profile]
    field, calls = counted(field)
    whole = cells(*lattice.extract(field, resolution, RADIUS, level, dense=True), resolution)
    calls.clear()
    sparse = lattice.extract(field, resolution, RADIUS, level, chunk=2**13)
    part = cells(*sparse, resolution)
    assert np.isin(part, whole).all()
    assert len(part) >= 0.999 * len(whole)
    # The surface passes through a tenth of all cells, far more than the surface of an object.
    assert len(calls) * 2**13 < 0.6 * resolution**3


def test_a_surface_is_followed_where_the_coarse_grid_sees_nothing():
    # A needle along x, half a cell thick, between the lines of coarse points. It is attached to a ball that they see.
    resolution = 129
    cell = 2 * RADIUS / (resolution - 1)

    def field(xyz):
        ball = jnp.linalg.norm(xyz - jnp.array([[-0.5, 0.0, 0.0]]), axis=-1) < 0.2
        off = jnp.maximum(jnp.abs(xyz[:, 1] - cell), jnp.abs(xyz[:, 2] - cell))
        needle = (off < 0.25 * cell) & (jnp.abs(xyz[:, 0]) < 0.6)
        return jnp.where(ball | needle, 1.0, 0.0)

    vertices, _ = lattice.extract(jax.jit(field), resolution, RADIUS, 0.5)
    assert vertices[:, 0].max() > 0.6 - cell


def test_evaluations_are_few_and_all_have_one_shape():
    field, calls = counted(sphere)
    lattice.extract(field, 256, RADIUS, 0.0)
    assert set(calls) == {(2**15, 3)}
    assert len(calls) * 2**15 < 256**3 / 8


def test_memory_stays_far_below_the_dense_grid():
    field = jax.jit(sphere)
    lattice.extract(field, 65, RADIUS, 0.0)
    tracemalloc.start()
    lattice.extract(field, 384, RADIUS, 0.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.7 * 4 * 384**3, f"{peak / 1e6:.0f} MB"


@pytest.mark.parametrize("resolution", [17, 40])
def test_slabs_of_the_dense_grid_merge_to_the_bit(monkeypatch, resolution):
    whole = lattice.extract(jax.jit(blob), resolution, RADIUS, 0.0, dense=True)
    for layers in (1, 3):
        monkeypatch.setattr(lattice, "SLAB", layers * resolution**2)
        parts = lattice.extract(jax.jit(blob), resolution, RADIUS, 0.0, dense=True)
        np.testing.assert_array_equal(parts[0], whole[0])
        assert trimesh.Trimesh(*parts, process=False).is_watertight


@pytest.mark.parametrize("resolution", [20, 65])  # dense, coarse to fine
def test_any_signs_give_a_closed_surface_without_degenerate_faces(resolution):
    # Noise has every pattern of signs in a cell, and some values exactly at the level.
    values = np.random.default_rng(0).integers(-2, 3, (resolution,) * 3).astype(np.float32)
    for axis in range(3):
        np.moveaxis(values, axis, 0)[[0, *range(19, resolution)]] = -1
    table = jnp.asarray(values)

    def field(xyz):
        index = jnp.round((xyz / RADIUS + 1) / 2 * (resolution - 1)).astype(int)
        return table[index[:, 0], index[:, 1], index[:, 2]]

    vertices, faces = lattice.extract(jax.jit(field), resolution, RADIUS, 0.0)
    shape = trimesh.Trimesh(vertices, faces, process=False)
    assert shape.is_watertight and shape.is_winding_consistent
    assert shape.area_faces.min() > 0


@pytest.mark.parametrize("dense", [False, True])
def test_an_empty_surface_names_the_range_and_the_level(dense):
    with pytest.raises(InputError, match=r"\[-1\.0\d+, 0\.4\d+\].* level 7"):
        lattice.extract(jax.jit(sphere), 80, RADIUS, 7.0, dense=dense)


@pytest.mark.parametrize("resolution", [20, 80])
def test_nans_in_the_field_are_an_error_that_says_where(resolution):
    with pytest.raises(InputError, match="NaN at .* points, first at"):
        lattice.extract(jax.jit(lambda xyz: jnp.log(sphere(xyz))), resolution, RADIUS, 0.0)


def test_an_overflowing_density_is_inside():
    overflowing = jax.jit(lambda xyz: jnp.exp(1000 * sphere(xyz)))
    vertices, faces = lattice.extract(overflowing, 80, RADIUS, 1.0)
    assert np.isfinite(vertices).all() and signed_volume(vertices, faces) > 0


def test_progress_reports_every_call():
    seen = []

    def progress(iterable, total, label):
        items = list(iterable)
        yield from items
        seen.append((label, len(items) == total))

    lattice.extract(jax.jit(sphere), 96, RADIUS, 0.0, progress=progress)
    assert len(seen) >= 3 and all(complete and label for label, complete in seen)


def color(xyz):
    return 0.5 + xyz / 2


@pytest.fixture(scope="module")
def painted():
    vertices, faces = lattice.extract(jax.jit(blob), 40, RADIUS, 0.0)
    return surface.paint(vertices, faces, jax.jit(color))


def test_normals_point_down_the_field(painted):
    gradient = jax.jit(jax.grad(lambda xyz: blob(xyz).sum()))(painted.vertices)
    downhill = -gradient / np.linalg.norm(gradient, axis=-1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(painted.normals, axis=-1), 1, rtol=1e-6)  # float32
    cosine = np.sum(painted.normals * downhill, -1)
    assert cosine.min() > 0.95 and cosine.mean() > 0.998


def test_paint_queries_the_colours_at_the_vertices(painted):
    # Rounding to the nearest byte.
    np.testing.assert_allclose(painted.colors / 255, color(painted.vertices), atol=0.5 / 255 + 1e-6)


def to_srgb(linear):
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def y_up(xyz):
    return np.stack([xyz[:, 0], xyz[:, 2], -xyz[:, 1]], -1)


def test_glb_reloads_y_up_with_normals_and_linear_colours(painted):
    data = formats.to_glb(painted)
    scene = trimesh.load(io.BytesIO(data), file_type="glb", process=False)
    (shape,) = scene.geometry.values()
    np.testing.assert_array_equal(shape.vertices, y_up(painted.vertices).astype(np.float64))
    np.testing.assert_array_equal(shape.faces, painted.faces)
    np.testing.assert_array_equal(shape.vertex_normals, y_up(painted.normals).astype(np.float64))
    assert shape.volume > 0
    # If a file has a material, trimesh keeps its vertex colours unchanged, as linear floats.
    reloaded = to_srgb(shape.visual.vertex_attributes["color"])
    np.testing.assert_allclose(reloaded, painted.colors / 255, atol=1e-5)  # float32


def glb_arrays(data):
    """The JSON tree and the float attributes of a .glb, read according to the specification."""
    length = int.from_bytes(data[12:16], "little")
    tree = json.loads(data[20 : 20 + length])
    body = data[28 + length :]
    (primitive,) = tree["meshes"][0]["primitives"]
    arrays = {}
    for name, index in primitive["attributes"].items():
        accessor = tree["accessors"][index]
        view = tree["bufferViews"][accessor["bufferView"]]
        values = np.frombuffer(body[view["byteOffset"] :][: view["byteLength"]], "<f4")
        arrays[name] = values.reshape(accessor["count"], -1)
    return tree, arrays


def test_glb_colours_are_linear_and_exact(painted):
    tree, arrays = glb_arrays(formats.to_glb(painted))
    # Bytes survive the conversion to linear floats and back.
    np.testing.assert_array_equal(np.rint(to_srgb(arrays["COLOR_0"]) * 255), painted.colors)
    (material,) = tree["materials"]
    assert material["doubleSided"]
    assert material["pbrMetallicRoughness"] == {"metallicFactor": 0.0, "roughnessFactor": 1.0}
    position = tree["accessors"][0]
    np.testing.assert_array_equal(position["min"], y_up(painted.vertices).min(0))
    np.testing.assert_array_equal(position["max"], y_up(painted.vertices).max(0))


def test_obj_reloads_y_up_with_srgb_colours(painted):
    files = formats.to_obj(painted, "thing")
    assert list(files) == ["thing.obj"]
    shape = trimesh.load(io.BytesIO(files["thing.obj"]), file_type="obj", process=False)
    # The file has six decimals.
    np.testing.assert_allclose(shape.vertices, y_up(painted.vertices), atol=1e-6)
    np.testing.assert_array_equal(shape.faces, painted.faces)
    np.testing.assert_allclose(shape.visual.vertex_colors[:, :3], painted.colors, atol=1)  # bytes
    text = files["thing.obj"].decode().splitlines()
    normals = np.array([line.split()[1:] for line in text if line.startswith("vn")], float)
    np.testing.assert_allclose(normals, y_up(painted.normals), atol=1e-4)  # four decimals


def test_ply_reloads_z_up_with_srgb_colours(painted):
    data = formats.to_ply(painted)
    shape = trimesh.load(io.BytesIO(data), file_type="ply", process=False)
    np.testing.assert_array_equal(shape.vertices, painted.vertices.astype(np.float64))
    np.testing.assert_array_equal(shape.faces, painted.faces)
    np.testing.assert_array_equal(shape.visual.vertex_colors[:, :3], painted.colors)
    np.testing.assert_allclose(shape.vertex_normals, painted.normals, atol=1e-6)  # float32


def test_a_moved_surface_is_that_of_the_moved_field():
    """A similarity turns, scales and moves vertices; normals stay unit vectors, and colours and faces stay."""
    motion = 3 * cameras.z_rotation(30.0)
    motion[:, 3] = [1, 2, 3, 1]
    painted = surface.paint(*lattice.extract(blob, 24, RADIUS, 0.0), lambda xyz: xyz * 0.5 + 0.5)
    moved = surface.moved(painted, motion)
    back = (moved.vertices - [1, 2, 3]) / 3 @ cameras.z_rotation(30.0)[:3, :3]
    np.testing.assert_allclose(back, painted.vertices, atol=1e-6)
    again = surface.vertex_normals(moved.vertices, moved.faces)
    np.testing.assert_allclose(moved.normals, again, atol=1e-4)
    np.testing.assert_array_equal(moved.colors, painted.colors)
    assert moved.vertices.dtype == moved.normals.dtype == np.float32
