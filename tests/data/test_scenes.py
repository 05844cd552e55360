"""Scenes give the same images and cameras in every layout. Views, crops and poses follow LVSM's definitions."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from scene_folders import (
    CENTRE,
    FOCAL,
    HEIGHT,
    LAYOUTS,
    NUM_FRAMES,
    WIDTH,
    fractions,
    image,
    trajectory,
    write_chunk,
    write_lvsm,
    write_nerfstudio,
)

from lrm_jax.data import pipeline, scene_files, scenes
from lrm_jax.images import captures
from lrm_jax.ops import normalization
from lrm_jax.types import InputError
from lrm_jax.weights import tensor_files

FIELDS = dict(seed=0, num_source=2, num_target=2, source_size=16, target_size=16, min_gap=6, max_gap=9)  # fmt: skip


def make(root: Path, split: str = "all", **fields):
    return scenes.make(root, split=split, **{**FIELDS, **fields})


def frame_of(rgb: np.ndarray, seed: int = 0) -> np.ndarray:
    """The frame numbers of the images [V H W 3]."""
    return np.round((rgb[..., 2].mean((1, 2)) - 40 - seed) / 10).astype(int)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_cameras_and_images_that_were_written(tmp_path, layout):
    for seed, name in enumerate(["attic", "barn"]):
        LAYOUTS[layout](tmp_path, name, seed)
    places = scene_files.find(tmp_path, "all")
    assert [place.name for place in places] == ["attic", "barn"]
    for seed, place in enumerate(places):
        frames = place.read()
        shown = [captures.read_image(frames, view) for view in range(NUM_FRAMES)]
        assert list(frame_of(np.stack(shown), seed)) == list(range(NUM_FRAMES))
        # pixelSplat's files have float32, with coordinates near 10.
        np.testing.assert_allclose(frames.c2w, trajectory(seed), atol=1e-5)
        np.testing.assert_allclose(
            frames.fxfycxcy, np.tile(fractions(), (NUM_FRAMES, 1)), atol=1e-6
        )
        error = np.abs(shown[3].astype(int) - np.asarray(image(seed, 3)))
        assert error.max() <= (6 if layout == "pixelsplat" else 0)  # JPEG


def test_lvsm_intrinsics_may_be_fractions_and_paths_relative(tmp_path):
    write_lvsm(tmp_path, "attic", 0, count=2)
    path = tmp_path / "metadata" / "attic.json"
    content = json.loads(path.read_text())
    for view, frame in enumerate(content["frames"]):
        frame["fxfycxcy"] = fractions()
        del frame["image_path"]
        frame["file_path"] = f"images/attic/frame_{view}.png"
    path.write_text(json.dumps(content))
    (place,) = scene_files.find(tmp_path, "all")
    frames = place.read()
    np.testing.assert_allclose(frames.fxfycxcy, np.tile(fractions(), (2, 1)))
    assert frame_of(captures.read_image(frames, 1)[None]) == [1]


def test_a_field_of_view_is_enough_and_transparent_pixels_are_white(tmp_path):
    """As in NeRF's Blender scenes. Here the root itself is a scene."""
    rgba = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    rgba[:, : WIDTH // 2] = [200, 7, 30, 255]
    (tmp_path / "train").mkdir()
    Image.fromarray(rgba).save(tmp_path / "train" / "r_0.png")
    frame = dict(file_path="./train/r_0", transform_matrix=np.eye(4).tolist())
    content = dict(camera_angle_x=np.pi / 2, frames=[frame])
    (tmp_path / "transforms_train.json").write_text(json.dumps(content))
    (place,) = scene_files.find(tmp_path, "all")
    frames = place.read()
    assert place.name == tmp_path.name
    np.testing.assert_allclose(frames.fxfycxcy, [[0.5, 0.5 * WIDTH / HEIGHT, 0.5, 0.5]])
    np.testing.assert_array_equal(frames.c2w[0], np.diag([1, -1, -1, 1]))
    rgb = captures.read_image(frames, 0)
    np.testing.assert_array_equal(rgb[:, : WIDTH // 2], rgba[:, : WIDTH // 2, :3])
    np.testing.assert_array_equal(rgb[:, WIDTH // 2 :], 255)


def test_train_and_test_folders_are_the_splits_and_otherwise_names_decide(tmp_path):
    write_chunk(tmp_path / "train", "0.torch", {"a": 0, "b": 1}, count=1)
    write_chunk(tmp_path / "test", "0.torch", {"c": 2}, count=1)

    def names(root, split):
        return {place.name for place in scene_files.find(root, split)}

    assert names(tmp_path, "train") == {"a", "b"}
    assert names(tmp_path, "val") == {"c"}
    assert names(tmp_path, "all") == {"a", "b", "c"}
    assert names(tmp_path / "test", "all") == {"c"}
    flat = tmp_path / "flat"
    write_chunk(flat, "0.torch", {f"{i:x}b": 0 for i in range(40)}, count=1)
    train, val = names(flat, "train"), names(flat, "val")
    assert val and not train & val and train | val == names(flat, "all")


def test_the_views_of_a_window_are_lvsms():
    recipe = scenes.Recipe(2, 4, 16, None, min_gap=25, max_gap=192)
    gaps, share = [], np.zeros(8)
    for seed in range(300):
        frames, targets = scenes.draw(400, recipe, np.random.default_rng(seed))
        first, last = frames[:2]
        assert 0 <= first < last < 400 and len(set(frames)) == 8
        assert ((first < frames[2:]) & (frames[2:] < last)).all()
        assert len(set(targets)) == 6
        gaps.append(last - first)
        share[targets] += 1 / 300
    assert 25 <= min(gaps) < 35 and 182 < max(gaps) <= 192  # uniform: 300 draws of 168 values
    # Six of eight, including the sources: 3/4 each, with a standard deviation of 0.025.
    np.testing.assert_allclose(share, 0.75, atol=0.1)


def test_a_window_is_cut_to_the_video_and_a_short_video_is_refused():
    recipe = scenes.Recipe(2, 4, 16, None, min_gap=25, max_gap=192)
    for count in (8, 20):
        frames, _ = scenes.draw(count, recipe, np.random.default_rng(0))
        assert list(frames[:2]) == [0, count - 1]
    with pytest.raises(InputError, match="7 frames, but 8 are needed"):
        scenes.draw(7, recipe, np.random.default_rng(0))
    one = scenes.Recipe(
        1, 2, 16, None, min_gap=1, max_gap=3
    )  # too close together for five different frames
    frames, targets = scenes.draw(5, one, np.random.default_rng(0))
    assert sorted(frames) == [0, 1, 2, 3, 4] and frames[0] == 0 and len(targets) == 3


def test_the_images_and_cameras_of_a_sample_are_of_the_same_frames(tmp_path):
    write_nerfstudio(tmp_path, "attic", 0)
    source = make(tmp_path, normalize=None)
    batch = source.elements[0]
    assert batch.source.rgb.shape == (2, 16, 16, 3) and batch.target.rgb.shape == (4, 16, 16, 3)
    assert batch.source.rgb.dtype == np.uint8 and batch.source.alpha is None
    for views in (batch.source, batch.target):
        # LANCZOS overshoots only at edges, and blue has none.
        np.testing.assert_allclose(views.cameras.c2w, trajectory()[frame_of(views.rgb)], atol=1e-6)
    first, last = frame_of(batch.source.rgb)
    assert 6 <= last - first <= 9


@pytest.mark.parametrize("size", [(48, 32), (50, 32), (32, 48), (640, 360), (20, 20)])
def test_cropped_cameras_see_what_the_crop_shows(size):
    """A ramp in x and y is resized and cropped to the ramp of the box, however the width was rounded."""
    width, height = size
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    rgb = np.stack([255 * x, 255 * y, 0 * x], -1).round().astype(np.uint8)
    cropped, (top, left, box_height, box_width) = captures.crop(rgb, 16)
    assert cropped.shape == (16, 16, 3)
    assert round(16 / min(box_height, box_width)) % captures.WIDTH_STEP == 0
    assert max(box_height, box_width) == 1  # the shorter side is not cropped
    along = (np.arange(16) + 0.5) / 16
    # Only the middle, because LANCZOS's kernel is cut off at the edges of the image. 2 levels are two roundings.
    inner = slice(4, 12)
    wanted_x = np.broadcast_to(255 * (left + box_width * along)[None, :], (16, 16))
    wanted_y = np.broadcast_to(255 * (top + box_height * along)[:, None], (16, 16))
    np.testing.assert_allclose(cropped[inner, inner, 0], wanted_x[inner, inner], atol=2)
    np.testing.assert_allclose(cropped[inner, inner, 1], wanted_y[inner, inner], atol=2)


def test_intrinsics_are_scaled_and_shifted_with_the_crop(tmp_path):
    """Computed by hand in pixels: 48 x 32 becomes 24 x 16, and four columns are cut off on each side."""
    write_nerfstudio(tmp_path, "attic", 0)
    fxfycxcy = make(tmp_path).elements[0].target.cameras.fxfycxcy * 16
    wanted = [FOCAL[0] / 2, FOCAL[1] / 2, CENTRE[0] / 2 - 4, CENTRE[1] / 2]
    np.testing.assert_allclose(fxfycxcy, np.tile(wanted, (4, 1)), rtol=1e-6)  # float32


@pytest.mark.parametrize("normalize", ["all_views", "source_views"])
def test_the_mean_pose_is_the_identity_and_the_largest_coordinate_has_a_margin(normalize):
    c2w = trajectory()[[2, 9, 4, 6, 7]]
    motion, scale = normalization.scene_motion(c2w, 2, normalize)
    moved = motion @ c2w
    moved[:, :3, 3] *= scale
    by = moved[:2] if normalize == "source_views" else moved
    np.testing.assert_allclose(by[:, :3, 3].mean(0), 0, atol=1e-12)
    assert abs(np.abs(by[:, :3, 3]).max() - 1 / 1.35) < 1e-12
    forward = by[:, :3, 2].mean(0)
    np.testing.assert_allclose(forward / np.linalg.norm(forward), [0, 0, 1], atol=1e-12)
    down = by[:, :3, 1].mean(0)
    assert abs(down[0]) < 1e-12 and down[1] > 0
    # This is a rigid motion and a scale, so the views keep their relative places.
    np.testing.assert_allclose(motion[:3, :3] @ motion[:3, :3].T, np.eye(3), atol=1e-12)
    assert np.linalg.det(motion[:3, :3]) > 0
    relative = np.linalg.inv(c2w[0]) @ c2w[3]
    relative[:3, 3] *= scale
    np.testing.assert_allclose(np.linalg.inv(moved[0]) @ moved[3], relative, atol=1e-12)


@pytest.mark.parametrize("normalize", ["all_views", "source_views"])
def test_the_world_does_not_matter(normalize):
    """The normalised poses are the same for any rigidly moved and scaled copy of a scene."""
    c2w, world = trajectory()[[0, 9, 4]], trajectory(5)[3]
    copy = world @ c2w
    copy[:, :3, 3] *= 7.5
    normalized = []
    for poses in (c2w, copy):
        motion, scale = normalization.scene_motion(poses, 2, normalize)
        poses = motion @ poses
        poses[:, :3, 3] *= scale
        normalized.append(poses)
    np.testing.assert_allclose(*normalized, atol=1e-12)


def test_only_if_normalised_by_the_sources_a_view_does_not_depend_on_the_other_targets(tmp_path):
    write_nerfstudio(tmp_path, "attic", 0)
    frames = captures.read_folder(tmp_path / "attic")
    for normalize, same in (("source_views", True), ("all_views", False)):
        few = scenes.assemble(frames, [1, 9, 4], 2, [2], 16, normalize)
        many = scenes.assemble(frames, [1, 9, 4, 13, 12], 2, [2, 3, 4], 16, normalize)
        pairs = [
            (few.source.cameras.c2w, many.source.cameras.c2w),
            (few.target.cameras.c2w, many.target.cameras.c2w[:1]),
        ]
        assert all(np.array_equal(a, b) == same for a, b in pairs)
    # All views that are read count, not only those that are requested: in training, all eight frames of a window.
    one = scenes.assemble(frames, [1, 9, 4, 13, 12], 2, [2], 16, "all_views")
    np.testing.assert_array_equal(one.target.cameras.c2w, many.target.cameras.c2w[:1])


def test_poses_without_a_direction_or_a_length_are_refused():
    c2w = trajectory()[[0, 0]]
    for normalize in ("all_views", "source_views"):
        with pytest.raises(InputError, match="stand at one place"):
            normalization.scene_motion(c2w, 2, normalize)
    opposite = np.stack([c2w[0], c2w[0] @ np.diag([-1, 1, -1, 1])])
    with pytest.raises(InputError, match="opposite"):
        normalization.scene_motion(opposite, 2, "all_views")
    motion, scale = normalization.scene_motion(c2w, 2, None)
    assert scale == 1 and np.array_equal(motion, np.eye(4))


def test_training_reads_chunk_after_chunk_and_every_scene_once_per_epoch(tmp_path):
    for chunk in range(4):
        write_chunk(tmp_path, f"{chunk}.torch", {f"{chunk}{c}q": 0 for c in "abc"}, count=1)
    places = scene_files.find(tmp_path, "all")
    order = scenes._order(places, "train", seed=3)
    epochs = [[int(order[12 * epoch + i]) for i in range(12)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
        files = [places[i].path.name for i in epoch]
        assert all(len(set(files[i : i + 3])) == 1 for i in range(0, 12, 3))
    assert epochs[0] != epochs[1] != epochs[2]
    assert [int(order[i]) for i in range(11, -1, -1)] == epochs[0][::-1]  # in any order of reading
    assert [int(scenes._order(places, "train", seed=4)[i]) for i in range(12)] != epochs[0]
    assert [int(scenes._order(places, "val", seed=3)[i]) for i in range(12)] == list(range(12))


def test_samples_are_functions_of_seed_and_position_and_make_batches(tmp_path):
    for seed, name in enumerate(["attic", "barn", "cellar"]):
        write_nerfstudio(tmp_path, name, seed)
    batches = pipeline.open_batches(make(tmp_path), 3, prefetch=0)
    _, batch = next(batches)
    assert batch.target.rgb.shape == (3, 4, 16, 16, 3)
    again = make(tmp_path)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[2], y), batch, again.elements[2])
    assert again.names == ("attic", "barn", "cellar")
    other = make(tmp_path, seed=1).elements[2]
    assert not np.array_equal(other.target.cameras.c2w, batch.target.cameras.c2w[2])


def test_scenes_that_cannot_be_used_are_named_and_replaced(tmp_path, capsys):
    for seed, name in enumerate(["attic", "barn", "cellar"]):
        write_nerfstudio(tmp_path, name, seed)
    for frame in range(NUM_FRAMES):
        (tmp_path / "attic" / "images" / f"frame_{frame}.png").unlink()
    broken = json.loads((tmp_path / "barn" / "transforms.json").read_text())
    broken["frames"][3]["transform_matrix"][0] = [2, 0, 0, 0]
    (tmp_path / "barn" / "transforms.json").write_text(json.dumps(broken))
    source = make(tmp_path)
    with pytest.raises(InputError, match=r"attic: .*frame_\d+.png does not exist"):
        source.elements[0]
    with pytest.raises(InputError, match="barn: the pose of frame 10 is not a rotation"):
        source.elements[1]
    _, batch = next(pipeline.open_batches(source, 3, prefetch=0))
    np.testing.assert_array_equal(batch.source.rgb[0], batch.source.rgb[2])
    assert capsys.readouterr().err.count("bad record") == 2


def test_bad_cameras_are_one_line(tmp_path):
    write_nerfstudio(tmp_path, "attic", 0)
    path = tmp_path / "attic" / "transforms.json"
    good = json.loads(path.read_text())
    for change, cause in (
        (dict(frames=[]), "no frame|of 0 frames"),
        (dict(frames=[{}]), "KeyError: 'file_path'"),
        (dict(fl_x=None), "TypeError"),
        (dict(fl_x=-3.0), "not positive"),
        (dict(cx=2000.0), "the centre must be in the image"),
        (dict(k1=0.5), "OPENCV lens moves the corners"),
        (dict(camera_model="OPENCV_FISHEYE"), "OPENCV_FISHEYE camera is not a pinhole"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(InputError, match=cause):
            captures.read_folder(tmp_path / "attic")
    path.write_text(json.dumps(good | dict(w=HEIGHT, h=WIDTH, cx=10, cy=10)))
    frames = captures.read_folder(tmp_path / "attic")
    with pytest.raises(
        InputError, match="frame_0.png is 48x32, not the aspect ratio of its camera"
    ):
        captures.read_image(frames, 0)
    path.write_text("[")
    with pytest.raises(InputError, match="transforms.json cannot be read"):
        captures.read_folder(tmp_path / "attic")
    with pytest.raises(InputError, match="neither transforms.json nor"):
        captures.read_folder(tmp_path)


def test_bad_chunks_and_frames_of_re10k_are_one_line(tmp_path):
    write_chunk(tmp_path / "a", "0.torch", {"x": 0}, count=2)
    index = tmp_path / "a" / "index.json"
    index.write_text(json.dumps({"x": "0.torch", "y": "0.torch", "z": "1.torch"}))
    source = make(tmp_path / "a")
    with pytest.raises(InputError, match="x: 2 frames, but 6 are needed"):
        source.elements[0]
    with pytest.raises(InputError, match="y: 0.torch lacks it"):
        source.elements[1]
    with pytest.raises(InputError, match="z: .*1.torch: cannot be read"):
        source.elements[2]
    tensor_files.write_torch(tmp_path / "a" / "1.torch", {"model": np.zeros(3, np.float32)})
    with pytest.raises(InputError, match="not a chunk of pixelSplat's"):
        source.elements[2]
    index.unlink()
    with pytest.raises(InputError, match="index.json is missing"):
        make(tmp_path / "a")
    write_lvsm(tmp_path / "b", "w", 0)
    path = tmp_path / "b" / "metadata" / "w.json"
    content = json.loads(path.read_text())
    del content["frames"][2]["w2c"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="w: w.json cannot be read .KeyError: 'w2c'"):
        make(tmp_path / "b").elements[0]


def test_a_real_torch_file_is_read_without_torch(tmp_path):
    """A file as pixelSplat writes it. Needs torch to write it."""
    torch = pytest.importorskip("torch")
    write_chunk(tmp_path, "0.torch", {"x": 0}, count=2)
    content, _ = tensor_files.read(tmp_path / "0.torch")
    scene = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in content[0].items()}
    scene["images"] = [torch.tensor(image) for image in content[0]["images"]]
    torch.save([scene], tmp_path / "0.torch")
    scene_files._chunk.cache_clear()
    (place,) = scene_files.find(tmp_path, "all")
    frames = place.read()
    assert frame_of(captures.read_image(frames, 1)[None]) == [1]
    np.testing.assert_allclose(frames.c2w, trajectory(0, 2), atol=1e-5)  # float32


def test_evaluation_views_are_those_of_the_index_and_none_is_dropped(tmp_path, capsys):
    write_chunk(tmp_path / "test", "0.torch", {"a": 0, "b": 1, "short": 2})
    write_chunk(tmp_path / "train", "0.torch", {"other": 3}, count=1)
    index = tmp_path / "index.json"
    views = dict(context=[1, 9], target=[2, 5, 8])
    index.write_text(json.dumps({"b": views, "gone": views, "a": views, "unposed": None, "short": dict(context=[1, 14], target=[3])}))  # fmt: skip
    evaluation = scenes.evaluation_views(tmp_path, index, 16, "all_views")
    assert len(evaluation) == 3 and evaluation.absent == ("gone",)
    assert evaluation.unused == ("unposed",)
    assert "absent: gone" in (error := capsys.readouterr().err)
    assert "1 of 4 scenes" in error
    name, batch = evaluation[0]
    assert name == "b"
    assert list(frame_of(batch.source.rgb, 1)) == [1, 9]
    assert list(frame_of(batch.target.rgb, 1)) == [2, 5, 8]
    motion, scale = normalization.scene_motion(trajectory(1)[[1, 9, 2, 5, 8]], 2, "all_views")
    wanted = motion @ trajectory(1)[[2, 5, 8]]
    wanted[:, :3, 3] *= scale
    np.testing.assert_allclose(batch.target.cameras.c2w, wanted, atol=1e-5)  # float32
    assert evaluation[1][0] == "a"
    with pytest.raises(InputError, match="short: 14 frames, but the index asks for frame 14"):
        list(evaluation)
    index.write_text(json.dumps({"gone": views}))
    with pytest.raises(InputError, match="none of the 1 scenes"):
        scenes.evaluation_views(tmp_path, index, 16)
    for text in ("{", "[]", '{"a": {"context": [0.5], "target": [1]}}', '{"a": {"context": [0]}}'):
        index.write_text(text)
        with pytest.raises(InputError, match="is not an index of pixelSplat"):
            scenes.evaluation_views(tmp_path, index, 16)


def test_fields_out_of_range_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="no scene in it"):
        make(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        make(tmp_path / "nowhere")
    write_nerfstudio(tmp_path, "attic", 0, count=1)
    for fields, cause in (
        (dict(source_size=8), "must be equal"),
        (dict(normalize="azimuth"), "must be all_views"),
        (dict(normalize="source_views", num_source=1), "takes two sources"),
        (dict(min_gap=10), "min_gap=10"),
        (dict(num_source=0), "num_source=0"),
        (dict(split="test"), "must be train"),
        (dict(split="train", seed=-1), "seed"),
    ):
        with pytest.raises(InputError, match=cause):
            make(tmp_path, **fields)
