import numpy as np
import pytest
from three_balls import SIZE, write_object

from lrm_jax.data import elements, folders, held_out
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
