"""Matches by SIFT (Lowe 2004, https://doi.org/10.1023/B:VISI.0000029664.99615.94), which needs no weights.

docs/evaluation.md has what it finds on rendered objects. Of plain SIFT's matches on these, most lead to wrong elevations: few
points, and the same edges and colours in many places. Two things helped: a lower contrast threshold than SIFT's 0.04 / 3, as the
objects are drawn in plain colours, and `elevation.possible`, which excludes what no elevation allows before the best is chosen.
"""

import numpy as np
from jaxtyping import Float, UInt8

from lrm_jax.two_stage.elevation import PAIRS, SIDE, Matches, possible
from lrm_jax.types import InputError

CONTRAST = 0.003  # of a key point, in brightness from 0 to 1
RATIO = 0.8  # between the distances to the best and the second best descriptor, at most
SAME = 2.0  # pixels: nearer key points can be one point in several orientations


def matches(images: UInt8[np.ndarray, "4 H W 3"]) -> Matches:
    """Matches the four neighbours of an image, see `elevation.estimate`.

    The confidence is 1 minus the ratio between the distances of the best and the second best descriptor.

    Args:
      images: square, of any size; smaller details are found in larger ones.

    Raises:
      InputError: the images are not square.
    """
    if images.shape[1] != images.shape[2]:
        raise InputError(f"images of {images.shape[1:3]} pixels: must be square: pad or crop them")
    found = [keypoints(image) for image in images]
    return {(i, j): _matched((i, j), *found[i], *found[j]) for i, j in PAIRS}


def keypoints(
    image: UInt8[np.ndarray, "H H 3"],
) -> tuple[Float[np.ndarray, "M 2"], Float[np.ndarray, "M 128"]]:
    """x and y in pixels of a 256-pixel image, and the descriptors.

    The descriptors are square roots of shares (RootSIFT, https://doi.org/10.1109/CVPR.2012.6248018), so of unit length.
    """
    from skimage.color import rgb2gray
    from skimage.feature import SIFT

    detector = SIFT(upsampling=2, c_dog=CONTRAST)
    try:
        detector.detect_and_extract(rgb2gray(image))
    except RuntimeError:  # scikit-image raises it if there are no key points
        return np.zeros((0, 2)), np.zeros((0, 128))
    # Its positions are 0 at the centre of the first pixel of the doubled image, in pixels of the given one.
    xy = (detector.positions[:, ::-1].astype(float) + 0.25) * SIDE / len(image)
    counts = detector.descriptors.astype(float)
    return xy, np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1))


def _matched(
    pair: tuple[int, int],
    xy_a: Float[np.ndarray, "A 2"],
    descriptors_a: Float[np.ndarray, "A 128"],
    xy_b: Float[np.ndarray, "B 2"],
    descriptors_b: Float[np.ndarray, "B 128"],
) -> Float[np.ndarray, "M 5"]:
    """Mutually best matches among the possible ones. A lone candidate is as good as one with a second best at distance 1."""
    if not len(xy_a) or not len(xy_b):
        return np.zeros((0, 5))
    distance = np.sqrt(np.maximum(2 - 2 * descriptors_a @ descriptors_b.T, 0))
    distance = np.where(possible(pair, xy_a, xy_b), distance, np.inf)
    rows, best = np.arange(len(xy_a)), distance.argmin(1)
    nearest = distance[rows, best]
    beside = np.linalg.norm(xy_b[best][:, None] - xy_b, axis=-1) < SAME
    second = np.where(beside, np.inf, distance).min(1)
    second = np.where(np.isfinite(second), second, 1.0)
    mutual = (distance.argmin(0)[best] == rows) & (nearest < RATIO * second)
    confidence = 1 - nearest[mutual] / second[mutual]
    return np.column_stack([xy_a[mutual], xy_b[best[mutual]], confidence])
