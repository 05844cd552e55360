"""The elevation from given matches: equal to the reference's, right where it is wrong, and honest where there is none."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from lrm_jax.two_stage import elevation
from lrm_jax.two_stage.elevation import COARSE, PAIRS

CASES = ("box47", "box83", "sphere60", "sphere112")
NOTHING = {pair: np.zeros((0, 5)) for pair in PAIRS}


@pytest.fixture(scope="module")
def golden(goldens):
    return load_file(goldens / "elevation.safetensors")


def matches_of(golden, case):
    return {(i, j): golden[f"in.{case}.{i}_{j}"] for i, j in PAIRS}


def projected(polar, count=40):
    """Exact matches of random points for this polar angle."""
    xyz = np.random.default_rng(0).uniform(-0.4, 0.4, (count, 3))
    uvw = (
        elevation.projection_matrices(np.array([polar]))[0]
        @ np.column_stack([xyz, np.ones(count)]).T
    )  # [4 3 count]
    xy = (uvw[:, :2] / uvw[:, 2:]).transpose(0, 2, 1)
    return {(i, j): np.column_stack([xy[i], xy[j], np.ones(count)]) for i, j in PAIRS}


@pytest.mark.parametrize("case", [*CASES, "notracks"])
def test_scores_are_those_of_the_reference(golden, case):
    tracks = elevation.join(matches_of(golden, case))
    fine = elevation.around(int(COARSE[golden[f"out.{case}.coarse"].argmin()]))
    np.testing.assert_array_equal(fine, golden[f"out.{case}.fine_polar"])
    for polars, name in ((COARSE, "coarse"), (fine, "fine")):
        # In pixels. The reference computes in float32.
        np.testing.assert_allclose(
            elevation.scores(tracks, polars), golden[f"out.{case}.{name}"], atol=5e-4
        )


@pytest.mark.parametrize("case", CASES)
def test_the_elevation_is_the_reference_s_and_within_a_degree_of_the_truth(golden, case):
    found = elevation.estimate(matches_of(golden, case))
    assert found.status == "found" and found.degrees == 90 - golden[f"out.{case}.polar"][0]
    assert abs(found.degrees - (90 - golden[f"in.{case}.true_polar"][0])) <= 1
    assert found.degrees == min(found.scores, key=found.scores.get)


def test_cameras_and_triangulated_points_are_those_of_the_reference(golden):
    polars = np.array([60, 95, 90])
    projections = elevation.projection_matrices(polars)
    for matrices, name in zip(projections[:2], ("poses60", "poses95"), strict=True):
        w2c = np.linalg.inv(golden[f"out.{name}"].astype(float))
        np.testing.assert_allclose(matrices, golden["in.K"] @ w2c[:, :3], atol=1e-3)
    xy = golden["in.box83.0_1"][:, :4].reshape(-1, 2, 2).astype(float)
    xyz = elevation.triangulate(projections[2, np.tile([0, 1], (len(xy), 1))], xy)
    np.testing.assert_allclose(xyz, golden["out.box83.triangulated_at_90"], atol=1e-5)


def test_the_fine_range_ends_before_ten_degrees_more():
    np.testing.assert_array_equal(elevation.around(60), np.arange(50, 70))


@pytest.mark.parametrize("polar", [21, 45, 90, 148])
def test_exact_matches_give_the_exact_elevation(polar):
    found = elevation.estimate(projected(polar))
    assert (found.degrees, found.status) == (90 - polar, "found")
    # The rig's cameras are float32.
    assert found.scores[90 - polar] < 1e-3


def test_nothing_to_follow_has_a_status_of_its_own(golden):
    assert elevation.estimate(NOTHING)[:2] == (None, "no matches")
    assert elevation.estimate(matches_of(golden, "notracks"))[:2] == (None, "no tracks")
    assert elevation.estimate(NOTHING | {(0, 1): projected(60)[0, 1]})[:2] == (None, "no tracks")


@pytest.mark.parametrize("pair", PAIRS)
def test_one_pair_without_matches_does_not_matter(golden, pair):
    """The reference gives up, and takes the image as level."""
    found = elevation.estimate(matches_of(golden, "box47") | {pair: NOTHING[pair]})
    assert found.status == "found" and abs(found.degrees - 43) <= 1


def test_one_point_is_too_few_and_two_are_enough():
    """Each point is a match of three pairs that are followed."""
    one, two = (elevation.estimate(projected(60, count)) for count in (1, 2))
    assert (one.status, one.followed) == ("ambiguous", 3)
    assert (two.status, two.followed) == ("found", 6)


@pytest.mark.parametrize("polar", [15, 155])
def test_an_elevation_beyond_those_tried_is_ambiguous(polar):
    found = elevation.estimate(projected(polar))
    assert found.status == "ambiguous" and 90 - found.degrees in (20, 149)


def test_matches_at_random_are_ambiguous():
    rng = np.random.default_rng(0)
    for _ in range(5):
        xy = rng.uniform(40, 216, (4, 60, 2))
        random = {(i, j): np.column_stack([xy[i], xy[j], np.ones(60)]) for i, j in PAIRS}
        assert elevation.estimate(random).status == "ambiguous"


@pytest.mark.parametrize("side", [256, 64])
def test_a_match_is_kept_if_each_end_is_on_the_foreground_of_its_own_image(side):
    """The reference looks up the first end at its row and the second end's column: it keeps `lost` and drops `kept`."""
    masks = np.zeros((4, side, side), bool)
    unit = side // 64
    masks[0, 10 * unit : 12 * unit, 20 * unit : 22 * unit] = True
    masks[1, 30 * unit : 32 * unit, 40 * unit : 42 * unit] = True
    kept, lost = [84.0, 44.0, 164.0, 124.0, 0.5], [164.0, 44.0, 84.0, 124.0, 0.5]
    swapped = [44.0, 84.0, 164.0, 124.0, 0.5]
    at_the_edge = [80.0, 40.0, 167.9, 127.9, 0.5]
    matches = NOTHING | {(0, 1): np.array([kept, lost, swapped, at_the_edge])}
    left = elevation.on_foreground(matches, masks)
    np.testing.assert_array_equal(left[0, 1], [kept, at_the_edge])
    assert left.keys() == matches.keys()


def test_any_channel_of_at_most_245_is_foreground():
    pixels = np.array([[[255, 255, 255], [246, 246, 246], [255, 245, 255], [0, 0, 0]]], np.uint8)
    np.testing.assert_array_equal(elevation.off_white(pixels[None]), [[[False, False, True, True]]])


@pytest.mark.parametrize("polar", [33, 71, 120])
def test_what_an_elevation_allows_is_possible_and_most_else_is_not(polar):
    for pair, rows in projected(polar).items():
        possible = elevation.possible(pair, rows[:, :2], rows[:, 2:4])
        near = np.linalg.norm(rows[:, :2] - rows[:, 2:4], axis=-1) < elevation.REACH
        assert near.sum() > 20 and possible.diagonal()[near].all()
        assert possible.mean() < 0.3
