"""Cycles gets the cameras, the world and the light of embree. If LRM_BLENDER names a Python with bpy, the images of both agree."""

import dataclasses
import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import render_objects  # noqa: E402
from rendering import cycles, embree, objects  # noqa: E402
from rendering.protocols import PROTOCOLS, Lighting, Settings, choose_cameras  # noqa: E402
from rendering.surfaces import load_triangles  # noqa: E402
from test_render_objects import ball, lopsided_scene, read, save, textured_board  # noqa: E402

from lrm_jax.types import InputError  # noqa: E402

SETTINGS = dataclasses.replace(
    PROTOCOLS["openlrm"], views=3, size=64, samples=16, backend="cycles", geometry=True
)
GOLDEN = Path(__file__).parents[1] / "goldens" / "blender_depth_normal.exr"


def stand_in(folder: Path, *, ends: str = "") -> str:
    """A program that replaces Blender's Python. It keeps the job as job.json, and writes images with the view's number as red."""
    program = folder / "blender_python"
    program.write_text(f"""#!{sys.executable}
import json, shutil, sys
from pathlib import Path
if sys.argv[1:3] == ["-I", "-c"]:
    sys.exit(0)
isolated, script, job = sys.argv[1:]
assert isolated == "-I" and Path(script).name == "blender_script.py"
shutil.copy(job, {str(folder / "job.json")!r})
job = json.loads(Path(job).read_text())
from PIL import Image
for view in range(len(job["c2w"])):
    stem = Path(job["out"]) / f"{{view:03d}}"
    Image.new("RGBA", (job["size"],) * 2, (view, 0, 0, 255)).save(stem.with_suffix(".png"))
    if job["geometry"]:
        shutil.copy({str(GOLDEN)!r}, stem.with_suffix(".exr"))
    print("Fra:1 noise of Blender's")
    print("finished view", view, flush=True)
    {ends}
""")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def test_the_golden_has_the_depth_and_normal_of_a_board_seen_from_the_front():
    """Blender 4.5 wrote it with blender_script.py: `textured_board` in a box of side 1, camera at (0, -2, 0), f 0.75, 9 pixels."""
    channels = cycles.read_exr(GOLDEN.read_bytes())
    assert set(channels) >= {f"ViewLayer.{name}" for name in (*cycles.NORMAL, cycles.DEPTH)}
    depth = channels["ViewLayer.Depth.Z"]
    x = (np.arange(9) + 0.5) / 9 - 0.5
    seen = np.abs(x / 0.75 * 2) < 0.5
    seen = seen[:, None] & seen
    assert 0 < seen.sum() < 81
    # Depth along the optical axis, not along the ray, is the same everywhere. Cycles computes it in float32.
    np.testing.assert_allclose(depth[seen], 2, rtol=1e-6)
    assert (depth[~seen] > cycles.NOTHING).all()
    for name, value in zip(cycles.NORMAL, (0, -1, 0), strict=True):
        np.testing.assert_allclose(channels[f"ViewLayer.{name}"][seen], value, atol=1e-6)


def test_an_exr_of_another_kind_is_refused():
    data = GOLDEN.read_bytes()
    tiled = data[:5] + bytes([data[5] | 0b10]) + data[6:]
    with pytest.raises(InputError, match="tiled"):
        cycles.read_exr(tiled)


def test_blender_gets_the_cameras_the_world_and_the_light(tmp_path):
    path = save(tmp_path / "thing.glb", lopsided_scene())
    blender = cycles.find_blender(stand_in(tmp_path), threads=3)
    settings = dataclasses.replace(SETTINGS, size=9)
    cause = objects.write_object("thing", path, None, tmp_path / "out", settings, blender)
    assert cause is None
    job = json.loads((tmp_path / "job.json").read_text())
    assert (job["file"], job["size"], job["samples"], job["threads"]) == (str(path), 9, 16, 3)
    assert job["geometry"] and job["focal"] == pytest.approx(0.75)
    images, poses, _ = read(tmp_path / "out/thing")
    np.testing.assert_allclose(np.array(job["c2w"])[:, :3], poses, rtol=1e-6)  # float32 as text
    light = job["light"]
    assert np.linalg.norm(light["direction"]) == pytest.approx(1, abs=1e-6)
    assert {"sun", "sky", "above"} < set(light)
    # The normalisation moves the corners of the file to the same places as in embree.
    vertices = lopsided_scene().to_mesh().vertices @ [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    low, high = (vertices - job["centre"]).min(0), (vertices - job["centre"]).max(0)
    np.testing.assert_allclose(low, -high, atol=1e-6)
    assert (high - low).max() * job["scale"] == pytest.approx(2, abs=1e-6)
    assert sorted(p.name for p in (tmp_path / "out/thing").iterdir()) == [
        "depth", "intrinsics.npy", "normal", "points.npy", "pose", "rgba",
    ]  # fmt: skip
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2]
    depth = np.asarray(Image.open(tmp_path / "out/thing/depth/001.png"))
    assert set(np.unique(depth)) == {0, 20000}  # the golden's 2 world units


def test_the_failure_names_what_ended_blender(tmp_path):
    path = save(tmp_path / "thing.glb", lopsided_scene())
    ends = "print('Error: out of memory', file=sys.stderr); print('bye'); sys.exit(3)"
    blender = cycles.find_blender(stand_in(tmp_path, ends=ends), threads=1)
    settings = dataclasses.replace(SETTINGS, size=9)
    cause = objects.write_object("thing", path, None, tmp_path / "out", settings, blender)
    assert cause == "Blender ended with code 3 after 1 views: Error: out of memory"
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "blender", [[], ["--blender", "/nowhere/python"], ["--blender", sys.executable]]
)
def test_without_bpy_one_line_says_how_to_install_it(blender, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cycles, "PROBE", "import no_such_module")
    path = save(tmp_path / "thing.glb", lopsided_scene())
    arguments = [str(path), str(tmp_path / "out"), "--backend", "cycles", *blender]
    assert render_objects.main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "pip install 'bpy==4.5.*'" in line and "--blender" in line
    assert not (tmp_path / "out").exists()


needs_blender = pytest.mark.skipif(
    "LRM_BLENDER" not in os.environ, reason="LRM_BLENDER does not name a Python that has bpy"
)


def both(path: Path, tmp_path: Path, settings: Settings, light: Lighting) -> tuple[list, list]:
    triangles = load_triangles(path, settings.box, file_normals=True)
    cameras = choose_cameras(settings, "thing")
    blender = cycles.find_blender(os.environ["LRM_BLENDER"], threads=2)
    ours = embree.render(triangles, cameras, light, settings)
    theirs = cycles.render(
        path, triangles, cameras, light, settings, blender, tmp_path / f"blender_{path.suffix[1:]}"
    )
    return list(ours), list(theirs)


def assert_same_shape(ours: list, theirs: list) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        seen, also = a.depth > 0, b.depth > 0
        # The rays are the same. The two may differ only where a ray grazes an edge.
        assert (seen & also).sum() / (seen | also).sum() > 0.995
        # Cycles blurs with a filter of 1.5 pixels, which keeps the sum. There are 16 samples in each of about a hundred edge pixels.
        np.testing.assert_allclose(b.rgba[..., 3].sum(), a.rgba[..., 3].sum(), rtol=0.02)
        difference = np.abs(a.depth - b.depth)[seen & also]
        assert np.median(difference) < 1e-5 and np.mean(difference > 1e-3) < 0.005
        cosine = (a.normal * b.normal).sum(-1)[seen & also]
        assert np.mean(cosine > 0.999) > 0.98


@needs_blender
def test_both_back_ends_see_the_same_ball_in_the_same_light(tmp_path):
    """A ball casts no shadow on itself, so the light is comparable. This checks the direction of the sun, the sky, and sRGB."""
    sphere = ball(4)
    sphere.visual = trimesh.visual.TextureVisuals(
        material=trimesh.visual.material.PBRMaterial(
            baseColorFactor=[128, 128, 128, 255], metallicFactor=0, roughnessFactor=1
        )
    )
    path = save(tmp_path / "ball.glb", sphere)
    light = Lighting(np.array([0.6, -0.64, 0.48], np.float32), sun=0.5, sky=0.3, above=0.15)
    ours, theirs = both(path, tmp_path, dataclasses.replace(SETTINGS, samples=64), light)
    assert_same_shape(ours, theirs)
    for a, b in zip(ours, theirs, strict=True):
        inside = (a.rgba[..., 3] == 255) & (b.rgba[..., 3] == 255)
        difference = (b.rgba[inside, 0] / 1.0) - a.rgba[inside, 0]
        # The gloss of glTF's material adds a little, mostly near the silhouette. The noise of 64 samples is about 2.
        assert -4 < np.median(difference) < 10 and np.abs(difference).mean() < 12


@needs_blender
@pytest.mark.parametrize("name", ["thing.glb", "thing.obj", "thing.ply"])
def test_both_back_ends_place_all_formats_alike(name, tmp_path):
    scene = lopsided_scene()
    if name == "thing.glb":
        path = save(tmp_path / name, scene)
    else:
        scene = scene.to_mesh() if name == "thing.ply" else scene
        path = tmp_path / name
        scene.export(path)
    ours, theirs = both(path, tmp_path, SETTINGS, Lighting())
    assert_same_shape(ours, theirs)


@needs_blender
@pytest.mark.parametrize("name", ["board.glb", "board.obj", "colours.ply", "colours.glb"])
def test_both_back_ends_see_the_same_colours(name, tmp_path):
    board = textured_board()
    if name.startswith("colours"):
        board = trimesh.Trimesh(board.vertices, board.faces, process=False)
        colors = [[255, 0, 0, 255], [255, 0, 0, 255], [0, 0, 255, 255], [0, 0, 255, 255]]
        board.visual = trimesh.visual.ColorVisuals(board, vertex_colors=colors)
    path = tmp_path / name
    board.export(path)
    settings = dataclasses.replace(SETTINGS, views=1)
    (ours,), (theirs,) = both(path, tmp_path, settings, Lighting())
    inside = (ours.rgba[..., 3] == 255) & (theirs.rgba[..., 3] == 255)
    hue = [
        image.rgba[inside, :3] / image.rgba[inside, :3].max(-1, keepdims=True).clip(1)
        for image in (ours, theirs)
    ]
    # Gloss makes colours paler by about a tenth. A wrong image, place or transfer function would make a larger difference.
    assert np.abs(hue[0] - hue[1]).mean() < 0.15
    assert (hue[0].argmax(-1) == hue[1].argmax(-1)).mean() > 0.9
