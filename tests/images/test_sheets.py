"""Files are written completely or not at all, and images and videos can be opened."""

import errno
import io
import os
import time

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from lrm_jax.images import sheets, video
from lrm_jax.parallel import messages, whole_files
from lrm_jax.types import InputError


def test_write_file_makes_the_folder_and_leaves_only_the_file(tmp_path):
    whole_files.write_file(tmp_path / "a" / "b.bin", b"one")
    whole_files.write_file(tmp_path / "a" / "b.bin", b"two")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.bin"]
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"two"


def test_a_full_disk_leaves_neither_new_files_nor_damaged_old_ones(tmp_path, monkeypatch):
    whole_files.write_file(tmp_path / "b", b"old")
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        whole_files.write_files(tmp_path, {"a": b"new", "b": b"new"})
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert (tmp_path / "b").read_bytes() == b"old"


def test_stages_are_named_and_timed_even_if_they_fail(capsys):
    stages = messages.Stages()
    with stages("encode", " 2 images"):
        time.sleep(0.02)
    with pytest.raises(ValueError), stages("encode"):
        raise ValueError
    with stages("surface"):
        pass
    assert list(stages.seconds) == ["encode", "surface"]
    assert 0.02 <= stages.seconds["encode"] < stages.elapsed()
    assert "encode 2 images\n" in capsys.readouterr().err


def test_progress_is_silent_when_quick(capsys):
    assert list(messages.progress(range(3), 3, "quick")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def plane_seen_from_above(size: int = 9):
    """Depth of the plane z = 0.2 x from a camera at z = 3 with parallel rays down. Rows go along -y, columns along +x."""
    x, y = np.meshgrid(np.linspace(-1, 1, size), np.linspace(1, -1, size))
    origins = np.stack([x, y, np.full_like(x, 3.0)], -1)[None]
    dirs = np.broadcast_to(np.array([0.0, 0.0, -1.0]), origins.shape)
    return 3.0 - 0.2 * x[None], origins, dirs


def test_normals_of_a_plane_point_at_the_camera():
    depth, origins, dirs = plane_seen_from_above()
    images = sheets.normal_images(depth, np.ones_like(depth), origins, dirs)
    expected = np.array([-0.2, 0.0, 1.0]) / np.sqrt(1.04)
    expected = np.broadcast_to((expected * 0.5 + 0.5) * 255, images.shape)
    np.testing.assert_allclose(images, expected, atol=0.51)  # rounding to 8 bits


def test_unseen_pixels_are_white_and_their_depth_is_ignored():
    depth, origins, dirs = plane_seen_from_above()
    alpha = np.ones_like(depth)
    alpha[:, :4], depth[:, :4] = 0.0, np.nan
    for images in (
        sheets.depth_images(depth, alpha),
        sheets.normal_images(depth, alpha, origins, dirs),
    ):
        assert (images[:, :4] == 255).all() and (images[:, 5:] < 255).any(-1).all()
    assert (sheets.depth_images(depth, alpha * 0) == 255).all()


def test_near_is_brighter_than_far():
    depth, _, _ = plane_seen_from_above()
    grey = sheets.depth_images(depth, np.ones_like(depth))[0, 0, :, 0]
    assert (np.diff(grey[1:-1].astype(int)) > 0).all()


def test_contact_sheet_holds_every_image():
    rows = {
        name: np.full((3, 32, 40, 3), value, np.uint8) for name, value in [("a", 10), ("b", 90)]
    }
    source = np.full((100, 50, 3), 200, np.uint8)
    sheet = np.asarray(
        Image.open(io.BytesIO(sheets.contact_sheet(source, rows, ["x"] * 3, "name")))
    )
    for value, count in [(10, 3 * 32 * 40), (90, 3 * 32 * 40), (200, 16 * 32)]:
        assert (sheet == value).all(-1).sum() == pytest.approx(
            count, abs=20
        )  # a label may have this grey


@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_turntable_plays_with_even_sides(tmp_path, size):
    frames = np.zeros((6, *size, 3), np.uint8)
    frames[3:] = 255
    (tmp_path / "t.mp4").write_bytes(video.turntable(frames))
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "t.mp4"))
    assert next(reader)["size"] == (48, 32 if size[0] == 32 else 34)
    means = [np.frombuffer(frame, np.uint8).mean() for frame in reader]
    assert len(means) == 6 and max(means[:3]) < 30 and min(means[3:]) > 225  # the video is lossy


def test_a_video_that_ffmpeg_cannot_write_is_an_error(monkeypatch, tmp_path):
    failing = tmp_path / "ffmpeg"
    failing.write_text("#!/bin/sh\necho No space left on device >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(failing))
    with pytest.raises(InputError, match="No space left on device.*: free some space in"):
        video.turntable(np.zeros((2, 8, 8, 3), np.uint8))
