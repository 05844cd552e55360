"""Batches are right in geometry, exact on resuming, and survive broken objects."""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lrm_jax.data import objects
from lrm_jax.types import Cameras, InputError

SIZE, VIEWS, FOCAL = 32, 8, 40.0
POINT = np.array([0.5, 0.3, 0.2])  # a red dot; the object is a faint ball around the origin
FIELDS = dict(seed=3, batch_size=4, num_target=3, source_size=16, target_size=32)


def pose_at(azimuth: float, elevation: float, distance: float = 3.0) -> np.ndarray:
    """[3 4] Blender camera that looks at the origin, z up."""
    a, e = np.radians([azimuth, elevation])
    back = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
    right = np.array([-np.sin(a), np.cos(a), 0])
    return np.stack([right, np.cross(back, right), back, distance * back], axis=1)


def pixel_of(point: np.ndarray, pose: np.ndarray) -> tuple[float, float]:
    """(column, row), by Blender's definition: x right, y up, z backward."""
    x, y, z = (point - pose[:, 3]) @ pose[:, :3]
    return SIZE / 2 + FOCAL * x / -z, SIZE / 2 - FOCAL * y / -z


def picture(pose: np.ndarray, shade: int) -> np.ndarray:
    rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
    rows, columns = np.indices((SIZE, SIZE)) + 0.5
    ball = np.hypot(rows - SIZE / 2, columns - SIZE / 2) < 11
    rgba[ball] = [0, shade, 60, 255]
    column, row = pixel_of(POINT, pose)
    rgba[(np.abs(rows - row) < 1.5) & (np.abs(columns - column) < 1.5)] = [255, 0, 0, 255]
    return rgba


def write_object(folder: Path, shade: int = 30) -> None:
    """Even views at elevation 10 to 30, odd ones at 50."""
    (folder / "rgba").mkdir(parents=True)
    (folder / "pose").mkdir()
    np.save(folder / "intrinsics.npy", np.float32([[FOCAL] * 2, [SIZE / 2] * 2, [SIZE] * 2]))
    for view in range(VIEWS):
        pose = pose_at(360 * view / VIEWS + 11, 50 if view % 2 else 10 + 3 * view)
        np.save(folder / "pose" / f"{view:03d}.npy", pose.astype(np.float32))
        Image.fromarray(picture(pose, shade)).save(folder / "rgba" / f"{view:03d}.png")


@pytest.fixture
def root(tmp_path) -> Path:
    for i in range(6):
        write_object(tmp_path / f"pack-thing{chr(97 + i) * 3}", shade=30 + 30 * i)
    return tmp_path


def make(root: Path, split: str = "train", **fields) -> objects.Objects:
    return objects.make(root, split=split, **{**FIELDS, **fields})


def assert_same(a, b) -> None:
    for x, y in ((a.source, b.source), (a.target, b.target)):
        np.testing.assert_array_equal(x.rgb, y.rgb)
        np.testing.assert_array_equal(x.alpha, y.alpha)
        np.testing.assert_array_equal(x.cameras.c2w, y.cameras.c2w)
        np.testing.assert_array_equal(x.cameras.fxfycxcy, y.cameras.fxfycxcy)


def seen_at(cameras: Cameras, point: np.ndarray) -> np.ndarray:
    """(u, v) fractions [B V 2] of world points [B 3], by the OpenCV definition."""
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


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("ratio", [None, 0.7])
def test_cameras_see_the_dot_where_the_pictures_show_it(root, mirror, ratio):
    data = make(root, mirror=mirror, foreground_ratio=ratio, batch_size=12)
    batch = data.batch(0)
    # Where the dot is in each sample's turned world follows from how far the world was turned: try all views' azimuths.
    azimuths = np.radians(-(360 * np.arange(VIEWS) / VIEWS + 11))
    candidates = np.stack(
        [
            [c * POINT[0] - s * POINT[1], flip * (s * POINT[0] + c * POINT[1]), POINT[2]]
            for c, s in zip(np.cos(azimuths), np.sin(azimuths), strict=True)
            for flip in ((1, -1) if mirror else (1,))
        ]
    )
    shown = dot_in(batch.target)
    errors = np.stack(
        [
            np.abs(seen_at(batch.target.cameras, np.tile(p, (12, 1))) - shown).max((1, 2))
            for p in candidates
        ]
    )
    best = errors.argmin(0)
    # Half a pixel of 32, as the dot is drawn on whole pixels.
    assert (errors.min(0) < 0.5 / 32 + 1e-3).all()
    if mirror:
        assert 0 < (best % 2).sum() < 12  # some of both
    # The dot is where the source shows it too, crop or not; its pixels are half as many (16).
    source = np.abs(seen_at(batch.source.cameras, candidates[best]) - dot_in(batch.source))
    assert source.max() < 0.75 / 16


def test_source_is_at_azimuth_0_and_keeps_elevation_and_distance(root):
    batch = make(root, mirror=True, batch_size=16).batch(5)
    eye = batch.source.cameras.c2w[:, 0, :3, 3]
    np.testing.assert_allclose(eye[:, 1], 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(eye, axis=-1), 3, rtol=1e-5)
    elevation = np.degrees(np.arctan2(eye[:, 2], eye[:, 0]))
    # Only those of even views are in the default band.
    assert all(np.abs(elevation[:, None] - [10, 16, 22, 28]).min(1) < 1e-3)
    rotation = batch.target.cameras.c2w[..., :3, :3]
    np.testing.assert_allclose(np.linalg.det(rotation), 1, rtol=1e-5)
    # The first target is the source, whole.
    np.testing.assert_array_equal(batch.target.cameras.c2w[:, 0], batch.source.cameras.c2w[:, 0])
    assert batch.target.rgb.shape == (16, 4, 32, 32, 3)
    assert batch.source.rgb.shape == (16, 1, 16, 16, 3) and batch.source.rgb.dtype == np.float32


def test_foreground_fills_the_ratio(root):
    alpha = make(root, foreground_ratio=0.5, source_size=64).batch(0).source.alpha[:, 0] > 0.5
    for view in alpha:
        rows, columns = np.nonzero(view)
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        assert abs(extent / 64 - 0.5) < 0.05  # a pixel of the file is 1.5 of these


def test_downscaling_averages_area_with_premultiplied_alpha(root):
    whole, half = (make(root, target_size=size).batch(2).target for size in (32, 16))
    premultiplied = whole.rgb * whole.alpha[..., None]
    mean = premultiplied.reshape(4, 4, 16, 2, 16, 2, 3).mean((3, 5))
    # Two 8-bit roundings.
    np.testing.assert_allclose(half.rgb * half.alpha[..., None], mean, atol=1.5 / 255)
    np.testing.assert_allclose(
        half.alpha, whole.alpha.reshape(4, 4, 16, 2, 16, 2).mean((3, 5)), atol=1 / 255
    )


def test_batches_are_a_function_of_seed_and_step(root):
    a, b = make(root, mirror=True), make(root, mirror=True)
    a.batch(0)
    assert_same(a.batch(7), b.batch(7))
    other = make(root, seed=4, mirror=True).batch(7)
    assert np.abs(other.target.rgb - a.batch(7).target.rgb).max() > 0
    again = a.batch(8)
    again.source.rgb[:] = -1
    assert a.batch(8).source.rgb.min() >= 0  # batches do not share memory with the store


def test_an_epoch_shows_every_object_once_and_another_order_next(root):
    data = make(root, batch_size=1)
    count = data.num_objects
    shade = [float(data.batch(i).source.rgb[0, 0, ..., 1].max()) for i in range(2 * count)]
    assert len(set(shade[:count])) == count
    assert sorted(shade[:count]) == sorted(shade[count:]) and shade[:count] != shade[count:]


def test_the_second_start_decodes_nothing_and_changed_files_are_noticed(root, monkeypatch):
    first = make(root).batch(0)
    objects._get_store.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(objects, "load_image", lambda path: pytest.fail("decoded again"))
        assert_same(make(root).batch(0), first)
    for path in root.glob("*/rgba/*.png"):
        Image.fromarray(np.asarray(Image.open(path)) // 2).save(path)
    assert make(root).batch(0).target.rgb.max() < 0.6
    assert not list(root.glob("*.unfinished"))


def test_a_folder_that_cannot_be_written_is_kept_in_memory(root, monkeypatch, capsys):
    def full(fd, offset, size):
        raise OSError(28, "No space left on device")

    expected = make(root).batch(0)
    for cache in root.glob(".cache-*"):
        shutil.rmtree(cache)
    objects._get_store.cache_clear()
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert_same(make(root).batch(0), expected)
    assert "No space left on device" in capsys.readouterr().err
    assert not list(root.glob(".cache*"))


def test_variants_fall_on_one_side():
    for uids in (
        ["p-house_A_blue", "p-house_B_red", "p-house_yellow", "p-house"],
        ["p-banner_patternA_red", "p-banner_patternB_blue"],
        ["p-pumpkin_orange_small", "p-pumpkin_yellow_small"],
        ["p-chair_01", "p-chair_02", "p-chair3"],
    ):
        assert len({objects.group(uid) for uid in uids}) == 1
        assert len({objects.in_validation(uid) for uid in uids}) == 1
    assert objects.group("p-bucket_water") != objects.group("p-bucket_empty")
    share = np.mean([objects.in_validation(f"p-{chr(97 + i % 26)}x{i}y") for i in range(4000)])
    assert 0.06 < share < 0.10
    # The split must never change between versions.
    assert objects.in_validation("medieval-hexagon-pack-building_castle_blue")
    assert not objects.in_validation("medieval-hexagon-pack-building_windmill_blue")


def test_splits_are_disjoint_and_complete(root):
    train, val = make(root), make(root, "val", mirror=True)
    assert val.uids == ["pack-thingddd"]
    assert sorted(train.uids + val.uids) == sorted(p.name for p in root.glob("pack-*"))
    assert not val.mirror
    assert val.batch(0).target.rgb.shape[0] == 4  # more than there are objects: they come again


def nan_pose(folder):
    np.save(folder / "pose/002.npy", np.full((3, 4), np.nan, np.float32))


def truncated_picture(folder):
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
        (truncated_picture, "003.png"),
        (odd_size, "rgba/000.png is 8x8, intrinsics.npy says 32x32"),
        (bytes_of_nothing, "pose/001.npy cannot be read"),
        (pickled, "intrinsics.npy cannot be read"),
        (lambda folder: (folder / "pose/004.npy").unlink(), "pose/004.npy is missing"),
        (lambda folder: [p.unlink() for p in folder.glob("rgba/*")], "no rgba/*.png"),
        (no_photo_like_view, "0 views with an elevation in (5.0, 35.0) for 1 sources"),
    ],
)
def test_a_broken_object_is_skipped_with_its_name_and_cause(root, capsys, damage, cause):
    damage(root / "pack-thingbbb")
    data = make(root)
    assert "pack-thingbbb" not in data.uids and data.num_objects >= 4
    error = capsys.readouterr().err
    assert "skipped pack-thingbbb: " in error and cause in error
    assert "skipped 1 of 6 objects" in error
    for step in range(4):
        batch = data.batch(step)
        assert np.isfinite(batch.target.cameras.c2w).all() and batch.target.alpha.max() == 1


def test_nothing_usable_is_an_input_error(root, tmp_path_factory):
    with pytest.raises(InputError, match="no such folder"):
        make(root / "nowhere")
    with pytest.raises(InputError, match="no object"):
        make(tmp_path_factory.mktemp("empty"))
    with pytest.raises(InputError, match="8 views for 1 sources and 9 other targets"):
        make(root, num_target=9)
    with pytest.raises(InputError, match="must be train or val"):
        make(root, "test")
    shutil.rmtree(root / "pack-thingddd")
    with pytest.raises(InputError, match="none of its 5 objects falls into the val split"):
        make(root, "val")
