"""Variants of objects: other shapes and colours that the pictures, poses and points agree about; none of what is held out."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from lrm_jax.data import splits

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import render_objects  # noqa: E402
from rendering import variants  # noqa: E402
from rendering.surfaces import load_triangles, look_up  # noqa: E402

RED, BLUE, GREY = (200, 20, 20, 255), (20, 20, 200, 255), (120, 120, 120, 255)


def save(path: Path, geometry) -> Path:
    path.write_bytes(geometry.export(file_type="glb"))
    return path


def house(tmp_path: Path) -> Path:
    """A red box, a blue and a grey face among it."""
    box = trimesh.creation.box((1.0, 2.0, 0.6))
    colors = np.tile(np.array(RED, np.uint8), (12, 1))
    colors[2:4], colors[6:8] = BLUE, GREY
    parts = []
    for color in np.unique(colors, axis=0):
        part = box.submesh([np.flatnonzero((colors == color).all(1))], append=True)
        part.visual = trimesh.visual.TextureVisuals(
            material=trimesh.visual.material.PBRMaterial(baseColorFactor=color)
        )
        parts.append(part)
    return save(tmp_path / "house.glb", trimesh.Scene(parts))


@pytest.mark.parametrize("box", [None, 1.0])
@pytest.mark.parametrize("company", [0, 1])
def test_a_variant_is_normalised_and_its_own_function(tmp_path, box, company):
    thing = load_triangles(house(tmp_path), box=box)
    others = [load_triangles(house(tmp_path), box=box)] * company
    seen = []
    for uid in ("p-house~1", "p-house~2", "p-house~1"):
        varied = variants.vary(uid, thing, others, box, 0)
        low, high = varied.xyz.min((0, 1)), varied.xyz.max((0, 1))
        np.testing.assert_allclose(low + high, 0, atol=1e-5)
        reach = np.linalg.norm(varied.xyz, axis=-1).max() if box is None else (high - low).max()
        np.testing.assert_allclose(reach, 1, rtol=1e-5)
        assert len(varied.xyz) == len(thing.xyz) * (1 + company)
        assert all(
            len(a) == len(varied.xyz)
            for a in (varied.facing, varied.material, varied.cutout, *varied.attributes)
        )
        seen.append(varied)
    np.testing.assert_array_equal(seen[0].xyz, seen[2].xyz)
    assert np.abs(seen[0].xyz - seen[1].xyz).max() > 0.05


def test_flat_triangles_stay_flat_and_smooth_normals_follow_the_stretch(tmp_path):
    flat = variants.vary("p~3", load_triangles(house(tmp_path)), [], None, 0)
    unit = flat.facing / np.linalg.norm(flat.facing, axis=1, keepdims=True)
    np.testing.assert_allclose(np.abs((unit * flat.attributes[0][:, :3]).sum(1)), 1, atol=1e-4)
    sphere = trimesh.creation.icosphere(3)
    sphere.vertex_normals = sphere.vertices
    path = save(tmp_path / "sphere.glb", sphere)
    thing = load_triangles(path, file_normals=True)
    bends = 0.0
    for number in range(8):
        smooth = variants.vary(f"p~{number}", thing, [], None, 0)
        first, *steps = smooth.attributes
        assert np.any(steps[0][:, :3])
        normal = first[:, :3] + (steps[0] + steps[1])[:, :3] / 3
        normal /= np.linalg.norm(normal, axis=1, keepdims=True)
        facing = smooth.facing / np.linalg.norm(smooth.facing, axis=1, keepdims=True)
        # A taper turns the sides by up to atan(TAPER), which the smooth normals do not follow.
        assert (normal * facing).sum(1).min() > np.cos(np.arctan(2 * variants.TAPER))
        bends = max(bends, np.ptp(np.ptp(smooth.xyz, axis=(0, 1))))
    assert bends > 0.3  # some are no spheres


def test_colours_of_a_kind_change_alike_and_stay_in_range(tmp_path):
    thing = load_triangles(house(tmp_path))
    kinds = [
        np.flatnonzero((thing.attributes[0][:, 5:8] == c).all(1))
        for c in np.unique(thing.attributes[0][:, 5:8], axis=0)
    ]
    assert len(kinds) == 3
    changed = 0
    for number in range(12):
        rgba = variants.vary(f"p~{number}", thing, [], None, 0).attributes[0][:, 5:9]
        assert rgba.min() >= 0 and rgba.max() <= 1
        np.testing.assert_array_equal(rgba[:, 3], 1)
        for kind in kinds:
            np.testing.assert_allclose(
                rgba[kind, :3], np.broadcast_to(rgba[kind[0], :3], (len(kind), 3)), atol=1e-6
            )
        changed += not np.allclose(rgba, thing.attributes[0][:, 5:9])
    assert 2 <= changed <= 10


def test_textures_of_both_objects_are_found(tmp_path):
    """Two boards of different textures, joined: each keeps the colour of its own."""
    boards = []
    for color in ((250, 250, 250), (10, 10, 10)):
        board = trimesh.creation.box((1, 1, 0.2))
        material = trimesh.visual.material.PBRMaterial(
            baseColorTexture=Image.new("RGB", (4, 4), color), metallicFactor=0
        )
        board.visual = trimesh.visual.TextureVisuals(
            uv=np.zeros((len(board.vertices), 2)), material=material
        )
        boards.append(load_triangles(save(tmp_path / f"{color[0]}.glb", board)))
    joined = variants.vary("p~1", boards[0], boards[1:], None, 0)
    assert len(joined.textures) == 2
    count = len(boards[0].xyz)
    zeros = np.zeros(len(joined.xyz), np.float32)
    colors = look_up(joined, np.arange(len(joined.xyz)), zeros, zeros)[1][:, :3]
    assert colors[:count].min() > 0.3 and colors[count:].max() < 0.05


def test_what_is_held_out_has_no_variants_and_is_in_none(tmp_path):
    objects = {f"pack-thing{chr(97 + i) * 3}": (tmp_path, f"{i}.glb") for i in range(26)}
    held_out = {where for uid, where in objects.items() if splits.in_validation(uid)}
    assert 0 < len(held_out) < 26
    planned = variants.plan(objects, 4, 0)
    assert len(planned) == 4 * (26 - len(held_out))
    for uid, (path, member, company) in planned.items():
        parent = uid.split("~")[0]
        assert objects[parent] == (path, member)
        assert not splits.in_validation(uid) and splits.group(uid) == splits.group(parent)
        assert not held_out & {(path, member), *company}
    share = np.mean([len(company) for *_, company in planned.values()])
    assert 0.3 < share < 0.7
    # More variants, or fewer objects before them, change none of those that were there.
    assert {k: v[:2] for k, v in variants.plan(objects, 2, 0).items()}.items() <= {
        k: v[:2] for k, v in planned.items()
    }.items()


def test_the_command_renders_them_beside_their_objects(tmp_path, capsys):
    (tmp_path / "pack").mkdir()
    for name in ("thingaaa", "thingddd"):  # ddd is held out
        save(tmp_path / "pack" / f"{name}.glb", trimesh.creation.box((1, 2, 0.5)))
    out = tmp_path / "out"
    options = [str(tmp_path / "pack"), str(out), "--views", "2", "--size", "32", "--workers", "1"]
    assert render_objects.main([*options, "--variants", "2"]) == 0
    folders = {p.name for p in out.iterdir() if p.is_dir()}
    assert folders == {"pack-thingaaa", "pack-thingaaa~1", "pack-thingaaa~2", "pack-thingddd"}
    assert json.loads((out / "failures.json").read_text()) == {}
    silhouettes = []
    for name in sorted(folders):
        alpha = np.asarray(Image.open(out / name / "rgba/000.png"))[..., 3]
        points = np.load(out / name / "points.npy")
        assert alpha.any() and np.linalg.norm(points, axis=1).max() <= 1 + 1e-5
        silhouettes.append(np.ptp(points, axis=0))
    assert np.abs(silhouettes[0] - silhouettes[1]).max() > 0.03
    assert render_objects.main([*options, "--variants", "2"]) == 0
    assert "4 objects, 4 of them rendered already" in capsys.readouterr().err
