"""A baseline for surfaces that several posed views give: the visual hull, the largest shape with the given silhouettes.

Carving from outlines alone (https://doi.org/10.1109/34.273735): it uses neither colour nor anything learned. It cannot show a
concavity that no view sees as an outline: a bowl's is filled. NumPy and SciPy only: nothing here needs a device.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from lrm_jax.types import Cameras

NAME = "visual hull"
PROTOCOL = (
    "carved from the alpha of the same source images, on the same grid: what is inside the silhouette in every image; "
    "scored like the model's surface; not for images without transparency"
)
OUTLINE = 0.5  # the coverage of a pixel at the edge of the silhouette
FINE = 512  # silhouettes are enlarged to about this side, so that distances to their outlines are finer than a pixel


def field(
    alpha: Float[np.ndarray, "V H W"], cameras: Cameras
) -> Callable[[Float[np.ndarray, "Q 3"]], Float[np.ndarray, " Q"]]:
    """The field of the hull, for `mesh.lattice.extract`: positive inside, 0 at its surface, about the distance to it.

    In each view, the distance to the outline at the point's projection times the depth over the focal length is the
    distance to the view's cone of lines of sight; a point is inside the hull if it is inside every cone. A distance, unlike
    the coverage itself, changes evenly on grids coarser than a pixel. Beyond the border of an image, the distance falls from its
    value at the border by the distance from the border: where the object is cut off, it goes on, but gets thinner.

    Args:
      alpha: coverage of the pixels in [0, 1].
      cameras: NumPy Cameras[V], in the world of the points.
    """
    size = np.array(alpha.shape[:0:-1], float)  # width, height
    distances = [_to_outline(x) for x in alpha]
    w2c = np.linalg.inv(np.asarray(cameras.c2w, float))
    fxfycxcy = np.asarray(cameras.fxfycxcy, float)

    def inside(xyz):
        least = np.full(len(xyz), np.inf)
        for distance, motion, intrinsics in zip(distances, w2c, fxfycxcy, strict=True):
            x_y, z = np.split(xyz @ motion[:3, :3].T + motion[:3, 3], [2], axis=-1)
            ahead = np.maximum(z, 1e-9)
            place = x_y / ahead * intrinsics[:2] + intrinsics[2:]  # fractions of width and height
            column, row = (place * distance.shape[::-1] - 0.5).T
            seen = ndimage.map_coordinates(distance, [row, column], order=1, mode="nearest")
            seen -= np.linalg.norm((place - place.clip(0, 1)) * size, axis=-1)
            scale = ahead[:, 0] / (intrinsics[:2] * size).mean()
            least = np.minimum(least, np.where(z[:, 0] > 0, seen * scale, z[:, 0]))
        return least.astype(np.float32)

    return inside


def _to_outline(alpha: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "h w"]:
    """The distance to the silhouette's outline in pixels of `alpha`, positive inside, on a grid that is finer where needed."""
    finer = max(1, round(FINE / max(alpha.shape)))
    covered = _enlarged(alpha, finer) > OUTLINE
    if covered.all() or not covered.any():
        return np.full(alpha.shape, (1.0 if covered.any() else -1.0) * max(alpha.shape), np.float32)
    distance = ndimage.distance_transform_edt
    # The outline is half-way between two pixels' centres.
    signed = np.where(covered, distance(covered) - 0.5, 0.5 - distance(~covered))
    return (signed / finer).astype(np.float32)


def _enlarged(alpha: Float[np.ndarray, "H W"], factor: int) -> Float[np.ndarray, "h w"]:
    """Bilinear, with pixel centres at +0.5."""
    rows, columns = ((np.arange(factor * n) + 0.5) / factor - 0.5 for n in alpha.shape)
    return ndimage.map_coordinates(
        alpha, np.meshgrid(rows, columns, indexing="ij"), order=1, mode="nearest"
    )
