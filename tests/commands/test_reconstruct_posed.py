"""From posed images to a mesh in their own world, with a model of silhouettes; and all ways in which that can fail."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import posed_ball
import pytest
import trimesh
from PIL import Image
from posed_ball import BLUE, CENTRE, RADIUS, RED, SCALE, hull, posed, write_folder
from tiny_models import tiny, untrained
from tiny_reconstruction import ball, random_model

import lrm_jax
from lrm_jax import __main__, api, models
from lrm_jax.images import captures, model_input
from lrm_jax.ops import cameras, normalization
from lrm_jax.types import Cameras, InputError
from lrm_jax.weights import model_file


@pytest.fixture
def lrm(tmp_path, monkeypatch, capfd):
    """Runs `lrm reconstruct` in a fresh folder with the model of silhouettes. Returns the exit code and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(__main__, "_use_compilation_cache", lambda: None)
    load = api.load
    monkeypatch.setattr(api, "load", lambda x, dtype=None: hull() if x == "hull" else load(x))

    def run(*argv: str) -> tuple[int, list[str]]:
        small = ["--size", "32", "--resolution", "24", "--views", "2"]
        code = __main__.main(["reconstruct", *small, *argv])
        stderr = capfd.readouterr().err
        assert "Traceback" not in stderr
        return code, [line for line in stderr.splitlines() if line.startswith("lrm: error: ")]

    return run


@pytest.fixture(scope="module")
def capture() -> captures.Capture:
    return lrm_jax.posed_images(*posed())


@pytest.fixture(scope="module")
def scene(capture) -> lrm_jax.Scene:
    return hull().reconstruct(capture)


@pytest.mark.parametrize("normalize", normalization.BY_ALL_SOURCES)
def test_the_mesh_is_in_the_world_and_unit_of_the_posed_images(capture, normalize):
    """The world that the model was trained in makes no difference."""
    mesh = hull(normalize=normalize).reconstruct(capture).mesh(resolution=64)
    distance = np.linalg.norm(mesh.vertices - CENTRE, axis=1)
    # Eight silhouettes leave corners, and a step of the grid is up to 11% of the radius.
    np.testing.assert_allclose(np.median(distance), RADIUS * SCALE, rtol=0.1)
    np.testing.assert_allclose(mesh.bounds.mean(0), CENTRE, atol=0.1 * RADIUS * SCALE)
    assert mesh.volume > 0  # not turned inside out
    outward = ((mesh.vertices - CENTRE) * mesh.vertex_normals).sum(-1) / distance
    assert np.mean(outward > 0.3) > 0.95
    np.testing.assert_allclose(np.linalg.norm(mesh.vertex_normals, axis=1), 1, atol=1e-5)


def test_vertices_have_the_colours_of_the_images(scene):
    surface = scene.surface(48)
    height = (surface.vertices - CENTRE) @ posed_ball.WORLD[:3, 2] / SCALE / (RADIUS * SCALE)
    red_less_blue = surface.colors[:, 0].astype(int) - surface.colors[:, 2]
    assert red_less_blue[height > 0.7].mean() > 60 and red_less_blue[height < -0.7].mean() < -60


def test_views_from_cameras_in_that_world_show_the_images(capture, scene):
    size, (_, c2w, _) = 32, posed()
    square = posed_ball.ring().fxfycxcy
    own = Cameras(c2w=c2w, fxfycxcy=square)
    shown = scene.render(own, size=size)
    wanted, _ = model_input.crop_images(capture, size)
    wanted = wanted.min(-1) < 128
    both = (shown[..., 3] > 128) & wanted
    assert both.sum() > 0.9 * ((shown[..., 3] > 128) | wanted).sum()
    assert both.sum() > 0.9 * wanted.sum() > 1000
    rendering = next(scene.renderings(own, size))
    middle = rendering.depth[size // 2, size // 2]
    # 0.025 units of the model's world between samples, and the corners of the hull.
    np.testing.assert_allclose(middle, SCALE * (2.5 - RADIUS), rtol=0.03)
    np.testing.assert_array_equal(scene.cameras(None).c2w, c2w[:1])
    # `captures.crop` changes the aspect ratio by up to 4 of 106 pixels.
    np.testing.assert_allclose(scene.cameras(None).fxfycxcy, square[:1], rtol=0.04)


def test_an_orbit_turns_about_the_up_direction_of_the_images(scene):
    orbit = lrm_jax.orbit(5)
    frames = scene.render(orbit, size=32).astype(int)
    alpha = frames[..., 3] > 128
    row, column = np.mgrid[:32, :32]
    for frame, inside in zip(frames, alpha, strict=True):
        # A pixel off, because the silhouettes are made of pixels.
        assert abs(row[inside].mean() - 15.5) < 1 and abs(column[inside].mean() - 15.5) < 1
        red_less_blue = frame[..., 0] - frame[..., 2]
        assert red_less_blue[inside & (row < 12)].mean() > 60
        assert red_less_blue[inside & (row > 19)].mean() < -60
    first = scene.cameras(orbit)
    np.testing.assert_allclose(first.c2w[0], scene.camera.c2w, atol=1e-3)  # of 100, float32
    np.testing.assert_allclose(first.fxfycxcy[0, 1], scene.camera.fxfycxcy[1], rtol=1e-5)
    placed = scene.cameras(lrm_jax.orbit(3, distance=50, elevation=0)).c2w
    np.testing.assert_allclose(np.linalg.norm(placed[:, :3, 3] - CENTRE, axis=1), 50, rtol=1e-4)
    up = posed_ball.WORLD[:3, 2] / SCALE
    np.testing.assert_allclose((placed[:, :3, 3] - CENTRE) @ up, 0, atol=50e-3)


def test_a_folder_and_its_arrays_give_the_same_scene(capture, scene, tmp_path):
    write_folder(tmp_path / "capture", *posed())
    for source in (tmp_path / "capture", str(tmp_path / "capture")):
        read = hull().reconstruct(source)
        for ours, expected in leaves(read, scene):
            np.testing.assert_allclose(ours, expected, atol=1e-5)
    few = hull().reconstruct(lrm_jax.read_capture(tmp_path / "capture", views=[1, 4, 6]))
    np.testing.assert_array_equal(few.encoded.rgb[0, 1], scene.encoded.rgb[0, 4])
    floats = [x[..., :4] / np.float32(255) for x in posed()[0]]
    given = lrm_jax.posed_images(floats, capture.c2w, capture.fxfycxcy)
    np.testing.assert_array_equal(given.images, capture.images)


def leaves(a, b):
    return zip(jax.tree.leaves(a.encoded), jax.tree.leaves(b.encoded), strict=True)


def test_images_of_several_sizes_have_their_own_cameras(scene):
    images, c2w, fxfycxcy = posed()
    larger = posed(size=96)[0]
    mixed = lrm_jax.posed_images([*images[:4], *larger[4:]], c2w, fxfycxcy)
    mesh, expected = hull().reconstruct(mixed).mesh(32), scene.mesh(32)
    np.testing.assert_allclose(mesh.bounds, expected.bounds, atol=0.1 * RADIUS * SCALE)


def test_a_background_of_one_colour_is_removed_from_each_image(capture, scene):
    images, c2w, fxfycxcy = posed()
    opaque = []
    for i, rgba in enumerate(images):
        grey = np.full_like(rgba, 20 * i)[..., :3]
        opaque.append(np.where(rgba[..., 3:] > 0, rgba[..., :3], grey))
    found = hull().reconstruct(lrm_jax.posed_images(opaque, c2w, fxfycxcy))
    np.testing.assert_array_equal(found.encoded.rgb, scene.encoded.rgb)
    np.testing.assert_array_equal(found.image[..., 3], capture.images[0][..., 3])


def test_all_files_are_written(lrm):
    write_folder("my capture", *posed())
    argv = ["--source", "my capture", "--weights", "hull", "--formats", "glb,ply,obj"]
    assert lrm(*argv, "--video", "--frames", "3", "--source-views", "7", "--views", "3") == (0, [])
    names = {"mesh.glb", "mesh.ply", "mesh.obj", "contact_sheet.png", "viewer.html", "turntable.mp4"}  # fmt: skip
    assert {p.name for p in Path("out").iterdir()} == {"my capture", "report.json"}
    assert {p.name for p in Path("out/my capture").iterdir()} == names
    report = json.loads(Path("out/report.json").read_text())
    told = report["images"]["my capture"]
    assert told["views"] == [0, 1, 2, 4, 5, 6, 7] and told["names"][3] == "4.png"
    assert told["mesh.ply"] == Path("out/my capture/mesh.ply").stat().st_size
    assert report["failures"] == {} and report["model"]["family"] == "hull"
    own = trimesh.load("out/my capture/mesh.ply", force="mesh")
    np.testing.assert_allclose(own.bounds.mean(0), CENTRE, atol=0.1 * RADIUS * SCALE)
    x, y, z = own.vertices.T
    turned = trimesh.load("out/my capture/mesh.glb", force="mesh")
    expected = np.stack([x, z, -y], -1)
    np.testing.assert_allclose(turned.bounds, [expected.min(0), expected.max(0)], atol=1e-3)


def test_one2345_makes_a_mesh_in_the_world_of_the_images(lrm, tmp_path):
    """Its untrained field is a ball, which is moved with the world."""
    model = models.build("one2345", "tiny")
    capture = lrm_jax.posed_images(*posed(3))
    _, to_model = model_input.source_views(capture, model.image_size, model.normalize)
    model_file.save_model(tmp_path / "one2345.safetensors", model, untrained("one2345"), {})
    write_folder("capture", *posed(3))
    argv = ["--source", "capture", "--weights", str(tmp_path / "one2345.safetensors")]
    assert lrm(*argv, "--formats", "ply", "--level", "0") == (0, [])
    mesh = trimesh.load("out/capture/mesh.ply", force="mesh")
    inside = mesh.vertices @ to_model[:3, :3].T + to_model[:3, 3]
    extent = np.ptp(inside, axis=0)
    assert (extent > 0.6).all() and (extent < 1.6).all() and np.abs(inside.mean(0)).max() < 0.3
    scene = lrm_jax.load(tmp_path / "one2345.safetensors").reconstruct("capture")
    field, rgb = scene.model.query(scene.encoded, inside.astype(np.float32))
    # Straight edges of a grid of 0.09.
    assert np.quantile(np.abs(field), 0.9) < 0.02
    colors = mesh.visual.vertex_colors[:, :3] / 255
    np.testing.assert_allclose(colors, rgb, atol=0.01)
    frames = scene.render(lrm_jax.orbit(2), size=16)
    assert frames.shape == (2, 16, 16, 4) and frames[..., 3].max() > 128


def test_the_viewer_shows_the_object_upright_and_from_the_first_camera(lrm):
    write_folder("capture", *posed())
    assert lrm("--source", "capture", "--weights", "hull")[0] == 0
    page = Path("out/capture/viewer.html").read_text()
    data = base64.b64decode(max(re.findall(r"[A-Za-z0-9+/=]{1000,}", page), key=len))
    (shown,) = trimesh.load(io.BytesIO(data), file_type="glb", process=False).geometry.values()
    np.testing.assert_allclose(shown.bounds.mean(0), 0, atol=0.1 * RADIUS * SCALE)
    height = shown.vertices[:, 1]
    red, _, blue = shown.visual.vertex_attributes["color"][:, :3].astype(float).T
    assert (red > blue)[height > 6].all() and (red < blue)[height < -6].all()
    distance = float(re.search(r"distance: ([\d.]+)", page)[1])
    np.testing.assert_allclose(distance, 2.5 * SCALE, rtol=1e-3)
    first = hull().reconstruct("capture").facing @ np.append(
        captures.read_capture("capture").c2w[0, :3, 3], 1
    )
    np.testing.assert_allclose(first[0], 0, atol=1e-3 * distance)
    assert first[1] < -0.99 * distance * np.cos(np.radians(20.1)) and first[2] < 0


def test_the_contact_sheet_has_a_row_of_the_images(lrm):
    write_folder("capture", *posed())
    assert lrm("--source", "capture", "--weights", "hull", "--views", "4")[0] == 0
    sheet = np.asarray(Image.open("out/capture/contact_sheet.png"))
    # Four images beside the first one; the colours of rendered views are blended.
    for colour in (RED, BLUE):
        assert (np.abs(sheet.astype(int) - colour).max(-1) < 20).sum() > 4 * 50


def change(function, **fields):
    """Writes a folder with changed images, poses and intrinsics."""

    def write():
        images, c2w, fxfycxcy = posed()
        write_folder("capture", *function(images, c2w, fxfycxcy))
        content = json.loads(Path("capture/transforms.json").read_text())
        Path("capture/transforms.json").write_text(json.dumps(content | fields))

    return write


def as_it_is(*arrays):
    return arrays


def noisy(images, c2w, fxfycxcy):
    noise = np.random.default_rng(0).integers(0, 256, (*images[0].shape[:2], 3), dtype=np.uint8)
    return [*images[:5], noise, *images[6:]], c2w, fxfycxcy


def invisible(images, c2w, fxfycxcy):
    return [*images[:5], images[5] * np.uint8([1, 1, 1, 0]), *images[6:]], c2w, fxfycxcy


def parallel(images, c2w, fxfycxcy):
    poses = np.tile(c2w[0], (8, 1, 1))
    poses[:, :3, 3] += np.arange(8)[:, None] * c2w[0, :3, 0]
    return images, poses, fxfycxcy


def reversed_one(images, c2w, fxfycxcy):
    c2w = c2w.copy()
    c2w[3, :3, :3] = c2w[3, :3, :3] @ np.diag([-1, 1, -1])
    return images, c2w, fxfycxcy


def missing():
    change(as_it_is)()
    Path("capture/images/3.png").unlink()


def another_shape():
    change(as_it_is)()
    Image.fromarray(np.zeros((40, 40, 4), np.uint8)).save("capture/images/3.png")


BAD = {
    "no cameras": (lambda: Path("capture").mkdir(), [], "capture has neither transforms.json"),
    "no folder": (lambda: None, [], "capture has neither transforms.json"),
    "an image is missing": (missing, [], "3.png does not exist"),
    "an image of another shape": (another_shape, [], "3.png is 40x40, not the aspect ratio"),
    "two views": (change(as_it_is), ["--source-views", "2"], "2 source views: give 3 or more"),
    "too many views": (change(as_it_is), ["--source-views", "9"], "choose 1 to 8"),
    "no such view": (change(as_it_is), ["--source-views", "0,1,8"], "there is no view 8"),
    "no mask": (change(noisy), [], "5.png has no alpha channel, and its background is not of one colour: add --remove-background"),  # fmt: skip
    "nothing shown": (change(invisible), [], "5.png shows no object"),
    "parallel axes": (change(parallel), [], "axes do not meet"),
    "one camera looks away": (change(reversed_one), [], "source view 3 looks away"),
    "a fisheye lens": (change(as_it_is, camera_model="OPENCV_FISHEYE"), [], "capture: a OPENCV_FISHEYE camera is not a pinhole"),  # fmt: skip
    "images as well": (change(as_it_is), ["a.png"], "IMAGE has no effect with --source"),
    "recentred": (change(as_it_is), ["--recenter"], "--recenter has no effect with --source"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(lrm, case):
    write, argv, expected = BAD[case]
    write()
    code, errors = lrm("--source", "capture", "--weights", "hull", *argv)
    assert code == 2 and len(errors) == 1 and expected in errors[0], errors
    assert not Path("out").exists()


def test_arguments_of_posed_images_need_them(lrm):
    for argv in (["--source-views", "3"], ["--convention", "opencv-w2c"]):
        code, (line,) = lrm("a.png", *argv)
        assert code == 2 and f"{argv[0]} has no effect without --source" in line


def test_a_stated_convention_is_used(lrm, scene):
    images, c2w, fxfycxcy = posed()
    write_folder("capture", images, cameras.opengl_to_opencv(c2w), fxfycxcy)  # so OpenCV's axes
    code, (line,) = lrm("--source", "capture", "--weights", "hull")
    assert code == 2 and "add --convention opencv-c2w" in line
    argv = ["--convention", "opencv-c2w", "--formats", "ply"]
    assert lrm("--source", "capture", "--weights", "hull", *argv) == (0, [])
    mesh = trimesh.load("out/capture/mesh.ply", force="mesh")
    np.testing.assert_allclose(mesh.bounds, scene.mesh(24).bounds, atol=1e-3)


def test_each_kind_of_family_says_what_it_takes(lrm, tmp_path):
    write_folder("capture", *posed())
    Image.fromarray(ball()).save("a.png")
    single = str(random_model(tmp_path / "triposr.safetensors"))
    code, (line,) = lrm("--source", "capture", "--weights", single)
    assert code == 2 and "triposr reconstructs from one image: give it one, without" in line
    model_file.save_model(tmp_path / "lvsm.safetensors", *tiny("lvsm"), {})
    code, (line,) = lrm("--source", "capture", "--weights", str(tmp_path / "lvsm.safetensors"))
    assert code == 2 and "lvsm renders views and makes no mesh" in line
    code, (line,) = lrm("a.png", "--weights", "hull")
    assert code == 2 and "hull reconstructs from posed images: give a folder" in line
    assert not Path("out").exists()
    with pytest.raises(InputError, match="hull reconstructs from posed images: use `reconstruct`"):
        hull().synthesize("capture")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (ball(), {}, "takes posed images: give a folder"),
        ([ball()] * 3, {}, "takes posed images: give a folder"),
        ("nothing", {}, "nothing has neither transforms.json"),
        (None, {"recenter": True}, "posed images keep their place"),
    ],
)
def test_the_library_says_what_posed_images_are(capture, source, options, message):
    with pytest.raises(InputError, match=message):
        hull().reconstruct(capture if source is None else source, **options)


def test_a_capture_is_an_error_for_other_families(capture, tmp_path):
    model = lrm_jax.load(random_model(tmp_path / "triposr.safetensors"))
    with pytest.raises(InputError, match="triposr reconstructs from one image"):
        model.reconstruct(capture)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, c, f: (x[:7], c, f), r"7 images with c2w \[8, 4, 4\]"),
        (lambda x, c, f: (x, c[:, :3], f), r"c2w \[8, 3, 4\]"),
        (lambda x, c, f: (x, c, f[:, :3]), r"fxfycxcy \[8, 3\]"),
        (lambda x, c, f: (x, 2 * c, f), "not a rotation"),
        (lambda x, c, f: (x, c.swapaxes(1, 2), f), "transposed"),
        (lambda x, c, f: (x, c, 100 * f), "as fractions of its sides"),
        (lambda x, c, f: ([y.astype(int) for y in x], c, f), "array of int64"),
    ],
)
def test_arrays_that_are_no_posed_images_are_an_error(change, message):
    with pytest.raises(InputError, match=message):
        lrm_jax.posed_images(*change(*posed()))


def test_a_folder_can_be_used_after_it_was_copied(lrm):
    """Paths are relative to transforms.json."""
    write_folder("here", *posed())
    shutil.move("here", "there")
    assert lrm("--source", "there", "--weights", "hull", "--source-views", "0,3,5") == (0, [])
