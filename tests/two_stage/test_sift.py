"""SIFT's key points are where the details are, in the unit of the matches, and images without any give none."""

import numpy as np
import pytest

from lrm_jax.two_stage import elevation, sift
from lrm_jax.types import InputError


def blob(side, x, y):
    """A dark spot on white. x and y are fractions of the side, from the upper left corner."""
    at = (np.arange(side) + 0.5) / side
    spot = np.exp(-((at - x) ** 2 + (at[:, None] - y) ** 2) / (2 * 0.03**2))
    return np.repeat((255 - 200 * spot).round().astype(np.uint8)[..., None], 3, axis=-1)


@pytest.mark.parametrize("side", [128, 256, 320])
def test_a_spot_is_found_at_its_place_in_pixels_of_256(side):
    xy, descriptors = sift.keypoints(blob(side, 0.3, 0.6))
    # Its doubled images lie a quarter of a pixel beside the given one.
    assert np.abs(xy - 256 * np.array([0.3, 0.6])).max(1).min() < 0.1
    np.testing.assert_allclose(np.linalg.norm(descriptors, axis=1), 1, atol=1e-6)


def test_the_same_details_match():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)
    image = coarse.repeat(8, 0).repeat(8, 1)
    found = sift.matches(np.stack([image] * 4))
    assert list(found) == elevation.PAIRS
    # Views 2 and 3 are level with each other, so all that stays in place is possible for some elevation.
    rows = found[2, 3]
    assert len(rows) > 20 and (rows[:, 4] > 0.19).all() and (rows[:, 4] <= 1).all()
    np.testing.assert_allclose(rows[:, :2], rows[:, 2:4], atol=1e-6)


def test_images_without_details_have_no_matches():
    found = sift.matches(np.full((4, 64, 64, 3), 255, np.uint8))
    assert all(rows.shape == (0, 5) for rows in found.values())
    assert elevation.estimate(found).status == "no matches"


def test_images_that_are_not_square_are_an_error():
    with pytest.raises(InputError, match="must be square"):
        sift.matches(np.zeros((4, 64, 48, 3), np.uint8))
