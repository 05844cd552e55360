"""The command with a model that knows the answer, so that any wrong change of world or unit is noticed."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image
from three_balls import (
    BALLS,
    DISTANCE,
    FOV,
    RADII,
    SIZE,
    SOURCE,
    camera,
    draw,
    write_object,
)

from lrm_jax import __main__, models
from lrm_jax.data import elements, held_out
from lrm_jax.evaluation import objects, report_page, scenes
from lrm_jax.evaluation.scores import compiled, nearest_source, on_white
from lrm_jax.metrics import lpips, mean_object, surface_metrics
from lrm_jax.ops import cameras, normalization
from lrm_jax.types import Batch, Cameras, InputError, Rendering, Views
from lrm_jax.weights import loading, model_file


class KnowsTheBalls(nn.Module):
    """A model that knows the balls. `world` maps the world of the data to its own."""

    world: tuple = tuple(map(tuple, np.eye(4)))
    broken: bool = False
    radius: float = 1.0
    surface_level: float = 0.0
    distance: float = DISTANCE

    def _balls(self):
        world = np.array(self.world)
        scale = np.cbrt(np.linalg.det(world[:3, :3]))
        return BALLS @ world[:3, :3].T + world[:3, 3], RADII * scale

    def render(self, scene, rays, key=None):
        rendering = draw(rays, *(jnp.asarray(x, jnp.float32) for x in self._balls()))
        return rendering.replace(rgb=rendering.rgb + scene["level"][:, None, None, None, None])

    @jax.numpy_rank_promotion("allow")
    def query(self, scene, xyz):
        balls, radii = self._balls()
        field = (radii - jnp.linalg.norm(xyz[..., None, :] - balls, axis=-1)).max(-1)
        return field + scene["level"][:, None], jnp.ones_like(xyz)


class Oracle(KnowsTheBalls):
    """It takes single images."""

    def prepare(self, rgba):
        camera = cameras.orbit(1, self.distance, 0.0, FOV)
        return Views(rgb=jnp.stack([x[None, ..., :3] / 255 for x in rgba]), cameras=jax.tree.map(lambda x: x[None], camera))  # fmt: skip

    def encode(self, source):
        return {"level": jnp.full(source.rgb.shape[0], jnp.nan if self.broken else 0.0)}


def upright(azimuth: float = SOURCE[0]) -> np.ndarray:
    a = np.radians(-azimuth)
    world = np.eye(4)
    world[:2, :2] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
    return world


def seen_by_source() -> np.ndarray:
    there = np.eye(4)
    there[:3] = [[1, 0, 0, 0], [0, 0, 1, -DISTANCE], [0, -1, 0, 0]]
    return there @ np.linalg.inv(camera(*SOURCE).c2w.astype(float))


@pytest.fixture
def lrm(tmp_path, monkeypatch, capfd):
    """Runs `lrm evaluate` in a fresh folder with the given model. Returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(__main__, "_use_compilation_cache", lambda: None)
    for name, value in {"NUM_POINTS": 3000, "NUM_AZIMUTHS": 8, "ICP_STEPS": 5}.items():
        monkeypatch.setattr(surface_metrics, name, value)

    def run(*argv: str, model=None) -> tuple[int, str, str]:
        if model is not None:
            info = {"family": "oracle", "variant": "", "path": "oracle", "training": {"steps": 1}}
            monkeypatch.setattr(loading, "load_weights", lambda *_: (model, {}, info))
        options = ["--size", str(SIZE)]
        if "--index" not in argv:
            options += ["--views", "3", "--resolution", "40"]
        code = __main__.main(["evaluate", *options, *argv])
        return code, *capfd.readouterr()

    return run


def read_summary(path: str = "out/evaluation.json") -> dict:
    return json.loads(Path(path).read_text())


@pytest.mark.parametrize("frame", ["azimuth", "source"])
def test_a_model_that_knows_the_answer_scores_as_such(lrm, monkeypatch, frame):
    write_object(Path("data/a"))
    write_object(Path("data/b"))
    world = {"azimuth": upright, "source": seen_by_source}[frame]()
    families = {"azimuth": (), "source": (Oracle.__module__,)}[frame]
    monkeypatch.setattr(objects, "SEEN_BY_SOURCE", families)
    code, stdout, _ = lrm("--data", "data", model=Oracle(tuple(map(tuple, world))))
    assert code == 0
    summary = read_summary()
    mean = summary["mean"]
    # 8-bit rounding, and one or two pixels of an outline that float32 decides differently.
    assert mean["psnr"] > 30 and mean["ssim"] > 0.98 and mean["iou"] > 0.98
    assert mean["lpips"] is None
    # 3000 points on an area of about 4: the nearest is 0.02 away, or twice that if the box is 2 instead of 1.3.
    assert summary["unaligned"]["mean"]["chamfer"] < 0.03
    assert mean["chamfer"] < 0.04 and mean["fscore@0.1"] > 0.995
    assert set(mean) == {"psnr", "ssim", "lpips", "iou", "chamfer", "fscore@0.1", "fscore@0.2", "fscore@0.5"}  # fmt: skip
    assert set(summary["objects"]["a"]) == set(mean) and set(summary["objects"]) == {"a", "b"}
    assert summary["skipped"] == {} and summary["count"]["chamfer"] == 2
    assert {"protocol", "baseline", "median", "model"} <= set(summary)
    assert re.search(r"^mean +\d", stdout, re.M) and re.search(r"^mean object \(baseline\)", stdout, re.M)  # fmt: skip


def test_the_size_in_the_image_decides_the_scale():
    ball = np.zeros((200, 200, 4), np.uint8)
    rows, columns = np.indices((200, 200)) - 99.5
    ball[np.hypot(rows, columns) < 80] = 255
    model = models.build("triposr", "tiny")
    assumed = jax.tree.map(lambda x: np.asarray(x[0, 0]), model.prepare([ball]).cameras)
    alignment = objects.alignment_of(model, {}, None)
    assert alignment.scale == "image"
    world = objects.motion_to_model(model, ball, camera(*SOURCE), assumed, alignment)
    scale = np.cbrt(np.linalg.det(world[:3, :3]))
    # An object that fills 160 of 200 pixels at a distance of 2.8 fills 85 % of the assumed camera's image, at 1.9.
    true = 160 / 200 * DISTANCE / camera(*SOURCE).fxfycxcy[0]
    wanted = 0.85 * assumed.fxfycxcy[0] ** -1 * np.linalg.norm(assumed.c2w[:3, 3])
    assert scale * true == pytest.approx(wanted, rel=0.02)  # rounded to whole pixels
    np.testing.assert_allclose(world[:3, :3] / scale, upright()[:3, :3], atol=1e-6)
    poses = objects.move_poses(world, camera(*SOURCE).c2w[None])
    np.testing.assert_allclose(np.linalg.det(poses[:, :3, :3]), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(poses[0, :3, 3]), scale * DISTANCE, rtol=1e-5)


def test_a_model_trained_in_the_world_of_the_image_is_evaluated_in_it(tmp_path):
    write_object(tmp_path / "a")
    item = held_out.read(tmp_path / "a", 3, SIZE)
    model = models.build("triposr", "tiny")
    data = {"normalize": "image", "assumed_camera": [1.9, 40.0]}
    alignment = objects.alignment_of(model, {"config": {"data": data}}, None)
    posed = objects.posed_by_image(model, alignment, item)
    # Near the origin, the crop shows the same as the assumed camera.
    box = np.array(elements.source_crop(item.source, 32, 0.85, "a")[1])
    cropped = cameras.crop_intrinsics(item.source_camera.fxfycxcy[None], box[None])
    pose = objects.move_poses(posed.to_model, item.source_camera.c2w[None])
    seen = Cameras(c2w=jnp.asarray(pose), fxfycxcy=jnp.asarray(cropped))
    x, _, z = pose[0, :3, 3]
    points = 0.02 * jnp.array([[[0, 0, 0], [0, 1, 0], np.array([-z, 0, x]) / np.hypot(x, z)]])
    assumed = cameras.orbit(1, 1.9, float(np.degrees(np.arctan2(z, x))), 40.0)
    np.testing.assert_allclose(assumed.fxfycxcy, posed.source.cameras.fxfycxcy[0])
    np.testing.assert_allclose(
        cameras.project(seen, points)[0], cameras.project(assumed, points)[0], atol=1e-3
    )
    with pytest.raises(
        InputError, match="--scale data: this model was trained with the scale of the image"
    ):
        objects.alignment_of(model, {"config": {"data": data}}, "data")


def test_lrm_is_given_the_normalised_true_camera(tmp_path):
    write_object(tmp_path / "a")
    item = held_out.read(tmp_path / "a", 3, SIZE)
    model = models.build("lrm", "tiny")
    alignment = objects.alignment_of(model, {"steps": 1}, None)
    posed = objects.posed_by_image(model, alignment, item)
    both = jax.tree.map(
        lambda one, more: jnp.asarray(np.concatenate([one[None], more])),
        item.source_camera,
        item.target_cameras,
    )
    wanted = cameras.normalize_to_source(both)
    np.testing.assert_allclose(posed.source.cameras.c2w[0, 0], wanted.c2w[0], atol=1e-5)
    np.testing.assert_allclose(posed.source.cameras.fxfycxcy[0, 0], wanted.fxfycxcy[0])
    np.testing.assert_allclose(posed.targets.c2w, wanted.c2w[1:], atol=1e-5)


def test_a_model_file_with_bad_objects_beside_good_ones(lrm, tmp_path):
    model = models.build("triposr", "tiny", surface_level=0.37)
    source = Views(rgb=jnp.zeros((1, 1, 32, 32, 3)), cameras=cameras.orbit(1, 2.0, 0.0, 40.0))
    rays = cameras.pixel_rays(jax.tree.map(lambda x: x[None], source.cameras), 2, 2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), source, rays)["params"]
    rng = np.random.default_rng(0)

    def random(x):
        fan_in = x.shape[-2] if x.ndim > 1 else 100
        return rng.normal(scale=fan_in**-0.5, size=x.shape).astype(np.float32)

    params = jax.tree.map(random, shapes)
    model_file.save_model(tmp_path / "tiny.safetensors", model, params, {})
    for name in ("good", "no_points", "nan_pose", "no_image", "few", "clear"):
        write_object(Path("data") / name, 3 if name == "few" else 5, name != "no_points")
    np.save("data/nan_pose/pose/001.npy", np.full((3, 4), np.nan))
    Path("data/no_image/rgba/002.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((SIZE, SIZE, 4), np.uint8)).save("data/clear/rgba/001.png")
    code, stdout, stderr = lrm("--data", "data", "--weights", "tiny.safetensors", "--out", "x/y")
    assert code == 1 and "Traceback" not in stderr  # some objects were lost
    assert "done: 2 of 6 evaluated, 4 could not be used: " in stderr.splitlines()[-1]
    assert (
        stderr.count("(the first batch takes longer: it is compiled)") == 1 and "\r" not in stderr
    )
    summary = read_summary("x/y/evaluation.json")
    assert set(summary["objects"]) == {"good", "no_points"}
    causes = {
        "no_points": "no surface metrics: points.npy is missing",
        "nan_pose": "pose/001.npy has values that are not finite",
        "no_image": "002.png is not an image",
        "few": "3 views are too few for 1 source and 3 target views",
        "clear": "transparent everywhere",
    }
    assert set(summary["skipped"]) == set(causes)
    for uid, cause in causes.items():
        assert cause in summary["skipped"][uid]
        assert re.search(f"^lrm: {uid}: .*{cause}", stderr, re.M)
    good, other = summary["objects"]["good"], summary["objects"]["no_points"]
    assert other["chamfer"] is None and summary["count"]["chamfer"] == 1
    assert summary["mean"]["chamfer"] == pytest.approx(good["chamfer"])
    assert summary["mean"]["psnr"] == pytest.approx((good["psnr"] + other["psnr"]) / 2)
    assert "image" in summary["protocol"]["world"]  # no record of training
    page = Path("x/y/evaluation.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 2 and "http" not in page.split("<dl>")[0]
    assert re.findall("<h3>(.*?)</h3>", page) == report_page.worst_first(summary["objects"])
    assert "<title>tiny.safetensors on data (all)</title>" in page


def test_what_is_not_finite_or_has_no_surface_is_named(lrm):
    write_object(Path("data/a"))
    code, _, stderr = lrm("--data", "data", model=Oracle(broken=True))
    assert code == 2 and "not finite" in stderr.splitlines()[-1]
    code, _, stderr = lrm("--data", "data", model=Oracle(surface_level=5.0))
    assert code == 0 and re.search(
        "^lrm: a: no Chamfer distance, F-scores of 0: the surface is empty", stderr, re.M
    )
    summary = read_summary()
    assert summary["mean"]["fscore@0.2"] == 0 and summary["mean"]["chamfer"] is None
    assert summary["unaligned"]["mean"]["fscore@0.2"] == 0


def test_the_baseline_can_come_from_training_objects(lrm):
    names = [f"x{chr(97 + i)}{chr(97 + j)}y" for i in range(8) for j in range(8)]
    train = [x for x in names if not held_out.splits.in_validation(x)][:2]
    val = [x for x in names if held_out.splits.in_validation(x)][:1]
    for name in train + val:
        write_object(Path("data") / name)
    argv = ["--data", "data", "--split", "val", "--baseline-data", "data"]
    code, _, _ = lrm(*argv, model=Oracle(tuple(map(tuple, upright()))))
    summary = read_summary()
    assert code == 0 and list(summary["objects"]) == val
    assert "2 training objects" in summary["protocol"]["baseline"]
    # All are the same object, from the same sides.
    assert summary["baseline"]["images"] == "mean image by view"
    assert summary["baseline"]["mean"]["iou"] == 1 and summary["baseline"]["mean"]["psnr"] > 90
    assert 0.05 < summary["baseline"]["mean"]["chamfer"] < 0.5


def test_lpips_is_computed_on_images_on_white(lrm, monkeypatch):
    write_object(Path("data/a"), points=False)
    monkeypatch.setattr(lpips, "load", lambda path: {"path": jnp.float32(path == "w.safetensors")})
    monkeypatch.setattr(
        lpips, "distance", lambda params, x, y: params["path"] * (x.max((-3, -2, -1)) + 0 * y.sum())
    )
    model = Oracle(tuple(map(tuple, upright())))
    code, _, _ = lrm("--data", "data", "--lpips", "w.safetensors", model=model)
    assert code == 0 and read_summary()["mean"]["lpips"] == 1
    assert read_summary()["baseline"]["mean"]["lpips"] is None


def test_the_nearest_source_is_that_of_each_target():
    def poses(*x):
        c2w = np.tile(np.eye(4), (len(x), 1, 1))
        c2w[:, 0, 3] = x
        return c2w

    found = nearest_source(poses(0, 5, 10), poses(9, 1, 4, 20))
    np.testing.assert_array_equal(found, [2, 0, 1, 2])


def test_the_worst_come_first():
    objects = {"a": {"psnr": 20.0}, "b": {"psnr": 9.5}, "c": {"psnr": 30.0}}
    assert report_page.worst_first(objects) == ["b", "a", "c"]


def test_names_are_escaped_on_the_page():
    values = {"psnr": 1.0, "iou": None}
    summary = {
        "mean": values, "median": values, "count": {"psnr": 1, "iou": 0}, "baseline": {"name": "<b>", "mean": values, "others": {"<i>": values}},
        "model": {"path": "<m>"}, "data": {"path": "d", "split": "all", "objects": 1}, "protocol": {"x": {"y": "a & b"}},
        "skipped": {"<b>": "1 < 2"}, "objects": {"<b>": values},
    }  # fmt: skip
    page = report_page.page(summary, {"<b>": b"jpeg"}).decode()
    assert (
        "<b>" not in page
        and "<i>" not in page
        and "<m>" not in page
        and "1 &lt; 2" in page
        and "a &amp; b" in page
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--data", "."], "no object"),
        (["--data", ".", "--views", "0"], "--views 0 is out of range"),
        (["--data", ".", "--size", "8"], "--size 8 is out of range"),
        (["--data", "data", "--split", "val"], "none of its 1 objects falls into the val split"),
        (["--data", "data", "--lpips", "no.safetensors"], "no.safetensors"),
        (["--data", "data", "--weights", "no.safetensors"], "no.safetensors"),
        (["--data", "data", "--views", "9"], "none of 1 objects can be used"),
    ],
)
def test_bad_arguments_are_one_line(lrm, argv, message):
    write_object(Path("data/a"))
    code, _, stderr = lrm(
        *argv, *([] if "--weights" in argv else ["--weights", str(loading.BUNDLED)])
    )
    lines = [x for x in stderr.splitlines() if x.startswith("lrm: error: ")]
    assert code == 2 and len(lines) == 1 and message in lines[0] and "Traceback" not in stderr


class Posed(nn.Module):
    """Takes posed views, and always renders the first one. It is grey if its camera does not match the balls."""

    world: tuple = tuple(map(tuple, upright()))
    image_size: int = SIZE

    @jax.numpy_rank_promotion("allow")
    def encode(self, source):
        """Checks whether the given images show the balls as the given cameras see them."""
        world = np.array(self.world)
        balls = jnp.asarray(BALLS @ world[:3, :3].T + world[:3, 3], jnp.float32)
        rays = cameras.pixel_rays(source.cameras, *source.rgb.shape[2:4])
        seen = draw(rays, balls, jnp.asarray(RADII, jnp.float32))
        seen = seen.rgb + 0.5 * (1 - seen.alpha[..., None])
        return {
            "error": jnp.abs(source.rgb - seen).mean((1, 2, 3, 4)),
            "balls": jnp.broadcast_to(balls, (len(source.rgb), 3, 3)),
        }

    @jax.numpy_rank_promotion("allow")
    def render(self, scene, rays, key=None):
        seen = draw(rays, scene["balls"][0], jnp.asarray(RADII, jnp.float32))
        rgb = seen.rgb + (1 - seen.alpha[..., None])
        wrong = scene["error"][:, None, None, None, None] > 0.03
        return Rendering(rgb=jnp.where(wrong, 0.5, rgb))


@pytest.mark.parametrize("count", [1, 2])
def test_a_family_of_posed_views_is_given_them_as_in_training(lrm, monkeypatch, count):
    write_object(Path("data/a"), num_views=6, step=5.0)
    x, y, _ = held_out.read(Path("data/a"), 3, SIZE, count).source_camera.c2w[:3, 3]
    model = Posed(tuple(map(tuple, upright(float(np.degrees(np.arctan2(y, x)))))))
    trained = dict(
        num_source=count, source_size=64, foreground_ratio=0.85, normalize="azimuth", source_background=0.5
    )  # fmt: skip
    info = {"family": "posed", "variant": "", "path": "posed", "training": {"config": {"data": trained}}}  # fmt: skip
    monkeypatch.setattr(loading, "load_weights", lambda *_: (model, {}, info))
    code, _, stderr = lrm("--data", "data")
    assert code == 0, stderr
    summary = read_summary()
    # There is no alpha, and other rays decide the outlines differently.
    assert summary["mean"]["psnr"] > 28 and summary["mean"]["iou"] is None
    assert summary["mean"]["chamfer"] is None and summary["skipped"] == {}
    assert summary["protocol"]["source"].startswith(f"{count} views with an elevation of 5 to 35")
    assert set(summary["baseline"]["others"]) == {"nearest image"}  # no surface, so no hull
    assert summary["baseline"]["name"] == "mean object"
    del trained["normalize"]
    code, _, stderr = lrm("--data", "data")
    assert code == 2 and "evaluate scenes with --index" in stderr


class PosedOracle(KnowsTheBalls):
    """It takes posed views, and is wrong if an image does not show the balls as its camera sees them."""

    image_size: int = SIZE
    normalize: str = "common_view"

    @jax.numpy_rank_promotion("allow")
    def encode(self, source):
        rays = cameras.pixel_rays(source.cameras, *source.rgb.shape[2:4])
        seen = draw(rays, *(jnp.asarray(x, jnp.float32) for x in self._balls()))
        error = jnp.abs(source.rgb - seen.rgb - (1 - seen.alpha[..., None])).mean((1, 2, 3, 4))
        return {"level": jnp.where(error > 0.03, 0.5, 0.0)}


def posed_oracle(folder: Path, normalize: str, **choice) -> PosedOracle:
    """The oracle in the world of one object's source cameras."""
    seen_by = held_out.read(folder, 2, SIZE, **choice).source_cameras
    world = normalization.views_motion(seen_by.c2w, seen_by.fxfycxcy, normalize)
    return PosedOracle(tuple(map(tuple, world)), normalize=normalize)


def record(**fields) -> dict:
    data = dict(num_source=6, source_size=SIZE, foreground_ratio=None, source_background=1.0)
    return {"config": {"data": data | fields}}


@pytest.mark.parametrize("normalize, count", [("common_view", 6), ("frusta", 4)])
def test_posed_views_of_a_range_are_given_and_others_compared(lrm, monkeypatch, normalize, count):
    write_object(Path("data/a"), num_views=12, step=5.0)
    choice = dict(num_sources=count, elevation=(5.0, 50.0), source_views=(2, 12))
    model = posed_oracle(Path("data/a"), normalize, **choice)
    training = record(normalize=normalize, source_views=[2, 12], source_elevation=[5.0, 50.0])
    info = {"family": "posed", "variant": "", "path": "posed", "training": training}
    monkeypatch.setattr(loading, "load_weights", lambda *_: (model, {}, info))
    argv = ["--data", "data", "--views", "2", "--sources", str(count)]
    code, stdout, stderr = lrm(*argv, "--resolution", "80")
    assert code == 0, stderr
    summary = read_summary()
    assert summary["mean"]["psnr"] > 28 and summary["mean"]["iou"] > 0.97
    assert summary["unaligned"]["mean"]["chamfer"] < 0.03 and summary["mean"]["fscore@0.1"] > 0.99
    protocol = summary["protocol"]
    assert protocol["source"].startswith(
        f"{count} views with an elevation of 5 to 50 degrees and a number from 2 to 11"
    )
    # The baselines have rows of their own.
    others = summary["baseline"]["others"]
    assert set(others) == {"nearest image", "visual hull"} <= set(protocol)
    for name in ("mean object", *others):
        assert len(re.findall(f"^{name} \\(baseline\\)", stdout, re.M)) == 1
        assert f"<td>{name} (baseline)</td>" in Path("out/evaluation.html").read_text()
    item = held_out.read(Path("data/a"), 2, SIZE, **choice)
    places, targets = (x.c2w[:, :3, 3] for x in (item.source_cameras, item.target_cameras))
    nearest = [int(np.argmin([np.linalg.norm(t - x) for x in places])) for t in targets]
    shown, true = (
        on_white(mean_object.premultiplied(x)) for x in (item.sources[nearest], item.targets)
    )
    wanted = -10 * np.log10(((shown - true) ** 2).mean((1, 2, 3))).mean()
    assert others["nearest image"]["psnr"] == pytest.approx(wanted, abs=1e-2)
    assert others["nearest image"]["chamfer"] is None and others["visual hull"]["psnr"] is None
    assert 0.7 < others["visual hull"]["fscore@0.2"] <= 1
    assert 0.03 < others["visual hull"]["chamfer"] < 0.2  # worse than the oracle


def test_one2345_is_evaluated_from_its_training_record(lrm, tmp_path):
    """Random weights, whose surface is that of the initialisation: about a ball."""
    write_object(Path("data/a"), num_views=12, step=5.0)
    model = models.build("one2345", "tiny")
    seen_by = jax.tree.map(lambda x: x[None], cameras.orbit(3, 2.0, 20.0, 40.0))
    source = Views(rgb=jnp.zeros((1, 3, 16, 16, 3)), cameras=seen_by)
    variables = jax.jit(model.init)(jax.random.key(0), source, cameras.pixel_rays(seen_by, 2, 2))
    training = record(num_source=6, source_size=16, normalize="common_view", source_views=[2, 12], source_elevation=None)  # fmt: skip
    model_file.save_model(tmp_path / "tiny.safetensors", model, variables["params"], training)
    coarse = ["--views", "2", "--size", "16", "--resolution", "24"]
    code, _, stderr = lrm("--data", "data", *coarse, "--weights", "tiny.safetensors")
    assert code == 0, stderr
    summary = read_summary()
    assert summary["protocol"]["source"].startswith("6 views with a number from 2 to 11")
    assert summary["protocol"]["world"].startswith("the model's is upright")
    for name in ("psnr", "iou", "fscore@0.5"):
        assert summary["mean"][name] is not None
    assert summary["baseline"]["others"]["visual hull"]["fscore@0.2"] > 0.7


def test_published_weights_of_posed_views_need_no_record(lrm, monkeypatch):
    write_object(Path("data/a"), num_views=9, step=5.0)
    choice = dict(num_sources=5, elevation=None)
    model = posed_oracle(Path("data/a"), "common_view", **choice)
    info = {"family": "posed", "variant": "", "path": "posed.ckpt", "training": {}}
    monkeypatch.setattr(loading, "load_weights", lambda *_: (model, {}, info))
    code, _, stderr = lrm("--data", "data", "--views", "2", "--sources", "5")
    assert code == 0, stderr
    assert read_summary()["unaligned"]["mean"]["chamfer"] < 0.04
    code, _, stderr = lrm("--data", "data", "--sources", "1")
    assert code == 2 and "--sources 1: posed needs 2 or more views" in stderr.splitlines()[-1]
    code, _, stderr = lrm("--data", "data")
    assert code == 2 and "9 view has any elevation; number of sources needed: 32" in stderr


class Grey(nn.Module):
    image_size: int = 32

    def encode(self, source):
        return source.rgb.mean((1, 2, 3, 4))

    def render(self, scene, rays, key=None):
        return Rendering(rgb=jnp.full(rays.dirs.shape, 0.5) + 0 * scene[:, None, None, None, None])


def write_scene(folder: Path, seed: int, num_frames: int = 5) -> np.ndarray:
    """Writes a scene of noise, seen from places in a row. Returns its images in [0, 1]."""
    (folder / "images").mkdir(parents=True)
    images = np.random.default_rng(seed).integers(0, 256, (num_frames, 32, 32, 3), np.uint8)
    frames = []
    for i, rgb in enumerate(images):
        Image.fromarray(rgb).save(folder / f"images/{i}.png")
        c2w = np.eye(4)
        c2w[0, 3] = i
        frames.append({"file_path": f"images/{i}.png", "transform_matrix": c2w.tolist()})
    camera = dict(fl_x=30, fl_y=30, cx=16, cy=16, w=32, h=32)
    (folder / "transforms.json").write_text(json.dumps(camera | {"frames": frames}))
    return images / 255


def test_all_scenes_of_an_index_count_and_absent_ones_are_named(lrm, monkeypatch):
    scenes = {name: write_scene(Path("data", name), i) for i, name in enumerate("abc")}
    Path("data/c/images/3.png").write_bytes(b"torn")
    views = dict(context=[0, 4], target=[1, 3])
    Path("index.json").write_text(json.dumps(dict.fromkeys("abcd", views) | {"e": None}))
    code, stdout, stderr = lrm("--data", "data", "--index", "index.json", "--size", "32", model=Grey())  # fmt: skip
    assert code == 1 and "nearest image (baseline)" in stdout
    assert "done: 2 of 4 evaluated, 2 could not be used" in stderr
    summary = read_summary()

    def psnr(a, b):
        return -10 * np.log10(((a - b) ** 2).mean((1, 2, 3))).mean()

    for name in "ab":
        wanted = psnr(scenes[name][[1, 3]], 0.5)
        assert summary["objects"][name]["psnr"] == pytest.approx(wanted, abs=1e-3)
    guesses = [psnr(scenes[name][[1, 3]], scenes[name][[0, 4]]) for name in "ab"]
    assert summary["baseline"]["mean"]["psnr"] == pytest.approx(np.mean(guesses), abs=1e-3)
    assert set(summary["skipped"]) == {"c", "d"} and summary["count"]["psnr"] == 2
    assert "absent" in summary["skipped"]["d"] and "3.png" in summary["skipped"]["c"]
    assert summary["mean"]["iou"] is None and "all views" in summary["protocol"]["world"]
    argv = ["--data", "data", "--index", "index.json"]
    Path("index.json").write_text(json.dumps({"a": views}))
    assert lrm(*argv, "--size", "32", model=Grey())[0] == 0
    Path("index.json").write_text(json.dumps({"c": views}))
    code, _, stderr = lrm(*argv, "--size", "32", model=Grey())
    assert code == 2 and stderr.splitlines()[-1].startswith("lrm: error: data: none of 1 objects")
    code, _, stderr = lrm(*argv, model=Oracle())
    assert code == 2 and "without --index" in stderr


def test_the_objects_of_a_batch_are_split_over_all_devices():
    programs = compiled(Oracle(), {}, None, 8)
    assert programs.num_devices == jax.device_count() == 8
    camera = jax.tree.map(lambda x: x[None], cameras.orbit(1, DISTANCE, 0.0, FOV))
    source, targets = jax.tree.map(
        lambda x: np.concatenate([x] * 8),
        (Views(rgb=np.ones((1, 1, 8, 8, 3)), cameras=camera), camera),
    )
    scenes, rgb, _ = programs.predict(source, targets)
    assert [scene["level"].shape for scene in scenes] == [(1,)] * 8
    assert len({scene["level"].device for scene in scenes}) == 8
    assert rgb.addressable_shards[0].data.shape == (1, 1, 8, 8, 3)
    field = programs.field(scenes[5], np.zeros((3, 3), np.float32))
    assert field.shape == (3,) and field.devices() == scenes[5]["level"].devices()


def test_scenes_are_grouped_by_their_numbers_of_views():
    def scene(num_targets):
        views = (Views(rgb=np.zeros((n, 2, 2, 3)), cameras=None) for n in (2, num_targets))
        return Batch(*views)

    found = [("a", scene(1)), ("b", scene(1)), ("c", scene(1)), ("d", scene(3)), ("e", scene(1))]
    names = [names for names, _ in scenes.groups(found, 2, {})]
    assert names == [["a", "b"], ["c"], ["d"], ["e"]]


def test_an_object_that_cannot_be_placed_is_left_out(lrm, tmp_path):
    for name in ("good", "odd"):
        write_object(Path("data") / name)
    poses = sorted(Path("data/odd/pose").iterdir())
    for path in poses:
        pose = np.load(path)
        pose[:, 1:3] *= -1  # the camera looks away
        np.save(path, pose)
    for path in (Path("data/odd/points.npy"), Path("data/good/points.npy")):
        np.savez(path.with_suffix(".npz"), a=np.ones(3))
        path.with_suffix(".npz").rename(path)
    model = models.build("triposr", "tiny")
    alignment = objects.Alignment("image", (1.9, 40.0), "image")
    pose = functools.partial(objects.posed_by_image, model, alignment)
    skipped = {}
    read = functools.partial(held_out.read, num_targets=3, size=SIZE)
    folders = [Path("data/good"), Path("data/odd")]
    posed = list(objects.posed_objects(folders, skipped, read, pose))
    assert [x.item.uid for x in posed] == ["good"] and "looks away" in skipped["odd"]
    assert posed[0].item.points is None and "cannot be read" in posed[0].item.no_points


def test_the_world_of_training_is_that_of_evaluation():
    model = models.build("triposr", "tiny")
    record = {"config": {"data": {"normalize": "source"}}}
    assert objects.alignment_of(model, record, None).normalize == "source"
    assert objects.alignment_of(model, {}, None).normalize == "azimuth"


def test_the_help_lists_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["evaluate", "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and printed.count("Exit code: 0 ") == 1
    for word in ("picture", "film", "lattice", "choose of"):
        assert word not in printed


@pytest.mark.parametrize("option", ["--scale=data", "--views=3", "--baseline-data=x"])
def test_an_option_without_effect_is_refused(lrm, option):
    code, _, stderr = lrm("--data", "data", "--index", "i.json", option)
    assert code == 2 and f"{option.split('=')[0]} has no effect with --index" in stderr
