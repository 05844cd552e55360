import numpy as np
import pytest
from PIL import Image
from posed_folder import write_capture
from three_balls import SIZE, write_object

from lrm_jax.data import elements, folders, held_out
from lrm_jax.images import captures
from lrm_jax.types import InputError


def test_the_name_chooses_targets_from_all_parts_of_the_views(tmp_path):
    """Views with even numbers are alike, as in `render_objects`. Half of the targets have odd numbers, whichever view is the source."""
    odd, firsts = [], set()
    for i in range(24):
        folder = tmp_path / f"thing{i}"
        write_object(folder, num_views=16, points=False, step=2.0)
        cameras = folders.read_cameras(folder)
        item = held_out.read(folder, 4, SIZE)
        places = [
            int(np.flatnonzero([np.array_equal(c, x) for x in cameras.c2w.astype(np.float32)])[0])
            for c in item.target_cameras.c2w
        ]
        assert places == sorted(set(places))
        assert all(4 * k <= place <= 4 * k + 5 for k, place in enumerate(places))
        odd += [place % 2 for place in places]
        firsts.add(places[0])
    assert 0.35 < np.mean(odd) < 0.65 and len(firsts) >= 3


def test_the_name_chooses_the_source(tmp_path):
    names, seen = "abcdefgh", []
    for name in names:
        write_object(tmp_path / name, num_views=6, points=False, step=5.0)
        item = held_out.read(tmp_path / name, 3, SIZE)
        seen.append(item.source_camera.c2w)
        assert elements.in_band(item.source_camera.c2w[None], held_out.SOURCE_ELEVATION).all()
        assert not any(np.array_equal(item.source_camera.c2w, x) for x in item.target_cameras.c2w)
        again = held_out.read(tmp_path / name, 3, SIZE).source_camera.c2w
        np.testing.assert_array_equal(again, seen[-1])
    assert len(np.unique(np.round(seen, 5), axis=0)) >= 3


def test_objects_need_a_view_from_the_side_and_square_images(tmp_path):
    write_object(tmp_path / "a")
    high = np.load(tmp_path / "a/pose/000.npy")
    for i in range(5):
        np.save(tmp_path / f"a/pose/{i:03d}.npy", high)
    with pytest.raises(InputError, match="no view has an elevation"):
        held_out.read(tmp_path / "a", 3, SIZE)
    np.save(tmp_path / "a/intrinsics.npy", np.array([[50, 50], [24, 24], [48, 32.0]]))
    with pytest.raises(InputError, match="48x32, not square"):
        held_out.read(tmp_path / "a", 3, SIZE)


def places_of(poses: np.ndarray, folder) -> list[int]:
    known = folders.read_cameras(folder).c2w.astype(np.float32)
    return [int(np.flatnonzero([np.array_equal(c, x) for x in known])[0]) for c in poses]


def test_sources_come_from_a_range_of_views_and_targets_from_outside(tmp_path):
    folder = tmp_path / "a"
    write_object(folder, num_views=14, points=False, step=5.0)
    choice = dict(elevation=None, source_views=(2, 12))
    item = held_out.read(folder, 4, SIZE, 5, **choice)
    sources = places_of(item.source_cameras.c2w, folder)
    # Every second one, from a start that the name chooses.
    assert sources[0] in range(2, 12) and set(np.diff(sources)) <= {2, -8}
    assert places_of(item.target_cameras.c2w, folder) == [0, 1, 12, 13]
    every = held_out.read(folder, 4, SIZE, 10, **choice)
    assert sorted(places_of(every.source_cameras.c2w, folder)) == list(range(2, 12))
    with pytest.raises(
        InputError,
        match="with a number from 2 to 11 for sources are too few for 10 source and 5 target",
    ):
        held_out.read(folder, 5, SIZE, 10, **choice)
    with pytest.raises(
        InputError, match="10 view has a number from 2 to 11; number of sources needed: 11"
    ):
        held_out.read(folder, 4, SIZE, 11, **choice)
    with pytest.raises(
        InputError, match="has an elevation of 5 to 35 degrees and a number from 0 to 0"
    ):
        held_out.read(folder, 4, SIZE, source_views=(0, 1))


def test_sources_can_be_predictions_of_the_views(tmp_path):
    folder = tmp_path / "a"
    write_object(folder, num_views=6, points=False, step=5.0)
    choice = dict(source_images="predicted")
    with pytest.raises(InputError, match="predicted"):
        held_out.read(folder, 2, SIZE, 2, **choice)
    (folder / "predicted").mkdir()
    for path in (folder / "rgba").iterdir():
        Image.new("RGBA", (SIZE, SIZE), (7, 8, 9, 255)).save(folder / "predicted" / path.name)
    item, true = held_out.read(folder, 2, SIZE, 2, **choice), held_out.read(folder, 2, SIZE, 2)
    assert (item.sources == [7, 8, 9, 255]).all()
    np.testing.assert_array_equal(item.targets, true.targets)
    np.testing.assert_array_equal(item.source_cameras.c2w, true.source_cameras.c2w)


def test_views_of_an_object_make_a_capture_in_the_same_world(tmp_path):
    write_object(tmp_path / "a", num_views=6, points=False, step=5.0)
    write_capture(tmp_path / "capture", tmp_path / "a", [1, 2, 4, 5])
    capture, known = (
        captures.read_capture(tmp_path / "capture"),
        folders.read_cameras(tmp_path / "a"),
    )
    np.testing.assert_allclose(capture.c2w, known.c2w[[1, 2, 4, 5]], atol=1e-6)
    np.testing.assert_allclose(capture.fxfycxcy, known.fxfycxcy[[1, 2, 4, 5]])
    np.testing.assert_array_equal(capture.images[2], np.asarray(Image.open(known.images[4])))
