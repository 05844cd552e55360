import jax
import numpy as np
import pytest

from lrm_jax.mesh import lattice
from lrm_jax.metrics import surface_metrics, visual_hull
from lrm_jax.ops import cameras
from lrm_jax.types import Cameras, InputError

RADIUS = 0.6


def rig(count: int = 12, elevations: tuple = (-40.0, 0.0, 40.0)) -> Cameras:
    """Cameras all around the origin, at several elevations."""
    rings = [cameras.orbit(count, 3.0, e, 40.0, 7 * e) for e in elevations]
    return jax.tree.map(lambda *x: np.concatenate(x), *rings)


def silhouettes(seen_by: Cameras, size: int = 48, cut: float = np.inf) -> np.ndarray:
    """Coverage [V S S] of the part of a ball below z = `cut`, from 4 x 4 rays for each pixel."""
    rays = cameras.pixel_rays(seen_by, 4 * size, 4 * size)
    origins, dirs = np.asarray(rays.origins, float), np.asarray(rays.dirs, float)
    along = (origins * dirs).sum(-1)
    squared = along**2 - (origins**2).sum(-1) + RADIUS**2
    # A ray is inside the ball on an interval. It hits its lower part if an end of the interval is low enough.
    half = np.sqrt(np.maximum(squared, 0))
    ends = origins[..., 2] + (-along + np.stack([half, -half])) * dirs[..., 2]
    hit = (squared > 0) & (ends.min(0) <= cut)
    return hit.reshape(-1, size, 4, size, 4).mean((2, 4)).astype(np.float32)


def surface(field, resolution: int = 64) -> np.ndarray:
    vertices, faces = lattice.extract(field, resolution, 1.0, 0.0)
    return surface_metrics.sample_surface(vertices, faces, 10_000, np.random.default_rng(0))


def on_ball(count: int) -> np.ndarray:
    dirs = np.random.default_rng(1).normal(size=(count, 3))
    return RADIUS * dirs / np.linalg.norm(dirs, axis=-1, keepdims=True)


@pytest.mark.parametrize("size", [48, 100])
def test_the_hull_of_a_ball_is_the_ball(size):
    seen_by = rig()
    points = surface(visual_hull.field(silhouettes(seen_by, size), seen_by))
    scores = surface_metrics.aligned_scores(points, on_ball(10_000))
    assert scores["fscore@0.1"] == 1 and scores["chamfer"] < 0.025
    # The cones touch the ball, so the hull is never smaller, but for a quarter of a pixel (an image is 2.2 wide there).
    radius = np.linalg.norm(points, axis=-1)
    assert radius.min() > RADIUS - 0.25 * 2.2 / size and np.median(radius) < RADIUS + 0.02


def test_the_field_is_about_the_distance_to_the_surface():
    seen_by = rig()
    field = visual_hull.field(silhouettes(seen_by), seen_by)
    for distance in (-0.3, -0.1, 0.1, 0.25):
        found = field(on_ball(500) * (1 - distance / RADIUS))
        np.testing.assert_allclose(found, distance, atol=0.06)


def test_a_bowl_is_filled():
    """No outline shows the inside of a bowl: its silhouettes are those of the lower half of the ball."""
    seen_by = rig()
    field = visual_hull.field(silhouettes(seen_by, cut=0.0), seen_by)
    assert (field(np.array([[0, 0, -0.1], [0.2, 0.1, -0.2]])) > 0.05).all()
    assert (field(np.array([[0, 0, 0.25], [0.2, 0.1, 0.3]])) < 0).all()
    outside = on_ball(20_000)
    outside = outside[outside[:, 2] < 0]
    bowl = np.concatenate([outside, 0.95 * outside])
    scores = surface_metrics.aligned_scores(surface(field), bowl)
    assert scores["fscore@0.1"] < 0.9


def test_fewer_views_carve_less():
    many, few = rig(), rig(3, (0.0,))
    inside = [
        (visual_hull.field(silhouettes(x), x)(on_ball(2000) * 1.15) > 0).mean() for x in (many, few)
    ]
    assert inside[0] == 0 and inside[1] > 0.05


def test_an_image_that_cuts_the_object_off_carves_little_beyond_its_border():
    seen_by = rig()
    alpha = silhouettes(seen_by)
    # The left half of the first image shows half of the ball.
    left = np.array([[0.0, 0.0, 1.0, 0.5]])
    cut = jax.tree.map(lambda x: x[:1], seen_by)
    cut = cut.replace(fxfycxcy=cameras.crop_intrinsics(cut.fxfycxcy, left))
    one = visual_hull.field(alpha[:1, :, :24], cut)
    right = np.asarray(seen_by.c2w[0, :3, 0])  # to the right in the image
    inside = right * np.array([[-0.5], [-0.3], [0.0], [0.25]])
    assert (visual_hull.field(alpha, seen_by)(inside) > 0).all() and (one(inside) > 0).all()
    # The ball's radius at the border is 0.6, so it goes on for 0.6 at most.
    assert (one(right * np.array([[0.75], [2.0]])) < 0).all()


def test_what_is_behind_a_camera_or_in_no_silhouette_is_outside():
    seen_by = rig()
    field = visual_hull.field(silhouettes(seen_by), seen_by)
    eye, forward = seen_by.c2w[0, :3, 3], seen_by.c2w[0, :3, 2]
    assert (field(np.stack([eye - 0.5 * forward, eye - 2 * forward])) < 0).all()
    empty = visual_hull.field(np.zeros((36, 8, 8), np.float32), seen_by)
    with pytest.raises(InputError, match="the surface is empty"):
        lattice.extract(empty, 16, 1.0, 0.0)
