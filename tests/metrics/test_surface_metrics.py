"""Chamfer distance, F-score and alignment, compared with closed forms and a slow oracle."""

import numpy as np
import pytest
import trimesh
from scipy.spatial.transform import Rotation

from lrm_jax.metrics import surface_metrics
from lrm_jax.types import InputError


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def lamp(count: int, rng) -> np.ndarray:
    """Points on a shape without symmetries."""
    slab = trimesh.creation.box((1, 2, 0.4))
    post = trimesh.creation.box((0.3, 0.3, 1.5)).apply_translation((0.3, 0.6, 0.6))
    shape = trimesh.util.concatenate([slab, post])
    return surface_metrics.sample_surface(shape.vertices, shape.faces, count, rng)


def test_the_chamfer_distance_of_planes_is_their_distance(rng):
    plane = np.concatenate([rng.uniform(-1, 1, (500, 2)), np.zeros((500, 1))], -1)
    scores = surface_metrics.scores(plane + [0, 0, 0.15], plane)
    assert scores["chamfer"] == pytest.approx(0.15, abs=1e-12)
    assert [scores[f"fscore@{t}"] for t in (0.1, 0.2, 0.5)] == [0, 1, 1]
    assert tuple(scores) == surface_metrics.NAMES


def test_scores_equal_those_of_all_pairs(rng):
    points, truth = rng.normal(size=(60, 3)), rng.normal(size=(90, 3))
    distance = np.linalg.norm(points[:, None] - truth, axis=-1)
    scores = surface_metrics.scores(points, truth)
    wanted = (distance.min(1).mean() + distance.min(0).mean()) / 2
    assert scores["chamfer"] == pytest.approx(wanted, abs=1e-12)
    precision, recall = (distance.min(1) < 0.5).mean(), (distance.min(0) < 0.5).mean()
    wanted = 2 * precision * recall / (precision + recall)
    assert scores["fscore@0.5"] == pytest.approx(wanted, abs=1e-12)


def test_half_of_a_shape_has_full_precision_and_half_the_recall(rng):
    truth = np.repeat([[0, 0, 0], [5, 0, 0]], 50, 0) + rng.uniform(0, 0.01, (100, 3))
    scores = surface_metrics.scores(truth[:50], truth)
    assert scores["fscore@0.1"] == pytest.approx(2 / 3)
    assert scores["chamfer"] == pytest.approx(0.5 * 0.5 * 5, abs=0.02)


def test_a_sphere_is_itself(rng):
    ball = trimesh.creation.icosphere(4)
    first, second = (
        surface_metrics.sample_surface(ball.vertices, ball.faces, 5000, rng) for _ in range(2)
    )
    scores = surface_metrics.aligned_scores(3 * first + 7, second)
    # With 5000 points on an area of 4 pi, the nearest is on average 0.5 / sqrt(5000 / 4 pi) = 0.025 away.
    assert scores["chamfer"] == pytest.approx(0.025, abs=0.002)
    assert scores["fscore@0.1"] == 1


@pytest.mark.parametrize("azimuth, tilt", [(37, 0), (100, 12), (222, -25), (0, 0)])
def test_a_rotated_scaled_and_moved_shape_is_aligned_back(rng, azimuth, tilt):
    truth, points = lamp(4000, rng), lamp(4000, rng)
    turn = Rotation.from_euler("zx", [azimuth, tilt], degrees=True).as_matrix()
    scores = surface_metrics.aligned_scores(0.6 * points @ turn.T + [0.2, 0, 0.1], truth)
    by_sampling = surface_metrics.scores(*(surface_metrics.normalized(x) for x in (points, truth)))[
        "chamfer"
    ]
    assert scores["chamfer"] == pytest.approx(by_sampling, rel=0.05)
    assert scores["fscore@0.1"] == 1


def test_alignment_never_makes_it_worse(rng):
    truth = lamp(2000, rng)
    points = rng.normal(size=(2000, 3))
    before = surface_metrics.scores(*(surface_metrics.normalized(x) for x in (points, truth)))
    after = surface_metrics.aligned_scores(points, truth)
    assert after["chamfer"] <= before["chamfer"] + 1e-12


def test_a_mirrored_shape_is_not_aligned(rng):
    truth, points = lamp(2000, rng), lamp(2000, rng) * [-1, 1, 1]
    aligned = surface_metrics.aligned_scores(points, truth)["chamfer"]
    assert aligned > 1.5 * surface_metrics.aligned_scores(lamp(2000, rng), truth)["chamfer"]


def test_points_are_uniform_in_area(rng):
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [3, 0, 1], [0, 1, 1]])
    faces = np.array([[0, 1, 2], [3, 4, 5]])
    points = surface_metrics.sample_surface(vertices.astype(np.float32), faces, 4000, rng)
    upper = points[:, 2] == 1
    # Four standard deviations for a share of 3/4 of 4000 points.
    assert upper.mean() == pytest.approx(0.75, abs=0.028)
    assert (points[:, :2] >= 0).all() and (points[~upper][:, :2].sum(-1) <= 1).all()
    np.testing.assert_allclose(points[~upper].mean(0), [1 / 3, 1 / 3, 0], atol=0.03)


def test_a_shape_without_extent_is_an_error(rng):
    good = rng.normal(size=(50, 3))
    with pytest.raises(InputError, match="not finite"):
        surface_metrics.aligned_scores(np.where(good > 2, np.nan, good + 3), good)
    with pytest.raises(InputError, match="one place"):
        surface_metrics.aligned_scores(good, np.ones((9, 3)))
    with pytest.raises(InputError, match="no area"):
        surface_metrics.sample_surface(np.ones((3, 3)), np.array([[0, 1, 2]]), 5, rng)
