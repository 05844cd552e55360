"""One image to a mesh by two tiny models: what is drawn from what, what is kept, and what is drawn again."""

import json

import jax
import numpy as np
import pytest
from tiny_models import write_two_models

from lrm_jax import api, two_stage
from lrm_jax.commands import reconstruct
from lrm_jax.images import captures, png
from lrm_jax.ops import cameras as ops_cameras
from lrm_jax.two_stage import drawing, elevation
from lrm_jax.types import InputError, Views


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one2345")
    write_two_models(folder)
    return folder


@pytest.fixture(scope="module")
def models(parts):
    return two_stage.load(parts)


@pytest.fixture(scope="module")
def image():
    y, x = np.mgrid[:40, :40] - 20
    alpha = np.where(x**2 + y**2 < 150, 255, 0)
    return np.stack([128 + 3 * x, 128 + 3 * y, 0 * x + 60, alpha], axis=-1).clip(0, 255).astype(np.uint8)  # fmt: skip


@pytest.fixture(scope="module")
def first(models, image, tmp_path_factory):
    """A scene, and the folder of its views."""
    folder = tmp_path_factory.mktemp("out") / "views"
    return models.reconstruct(image, elevation=20, steps=3, folder=folder), folder


def counting(models, monkeypatch):
    """The numbers of views drawn from now on, by batch."""
    calls, draw = [], models._draw

    def counted(drawn, rgb, views, *args):
        missing = [view for view in views if view not in drawn.images]
        if missing:
            calls.append(missing)
        draw(drawn, rgb, views, *args)

    monkeypatch.setattr(models, "_draw", counted)
    return calls


def images_of(scene):
    return np.stack(scene.views.images)


def test_a_scene_has_forty_views_and_a_mesh(first):
    scene, folder = first
    assert images_of(scene).shape == (40, 16, 16, 4)
    assert len(np.unique(images_of(scene).reshape(40, -1), axis=0)) == 40
    rendered = scene.render(size=16)
    assert rendered.shape == (1, 16, 16, 4)
    known = json.loads((folder / "views.json").read_text())
    assert known["elevation"] == {"degrees": 20.0, "status": "given"}
    assert len(list(folder.glob("*.png"))) == 40
    frames = json.loads((folder / "transforms.json").read_text())["frames"]
    assert [x["file_path"] for x in frames] == [f"{view:03}.png" for view in range(8, 40)]


def test_the_same_again_draws_nothing(models, image, first, monkeypatch):
    scene, folder = first
    calls = counting(models, monkeypatch)
    again = models.reconstruct(image, elevation=20, steps=3, folder=folder)
    assert not calls
    np.testing.assert_array_equal(images_of(again), images_of(scene))


def test_a_run_that_was_stopped_goes_on_from_its_views(models, image, first, tmp_path, monkeypatch):
    """A batch is kept as soon as it is drawn, and the rest is what it would have been."""
    scene, _ = first
    draw, calls = models._draw, []

    def stopping(drawn, rgb, views, *args):
        if views == two_stage.SECOND:
            raise KeyboardInterrupt
        draw(drawn, rgb, views, *args)

    with monkeypatch.context() as patch:
        patch.setattr(models, "_draw", stopping)
        with pytest.raises(KeyboardInterrupt):
            models.reconstruct(image, elevation=20, steps=3, folder=tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == {f"{v:03}" for v in (0, 1, 2, 3, 8, 9, 10, 11)}  # fmt: skip
    calls = counting(models, monkeypatch)
    rest = models.reconstruct(image, elevation=20, steps=3, folder=tmp_path)
    assert calls == [list(two_stage.SECOND), list(two_stage.OTHERS)]
    np.testing.assert_array_equal(images_of(rest), images_of(scene))


def test_one_view_that_is_missing_is_drawn_again_alone(models, image, first, monkeypatch):
    scene, folder = first
    (folder / "017.png").unlink()
    calls = counting(models, monkeypatch)
    again = models.reconstruct(image, elevation=20, steps=3, folder=folder)
    assert calls == [[17]]
    np.testing.assert_array_equal(images_of(again), images_of(scene))


def test_redrawing_a_view_changes_it_and_its_neighbours_alone(models, image, first, monkeypatch):
    scene, folder = first
    before = images_of(scene)
    calls = counting(models, monkeypatch)
    other = images_of(models.reconstruct(image, elevation=20, steps=3, folder=folder, redraw=[3]))
    assert calls == [[3], [20, 21, 22, 23]]
    changed = (other != before).any((1, 2, 3))
    assert np.flatnonzero(changed).tolist() == [3, 20, 21, 22, 23]
    # So that the folder is again what other tests expect.
    (folder / "views.json").write_text("{}")
    models.reconstruct(image, elevation=20, steps=3, folder=folder)


def test_another_seed_draws_all_views_again(models, image, first, tmp_path):
    scene, _ = first
    other = models.reconstruct(image, elevation=20, steps=3, seed=1, folder=tmp_path)
    assert (images_of(other) != images_of(scene)).any((1, 2, 3)).all()
    back = models.reconstruct(image, elevation=20, steps=3, folder=tmp_path)
    np.testing.assert_array_equal(images_of(back), images_of(scene))


def test_only_views_that_depend_on_the_elevation_s_side_are_drawn_again(models, image, first, tmp_path, monkeypatch):  # fmt: skip
    """Poses follow the elevation. Drawings do not, but that views 4 to 7 are below view 0 if it is high, else above."""
    scene, _ = first
    models.reconstruct(image, elevation=20, steps=3, folder=tmp_path)
    calls = counting(models, monkeypatch)
    higher = models.reconstruct(image, elevation=40, steps=3, folder=tmp_path)
    assert not calls
    assert np.abs(higher.views.c2w - scene.views.c2w).max() > 0.1
    models.reconstruct(image, elevation=10, steps=3, folder=tmp_path)
    assert calls == [list(two_stage.SECOND), list(range(24, 40))]


def test_an_unclear_elevation_is_one_line_and_keeps_the_views(models, image, tmp_path, monkeypatch):
    found = elevation.Elevation(30.0, "ambiguous", {}, 3)
    monkeypatch.setattr(elevation, "estimate", lambda matches: found)
    with pytest.raises(InputError, match="unclear .ambiguous, perhaps 30 degrees.: give it with --elevation"):  # fmt: skip
        models.reconstruct(image, steps=3, folder=tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 8
    monkeypatch.setattr(elevation, "estimate", lambda matches: found._replace(status="found"))
    scene = models.reconstruct(image, steps=3, folder=tmp_path)
    assert len(scene.views.images) == 40
    known = json.loads((tmp_path / "views.json").read_text())
    assert known["elevation"] == {"degrees": 30.0, "status": "found"}


def test_a_view_does_not_depend_on_what_is_drawn_with_it(models):
    """Drawn alone, in a batch, and in another order."""
    rng = np.random.default_rng(0)
    rig = ops_cameras.one2345_rig(70.0)
    draw = drawing.program(models.drawing, 3)
    rgb = rng.uniform(size=(4, 1, 16, 16, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4)

    def drawn(order):
        order = np.array(order)
        source = Views(rgb[order], two_stage.at(rig, order))
        return draw(source, two_stage.at(rig, order + 4), keys[order])

    whole = drawn([0, 1, 2, 3])
    np.testing.assert_allclose(drawn([2, 0, 3, 1]), whole[[2, 0, 3, 1]], atol=1e-5)
    np.testing.assert_allclose(drawn([2, 2, 2, 2])[0], whole[2], atol=1e-5)


def test_nearly_white_pixels_become_white():
    image = np.array([[[253, 252, 255]]], np.uint8)
    np.testing.assert_allclose(two_stage.input_of(image), [[[1, 252 / 255, 1]]], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", 'needs the names "views" and "reconstruction"'),
        ('{"views": 1, "reconstruction": "surface.safetensors"}', "needs the names"),
        ('{"views": "a", "reconstruction": "b", "elevation": "c"}', "needs the names"),
        ('{"views": "surface.safetensors", "reconstruction": "surface.safetensors"}', "does not draw views"),
        ('{"views": "views.safetensors", "reconstruction": "views.safetensors"}', "reconstruction is a model of zero123"),
        ("[", "parts.json"),
    ],
)  # fmt: skip
def test_wrong_parts_are_one_line(parts, tmp_path, text, message):
    for path in parts.glob("*.safetensors"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / two_stage.PARTS).write_text(text)
    with pytest.raises(InputError, match=message):
        two_stage.load(tmp_path)


def test_the_command_writes_views_elevation_mesh_and_viewer(parts, image, tmp_path, capsys):
    (tmp_path / "ball.png").write_bytes(png.png(image))
    argv = [
        str(tmp_path / "ball.png"), "--weights", str(parts), "--out", str(tmp_path / "out"), "--elevation", "20", "--steps", "3",
        "--resolution", "16", "--size", "16", "--views", "2", "--level", "-0.2",
    ]  # fmt: skip
    assert reconstruct.main(argv) == 0
    folder = tmp_path / "out" / "ball"
    names = {path.name for path in folder.iterdir()}
    assert names == {"views", "mesh.glb", "contact_sheet.png", "viewer.html"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["images"]["ball"]["elevation"] == {"degrees": 20.0, "status": "given"}
    assert "elevation of ball: 20 degrees (given)" in capsys.readouterr().err
    capture = captures.read_capture(folder / "views", most=40)
    assert capture.names == [f"{view:03}.png" for view in range(8, 40)]
    rig = ops_cameras.one2345_rig(70.0)
    np.testing.assert_allclose(capture.c2w, rig.c2w[8:], atol=1e-6)
    np.testing.assert_allclose(capture.fxfycxcy, rig.fxfycxcy[8:], atol=1e-6)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--batch", "2"], "--batch has no effect with parts.json"),
        (["--elevation", "80"], "--elevation 80.0 is out of range: choose -50 to 60"),
        (["--redraw", "x"], "give numbers of views, such as 3 or 3,17"),
        (["--steps", "1"], "--steps 1 is out of range: choose 2 to 500"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(parts, extra, message):
    with pytest.raises(InputError, match=message):
        reconstruct.main(["--weights", str(parts), *extra])


def test_arguments_of_two_models_need_two(tmp_path):
    with pytest.raises(InputError, match="--seed has no effect without parts.json"):
        reconstruct.main(["--seed", "1", "--out", str(tmp_path)])


def test_a_turntable_starts_every_frame_from_the_same_noise(models, image):
    prepared = models.drawing.place(image)
    frames = drawing.turntable(models.drawing, prepared, 5, 0, 3)
    assert frames.shape == (5, 16, 16, 3) and frames.dtype == np.uint8
    with pytest.raises(InputError, match="does not draw views"):
        drawing.turntable(models.reconstruction, prepared, 5, 0, 3)
    assert isinstance(models.drawing, api.Model)
