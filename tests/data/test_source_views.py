"""Several given views of an object: which views they are, from which folder, and the world that they all decide."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_objects import FIELDS, SIZE, VIEWS, write_object

from lrm_jax.data import elements, folders, mvimgnet, objects, records, store
from lrm_jax.data.procedural import source as procedural
from lrm_jax.ops import normalization, paths
from lrm_jax.types import InputError

SOURCES = (2, 6)
BOTH = dict(source_elevation=None, foreground_ratio=None, normalize=None)  # all fields of a case
SHADE = 200  # green of the predicted images, which no rendered image has


@pytest.fixture
def root(tmp_path) -> Path:
    for name in ("aaa", "bbb", "ccc"):
        write_object(tmp_path / f"pack-thing{name}")
        folder = tmp_path / f"pack-thing{name}" / "predicted"
        folder.mkdir()
        for view in range(*SOURCES):  # twice the size of rgba, without alpha
            image = np.full((2 * SIZE, 2 * SIZE, 3), [view, SHADE, 0], np.uint8)
            Image.fromarray(image).save(folder / f"{view:03d}.png")
    return tmp_path


def elements_of(root: Path, count: int = 12, **fields) -> list:
    source = objects.make(root, **{**FIELDS, "split": "all", **BOTH, **fields})
    return [source.elements[i] for i in range(count)]


def numbers(views, root: Path) -> list[int]:
    """Which views of the object these are, by their poses. All objects have the same."""
    c2w = folders.read_cameras(root / "pack-thingaaa").c2w
    difference = np.abs(views.cameras.c2w[:, None] - c2w).max((2, 3))
    assert (difference.min(1) < 1e-5).all()
    return difference.argmin(1).tolist()


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("shown", [True, False])
def test_sources_are_from_their_range_and_other_targets_are_not_given(root, cache, shown):
    given = dict(num_source=3, num_target=2, source_views=SOURCES, sources_as_targets=shown)
    seen = set()
    for element in elements_of(root, cache=cache, **given):
        sources, targets = (numbers(views, root) for views in (element.source, element.target))
        assert len(set(sources)) == 3 and set(sources) <= set(range(*SOURCES))
        others = targets[3:] if shown else targets
        assert targets == (sources if shown else []) + others
        assert len(set(others)) == 2 and not set(others) & set(sources)
        seen |= {(sources[0], view) for view in others}
    assert len(seen) > 6  # any of the sources comes first, with any of the others
    assert {view in range(*SOURCES) for _, view in seen} == {True, False}


def test_sources_need_not_be_targets_without_a_range(root):
    fields = dict(num_source=2, num_target=4, source_elevation=(5.0, 35.0))
    whole, others = (
        elements_of(root, sources_as_targets=shown, **fields) for shown in (True, False)
    )
    for a, b in zip(whole, others, strict=True):
        np.testing.assert_array_equal(a.source.rgb, b.source.rgb)
        np.testing.assert_array_equal(a.target.rgb[2:], b.target.rgb)
        np.testing.assert_array_equal(a.target.cameras.c2w[2:], b.target.cameras.c2w)


@pytest.mark.parametrize("shown", [True, False])
def test_cache_and_files_give_the_same(root, shown):
    fields = dict(
        num_source=3, source_views=SOURCES, source_images="predicted", sources_as_targets=shown,
        normalize="common_view", mirror=True, split="train", num_target=2,
    )  # fmt: skip
    cached, read = (elements_of(root, cache=cache, **fields) for cache in (True, False))
    jax.tree.map(np.testing.assert_array_equal, cached, read)


@pytest.mark.parametrize("cache", [True, False])
def test_predicted_sources_do_not_change_the_targets(root, cache):
    fields = dict(num_source=2, num_target=2, source_views=SOURCES, cache=cache)
    true = elements_of(root, **fields)
    predicted = elements_of(root, source_images="predicted", **fields)
    for a, b in zip(true, predicted, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a.target, b.target)
        np.testing.assert_array_equal(a.source.cameras.c2w, b.source.cameras.c2w)
        views = np.array(numbers(b.source, root))
        np.testing.assert_array_equal(b.source.rgb[:, 0, 0, 0], views)
        assert (b.source.rgb[..., 1] == SHADE).all() and (b.source.alpha == 255).all()
        assert (a.source.rgb[..., 1] != SHADE).all()


def test_changed_predictions_are_read_again(root):
    fields = dict(num_source=4, num_target=2, source_views=SOURCES, source_images="predicted")
    elements_of(root, **fields)
    for path in root.glob("*/predicted/*.png"):
        Image.new("RGB", (SIZE, SIZE), (0, 0, SHADE)).save(path)
    store._get_store.cache_clear()
    assert all((e.source.rgb[..., 2] == SHADE).all() for e in elements_of(root, **fields))


def no_folder(folder):
    shutil.rmtree(folder)


def no_file(folder):
    (folder / "003.png").unlink()


def wide(folder):
    for view in range(*SOURCES):
        Image.new("RGB", (40, 20)).save(folder / f"{view:03d}.png")


def damaged(folder):
    path = folder / "003.png"
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    "damage, cause",
    [
        (no_folder, "predicted/00[2-5].png is missing: predict this view"),
        (no_file, "predicted/003.png is missing: predict this view"),
        (wide, "predicted/00[2-5].png is 40x20: its proportions are not those of .*32x32"),
        (damaged, "predicted/003.png is damaged"),
    ],
)
def test_an_object_without_its_predictions_is_left_out(root, capsys, damage, cause):
    damage(root / "pack-thingbbb/predicted")
    fields = {**FIELDS, **BOTH, "split": "all", "num_source": 4, "source_views": SOURCES}
    whole = objects.make(root, **fields)
    assert len(whole.names) == 3 and not capsys.readouterr().err
    cached = objects.make(root, source_images="predicted", **fields)
    assert cached.names == ("pack-thingaaa", "pack-thingccc")
    error = capsys.readouterr().err
    assert "skipped 1 of 3" in error
    with pytest.raises(InputError, match=f"skipped pack-thingbbb: .*{cause}"):
        raise InputError(error)
    read = objects.make(root, source_images="predicted", cache=False, **fields)
    with pytest.raises(InputError, match=f"pack-thingbbb: .*{cause}"):
        for position in range(3):
            read.elements[position]


@pytest.mark.parametrize("normalize", normalization.BY_ALL_SOURCES)
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("ratio", [None, 0.7])
def test_all_sources_decide_the_world(root, normalize, mirror, ratio):
    """The world of the element is the model's: normalising its sources again changes nothing. All views show the dot in one place."""
    fields = dict(num_source=4, num_target=2, normalize=normalize, foreground_ratio=ratio)
    for element in elements_of(root, 6, split="train", mirror=mirror, **fields):
        given = element.source.cameras
        motion = normalization.views_motion(given.c2w, given.fxfycxcy, normalize)
        np.testing.assert_allclose(motion, np.eye(4), atol=1e-5)  # float32
        assert np.abs(given.c2w[:, :3, 3]).max() < 5
        views = element.target
        red = (views.rgb[..., 0] > 150) & (views.rgb[..., 1] < 80) & (views.alpha > 128)
        uv = np.stack([np.argwhere(image).mean(0)[::-1] + 0.5 for image in red]) / red.shape[-1]
        fxfycxcy, c2w = views.cameras.fxfycxcy, views.cameras.c2w
        local = np.concatenate([(uv - fxfycxcy[:, 2:]) / fxfycxcy[:, :2], np.ones((6, 1))], axis=1)
        dirs = np.einsum("vij,vj->vi", c2w[:, :3, :3], local)
        dirs /= np.linalg.norm(dirs, axis=1, keepdims=True)
        point, _ = paths.nearest_point(c2w[:, :3, 3], dirs)
        miss = np.linalg.norm(np.cross(point - c2w[:, :3, 3], dirs), axis=1)
        pixel = np.linalg.norm(c2w[:, :3, 3], axis=1) / fxfycxcy[:, 0] / SIZE
        assert (miss < pixel).all()


def test_mirrored_elements_differ(root):
    fields = dict(num_source=4, normalize="frusta", split="train")
    plain, mirrored = (elements_of(root, mirror=mirror, **fields) for mirror in (False, True))
    flipped = [
        np.array_equal(a.source.rgb[:, :, ::-1], b.source.rgb)
        for a, b in zip(plain, mirrored, strict=True)
    ]
    assert any(flipped) and not all(flipped)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(source_views=(3,)), "data.source_views=.3,.: needs 0 <= first < end"),
        (dict(source_views=(4, 4)), "needs 0 <= first < end"),
        (dict(source_views=(7, 40), num_source=2), "1 views .* and a number in .7, 40. are too few"),
        (dict(num_target=VIEWS), f"{VIEWS} views are too few for num_source=1 and num_target={VIEWS}"),
        (dict(sources_as_targets=False, num_target=0), "needs data.num_target of at least 1"),
        (dict(source_images="a/b"), "must be the name of a folder beside rgba"),
        (dict(source_images=""), "must be the name of a folder beside rgba"),
        (dict(normalize="frusta"), "normalize=frusta: needs data.num_source of at least 2"),
        (dict(normalize="commonview"), "must be azimuth, source, image, frusta, common_view or None"),
    ],
)  # fmt: skip
def test_a_field_that_does_not_fit_is_reported_at_the_start(root, fields, message):
    with pytest.raises(InputError, match=message):
        elements_of(root, **fields)


@pytest.mark.parametrize("module", [records, mvimgnet])
def test_other_kinds_of_data_have_no_predictions(root, module):
    with pytest.raises(InputError, match="has only the images themselves: use objects"):
        module.make(root, **FIELDS, split="train", source_images="predicted")


def test_sources_that_leave_no_world_are_an_input_error():
    fields = {k: v for k, v in FIELDS.items() if k != "seed"}
    recipe = elements.make_recipe(
        "val", **{**fields, **BOTH, "num_source": 2, "normalize": "frusta"}
    )
    pose = np.tile(np.eye(4), (VIEWS, 1, 1))
    pose[:, 0, 3] = np.arange(VIEWS)  # side by side
    intrinsics = np.tile([1.0, 1.0, 0.5, 0.5], (VIEWS, 1))
    with pytest.raises(InputError, match="2 source views look in the same direction"):
        elements.make(lambda view: np.zeros((8, 8, 4), np.uint8), pose, intrinsics, recipe, 0, 0)


@pytest.mark.parametrize("cache", [True, False])
def test_an_object_without_a_world_is_named(root, cache):
    for path in (root / "pack-thingbbb/pose").iterdir():
        pose = np.load(root / "pack-thingbbb/pose/000.npy")
        pose[:, 3] += int(path.stem) * pose[:, 0]
        np.save(path, pose)
    fields = {**FIELDS, **BOTH, "num_source": 2, "normalize": "frusta", "cache": cache}
    source = objects.make(root, split="all", **fields)
    assert source.elements[0].source.rgb.shape[0] == 2
    with pytest.raises(
        InputError, match="pack-thingbbb: 2 source views look in the same direction"
    ):
        source.elements[1]


def test_procedural_sources_need_not_be_targets():
    fields = dict(split="val", seed=3, num_source=2, num_target=1, source_size=8, target_size=8)
    shown, hidden = (
        jax.jit(procedural.make(sources_as_targets=value, **fields).finish)(
            {"index": np.uint32([5])}
        )
        for value in (True, False)
    )
    assert shown.target.rgb.shape[1] == 3 and hidden.target.rgb.shape[1] == 1
    np.testing.assert_allclose(
        shown.target.cameras.c2w[:, 2:], hidden.target.cameras.c2w, atol=1e-6
    )
    np.testing.assert_array_equal(shown.target.alpha[:, 2:] > 0, hidden.target.alpha > 0)


@pytest.mark.parametrize("normalize", normalization.BY_ALL_SOURCES)
def test_procedural_objects_cannot_be_normalised_by_all_sources(normalize):
    fields = dict(split="val", seed=3, num_source=2, num_target=1, source_size=8, target_size=8)
    with pytest.raises(InputError, match=f"data.normalize={normalize}: .*leave out data.mix"):
        procedural.make(normalize=normalize, **fields)
