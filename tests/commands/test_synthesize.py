"""From posed images to frames and a video with a tiny random LVSM, and all ways in which that can fail."""

import json
from pathlib import Path

import imageio_ffmpeg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from posed_folder import image, ring, write_transforms
from scipy.spatial.transform import Rotation

from lrm_jax import __main__, api, models
from lrm_jax.images import captures, model_input
from lrm_jax.ops import cameras, conventions, normalization
from lrm_jax.types import Views
from lrm_jax.weights import model_file, references


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(__main__, "_use_compilation_cache", lambda: None)


@pytest.fixture
def lrm(tmp_path, monkeypatch, capfd):
    """Runs `lrm synthesize --source scene` in a fresh folder. Returns the exit code and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[int, list[str]]:
        code = __main__.main(["synthesize", "--source", "scene", *argv])
        stderr = capfd.readouterr().err
        assert "Traceback" not in stderr
        return code, [line for line in stderr.splitlines() if line.startswith("lrm: error: ")]

    return run


def init(name: str):
    model = models.build(name, "tiny")
    shapes = references.param_shapes(model)
    rng = np.random.default_rng(0)
    # Larger than at the start of training, so that the images depend on the rays.
    params = jax.tree.map(lambda x: np.float32(rng.normal(scale=0.3, size=x.shape)), shapes)
    return model, params


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "lvsm.safetensors"
    model_file.save_model(path, *init("lvsm"), {})
    return str(path)


def write_colmap(folder: str, c2w: np.ndarray) -> None:
    Path(folder, "images").mkdir(parents=True)
    Path(folder, "sparse/0").mkdir(parents=True)
    lines = []
    for v, pose in enumerate(np.linalg.inv(c2w)):
        Image.fromarray(image(v)).save(Path(folder, "images", f"{v}.png"))
        x, y, z, w = Rotation.from_matrix(pose[:3, :3]).as_quat()
        numbers = " ".join(map(repr, map(float, [w, x, y, z, *pose[:3, 3]])))
        lines += [f"{v + 1} {numbers} 1 {v}.png", ""]
    Path(folder, "sparse/0/images.txt").write_text("\n".join(lines) + "\n")
    Path(folder, "sparse/0/cameras.txt").write_text("1 PINHOLE 24 18 30 30 12 9\n")


def frames_of(out: str = "out") -> np.ndarray:
    return np.stack([np.asarray(Image.open(p)) for p in sorted(Path(out, "frames").iterdir())])


@pytest.mark.filterwarnings("ignore:os.fork")  # imageio_ffmpeg's reader
def test_frames_video_sheet_and_report_are_written(lrm, weights):
    write_transforms("scene", ring())
    Path("out/frames").mkdir(parents=True)
    Path("out/frames/0007.png").write_bytes(b"of a longer run")
    code, errors = lrm("--weights", weights, "--frames", "3", "--batch", "2", "--views", "0,2,3")
    assert (code, errors) == (0, [])
    names = {"frames", "synthesis.mp4", "contact_sheet.png", "report.json", "path.json"}
    assert {p.name for p in Path("out").iterdir()} == names
    assert sorted(p.name for p in Path("out/frames").iterdir()) == [f"000{i}.png" for i in range(3)]
    frames = frames_of()
    assert frames.shape == (3, 16, 16, 3)
    assert np.abs(np.diff(frames.astype(int), axis=0)).max() > 2
    video = imageio_ffmpeg.read_frames("out/synthesis.mp4")
    assert next(video)["size"] == (16, 16) and len(list(video)) == 3
    summary = json.loads(Path("out/report.json").read_text())
    assert summary["source"]["views"] == [0, 2, 3] and summary["frames"] == 3
    assert summary["source"]["images"] == ["0.png", "2.png", "3.png"]
    assert {"read", "load", "render", "write", "total"} == set(summary["seconds"])
    assert summary["model"]["family"] == "lvsm" and "mean source camera" in summary["world"]


def test_rendering_the_written_path_in_other_batches_gives_the_same_frames(lrm, weights):
    write_transforms("scene", ring())
    common = ["--weights", weights, "--views", "3"]
    assert lrm(*common, "--path", "spiral", "--frames", "4", "--batch", "3") == (0, [])
    again = ["--path", "out/path.json", "--batch", "1", "--out", "again"]
    assert lrm(*common, *again) == (0, [])
    # One level, because the poses went through a file, and the products had another size.
    np.testing.assert_allclose(frames_of("again").astype(int), frames_of(), atol=1)


def test_frames_are_what_the_model_draws_with_cameras_normalised_by_the_sources(lrm, weights):
    c2w = ring()
    write_transforms("scene", c2w)
    assert lrm("--weights", weights, "--frames", "4") == (0, [])
    model, params, _ = model_file.load_model(weights)
    motion, scale = normalization.scene_motion(c2w, 4, "source_views")
    poses = motion @ c2w
    poses[:, :3, 3] *= scale
    np.testing.assert_allclose(np.abs(poses[:, :3, 3]).max(), 1 / 1.35, rtol=1e-6)
    images, boxes = zip(*(captures.crop(image(v), 16) for v in range(4)), strict=True)
    # 24 x 18 becomes 21.3 x 16, rounded to 24 x 16, and cropped to 16 x 16.
    np.testing.assert_allclose(boxes[0], [0, 1 / 6, 1, 2 / 3])
    intrinsics = np.tile([30 / 16, 30 / 18, 0.5, 0.5], (4, 1))
    source = Views(
        rgb=np.stack(images) / np.float32(255),
        cameras=cameras.Cameras(c2w=jnp.float32(poses), fxfycxcy=jnp.float32(intrinsics)),
    )
    source = jax.tree.map(lambda x: x[None], source)
    rays = cameras.pixel_rays(source.cameras, 16, 16)
    expected = model.apply({"params": params}, source, rays).rgb[0]
    # The path of four frames through four views is the views. The tolerance is half a level of rounding plus float32 error.
    np.testing.assert_allclose(frames_of() / 255, expected, atol=0.6 / 255)


def test_colmap_and_transforms_of_the_same_cameras_give_the_same_frames(lrm, weights):
    write_transforms("scene", ring())
    write_colmap("colmap", ring())
    common = ["--weights", weights, "--frames", "2", "--path", "orbit"]
    assert lrm(*common) == (0, [])
    assert lrm(*common, "--source", "colmap", "--out", "other") == (0, [])
    np.testing.assert_allclose(frames_of("other").astype(int), frames_of(), atol=1)


@pytest.mark.parametrize("written", [x for x in conventions.MEANINGS if x != "opengl-c2w"])
def test_a_wrong_convention_is_one_line_that_names_the_right_one(lrm, written):
    write_transforms("scene", ring(), written)
    code, errors = lrm("--weights", "unused")
    assert code == 2 and len(errors) == 1
    assert (
        "scene: the optical axes" in errors[0] and "poses in opengl-c2w were expected" in errors[0]
    )
    assert f"add --convention {written}, or --convention opengl-c2w" in errors[0]


def test_a_stated_convention_is_used():
    c2w = ring()
    for written in conventions.MEANINGS:
        matrices = conventions.write(c2w, written)
        misread = conventions.read(matrices, "opengl-c2w")
        taken = captures.in_convention(misread, "opengl-c2w", written)
        np.testing.assert_allclose(taken, c2w, atol=1e-12)
    # It is in doubt, but that only goes to the log.
    np.testing.assert_array_equal(captures.in_convention(c2w, "opengl-c2w", "opengl-c2w"), c2w)


def test_objects_keep_the_world_of_training():
    scene = captures.Capture([0], ["0.png"], [], ring(1), np.ones((1, 4)))
    training = {"config": {"data": {"name": "objects", "normalize": None}}}
    model = api.Model(models.build("lvsm", "tiny"), {}, {"training": training})
    motion, words = model_input.world(scene, scene.fxfycxcy, model.normalize)
    assert "the poses' own" in words
    np.testing.assert_array_equal(motion, np.eye(4))


@pytest.mark.parametrize(
    "views,count,expected",
    [(None, 3, [0, 1, 2]), (None, 31, list(range(0, 31, 2))), ("2", 5, [0, 4]), ("4,0", 5, [4, 0])],
)
def test_views_are_chosen(views, count, expected):
    assert captures.choose(views, count) == expected


def change(**fields):
    """Changes fields of transforms.json."""
    return lambda: write_transforms("scene", ring(), **fields)


def change_pose(function):
    def write():
        write_transforms("scene", ring())
        content = json.loads(Path("scene/transforms.json").read_text())
        for frame in content["frames"]:
            frame["transform_matrix"] = function(np.array(frame["transform_matrix"])).tolist()
        Path("scene/transforms.json").write_text(json.dumps(content))

    return write


def without_a_image():
    write_transforms("scene", ring())
    Path("scene/images/2.png").unlink()


def nothing():
    Path("scene").mkdir()


BAD = {
    "no cameras": (nothing, [], "neither transforms.json"),
    "an image is missing": (without_a_image, [], "2.png does not exist"),
    "not finite": (change_pose(lambda x: x * np.nan), [], "not finite"),
    "left-handed": (change_pose(lambda x: x * [1, -1, 1, 1]), [], "not a rotation and translation"),
    "scaled": (
        change_pose(lambda x: x @ np.diag([2, 2, 2, 1])),
        [],
        "not a rotation and translation",
    ),
    "transposed": (change_pose(lambda x: x.T), [], "transposed?"),
    "all equal": (change_pose(lambda x: np.eye(4)), ["--path", "spiral"], "stand at one place"),
    "turned image": (change(w=18, h=24), [], "not the aspect ratio of its camera"),
    "one view": (change(), ["--views", "1"], "only source view"),
    "too many views": (change(), ["--views", "5"], "choose 1 to 4"),
    "no such view": (change(), ["--views", "0,9"], "there is no view 9"),
    "a view twice": (change(), ["--views", "1,1"], "views '1,1'"),
    "views in words": (change(), ["--views", "all"], "views 'all'"),
    "no such path": (
        change(),
        ["--path", "circle"],
        "neither a file nor one of orbit, spiral, interpolate",
    ),
    "a bad path": (change(), ["--path", "scene/images/0.png"], "is not a transforms.json file"),
    "no frames": (change(), ["--frames", "0"], "--frames 0 is out of range"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_the_cause(lrm, case):
    write, argv, expected = BAD[case]
    write()
    code, errors = lrm("--weights", "unused", *argv)
    assert code == 2 and len(errors) == 1 and expected in errors[0], errors
    assert not Path("out").exists()


def test_equal_poses_are_an_error_on_every_path(lrm, weights):
    change_pose(lambda x: np.eye(4))()
    code, errors = lrm("--weights", weights)
    assert code == 2 and "stand at one place" in errors[0]


def test_a_family_of_single_images_is_sent_to_reconstruct(lrm, tmp_path):
    path = tmp_path / "triposr.safetensors"
    model_file.save_model(path, *init("triposr"), {})
    write_transforms("scene", ring())
    code, errors = lrm("--weights", str(path))
    assert code == 2 and "triposr reconstructs from one image: use `reconstruct`" in errors[0]
