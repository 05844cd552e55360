"""Samples from folders have the right geometry, are exact after resuming, and survive broken objects."""

import dataclasses
import io
import os
import pickle
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_objects import FIELDS, POINT, VIEWS, pose_at, write_object

from lrm_jax.data import Source, elements, folders, objects, splits, store
from lrm_jax.ops import cameras as cameras_lib
from lrm_jax.ops import normalization
from lrm_jax.types import Batch, Cameras, InputError


@pytest.fixture
def root(tmp_path) -> Path:
    for i in range(6):
        write_object(tmp_path / f"pack-thing{chr(97 + i) * 3}", shade=30 + 30 * i)
    return tmp_path


def make(root: Path, split: str = "train", **fields) -> Source:
    return objects.make(root, split=split, **{**FIELDS, **fields})


def stack(source: Source, count: int = 4, first: int = 0) -> Batch:
    """The elements from `first` on, stacked, with images as floats."""
    elements = [source.elements[first + i] for i in range(count)]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *elements)
    return jax.tree.map(lambda x: x / np.float32(255) if x.dtype == np.uint8 else x, batch)


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def seen_at(cameras: Cameras, point: np.ndarray) -> np.ndarray:
    """Projects world points [B 3] to (u, v) fractions [B V 2], by the OpenCV definition."""
    offset = point[:, None] - cameras.c2w[..., :3, 3]
    local = np.einsum("bvji,bvj->bvi", cameras.c2w[..., :3, :3], offset)
    f, c = cameras.fxfycxcy[..., :2], cameras.fxfycxcy[..., 2:]
    return c + f * local[..., :2] / local[..., 2:]


def dot_in(views) -> np.ndarray:
    """(u, v) fractions [B V 2] of the middle of the red dot."""
    red = (views.rgb[..., 0] > 0.6) & (views.rgb[..., 1] < 0.3) & (views.alpha > 0.5)
    size = red.shape[-1]
    at = [[np.argwhere(view).mean(0)[::-1] + 0.5 for view in scene] for scene in red]
    return np.array(at) / size


def dot_worlds(normalize: str | None) -> np.ndarray:
    """The place of the dot [VIEWS 3] if view v is the source, from ops.cameras."""
    poses = np.stack(
        [pose_at(360 * v / VIEWS + 11, 50 if v % 2 else 10 + 3 * v) for v in range(VIEWS)]
    )
    if normalize is None:
        return np.tile(POINT, (VIEWS, 1))
    if normalize == "azimuth":
        angle = np.arctan2(poses[:, 1, 3], poses[:, 0, 3])
        c, s = np.cos(angle), np.sin(angle)
        x, y, z = POINT
        return np.stack([c * x + s * y, c * y - s * x, np.full(VIEWS, z)], axis=1)
    c2w = np.concatenate([poses, np.tile([[[0, 0, 0, 1.0]]], (VIEWS, 1, 1))], axis=1)
    c2w = cameras_lib.opengl_to_opencv(jax.numpy.asarray(c2w, jax.numpy.float32))
    pairs = jax.numpy.stack([c2w, jax.numpy.broadcast_to(jax.numpy.eye(4), c2w.shape)], axis=1)
    cameras = Cameras(c2w=pairs, fxfycxcy=jax.numpy.ones((VIEWS, 2, 4)))
    motion = np.asarray(cameras_lib.normalize_to_source(cameras).c2w[:, 1])
    return motion[:, :3, :3] @ POINT + motion[:, :3, 3]


def mirror_worlds(points: np.ndarray, normalize: str | None) -> np.ndarray:
    """`points` [VIEWS 3] mirrored in the vertical plane through the camera of view v."""
    if normalize == "azimuth":
        return points * [1, -1, 1]
    if normalize == "source":
        return points * [-1, 1, 1]
    twice = 2 * np.radians(360 * np.arange(VIEWS) / VIEWS + 11)
    x, y, z = points.T
    return np.stack(
        [np.cos(twice) * x + np.sin(twice) * y, np.sin(twice) * x - np.cos(twice) * y, z], axis=1
    )


@pytest.mark.parametrize("cache", [True, False])
def test_images_give_a_world_that_is_similar_to_that_of_the_poses(root, cache):
    assumed = (3.0, 40.0)
    there = stack(make(root, normalize="image", assumed_camera=assumed, cache=cache), 6)
    here = stack(make(root, normalize=None), 6)
    np.testing.assert_array_equal(there.source.rgb, here.source.rgb)
    for i in range(6):
        motion = cameras_lib.image_motion(
            here.source.cameras.c2w[i, 0].astype(float),
            here.source.cameras.fxfycxcy[i, 0].astype(float),
            *assumed,
        )
        wanted = cameras_lib.move_poses(motion, here.target.cameras.c2w[i].astype(float))
        np.testing.assert_allclose(there.target.cameras.c2w[i], wanted, atol=1e-5)


def test_a_camera_that_looks_away_gives_no_world():
    away = np.asarray(
        cameras_lib.look_at(jax.numpy.array([3.0, 0, 0]), jax.numpy.array([6.0, 0, 1]))
    )
    with pytest.raises(InputError, match="looks away from the origin"):
        normalization.object_motion(away, np.array([1.0, 1, 0.5, 0.5]), "image", (3.0, 40.0))


@pytest.mark.parametrize("assumed_camera", [None, (3.0, 20.0, 40.0)])
def test_images_give_no_world_without_a_camera(root, assumed_camera):
    with pytest.raises(InputError, match="takes .distance, field of view."):
        make(root, normalize="image", assumed_camera=assumed_camera)


@pytest.mark.parametrize("normalize", ["azimuth", "source", None])
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("ratio, cache", [(None, True), (0.7, True), (0.7, False)])
def test_cameras_see_the_dot_where_the_images_show_it(root, mirror, ratio, normalize, cache):
    fields = dict(foreground_ratio=ratio, normalize=normalize, cache=cache)
    batch = stack(make(root, mirror=mirror, **fields), 12)
    plain = dot_worlds(normalize)
    worlds = [plain, mirror_worlds(plain, normalize)] if mirror else [plain]
    candidates = np.concatenate(worlds)
    shown = dot_in(batch.target)
    errors = [
        np.abs(seen_at(batch.target.cameras, np.tile(p, (12, 1))) - shown).max((1, 2))
        for p in candidates
    ]
    best = np.argmin(errors, axis=0)
    # Half a pixel of 32, because the dot covers whole pixels.
    assert (np.min(errors, axis=0) < 0.5 / 32 + 1e-3).all()
    if mirror:
        assert 0 < (best >= VIEWS).sum() < 12  # both occur
    # The source shows the dot in the right place too, cropped or not. It has half as many pixels (16).
    source = np.abs(seen_at(batch.source.cameras, candidates[best]) - dot_in(batch.source))
    assert source.max() < 0.75 / 16
    # Right-handed cameras, mirrored or not.
    np.testing.assert_allclose(
        np.linalg.det(batch.target.cameras.c2w[..., :3, :3]), 1, rtol=1e-5
    )  # float32


def test_reading_on_the_fly_equals_the_cache_to_the_bit(root):
    """Except for the cameras, whose float32 rounding happens at another place."""
    a, b = (make(root, mirror=True, cache=cache) for cache in (True, False))
    assert a.names == b.names
    for x, y in zip(jax.tree.leaves(stack(a, 7)), jax.tree.leaves(stack(b, 7)), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)


def test_source_normalisation_gives_lrms_source_camera(root):
    batch = stack(make(root, normalize="source", mirror=True), 12)
    wanted = [[1, 0, 0, 0], [0, 0, 1, -3], [0, -1, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(
        batch.source.cameras.c2w[:, 0], np.tile(wanted, (12, 1, 1)), atol=2e-6
    )  # float32 products


def test_numpy_cameras_are_those_of_ops():
    rng = np.random.default_rng(0)
    c2w = rng.normal(size=(3, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(
        cameras_lib.opengl_to_opencv(c2w), cameras_lib.opengl_to_opencv(jax.numpy.asarray(c2w))
    )
    fxfycxcy, boxes = jax.numpy.asarray(rng.uniform(0.3, 1, (2, 3, 4)), jax.numpy.float32)
    cropped = cameras_lib.crop_cameras(
        Cameras(jax.numpy.asarray(c2w), fxfycxcy), boxes[:, :2], boxes[:, 2:]
    )
    np.testing.assert_allclose(
        cameras_lib.crop_intrinsics(np.asarray(fxfycxcy), np.asarray(boxes)),
        cropped.fxfycxcy,
        rtol=1e-6,
    )


def test_source_is_at_azimuth_0_and_keeps_elevation_and_distance(root):
    batch = stack(make(root, mirror=True), 16, first=80)
    eye = batch.source.cameras.c2w[:, 0, :3, 3]
    np.testing.assert_allclose(eye[:, 1], 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(eye, axis=-1), 3, rtol=1e-5)
    elevation = np.degrees(np.arctan2(eye[:, 2], eye[:, 0]))
    # Only even views are in the default band.
    assert all(np.abs(elevation[:, None] - [10, 16, 22, 28]).min(1) < 1e-3)
    # The first target is the whole source view.
    np.testing.assert_array_equal(batch.target.cameras.c2w[:, 0], batch.source.cameras.c2w[:, 0])
    assert batch.target.rgb.shape == (16, 4, 32, 32, 3)
    assert batch.source.rgb.shape == (16, 1, 16, 16, 3)


def test_foreground_fills_the_ratio(root):
    alpha = stack(make(root, foreground_ratio=0.5, source_size=64)).source.alpha[:, 0] > 0.5
    for view in alpha:
        rows, columns = np.nonzero(view)
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        assert abs(extent / 64 - 0.5) < 0.05  # one pixel of the file is 1.5 pixels here


def test_downscaling_averages_area_with_premultiplied_alpha(root):
    whole, half = (stack(make(root, target_size=size)).target for size in (32, 16))
    premultiplied = whole.rgb * whole.alpha[..., None]
    mean = premultiplied.reshape(4, 4, 16, 2, 16, 2, 3).mean((3, 5))
    # The tolerance is two 8-bit roundings.
    np.testing.assert_allclose(half.rgb * half.alpha[..., None], mean, atol=1.5 / 255)
    np.testing.assert_allclose(
        half.alpha, whole.alpha.reshape(4, 4, 16, 2, 16, 2).mean((3, 5)), atol=1 / 255
    )


def test_samples_are_a_function_of_seed_and_position(root):
    a, b = make(root, mirror=True), make(root, mirror=True)
    stack(a)
    assert_same(a.elements[7], b.elements[7])
    assert a.elements[7].source.rgb.dtype == a.elements[7].target.alpha.dtype == np.uint8
    other = make(root, seed=4, mirror=True)
    assert np.abs(stack(other).target.rgb - stack(a).target.rgb).max() > 0
    for leaf in jax.tree.leaves(a.elements[8]):
        leaf[...] = 0
    assert a.elements[8].source.rgb.max() > 0  # samples do not share memory with the store


def test_an_epoch_shows_every_object_once_and_the_next_has_another_order(root):
    data = make(root)
    count = len(data.names)
    shade = [float(data.elements[i].source.rgb[..., 1].max()) for i in range(4 * count)]
    epochs = np.reshape(shade, (4, count))
    assert len(set(epochs[0])) == count
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.sort(epochs[0]), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) > 1
    # "all" has each object once, in the order of the names.
    everything = make(root, "all")
    assert len(everything.elements) == len(everything.names) == 6
    shade = [int(everything.elements[i].source.rgb[..., 1].max()) for i in range(6)]
    assert shade == sorted(shade)


def test_a_cached_source_travels_to_another_process_as_a_path(root):
    data = make(root)
    pickled = pickle.dumps(data)
    assert len(pickled) < 10_000
    assert_same(pickle.loads(pickled).elements[3], data.elements[3])


def test_the_second_start_decodes_nothing_and_changed_files_are_noticed(root, monkeypatch):
    first = stack(make(root))
    store._get_store.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(folders, "load_image", lambda path: pytest.fail("decoded again"))
        assert_same(stack(make(root)), first)
    for path in root.glob("*/rgba/*.png"):
        Image.fromarray(np.asarray(Image.open(path)) // 2).save(path)
    assert stack(make(root)).target.rgb.max() < 0.6
    assert not list(root.glob("*.unfinished"))


def test_a_folder_that_cannot_be_written_is_kept_in_memory(root, monkeypatch, capsys):
    def full(fd, offset, size):
        raise OSError(28, "No space left on device")

    expected = stack(make(root))
    for cache in root.glob(".cache-*"):
        shutil.rmtree(cache)
    store._get_store.cache_clear()
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert_same(stack(make(root)), expected)
    assert "No space left on device" in capsys.readouterr().err
    assert not list(root.glob(".cache*"))


def test_data_in_memory_is_not_copied_to_many_processes(root, monkeypatch):
    monkeypatch.setattr(store, "MAX_COPIED", 1000)
    there = store.get_store(root, folders.find(root), store.Settings(8, 8, None, None))
    pickle.dumps(there)  # each process opens the files
    kept = dataclasses.replace(there, folder=None)
    with pytest.raises(InputError, match="set data.num_workers=0"):
        pickle.dumps(kept)


def test_a_folder_that_fits_neither_on_disk_nor_in_memory_is_an_error(tmp_path):
    settings = store.Settings(512, 512, None, None)
    with pytest.raises(InputError, match="GB are more than the memory: .*config.data.name=records"):
        store._allocate(tmp_path / ".cache-x", 10**8, 10**8, settings)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_start_do_no_harm(root, capsys):
    (root / f".cache-x.{os.getpid()}.unfinished").mkdir()
    assert store._allocate(root / ".cache-x", 1, 1, store.Settings(8, 8, None, None))[1].is_dir()
    assert capsys.readouterr().err == ""


def test_leftovers_of_a_killed_start_are_removed_by_the_next(root):
    stack(make(root))
    cache = next(root.glob(".cache-*"))
    cache.rename(f"{cache}.1234.unfinished")
    store._get_store.cache_clear()
    stack(make(root))
    assert [x.name for x in root.glob(".cache-*")] == [cache.name]


def test_a_thin_diagonal_object_is_where_its_crop_says():
    """TripoSR's cropping loses the last row and column, and so the pixel that would be the first of the crop."""
    rgba = np.zeros((64, 64, 4), np.uint8)
    for i in range(30):
        rgba[10 + i, 45 - i] = 255
    crop, box = elements.recentered(rgba, 0.85, "sword")
    top, left, height, _ = np.rint(box * 64).astype(int)
    assert height == len(crop)
    rows, columns = np.nonzero(crop[..., 3])
    assert rgba[rows + top, columns + left, 3].all() and len(rows) == 28
    rgba[:] = 0
    rgba[3, 5] = rgba[4, 4] = 255
    with pytest.raises(InputError, match="sword: the image's foreground is too thin"):
        elements.recentered(rgba, 0.85, "sword")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (dict(num_source=0), "data.num_source=0: must be at least 1"),
        (dict(num_target=-1), "num_target=-1"),
        (dict(source_size=0), "source_size=0"),
        (dict(foreground_ratio=2.0), "foreground_ratio=2.0: must be in"),
        (dict(source_elevation=(5.0,)), "needs -90 <= low <= high"),
        (dict(mirorr=True), "config.data: .*mirorr"),
    ],
)
def test_a_field_out_of_range_is_reported_at_the_start(root, field, message):
    with pytest.raises(InputError, match=message):
        make(root, **field)


def test_variants_are_in_the_same_split():
    for uids in (
        ["p-house_A_blue", "p-house_B_red", "p-house_yellow", "p-house"],
        ["p-banner_patternA_red", "p-banner_patternB_blue"],
        ["p-pumpkin_orange_small", "p-pumpkin_yellow_small"],
        ["p-chair_01", "p-chair_02", "p-chair3"],
    ):
        assert len({splits.group(uid) for uid in uids}) == 1
        assert len({splits.in_validation(uid) for uid in uids}) == 1
    assert splits.group("p-bucket_water") != splits.group("p-bucket_empty")
    share = np.mean([splits.in_validation(f"p-{chr(97 + i % 26)}x{i}y") for i in range(4000)])
    assert 0.06 < share < 0.10
    # The split must never change from version to version.
    assert splits.in_validation("medieval-hexagon-pack-building_castle_blue")
    assert not splits.in_validation("medieval-hexagon-pack-building_windmill_blue")


def test_splits_are_disjoint_and_complete(root):
    train, val = make(root), make(root, "val", mirror=True)
    assert val.names == ("pack-thingddd",) and len(val.elements) == 1
    assert sorted(train.names + val.names) == sorted(p.name for p in root.glob("pack-*"))
    assert make(root, "all").names == tuple(sorted(train.names + val.names))
    assert_same(val.elements[0], make(root, "val").elements[0])  # never mirrored


def nan_pose(folder):
    np.save(folder / "pose/002.npy", np.full((3, 4), np.nan, np.float32))


def truncated_image(folder):
    path = folder / "rgba/003.png"
    path.write_bytes(path.read_bytes()[:60])


def odd_size(folder):
    Image.new("RGBA", (8, 8), "red").save(folder / "rgba/000.png")


def bytes_of_nothing(folder):
    (folder / "pose/001.npy").write_bytes(b"")


def pickled(folder):
    data = io.BytesIO()
    np.save(data, np.array([{}], object))
    (folder / "intrinsics.npy").write_bytes(data.getvalue())


def no_photo_like_view(folder):
    for view in range(VIEWS):
        np.save(folder / f"pose/{view:03d}.npy", pose_at(40 * view, 60))


@pytest.mark.parametrize(
    "damage, cause",
    [
        (nan_pose, "pose/002.npy has values that are not finite"),
        (truncated_image, "003.png"),
        (odd_size, "rgba/000.png is 8x8, intrinsics.npy says 32x32"),
        (bytes_of_nothing, "pose/001.npy cannot be read"),
        (pickled, "intrinsics.npy cannot be read"),
        (lambda folder: (folder / "pose/004.npy").unlink(), "pose/004.npy is missing"),
        (lambda folder: (folder / "rgba/004.png").unlink(), "rgba/004.png is missing"),
        (lambda folder: [p.unlink() for p in folder.glob("rgba/*")], "no rgba/*.png"),
        (
            no_photo_like_view,
            "0 views with an elevation in (5.0, 35.0) are too few for num_source=1",
        ),
    ],
)
def test_a_broken_object_is_skipped_with_its_name_and_cause(root, capsys, damage, cause):
    damage(root / "pack-thingbbb")
    data = make(root)
    assert "pack-thingbbb" not in data.names and len(data.names) >= 4
    error = capsys.readouterr().err
    assert "skipped pack-thingbbb: " in error and cause in error
    assert "skipped 1 of 6 objects" in error
    batch = stack(data, 16)
    assert np.isfinite(batch.target.cameras.c2w).all() and batch.target.alpha.max() == 1
    # Without a cache, the error comes when the object is read.
    lazy = make(root, cache=False)
    if damage not in (truncated_image, odd_size):  # these may or may not be chosen
        with pytest.raises(InputError, match=re.escape(f"pack-thingbbb: {cause}")):
            for position in range(len(lazy.names)):
                lazy.elements[position]


def test_nothing_usable_is_an_input_error(root, tmp_path_factory):
    with pytest.raises(InputError, match="no such folder"):
        make(root / "nowhere")
    with pytest.raises(InputError, match="no object"):
        make(tmp_path_factory.mktemp("empty"))
    with pytest.raises(InputError, match="8 views are too few for num_source=1 and num_target=9"):
        make(root, num_target=9)
    with pytest.raises(InputError, match="must be train, val or all"):
        make(root, "test")
    shutil.rmtree(root / "pack-thingddd")
    with pytest.raises(InputError, match="none of its 5 objects falls into the val split"):
        make(root, "val")
