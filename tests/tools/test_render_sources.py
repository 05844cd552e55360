"""Broken and incomplete files are reported with the cause, and points on the surface are uniform by area."""

import base64
import json
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from rendering import objects  # noqa: E402
from rendering.sources import find_objects, opened, referenced_files  # noqa: E402
from rendering.surfaces import _corners, load_triangles, random_points  # noqa: E402
from test_render_objects import (  # noqa: E402
    CORNERS,
    SETTINGS,
    ball,
    in_our_world,
    lopsided_scene,
    save,
    textured_board,
)

from lrm_jax.types import InputError  # noqa: E402

SQUARE = (
    "v -1 -1 0\nv 1 -1 0\nv 1 1 0\nv -1 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\nf 1/1 2/2 3/3 4/4\n"
)


def write_obj(folder: Path, material: str | None, texture: str | None) -> Path:
    """Writes a textured square as .obj, with its .mtl and its image unless they are None."""
    folder.mkdir(exist_ok=True)
    path = folder / "board.obj"
    path.write_text("mtllib my board.mtl\nusemtl paint\n" + SQUARE)
    if material is not None:
        (folder / "my board.mtl").write_text(material)
    if texture is not None:
        (folder / texture).parent.mkdir(exist_ok=True)
        Image.fromarray(CORNERS).save(folder / texture)
    return path


def write_gltf(path: Path, image: str) -> Path:
    """Writes one triangle. The image of its material is the file `image`."""
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4").tobytes()
    uv = np.array([[0, 0], [1, 0], [0, 1]], "<f4").tobytes()
    data = corners + uv
    header = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "TEXCOORD_0": 1}, "material": 0}]}],
        "materials": [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}],
        "textures": [{"source": 0}],
        "images": [{"uri": image}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3", "min": [0, 0, 0], "max": [1, 1, 0]},
            {"bufferView": 1, "componentType": 5126, "count": 3, "type": "VEC2"},
        ],
        "bufferViews": [
            {"buffer": 0, "byteOffset": 0, "byteLength": len(corners)},
            {"buffer": 0, "byteOffset": len(corners), "byteLength": len(uv)},
        ],
    }  # fmt: skip
    if path.suffix == ".gltf":
        encoded = "data:application/octet-stream;base64," + base64.b64encode(data).decode()
        header["buffers"] = [{"uri": encoded, "byteLength": len(data)}]
        path.write_text(json.dumps(header))
        return path
    header["buffers"] = [{"byteLength": len(data)}]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    chunks = (
        struct.pack("<2I", len(text), 0x4E4F534A)
        + text
        + struct.pack("<2I", len(data), 0x4E4942)
        + data
    )
    path.write_bytes(struct.pack("<3I", 0x46546C67, 2, 12 + len(chunks)) + chunks)
    return path


def cause(path: Path, tmp_path: Path) -> str:
    return objects.write_object("thing", path, None, tmp_path / "out", SETTINGS)


def test_an_empty_file_is_reported_as_empty(tmp_path):
    (tmp_path / "empty.glb").touch()
    assert "empty (0 bytes)" in cause(tmp_path / "empty.glb", tmp_path)


def test_vertices_that_are_not_finite_are_refused(tmp_path):
    (tmp_path / "nan.obj").write_text("v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    assert "not finite" in cause(tmp_path / "nan.obj", tmp_path)


@pytest.mark.parametrize(
    "text, words",
    [
        ("v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n", "all vertices are one point"),
        ("v 0 0 0\nv 1 1 1\nv 2 2 2\nf 1 2 3\n", "every triangle has area 0"),
    ],
)
def test_an_object_without_surface_is_refused(text, words, tmp_path):
    (tmp_path / "flat.obj").write_text(text)
    assert words in cause(tmp_path / "flat.obj", tmp_path)


@pytest.mark.parametrize("option", ["", "-s 1 1 1 ", "-bm 0.5 -clamp on "])
def test_an_obj_without_its_texture_is_refused(option, tmp_path):
    path = write_obj(tmp_path / "in", f"newmtl paint\nmap_Kd {option}wood grain.png\n", None)
    assert "texture or buffer wood grain.png is missing" in cause(path, tmp_path)


def test_an_obj_without_its_material_file_is_refused(tmp_path):
    path = write_obj(tmp_path / "in", None, None)
    assert "material file my board.mtl is missing" in cause(path, tmp_path)


@pytest.mark.parametrize("suffix", [".gltf", ".glb"])
def test_a_gltf_without_its_texture_is_refused(suffix, tmp_path):
    path = write_gltf(tmp_path / f"board{suffix}", "my%20wood.png")
    assert "my wood.png is missing" in cause(path, tmp_path)
    Image.fromarray(CORNERS).save(tmp_path / "my wood.png")
    with opened(path, None) as file:
        assert load_triangles(file).textures[0].shape == (2, 2, 4)


@pytest.mark.parametrize(
    "name, place",
    [
        ("-s 1 1 1 wood grain.png", "wood grain.png"),
        ("..\\textures\\wood.png", "../textures/wood.png"),
        ("C:\\me\\wood.png", "wood.png"),
        ("/home/me/wood.png", "wood.png"),
    ],
)
def test_textures_are_found_however_they_are_written(name, place, tmp_path):
    path = write_obj(tmp_path / "in", f"newmtl paint\nmap_Kd {name}\n", place)
    with opened(path, None) as file:
        (texture,) = load_triangles(file).textures.values()
    np.testing.assert_allclose(texture[0, 0], [1, 0, 0, 1])


@pytest.mark.parametrize("kind", ["obj", "glb"])
def test_a_member_of_a_zip_has_the_files_that_it_refers_to(kind, tmp_path):
    folder = tmp_path / "in"
    if kind == "obj":
        write_obj(folder, "newmtl paint\nmap_Kd maps\\wood.png\n", "maps/wood.png")
    else:
        (folder / "maps").mkdir(parents=True)
        write_gltf(folder / "board.glb", "maps/wood.png")
        Image.fromarray(CORNERS).save(folder / "maps/wood.png")
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, "sub" / path.relative_to(folder))
    ((uid, where),) = find_objects(tmp_path / "pack.zip").items()
    assert uid == "pack-sub-board"
    with opened(*where) as file:
        assert {p.name for p in referenced_files(file)} >= {"wood.png"}
        (texture,) = load_triangles(file).textures.values()
    np.testing.assert_allclose(texture[0, 0], [1, 0, 0, 1])


def test_file_normals_are_used_only_on_request(tmp_path):
    path = save(tmp_path / "ball.glb", ball(2))
    flat, smooth = load_triangles(path), load_triangles(path, file_normals=True)
    assert np.abs(flat.attributes[1][:, :3]).max() == 0  # the same at all three corners
    np.testing.assert_allclose(smooth.attributes[0][:, :3], smooth.xyz[:, 0], atol=1e-5)  # float32


def test_the_longest_side_of_the_box_has_the_given_length(tmp_path):
    path = save(tmp_path / "thing.glb", lopsided_scene())
    triangles = load_triangles(path, box=1.0)
    low, high = triangles.xyz.min((0, 1)), triangles.xyz.max((0, 1))
    np.testing.assert_allclose((high - low).max(), 1, rtol=1e-6)  # float32
    np.testing.assert_allclose(low, -high, atol=1e-6)


def test_points_lie_on_the_surface_uniformly_by_area(tmp_path):
    # The two boxes and the board in this lopsided scene have very different areas.
    scene = lopsided_scene()
    path = save(tmp_path / "thing.glb", scene)
    triangles = load_triangles(path)
    points = random_points(triangles, "thing")
    assert points.shape == (10000, 3) and points.dtype == np.float32
    solid = scene.to_mesh()
    truth = trimesh.Trimesh(in_our_world(solid.vertices), solid.faces, process=False)
    nearest, distance, _ = trimesh.proximity.closest_point_naive(truth, points[:200])
    np.testing.assert_allclose(distance, 0, atol=1e-6)  # float32
    # The pole has the same share of the points as of the area, within 4 standard deviations.
    share = (0.2 * 1.5 * 4 + 2 * 0.2**2) / solid.area
    on_pole = points[:, 2] > in_our_world(solid.vertices)[:4, 2].max() + 1e-6
    reach = 4 * np.sqrt(share * (1 - share) / 10000)
    np.testing.assert_allclose(
        on_pole.mean(), share, atol=reach + 0.05 * share
    )  # 0.05 of the pole is below the top of the board


def test_points_are_uniform_within_a_triangle(tmp_path):
    (tmp_path / "one.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    points = random_points(load_triangles(tmp_path / "one.obj"), "one")
    corners = load_triangles(tmp_path / "one.obj").xyz[0]
    np.testing.assert_allclose(points.mean(0), corners.mean(0), atol=0.01)  # 4 standard deviations
    expected = (
        np.cov((corners - corners.mean(0)).T, bias=True) / 4
    )  # the spread of a triangle, from its corners
    np.testing.assert_allclose(np.cov(points.T), expected, atol=0.005)


def test_points_depend_on_the_uid_alone(tmp_path):
    triangles = load_triangles(save(tmp_path / "thing.glb", lopsided_scene()))
    np.testing.assert_array_equal(random_points(triangles, "a"), random_points(triangles, "a"))
    assert (random_points(triangles, "a") != random_points(triangles, "b")).any()


def test_points_avoid_what_the_texture_cuts_out(tmp_path):
    board = textured_board()
    texture = np.full((8, 8, 4), 255, np.uint8)
    texture[:, :4, 3] = 0
    board.visual.material.baseColorTexture = Image.fromarray(texture)
    board.visual.material.alphaMode = "MASK"
    points = random_points(load_triangles(save(tmp_path / "half.glb", board)), "half")
    # Bilinear lookup: alpha is one half midway between two texels, which is the middle of the board, and also at its edges,
    # where the texture repeats.
    assert len(points) == 10000 and points[:, 0].min() > -1e-3
    board.visual.material.baseColorTexture = Image.fromarray(np.zeros((8, 8, 4), np.uint8))
    with pytest.raises(InputError, match="transparent"):
        random_points(load_triangles(save(tmp_path / "none.glb", board)), "none")


@pytest.mark.parametrize(("dtype", "value"), [(np.uint8, 51), (np.uint16, 51 * 257), (np.float32, 0.2)])  # fmt: skip
def test_vertex_colours_have_the_range_of_their_type(dtype, value):
    board = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]], process=False)
    material = trimesh.visual.material.PBRMaterial()
    board.visual = trimesh.visual.TextureVisuals(uv=np.zeros((3, 2)), material=material)
    board.visual.vertex_attributes["color"] = np.full((3, 4), value, dtype)
    rgba = _corners(board, linear=True, file_normals=False)[3]
    np.testing.assert_allclose(rgba[..., :3], 0.2, rtol=1e-6)


def test_names_start_with_the_folder_and_are_never_hidden(tmp_path, monkeypatch):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "chair.obj").write_text("v 0 0 0\n")
    monkeypatch.chdir(tmp_path / "in" / "sub")
    assert list(find_objects(Path(".."))) == ["in-chair"]
    (tmp_path / "in").rename(tmp_path / ".in")
    assert list(find_objects(tmp_path / ".in")) == ["in-chair"]
