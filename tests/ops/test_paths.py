"""Camera paths, compared with closed forms for cameras of known geometry."""

import numpy as np
import pytest

from lrm_jax.ops import cameras, paths
from lrm_jax.types import InputError

CENTRE = np.array([3.0, -1.0, 0.5])


def ring(num_views: int = 8, elevation_deg: float = 30.0, arc: float = 1.0) -> np.ndarray:
    """Cameras at distance 2 around CENTRE, on part of a circle."""
    around = cameras.orbit(round(num_views / arc), 2.0, elevation_deg, 40.0)
    c2w = np.array(around.c2w[:num_views], np.float64)
    c2w[:, :3, 3] += CENTRE
    return c2w


def assert_rigid(c2w):
    turn = c2w[:, :3, :3]
    identity = np.broadcast_to(np.eye(3), turn.shape)
    # `look_at` computes in float32.
    np.testing.assert_allclose(turn @ turn.transpose(0, 2, 1), identity, atol=2e-6)
    np.testing.assert_allclose(np.linalg.det(turn), 1, atol=2e-6)
    np.testing.assert_array_equal(c2w[:, 3], np.tile([0, 0, 0, 1], (len(c2w), 1)))


def test_the_axes_of_a_ring_meet_at_its_centre_ahead_of_all():
    c2w = ring()
    point, spread = paths.focus(c2w)
    np.testing.assert_allclose(point, CENTRE, atol=1e-5)  # the poses are float32
    np.testing.assert_allclose(paths.angles_to(c2w, point), 0, atol=1e-3)
    # Mean squared sines: the axes' second moments are cos^2(30) / 2 twice, and sin^2(30).
    np.testing.assert_allclose(np.sin(np.radians(spread)) ** 2, 1 - 0.375, atol=1e-6)
    np.testing.assert_allclose(paths.meeting_point(c2w), CENTRE, atol=1e-5)


def test_the_spread_of_two_axes_is_half_their_angle():
    c2w = ring(2, 0.0, 0.1)  # two of twenty: 18 degrees
    np.testing.assert_allclose(paths.focus(c2w)[1], 9, atol=1e-3)


def test_parallel_axes_do_not_meet_and_their_focus_stays_at_the_cameras():
    c2w = np.tile(np.eye(4), (3, 1, 1))
    c2w[:, 0, 3] = [100, 101, 102]
    point, spread = paths.focus(c2w)
    np.testing.assert_allclose(point, [101, 0, 0], atol=1e-9)
    assert spread < 1e-6
    assert paths.meeting_point(c2w) is None


def test_axes_that_meet_behind_the_cameras_are_no_meeting_point():
    c2w = ring() @ np.diag([1.0, -1, -1, 1])
    point, _ = paths.focus(c2w)
    np.testing.assert_allclose(paths.angles_to(c2w, point), 180, atol=1e-3)
    assert paths.meeting_point(c2w) is None


def test_a_camera_at_the_point_does_not_count_as_looking_at_it():
    c2w = ring()
    assert (paths.angles_to(c2w, c2w[3, :3, 3])[3]) == 90


@pytest.mark.parametrize("arc", [1.0, 0.5, 0.2])
def test_up_is_the_axis_of_the_ring_though_cameras_look_down(arc):
    # The term that decides for views that are close together is off by a few degrees.
    assert paths.up(ring(arc=arc))[2] > np.cos(np.radians(5))


def test_an_orbit_follows_the_ring_of_the_cameras():
    c2w = ring(4, arc=0.5)
    turn = paths.orbit(c2w, 8)
    assert_rigid(turn)
    # For half a ring, the upward direction is accurate to a few degrees.
    np.testing.assert_allclose(turn[0], c2w[0], atol=0.15)
    np.testing.assert_allclose(paths.angles_to(turn, CENTRE), 0, atol=1e-2)
    np.testing.assert_allclose(np.linalg.norm(turn[:, :3, 3] - CENTRE, axis=1), 2, atol=1e-2)
    full = paths.orbit(ring(), 8)
    np.testing.assert_allclose(full, ring(), atol=1e-5)  # the same cameras, in the same order


def test_there_is_no_orbit_where_cameras_look_at_no_common_point():
    c2w = np.tile(np.eye(4), (3, 1, 1))
    c2w[:, 0, 3] = [0, 1, 2]
    with pytest.raises(InputError, match="nothing to orbit"):
        paths.orbit(c2w, 4)


def test_a_spiral_stays_as_near_as_the_cameras_and_looks_where_they_look():
    c2w = ring(5, arc=0.1)
    mean = paths.interpolate(c2w, np.array([2.0]))[0]
    poses = paths.spiral(c2w, mean, 16)
    assert_rigid(poses)
    farthest = np.linalg.norm(c2w[:, :3, 3] - mean[:3, 3], axis=1).max()
    distance = np.linalg.norm(poses[:, :3, 3] - mean[:3, 3], axis=1)
    assert (distance > 0.5 * farthest).all() and (distance < 1.1 * farthest).all()
    assert (paths.angles_to(poses, CENTRE) < 1).all()
    np.testing.assert_allclose(poses[:, :3, 3].mean(0), mean[:3, 3], atol=1e-9)  # whole turns


def test_a_spiral_of_parallel_cameras_does_not_turn():
    c2w = np.tile(np.eye(4), (3, 1, 1))
    c2w[:, 0, 3] = [-1, 0, 1]
    poses = paths.spiral(c2w, np.eye(4), 6)
    np.testing.assert_array_equal(poses[:, :3, :3], c2w[[0] * 6, :3, :3])
    assert np.ptp(poses[:, 0, 3]) > 1 and np.ptp(poses[:, 1, 3]) > 1


def test_interpolation_passes_through_all_views():
    c2w = ring(5)
    position = paths.positions(5, 9)
    poses = paths.interpolate(c2w, position)
    assert_rigid(poses)
    np.testing.assert_allclose(poses[::2], c2w, atol=1e-6)
    # Halfway through a step of 72 degrees, rotation and place are near the ring, but a spline is not a circle.
    np.testing.assert_allclose(np.linalg.norm(poses[3:6:2, :3, 3] - CENTRE, axis=1), 2, atol=0.1)
    halfway = ring(10)[3]
    np.testing.assert_allclose(poses[3, :3, 2], halfway[:3, 2], atol=0.1)


def test_interpolation_of_a_straight_even_motion_is_that_motion():
    c2w = np.tile(np.eye(4), (4, 1, 1))
    c2w[:, 1, 3] = [0, 2, 4, 6]
    poses = paths.interpolate(c2w, paths.positions(4, 13))
    np.testing.assert_allclose(poses[:, 1, 3], np.linspace(0, 6, 13), atol=1e-12)
    np.testing.assert_array_equal(paths.positions(4, 1), [0])
