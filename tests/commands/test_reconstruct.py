"""From images to files with a tiny random model, and all ways in which that can fail."""

import errno
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import imageio_ffmpeg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trimesh
from PIL import Image
from tiny_reconstruction import ball, random_model

from lrm_jax import __main__, api
from lrm_jax.commands import arguments, reconstruct
from lrm_jax.images import cutout, load
from lrm_jax.mesh import surface
from lrm_jax.ops import cameras
from lrm_jax.parallel import messages
from lrm_jax.types import Cameras, InputError
from lrm_jax.weights import loading, model_file


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(__main__, "_use_compilation_cache", lambda: None)


@pytest.fixture
def lrm(tmp_path, monkeypatch, capfd):
    """Runs a command in a fresh folder. Returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[int, str, str]:
        small = ["--size", "32"] if argv[:1] == ("reconstruct",) else []
        code = __main__.main([*argv[:1], *small, *argv[1:]])
        return code, *capfd.readouterr()

    return run


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> str:
    return str(random_model(tmp_path_factory.mktemp("weights") / "tiny.safetensors"))


def save(path: Path | str, rgba: np.ndarray, **kw) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgba).save(path, **kw)
    return str(path)


def errors(stderr: str) -> list[str]:
    assert "Traceback" not in stderr
    return [line for line in stderr.splitlines() if line.startswith("lrm: error: ")]


def test_result_folders_are_in_the_output_folder_whatever_the_images_are_called(tmp_path):
    names = ["...png", "..png", "report.json.png", "a.png", os.fsdecode(b"caf\xe9.png")]
    paths = [tmp_path / name for name in names]
    for path in paths:
        Image.fromarray(ball()).save(path, "png")
    read = reconstruct.read_images(paths, False, messages.Stages(), {})
    folders = [name for name, _, _ in read]
    assert folders == ["image", "image-2", "report.json-2", "a", "caf\ufffd"]


@pytest.mark.filterwarnings("ignore:os.fork")  # imageio_ffmpeg's reader
def test_a_batch_with_bad_images_does_the_good_ones_and_exits_1(lrm, weights):
    save("in/a.png", ball())
    save("in/b.png", ball((20, 40, 200), 70))
    Path("in/broken.png").write_bytes(b"no image")
    save("in/long.png", np.pad(np.full((20, 20_000, 4), 255, np.uint8), ((1, 1), (0, 0), (0, 0))))
    save("copy/a.png", ball())
    argv = [
        "in",
        "copy/a.png",
        "nothing.png",
        "--weights",
        weights,
        "--resolution",
        "24",
        "--batch",
        "2",
    ]
    code, _, stderr = lrm(
        "reconstruct", *argv, "--video", "--frames", "6", "--views", "2", "--formats", "glb,obj,ply"
    )
    assert code == 1
    assert len(errors(stderr)) == 3
    told = " ".join(errors(stderr))
    assert "in/broken.png is not an image" in told and "nothing.png does not exist" in told
    assert "in/long.png: the image is too long" in told
    names = {
        "contact_sheet.png",
        "viewer.html",
        "turntable.mp4",
        "mesh.glb",
        "mesh.obj",
        "mesh.ply",
    }
    assert {p.name for p in Path("out").iterdir()} == {"a", "b", "a-2", "report.json"}
    for folder in ("a", "b", "a-2"):
        assert {p.name for p in Path("out", folder).iterdir()} == names
    check_files(Path("out/b"))
    # The same image in a full batch and in a padded one.
    assert Path("out/a/mesh.glb").read_bytes() == Path("out/a-2/mesh.glb").read_bytes()
    assert Path("out/a/mesh.glb").read_bytes() != Path("out/b/mesh.glb").read_bytes()
    summary = json.loads(Path("out/report.json").read_text())
    assert set(summary["images"]) == {"a", "b", "a-2"} and len(summary["failures"]) == 3
    assert summary["images"]["b"]["mesh.glb"] == Path("out/b/mesh.glb").stat().st_size
    assert {"read", "load", "encode", "render", "mesh", "files", "write", "total"} == set(
        summary["seconds"]
    )
    assert summary["model"]["family"] == "triposr" and "jax" in summary["versions"]


def check_files(folder: Path) -> None:
    loaded = {x: trimesh.load(folder / f"mesh.{x}", force="mesh") for x in ("glb", "obj", "ply")}
    assert len({len(x.faces) for x in loaded.values()}) == 1 and len(loaded["glb"].faces) > 10
    # y up in .glb and .obj; z up in .ply
    z_up = loaded["ply"].bounds
    np.testing.assert_allclose(loaded["obj"].bounds, loaded["glb"].bounds, atol=1e-5)
    np.testing.assert_allclose(loaded["glb"].bounds[:, 1], z_up[:, 2], atol=1e-5)
    video = imageio_ffmpeg.read_frames(str(folder / "turntable.mp4"))
    assert next(video)["size"] == (32, 32) and len(list(video)) == 6
    sheet = np.asarray(Image.open(folder / "contact_sheet.png"))
    assert (sheet == [20, 40, 200]).all(-1).any()
    assert b"<title>b</title>" in (folder / "viewer.html").read_bytes()


def test_a_texture_is_baked_into_every_format_that_has_one(lrm, weights):
    save("a.png", ball())
    argv = ["a.png", "--weights", weights, "--resolution", "16", "--views", "1", "--texture", "64"]
    code, _, stderr = lrm("reconstruct", *argv, "--formats", "glb,obj")
    assert (code, errors(stderr)) == (0, [])
    loaded = trimesh.load("out/a/mesh.glb", force="mesh")
    assert loaded.visual.material.baseColorTexture.size == (64, 64)
    assert {"mesh.obj", "mesh.mtl", "mesh.png"} < {p.name for p in Path("out/a").iterdir()}


def test_a_full_disk_is_one_line_and_leaves_nothing(lrm, weights, monkeypatch):
    save("a.png", ball())

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    code, _, stderr = lrm(
        "reconstruct", "a.png", "--weights", weights, "--resolution", "16", "--views", "1"
    )
    assert code == 2
    (line,) = errors(stderr)
    assert "out/a: No space left on device: free some space" in line
    assert not [p for p in Path("out").rglob("*") if p.is_file()]


def test_an_empty_surface_is_an_error_and_leaves_nothing(lrm, weights):
    save("a.png", ball())
    model, params, _ = loading.load_weights(weights)
    model_file.save_model(Path("high.safetensors"), model.clone(surface_level=1e9), params, {})
    code, _, stderr = lrm(
        "reconstruct",
        "a.png",
        "--weights",
        "high.safetensors",
        "--resolution",
        "16",
        "--views",
        "1",
    )
    assert code == 2
    (line,) = errors(stderr)
    assert "a.png: the surface is empty" in line and "1e+09" in line
    assert [p.name for p in Path("out").iterdir()] == ["report.json"]


def encoded(kind: str, rgba: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, kind)
    return buffer.getvalue()


NOISE = np.random.default_rng(0).integers(0, 256, (40, 40, 4), dtype=np.uint8)
BAD_IMAGES = {
    "truncated.png": (encoded("png", NOISE)[:2000], "cut short"),
    "corrupt.png": (encoded("png", NOISE)[:200] + b"\0" * 9000, "damaged"),
    "zero_size.png": (b"", "empty file"),
    "enormous.png": (encoded("png", np.zeros((11000, 11000), np.uint8)), "megapixels"),
    "transparent.png": (encoded("png", NOISE * np.uint8([1, 1, 1, 0])), "all is background"),
    "opaque.png": (encoded("png", NOISE[..., :3]), "add --remove-background"),
    "one_colour.png": (encoded("png", np.full((9, 9, 3), 80, np.uint8)), "all is background"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_one_line_and_leaves_nothing(lrm, name):
    data, message = BAD_IMAGES[name]
    Path(name).write_bytes(data)
    code, stdout, stderr = lrm("reconstruct", name, "--weights", "not looked at")
    assert (code, stdout) == (2, "")
    (line,) = errors(stderr)
    assert name in line and message in line
    assert [p.name for p in Path("out").iterdir()] == ["report.json"]


BAD_COMMANDS = {
    "missing image": ("reconstruct nothing.png", "nothing.png does not exist"),
    "folder without images": ("reconstruct empty", "empty has no images"),
    "missing weights": ("reconstruct a.png --weights nothing.safetensors", "nothing.safetensors"),
    "weights of no model": ("reconstruct a.png --weights a.png", "a.png"),
    "format": (
        "reconstruct a.png --formats glb,stl",
        "'stl' is not known: choose from glb, obj, ply",
    ),
    "resolution": ("reconstruct a.png --resolution 0", "--resolution 0 is out of range"),
    "batch": ("reconstruct a.png --batch -1", "--batch -1 is out of range"),
    "number": ("reconstruct a.png --views many", "argument --views: invalid int value: 'many'"),
    "flag": ("reconstruct a.png --vews 3", "unrecognized arguments: --vews 3: see lrm reconstruct"),
    "output is a file": ("reconstruct a.png --out a.png", "a.png is a file"),
    "output in a file": ("reconstruct a.png --out a.png/out", "a.png is a file"),
    "command": ("reconstrct a.png", "no command 'reconstrct': choose one of reconstruct"),
}


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_a_bad_command_is_one_line_and_leaves_nothing(lrm, name):
    save("a.png", ball())
    Path("empty").mkdir()
    argv, message = BAD_COMMANDS[name]
    code, stdout, stderr = lrm(*argv.split())
    assert (code, stdout) == (2, "")
    (line,) = errors(stderr)
    assert message in line and ": " in line.removeprefix("lrm: error: ")
    report = ["out"] if name == "missing image" else []  # the report lists the failure
    assert sorted(p.name for p in Path().iterdir()) == ["a.png", "empty", *report]


def test_a_read_only_output_folder_is_reported_before_the_work(lrm, monkeypatch):
    save("a.png", ball())
    Path("shut").mkdir()
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "shut"
    )  # root may write anywhere
    code, _, stderr = lrm("reconstruct", "a.png", "--out", "shut/out")
    assert code == 2 and "shut is read-only: choose another folder" in errors(stderr)[0]
    assert not Path("shut/out").exists()


def test_an_interrupt_is_130(lrm, monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(reconstruct, "main", interrupted)
    assert lrm("reconstruct")[0] == 130


def test_help_and_version(lrm):
    code, stdout, _ = lrm("--help")
    assert code == 0 and all(command in stdout for command in __main__.COMMANDS)
    assert lrm("--version")[1].startswith("lrm_jax ")
    assert lrm()[0] == 2


def test_python_m_gives_the_exit_code(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "lrm_jax", "nonsense"], capture_output=True, text=True
    )
    assert run.returncode == 2 and errors(run.stderr)


def test_a_background_of_one_colour_is_keyed_out_with_a_note(caplog):
    opaque = ball()
    opaque[opaque[..., 3] == 0] = 255
    ours = cutout.cut_out(opaque, "a.jpg")
    np.testing.assert_array_equal(ours[..., 3], ball()[..., 3])
    assert "a.jpg has no alpha channel" in caplog.text


def test_remove_background_leaves_an_alpha_channel_as_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", None)
    ours = cutout.cut_out(ball(), "a.png", remove_background=True)
    np.testing.assert_array_equal(ours, ball())


def test_remove_background_says_how_to_install_rembg(monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(InputError, match=r"pip install 'lrm_jax\[background\]'"):
        cutout.cut_out(np.full((4, 4, 4), 255, np.uint8), "a.png", remove_background=True)


def test_remove_background_uses_the_named_model(monkeypatch):
    named = []
    monkeypatch.setitem(
        sys.modules,
        "rembg",
        types.SimpleNamespace(
            new_session=named.append, remove=lambda rgb, session: ball(size=len(rgb))
        ),
    )
    cutout._rembg_session.cache_clear()
    ours = cutout.cut_out(np.full((48, 48, 4), 255, np.uint8), "a.png", remove_background=True)
    cutout._rembg_session.cache_clear()
    np.testing.assert_array_equal(ours, ball())
    assert named == ["u2net"]


@pytest.mark.parametrize("azimuth", [0.0, -90.0, 130.0])
def test_the_surface_is_turned_towards_the_source_camera(azimuth):
    camera = jax.tree.map(lambda x: x[0], cameras.orbit(1, 1.9, 15.0, 40.0, azimuth_deg=azimuth))
    orbit = cameras.orbit_of(camera)
    np.testing.assert_allclose(
        [orbit[x] for x in ("distance", "elevation_deg", "azimuth_deg", "fov_y_deg")],
        [1.9, 15, azimuth, 40],
        rtol=1e-5,
    )
    towards = np.asarray(camera.c2w)[None, :3, 3]
    one = surface.Surface(towards, np.zeros((0, 3), np.int32), np.zeros((1, 3), np.uint8), towards)
    turned = surface.moved(one, cameras.z_rotation(-90 - orbit["azimuth_deg"]))
    expected = [[0, -1.9 * np.cos(np.radians(15)), 1.9 * np.sin(np.radians(15))]]
    np.testing.assert_allclose(
        turned.vertices, expected, atol=1e-6
    )  # -y in the world is +z in glTF
    np.testing.assert_allclose(turned.normals, expected, atol=1e-6)


def test_the_bundled_examples_are_used_without_arguments(tmp_path, monkeypatch):
    save(tmp_path / "b.png", ball())
    save(tmp_path / "a.png", ball())
    (tmp_path / "LICENSE").write_text("CC0")
    monkeypatch.setattr(arguments, "EXAMPLES", tmp_path)
    assert load.find_images([arguments.EXAMPLES]) == [tmp_path / "a.png", tmp_path / "b.png"]


def test_a_family_without_a_surface_is_an_error():
    model = api.Model(types.SimpleNamespace(), {}, {"path": "a.pt", "family": "lvsm"})
    with pytest.raises(InputError, match=r"a\.pt: lvsm renders views.*weights of another family"):
        model.check_takes_images()


def test_a_source_camera_straight_above_has_an_orbit():
    orbit = cameras.orbit_of(
        Cameras(
            c2w=cameras.look_at(jnp.array([0, 0, 2.0]), jnp.zeros(3)),
            fxfycxcy=cameras.field_of_view(40.0),
        )
    )
    np.testing.assert_allclose([orbit["elevation_deg"], orbit["distance"]], [90, 2])


def test_a_field_that_is_not_finite_is_an_error(lrm, weights):
    save("a.png", ball())
    model, params, _ = loading.load_weights(weights)
    for i in range(3):  # infinities of both signs are adjacent
        params["decoder"][f"kernel_{i}"] *= 1e30
    model_file.save_model(Path("nan.safetensors"), model, params, {})
    code, _, stderr = lrm("reconstruct", "a.png", "--weights", "nan.safetensors", "--views", "1")
    assert code == 2 and "not finite" in errors(stderr)[0]
    assert [p.name for p in Path("out").iterdir()] == ["report.json"]
