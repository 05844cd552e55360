"""tools/predict_views.py: a trained Zero123's neighbours of the true views, as the reconstruction's training reads them."""

import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from lrm_jax.data import objects
from lrm_jax.ops import cameras
from lrm_jax.types import Rendering

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import predict_views  # noqa: E402

SIZE = 32  # of the data; twice that of the model
BUNDLED = Path(__file__).parents[2] / "lrm_jax/assets/nano.safetensors"


class StandIn(nn.Module):
    """Keeps Zero123's contract. Red is the source's, green the height of the target's camera, and blue depends on the key."""

    image_size: int = 16

    def setup(self):
        self.gain = self.param("gain", nn.initializers.ones, ())

    def encode(self, source):
        assert source.alpha is None and source.rgb.shape[1:] == (1, 16, 16, 3)
        assert source.cameras.c2w.shape[1:] == (1, 4, 4)
        return source.rgb * self.gain

    def render(self, scene, rays, keys_B):
        blue_B = jax.vmap(jax.random.uniform)(keys_B)
        height = (rays.origins[..., 2] + 1.2) / 2.4
        blue = jnp.broadcast_to(blue_B[:, None, None, None], height.shape)
        return Rendering(rgb=jnp.stack([scene[..., 0], height, blue], axis=-1))

    def __call__(self, source, rays, keys_B):
        return self.render(self.encode(source), rays, keys_B)


def write_object(folder: Path, elevation: float = 30.0) -> None:
    """A disc in front of each camera of the rig. Its red is the number of the view, times 5."""
    (folder / "rgba").mkdir(parents=True)
    (folder / "pose").mkdir()
    rig = cameras.one2345_rig(90 - elevation)
    intrinsics = np.float32([[280 / 256] * 2, [0.5] * 2, [1] * 2]) * SIZE
    np.save(folder / "intrinsics.npy", intrinsics)
    rows, columns = np.indices((SIZE, SIZE)) - SIZE / 2 + 0.5
    for view, pose in enumerate(np.asarray(cameras.opencv_to_opengl(jnp.asarray(rig.c2w)))):
        np.save(folder / f"pose/{view:03d}.npy", pose[:3])
        rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
        rgba[np.hypot(rows, columns) < SIZE / 3] = [5 * view, 0, 0, 255]
        Image.fromarray(rgba).save(folder / f"rgba/{view:03d}.png")


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    use(monkeypatch, 1.0)
    for i, name in enumerate(("aaa", "bbb")):
        write_object(tmp_path / "data" / name, 20.0 + 10 * i)
    return tmp_path / "data"


def use(monkeypatch, gain: float) -> None:
    loaded = StandIn(), {"gain": jnp.float32(gain)}, {"family": "zero123"}
    monkeypatch.setattr(predict_views.loading, "load_weights", lambda weights: loaded)


def run(root: Path, *options) -> int:
    return predict_views.main([str(root), "--weights", "runs/zero123", *map(str, options)])


def images(root: Path) -> dict[str, bytes]:
    return {str(x.relative_to(root)): x.read_bytes() for x in sorted(root.glob("*/predicted/*.png"))}  # fmt: skip


def pixels(root: Path, uid: str) -> np.ndarray:
    """[32 S S 3] the views of an object."""
    opened = [Image.open(root / uid / f"predicted/{view:03d}.png") for view in range(8, 40)]
    assert {image.mode for image in opened} == {"RGB"}
    return np.stack([np.asarray(image) for image in opened])


def test_each_view_is_drawn_from_the_true_view_that_it_is_a_neighbour_of(root, capsys):
    assert run(root) == 0
    assert capsys.readouterr().out == f"{root}: views drawn: 64\n"
    assert len(images(root)) == 64
    for uid, elevation in (("aaa", 20.0), ("bbb", 30.0)):
        found = pixels(root, uid)
        assert found.shape == (32, 16, 16, 3)
        np.testing.assert_array_equal(found[:, 8, 8, 0], np.repeat(5 * np.arange(8), 4))
        assert (found[:, 0, 0, 0] == 255).all()  # the background of the source is white
        height = cameras.one2345_rig(90 - elevation).c2w[8:, 2, 3] / 1.2
        # Rounding to 8 bits.
        np.testing.assert_allclose(found[:, 0, 0, 1], (height + 1) / 2 * 255, atol=0.51)
        assert (found == found[:, :1, :1])[..., 1:].all()


def test_every_view_has_its_own_key(root):
    run(root)
    blue = np.stack([pixels(root, uid)[:, 0, 0, 2] for uid in ("aaa", "bbb")]).astype(int)
    assert np.abs(blue[0] - blue[1]).max() > 50
    # 64 draws of 256 values: about 57 different ones, and hardly ever below 48.
    assert len(np.unique(blue)) >= 48
    key = predict_views.view_key(0, predict_views.number_of("aaa"), 8)
    assert blue[0, 0] == round(float(jax.random.uniform(key)) * 255)
    number = predict_views.number_of("aaa")
    expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), number), 8)
    assert (jax.random.key_data(key) == jax.random.key_data(expected)).all()


def test_neither_the_batch_nor_the_other_objects_change_a_view(root):
    run(root)
    first = images(root)
    for uid in ("aaa", "bbb"):
        shutil.rmtree(root / uid / "predicted")
    shutil.move(root / "aaa", root.parent / "aaa")
    assert run(root, "--batch", 24) == 0
    assert images(root) == {name: data for name, data in first.items() if name.startswith("bbb")}


def test_only_views_that_are_missing_are_drawn(root, capsys):
    run(root)
    first, path = images(root), root / "bbb/predicted/021.png"
    path.unlink()
    (root / "aaa/predicted/008.png").write_bytes(b"kept")
    assert run(root) == 0
    found = capsys.readouterr()
    assert "2 objects, 63 views exist, 1 to draw" in found.err
    assert found.out.splitlines()[-1] == f"{root}: views drawn: 1"
    assert images(root) == first | {"aaa/predicted/008.png": b"kept"}


def test_an_interrupted_run_continues(root, monkeypatch, capsys):
    run(root)
    whole = images(root)
    for uid in ("aaa", "bbb"):
        shutil.rmtree(root / uid / "predicted")
    written, png = [], predict_views.png

    def interrupted(image):
        written.append(image)
        if len(written) > 11:
            raise KeyboardInterrupt
        return png(image)

    monkeypatch.setattr(predict_views, "png", interrupted)
    assert run(root) == 130
    assert "interrupted: views are kept, run again to continue" in capsys.readouterr().err
    assert images(root).items() <= whole.items() and len(images(root)) == 11
    monkeypatch.setattr(predict_views, "png", png)
    assert run(root) == 0
    assert capsys.readouterr().out == f"{root}: views drawn: 53\n"
    assert images(root) == whole


@pytest.mark.parametrize(
    ("options", "gain", "message"),
    [(["--seed", 1], 1.0, "with other seed:"), ([], 0.5, "with other weights:")],
)
def test_views_of_two_origins_are_not_mixed(root, monkeypatch, capsys, options, gain, message):
    run(root)
    first = images(root)
    (root / "aaa/predicted/009.png").unlink()
    use(monkeypatch, gain)
    assert run(root, *options) == 2
    error = capsys.readouterr().err
    assert f"skipped aaa: predicted holds views {message}" in error and "delete predicted" in error
    assert "none of 2 objects could be used" in error
    shutil.rmtree(root / "bbb/predicted")
    assert run(root, *options) == 1
    remade = images(root)
    assert remade.keys() == first.keys() - {"aaa/predicted/009.png"}
    assert all((remade[name] != first[name]) == name.startswith("bbb") for name in remade)


def test_views_without_a_known_origin_are_not_continued(root, capsys):
    run(root)
    (root / "aaa/predicted/origin.json").unlink()
    assert json.loads((root / "bbb/predicted/origin.json").read_text())["seed"] == 0
    assert run(root) == 1
    assert "aaa: predicted holds views with other seed and weights" in capsys.readouterr().err


def test_training_reads_them_as_sources(root):
    run(root)
    source = objects.make(
        root, split="all", seed=0, num_source=32, num_target=1, source_size=16, target_size=16,
        source_views=(8, 40), source_images="predicted", sources_as_targets=False,
        source_elevation=None, foreground_ratio=None, normalize=None,
    )  # fmt: skip
    element = source.elements[0]
    drawn = pixels(root, source.names[0])
    number = np.linalg.norm(
        element.source.cameras.c2w[:, None] - cameras.one2345_rig(70.0).c2w[8:], axis=(2, 3)
    ).argmin(1)
    assert sorted(number) == list(range(32))
    np.testing.assert_array_equal(element.source.rgb, drawn[number])
    assert (element.source.alpha == 255).all()


def fewer(folder):
    for name in ("rgba/039.png", "pose/039.npy"):
        (folder / name).unlink()


def elsewhere(folder):
    pose = np.load(folder / "pose/030.npy")
    np.save(folder / "pose/013.npy", pose)


def damaged(folder):
    (folder / "rgba/003.png").write_bytes(b"not an image")


def unposed(folder):
    (folder / "pose/003.npy").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (fewer, "39 views, not 40: render with tools/render_objects.py --protocol one2345"),
        (elsewhere, r"view 13 is \d+ degrees from view 1, not 10: render with"),
        (damaged, "003.png is not an image"),
        (unposed, "pose/003.npy is missing"),
    ],
)
def test_a_bad_object_is_skipped_and_named(root, capsys, damage, message):
    damage(root / "aaa")
    assert run(root) == 1
    found = capsys.readouterr()
    assert found.out == f"{root}: views drawn: {len(images(root))}; objects skipped: 1\n"
    (line,) = [line for line in found.err.splitlines() if "skipped" in line]
    assert line.startswith(f"{root}: skipped aaa: ")
    assert re.search(message, line)
    assert len(list(root.glob("bbb/predicted/*.png"))) == 32


def test_values_that_are_not_finite_are_not_written(root, monkeypatch, capsys):
    use(monkeypatch, np.nan)
    assert run(root) == 2
    assert "view 39 is not finite" in capsys.readouterr().err and not images(root)


def test_wrong_usage_is_one_line(root, tmp_path, monkeypatch, capsys):
    assert run(tmp_path / "nowhere") == 2
    assert "no such folder" in capsys.readouterr().err
    monkeypatch.undo()
    assert predict_views.main([str(root), "--weights", str(BUNDLED)]) == 2
    error = capsys.readouterr().err
    assert "a model of triposr: give one of Zero123" in error and error.count("\n") == 1
    for option in (("--batch", "0"), ("--seed", "-1")):
        with pytest.raises(SystemExit) as stop:
            predict_views.main([str(root), "--weights", "x", *option])
        assert stop.value.code == 2 and f"{' '.join(option)}: must be" in capsys.readouterr().err
