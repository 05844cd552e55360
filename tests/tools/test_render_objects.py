"""Images, depth and normals agree with the poses written beside them, and bad files fail alone."""

import dataclasses
import functools
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import render_objects  # noqa: E402
from rendering import embree, objects, processes, surfaces  # noqa: E402
from rendering.protocols import PROTOCOLS, Lighting, Settings, choose_cameras  # noqa: E402

SETTINGS = Settings(
    views=6, size=64, distance=(2.6, 3.4), elevation=(-30.0, 75.0), fov=45.0, seed=0
)
# The upper left, upper right, lower left and lower right of the texture.
CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)


def textured_board() -> trimesh.Trimesh:
    """An upright square in glTF's frame (y up). Its front (+z) shows the texture unchanged."""
    board = trimesh.Trimesh(
        [[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], [[0, 1, 2], [0, 2, 3]], process=False
    )
    material = trimesh.visual.material.PBRMaterial(
        baseColorTexture=Image.fromarray(CORNERS.repeat(32, 0).repeat(32, 1)), metallicFactor=0
    )
    uv = [[0, 0], [1, 0], [1, 1], [0, 1]]
    board.visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
    return board


def lopsided_scene() -> trimesh.Scene:
    """A textured board with a pole on top and a box beside it, placed by the scene graph."""
    scene = trimesh.Scene()
    scene.add_geometry(textured_board())
    pole = trimesh.creation.box((0.2, 1.5, 0.2))
    scene.add_geometry(pole, transform=trimesh.transformations.translation_matrix([0.5, 1.7, 0]))
    turn = trimesh.transformations.rotation_matrix(0.5, [0, 1, 0])
    shift = trimesh.transformations.translation_matrix([-1.5, -0.5, 0.8])
    scene.add_geometry(trimesh.creation.box((0.5, 0.3, 1.0)), transform=shift @ turn)
    return scene


def save(path: Path, geometry) -> Path:
    path.write_bytes(geometry.export(file_type=path.suffix[1:]))
    return path


def ball(subdivisions: int) -> trimesh.Trimesh:
    """A sphere of radius 1 with its normals."""
    sphere = trimesh.creation.icosphere(subdivisions)
    sphere.vertex_normals = sphere.vertices
    return sphere


def rendered(tmp_path: Path, geometry, name="thing.glb", settings=SETTINGS) -> Path:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    path = save(tmp_path / name, geometry)
    assert objects.write_object("thing", path, None, out, settings) is None
    return out / "thing"


def read(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images = [np.asarray(Image.open(path)) for path in sorted(folder.glob("rgba/*.png"))]
    poses = [np.load(path) for path in sorted(folder.glob("pose/*.npy"))]
    return np.stack(images), np.stack(poses), np.load(folder / "intrinsics.npy")


def pixels_of(points: np.ndarray, pose: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """(column, row) of world points, by the definition of the layout: x right, y up, z backward."""
    local = (points - pose[:, 3]) @ pose[:, :3]
    return intrinsics[1] + intrinsics[0] * local[:, :2] * [1, -1] / -local[:, 2:]


def in_our_world(vertices: np.ndarray) -> np.ndarray:
    """An independent version of the documented frame: z up, box centred, farthest vertex at 1."""
    points = np.stack([vertices[:, 0], -vertices[:, 2], vertices[:, 1]], axis=-1)
    points = points - (points.min(0) + points.max(0)) / 2
    return points / np.linalg.norm(points, axis=-1).max()


def test_projected_vertices_span_the_silhouette(tmp_path):
    scene = lopsided_scene()
    images, poses, intrinsics = read(rendered(tmp_path, scene))
    points = in_our_world(scene.to_mesh().vertices)
    assert images.shape == (6, 64, 64, 4) and poses.shape == (6, 3, 4)
    for image, pose in zip(images, poses, strict=True):
        pixels = pixels_of(points, pose, intrinsics)
        rows, columns = np.nonzero(image[..., 3])
        # A pixel is covered if one of its 2x2 samples is, so the box is known to about a pixel.
        np.testing.assert_allclose(
            [columns.min(), rows.min()], pixels.min(0), atol=1.2, err_msg="upper left"
        )
        np.testing.assert_allclose(
            [columns.max() + 1, rows.max() + 1], pixels.max(0), atol=1.2, err_msg="lower right"
        )


def test_zero123_objects_are_of_side_1_and_may_leave_the_image(tmp_path):
    scene = lopsided_scene()
    settings = dataclasses.replace(PROTOCOLS["zero123"], size=64)
    images, poses, intrinsics = read(rendered(tmp_path, scene, settings=settings))
    assert images.shape == (12, 64, 64, 4) and poses.shape == (12, 3, 4)
    np.testing.assert_allclose(intrinsics, [[70, 70], [32, 32], [64, 64]], rtol=1e-6)  # 280 at 256
    x, y, z = np.asarray(scene.to_mesh().vertices).T
    points = np.stack([x, -z, y], axis=-1)  # z up
    points -= (points.min(0) + points.max(0)) / 2
    points /= np.ptp(points, axis=0).max()
    for image, pose in zip(images, poses, strict=True):
        pixels = pixels_of(points, pose, intrinsics).clip(0, 64)
        rows, columns = np.nonzero(image[..., 3])
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        # 1.2 as in the test above.
        np.testing.assert_allclose(seen, [*pixels.min(0), *pixels.max(0)], atol=1.2)


def test_sphere_has_its_analytic_silhouette(tmp_path):
    images, poses, intrinsics = read(rendered(tmp_path, trimesh.creation.icosphere(5)))
    rows, columns = np.indices((64, 64)) + 0.5
    for image, pose in zip(images, poses, strict=True):
        distance = np.linalg.norm(pose[:, 3])
        # The tangent cone around the optical axis has sin(angle) = 1 / distance.
        radius = intrinsics[0, 0] * np.tan(np.arcsin(1 / distance))
        from_axis = np.hypot(columns - intrinsics[1, 0], rows - intrinsics[1, 1])
        assert (image[from_axis < radius - 1, 3] == 255).all()
        assert (image[from_axis > radius + 1, 3] == 0).all()
        # With antialiasing, the sum of the coverage gives the area far better than a count of pixels.
        np.testing.assert_allclose(image[..., 3].sum() / 255, np.pi * radius**2, rtol=0.005)


def test_texture_and_world_are_the_right_way_round(tmp_path):
    images, poses, intrinsics = read(
        rendered(
            tmp_path, textured_board(), settings=Settings(16, 64, (3.0, 3.0), (0.0, 20.0), 45.0, 0)
        )
    )
    quarters = np.array([[-1, 0, 1], [1, 0, 1], [-1, 0, -1], [1, 0, -1]]) * 0.35  # z up, front -y
    seen = 0
    for image, pose in zip(images, poses, strict=True):
        if abs(pose[1, 3]) < 1.5:
            continue  # the board is seen edge-on
        columns, rows = pixels_of(quarters, pose, intrinsics).astype(int).T
        colors = image[rows, columns, :3].astype(float)
        brightness = colors.max(1, keepdims=True)
        np.testing.assert_allclose(colors / brightness, CORNERS.reshape(4, 3) / 255, atol=0.02)
        seen += 1
    assert seen >= 4  # from the front, and from behind, because the board has no back of its own


def test_half_transparent_edges_keep_the_colour_of_the_surface(tmp_path):
    board = trimesh.Trimesh([[-1, -1, 0], [1, -1, 0], [0, 1, 0]], [[0, 1, 2]], process=False)
    board.visual = trimesh.visual.ColorVisuals(board, vertex_colors=[[255, 128, 0, 255]] * 3)
    images, _, _ = read(rendered(tmp_path, board))
    for image in images:
        inside, edge = image[..., 3] == 255, (image[..., 3] > 0) & (image[..., 3] < 255)
        assert edge.sum() > 5
        # A plane has one colour, because the light depends only on the normal. 1 is for rounding.
        expected = np.median(image[edge | inside, :3], axis=0)
        np.testing.assert_allclose(image[edge, :3], np.tile(expected, (edge.sum(), 1)), atol=1)
        assert (image[image[..., 3] == 0] == 0).all()


def test_a_cut_out_texture_lets_rays_through(tmp_path):
    covered = {}
    for mode in ("OPAQUE", "MASK"):
        board = textured_board()
        texture = np.full((8, 8, 4), 255, np.uint8)
        texture[:, :4, 3] = 0
        board.visual.material.baseColorTexture = Image.fromarray(texture)
        board.visual.material.alphaMode = mode
        path = save(tmp_path / f"{mode}.glb", board)
        triangles = surfaces.load_triangles(path)
        views = embree.render(triangles, choose_cameras(SETTINGS, "x"), Lighting(), SETTINGS)
        covered[mode] = np.array([view.rgba[..., 3].sum() / 255 for view in views])
    # Half of the board is left. Perspective makes the nearer half larger, especially if the board is seen nearly edge-on.
    ratio = covered["MASK"] / covered["OPAQUE"]
    assert ((0.2 < ratio) & (ratio < 0.8)).all()


def test_bilinear_lookup_is_exact_on_texels_and_repeats():
    texture = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    middle_of = lambda row, column: [(column + 0.5) / 3, 1 - (row + 0.5) / 2]  # noqa: E731
    uv = np.array([middle_of(0, 0), middle_of(1, 2), middle_of(2, -1), [0.5, 0.5]], np.float32)
    values = surfaces.sample_texture(texture, uv)
    expected = [texture[0, 0], texture[1, 2], texture[0, 2], (texture[0, 1] + texture[1, 1]) / 2]
    np.testing.assert_allclose(values, expected, rtol=1e-5)  # float32


def from_depth(image: np.ndarray, pose: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """World points from a depth image, by the definitions of the formats."""
    rows, columns = np.nonzero(image)
    z = image[rows, columns, None] * 1e-4
    right_down = (np.stack([columns, rows], -1) + 0.5 - intrinsics[1]) / intrinsics[0] * z
    return (right_down * [1, -1]) @ pose[:, :2].T - z * pose[:, 2] + pose[:, 3]


def test_depth_and_normals_are_those_of_a_sphere(tmp_path):
    settings = dataclasses.replace(SETTINGS, geometry=True, file_normals=True)
    folder = rendered(tmp_path, ball(5), settings=settings)
    images, poses, intrinsics = read(folder)
    for view, (image, pose) in enumerate(zip(images, poses, strict=True)):
        depth, normal = (
            np.asarray(Image.open(folder / k / f"{view:03d}.png")) for k in ("depth", "normal")
        )
        assert depth.dtype == np.uint16 and normal.shape == (64, 64, 3)
        assert (normal.any(-1) == (depth > 0)).all()
        # The centre of the pixel decides. About half of its samples are on the same side.
        assert (depth[image[..., 3] == 255] > 0).all() and (depth[image[..., 3] == 0] == 0).all()
        points = from_depth(depth, pose, intrinsics)
        # The facets are up to 6e-4 inside the sphere, and near the silhouette rays graze them. A step is 1e-4.
        np.testing.assert_allclose(np.linalg.norm(points, axis=-1), 1, atol=1.5e-3)
        # Interpolated between vertices with exact normals. An 8-bit step is 0.004.
        np.testing.assert_allclose(normal[depth > 0] / 127.5 - 1, points, atol=0.012)


def test_depth_goes_through_what_is_cut_out(tmp_path):
    board = textured_board()
    texture = np.full((8, 8, 4), 255, np.uint8)
    texture[:, :4, 3] = 0
    board.visual.material.baseColorTexture = Image.fromarray(texture)
    board.visual.material.alphaMode = "MASK"
    scene = trimesh.Scene([board])
    behind = trimesh.Trimesh(
        [[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], [[0, 1, 2], [0, 2, 3]]
    )
    scene.add_geometry(behind, transform=trimesh.transformations.translation_matrix([0, 0, -1]))
    settings = Settings(1, 64, (3.0, 3.0), fov=45.0, front_first=True, geometry=True, box=1.0)
    folder = rendered(tmp_path, scene, settings=settings)
    _, (pose,), intrinsics = read(folder)
    np.testing.assert_allclose(pose[:, 3], [0, -3, 0], atol=1e-6)  # in front; float32
    depth = np.asarray(Image.open(folder / "depth/000.png"))
    normal = np.asarray(Image.open(folder / "normal/000.png"))
    points = from_depth(depth, pose, intrinsics)
    left = points[:, 0] < -0.02
    # The boards are 0.5 apart after the longest side is scaled to 1. A step of depth is 1e-4.
    np.testing.assert_allclose(points[left, 1], 0.25, atol=1e-4)
    np.testing.assert_allclose(points[points[:, 0] > 0.02, 1], -0.25, atol=1e-4)
    assert 200 < left.sum() < len(points) - 200
    assert (normal[depth > 0] == [128, 0, 128]).all()


def test_light_on_a_matt_surface_is_as_documented(tmp_path):
    board = trimesh.Trimesh([[-1, -1, 0], [1, -1, 0], [0, 1, 0]], [[0, 1, 2]], process=False)
    triangles = surfaces.load_triangles(save(tmp_path / "white.ply", board))
    light = Lighting(np.array([0.6, -0.8, 0], np.float32), sun=0.4, sky=0.2, above=0.1)
    settings = Settings(2, 32, elevation=(0.0, 0.0), front_first=True)
    front = next(embree.render(triangles, choose_cameras(settings, "x"), light, settings))
    # The board is white, and its front faces -y.
    expected = 255 * (1.055 * (0.2 + 0.4 * 0.8) ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(front.rgba[16, 16, :3], expected, atol=0.6)  # rounding to 8 bits


def small(*arguments) -> list[str]:
    return [*map(str, arguments), "--views", "2", "--size", "16", "--workers", "1"]


def test_a_flat_object_seen_edge_on_is_visible_in_the_other_views(tmp_path):
    sheet = trimesh.Trimesh(
        [[-1, 0, -1], [1, 0, -1], [1, 0, 1], [-1, 0, 1]], [[0, 1, 2], [0, 2, 3]], process=False
    )
    settings = dataclasses.replace(PROTOCOLS["openlrm"], views=3, size=32)
    images, _, _ = read(rendered(tmp_path, sheet, settings=settings))
    assert any(image[..., 3].any() for image in images[1:])


def test_a_name_that_is_too_long_fails_alone(tmp_path):
    path, uid = save(tmp_path / "thing.glb", ball(1)), 300 * "x"
    assert not objects.is_finished(tmp_path, uid)
    assert "File name too long" in objects.write_object(uid, path, None, tmp_path, SETTINGS)
    assert [x.name for x in tmp_path.iterdir()] == ["thing.glb"]


def test_bad_files_fail_alone_and_a_second_run_keeps_what_is_there(tmp_path, capsys):
    source, out = tmp_path / "things", tmp_path / "out"
    source.mkdir()
    save(source / "good.glb", lopsided_scene())
    (source / "truncated.glb").write_bytes((source / "good.glb").read_bytes()[:500])
    save(source / "points.ply", trimesh.PointCloud(np.eye(3)))
    with zipfile.ZipFile(source / "pack.zip", "w") as archive:
        archive.writestr("sub/box.glb", trimesh.creation.box().export(file_type="glb"))
        archive.writestr("__MACOSX/._box.glb", b"")
    assert render_objects.main(small(source, out)) == 1
    assert sorted(p.name for p in out.iterdir()) == [
        "failures.json", "pack-sub-box", "render.json", "things-good",
    ]  # fmt: skip
    failures = json.loads((out / "failures.json").read_text())
    assert failures["no triangles"] == ["things-points"]
    assert ["things-truncated"] in failures.values() and len(failures) == 2
    assert "no triangles: things-points" in capsys.readouterr().err
    assert render_objects.main(small(source / "truncated.glb", tmp_path / "none")) == 2
    assert "none of 1 objects could be rendered" in capsys.readouterr().err
    np.testing.assert_allclose(np.load(out / "things-good/intrinsics.npy")[1:], [[8, 8], [16, 16]])

    before = (out / "things-good/rgba/000.png").stat().st_mtime_ns
    for bad in ("truncated.glb", "points.ply"):
        (source / bad).unlink()
    assert render_objects.main(small(source, out)) == 0
    assert (out / "things-good/rgba/000.png").stat().st_mtime_ns == before
    assert render_objects.main(small(source, out) + ["--fov", "50"]) == 2
    assert "other settings: fov 40.0 (now 50.0)" in capsys.readouterr().err


def test_a_folder_from_before_points_were_written_gets_them_and_keeps_its_images(tmp_path):
    source, out = tmp_path / "things", tmp_path / "out"
    source.mkdir()
    save(source / "good.glb", lopsided_scene())
    assert render_objects.main(small(source, out)) == 0
    points = np.load(out / "things-good/points.npy")
    (out / "things-good/points.npy").unlink()
    old = {
        "views": 2,
        "size": 16,
        "distance": [3.0, 3.0],
        "elevation": [-30.0, 75.0],
        "fov": 40.0,
        "seed": 0,
    }
    (out / "render.json").write_text(json.dumps(old))
    before = (out / "things-good/rgba/000.png").stat().st_mtime_ns
    # The state that a killed process leaves.
    (out / ".things-good.unfinished/rgba").mkdir(parents=True)
    assert render_objects.main(small(source, out)) == 0
    np.testing.assert_array_equal(np.load(out / "things-good/points.npy"), points)
    assert (out / "things-good/rgba/000.png").stat().st_mtime_ns == before
    assert not (out / ".things-good.unfinished").exists()
    assert render_objects.main(small(source, out) + ["--geometry"]) == 2


def test_a_full_disk_stops_the_run_and_leaves_no_half_object(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = save(tmp_path / "thing.glb", lopsided_scene())
    monkeypatch.setattr(objects, "save_view", full)
    with pytest.raises(OSError, match="No space left"):
        objects.write_object("thing", path, None, tmp_path / "out", SETTINGS)
    assert list((tmp_path / "out").iterdir()) == []


def crash_on_b(uid: str, out: Path) -> None:
    (out / f".{uid}.unfinished").mkdir()
    if uid == "b":
        os._exit(11)
    (out / f".{uid}.unfinished").rmdir()


def test_a_file_that_crashes_its_process_fails_alone(tmp_path):
    crash = functools.partial(crash_on_b, out=tmp_path)
    results = dict(processes.run_in_processes(crash, {"a": (), "b": ()}, tmp_path, 2))
    assert {uid for uid, cause in results.items() if cause} == {"b"}
    assert "crashed" in results["b"] and results["a"] is None


def touch(uid: str, out: Path) -> None:
    (out / uid).touch()


def test_an_interrupted_run_starts_no_more_objects(tmp_path):
    work = functools.partial(touch, out=tmp_path)
    results = processes.run_in_processes(work, dict.fromkeys("abcdef", ()), tmp_path, 1)
    assert next(results) == ("a", None)
    results.close()  # as after Ctrl-C
    assert {path.name for path in tmp_path.iterdir()} <= {"a", "b"}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--views", "0"], "--views 0: must be at least 1"),
        (["--distance", "0.5", "3"], "needs 1 < LO <= HI"),
        (["--elevation", "20", "10"], "-90 <= LO <= HI <= 90"),
        (["--fov", "180"], "between 0 and 170"),
        (["--protocol", "lrm", "--elevation", "0", "9"], "--protocol lrm are not set by elevation"),
        (["--protocol", "zero123", "--elevation", "0", "9"], "zero123 are not set by elevation"),
        (["--protocol", "triposr", "--distance", "0.4", "2"], "needs 0.5 < LO <= HI"),
        (["--geometry", "--distance", "3", "9"], "with --geometry at most 5.55"),
        (["--samples", "8"], "only for --backend cycles"),
        (["--protocol", "one2345", "--views", "32"], "--views: --protocol one2345 has 40 fixed"),
        (["--protocol", "one2345", "--distance", "2", "2"], "--distance: --protocol one2345"),
        (["--protocol", "one2345", "--fov", "40"], "--fov: --protocol one2345"),
        (["--protocol", "one2345", "--elevation", "80", "91"], "-90 <= LO <= HI <= 90"),
    ],
)
def test_bad_arguments_end_with_2(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        render_objects.main([str(tmp_path), str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    "protocol, flag, written",
    [
        ("default", [], False),
        ("default", ["--geometry"], True),
        ("one2345", [], True),
        ("one2345", ["--no-geometry"], False),
    ],
)
def test_one2345_writes_depth_and_normals_unless_told_not_to(protocol, flag, written, tmp_path):
    save(tmp_path / "in.glb", textured_board())
    arguments = ["--protocol", protocol, "--size", "16", "--workers", "1", *flag]
    assert render_objects.main([str(tmp_path / "in.glb"), str(tmp_path / "out"), *arguments]) == 0
    (folder,) = (path.parent for path in tmp_path.glob("out/*/rgba"))
    count = PROTOCOLS[protocol].views
    assert len(list(folder.glob("rgba/*.png"))) == len(list(folder.glob("pose/*.npy"))) == count
    for name in ("depth", "normal"):
        assert len(list(folder.glob(f"{name}/*.png"))) == (count if written else 0)


def test_no_input_is_one_line_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "broken.zip").write_bytes(b"PK")
    for source in (tmp_path / "nowhere", tmp_path / "broken.zip", Path(__file__)):
        assert render_objects.main([str(source), str(tmp_path / "out")]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("at", "stops"), [("kit_raw/thing.glb", False), ("kit/.thing.unfinished", True), ("kit", True)]
)
def test_only_what_cannot_be_written_stops_the_run(tmp_path, monkeypatch, at, stops):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / at))

    monkeypatch.setattr(objects, "load_triangles", refuse)
    (tmp_path / "kit_raw").mkdir()
    path = save(tmp_path / "kit_raw" / "thing.glb", lopsided_scene())
    arguments = ("thing", path, None, tmp_path / "kit", SETTINGS)
    if stops:
        with pytest.raises(PermissionError):
            objects.write_object(*arguments)
    else:
        assert "Permission denied" in objects.write_object(*arguments)
