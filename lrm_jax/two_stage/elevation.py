"""The elevation of an image's camera, from points matched between four images drawn around it.

One-2-3-45 (https://arxiv.org/abs/2306.16928, sec. 3.3). A view-synthesis model that is given an image can be asked for a view
10 degrees higher without knowing how high the image itself was taken. It draws four such neighbours, in this order: 10 degrees
higher, 10 degrees lower, at the smaller and at the larger azimuth. How a point moves between them depends on the elevation. So
each elevation is tried: points matched in two images are triangulated with the cameras that it implies and projected into the
other two, and the elevation whose projections hit the matched points best is taken.

Matches are a dict {(i, j): [M 5]} for the six pairs i < j of the four images. A row is x_i, y_i, x_j, y_j, confidence. x and y
are in pixels of 256 x 256 images, counted from the image's upper left corner: the centre of the first pixel is at 0.5.

All is NumPy in float64 on the host. The number of matches differs from image to image, so a compiled program would be compiled
anew for each, which takes longer than the estimate itself.
"""

import functools
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy.spatial import cKDTree

from lrm_jax.ops import cameras as cameras_lib

Matches = dict[tuple[int, int], np.ndarray]
PAIRS = [(i, j) for i in range(4) for j in range(i + 1, 4)]
REACH, SLACK = 64.0, 2.0  # of `possible`, in pixels
SIDE = 256  # of the images that coordinates are in
COARSE = np.arange(30, 141, 10)  # polar angles in degrees: 90 minus the elevation
LOWEST, HIGHEST = 20, 149  # the ends of `around` the coarse ones
FEW, MISS, FAR, CONTRAST = 5, 20.0, 20, 1.15  # of "ambiguous", see `estimate`
JOIN = 1.0  # pixels between two matches' ends in one image that count as the same point


class Elevation(NamedTuple):
    """What `estimate` found."""

    degrees: float | None  # above the horizon; None without tracks
    status: Literal["found", "no matches", "no tracks", "ambiguous"]
    scores: dict[int, float]  # elevation tried -> `scores`, in pixels
    followed: int  # matches that lead into a third image: the scores stand on these


class Tracks(NamedTuple):
    """Points matched in two images, and where each was matched in a third."""

    views: Int[np.ndarray, "M 2"]
    xy: Float[np.ndarray, "M 2 2"]
    point: Int[np.ndarray, "T"]  # index into the M points
    view: Int[np.ndarray, "T"]
    end: Float[np.ndarray, "T 2"]
    weight: Float[np.ndarray, "T"]


def estimate(matches: Matches) -> Elevation:
    """The elevation of the image in whose neighbours these matches were found.

    First every 10 degrees from -50 to 60, then every degree around the best. The reference gives up if any of the six pairs has
    no match. Here, what can be followed counts.

    Returns:
      `status` is "found", or why the elevation should be given by hand:
      "no matches": no pair has any.
      "no tracks": no point is seen in three images.
      "ambiguous": there is a best elevation, and it is given, but it is little better than a guess. Fewer than `FEW` matches lead
        into a third image; or projections miss by more than `MISS` pixels on average; or an elevation at least `FAR` degrees away
        scores less than `CONTRAST` times the best; or the best is at an end of what is tried, so that the true one may lie beyond.
        Measured with SIFT's matches, on other objects than those of docs/evaluation.md: of 96 sets of four images of different
        objects none is "found" (71 "ambiguous", 25 "no tracks"). Of 96 true sets 8 are "ambiguous", and 3 of these are wrong by
        more than 5 degrees; of the other 88, 5 are.
    """
    if not any(len(x) for x in matches.values()):
        return Elevation(None, "no matches", {}, 0)
    tracks = join(matches)
    if not len(tracks.point):
        return Elevation(None, "no tracks", {}, 0)
    coarse = scores(tracks, COARSE)
    nearby = around(int(COARSE[coarse.argmin()]))
    fine = scores(tracks, nearby)
    polar = int(nearby[fine.argmin()])
    tried = dict(zip(COARSE, coarse, strict=True)) | dict(zip(nearby, fine, strict=True))
    followed = len(np.unique(tracks.point))
    far = coarse[abs(COARSE - polar) >= FAR].min()
    unclear = followed < FEW or far < CONTRAST * fine.min()
    unclear |= fine.min() > MISS * tracks.weight.sum()  # the weights of each way sum to 1
    unclear |= polar in (LOWEST, HIGHEST)
    table = {90 - int(p): float(s) for p, s in sorted(tried.items(), reverse=True)}
    return Elevation(float(90 - polar), "ambiguous" if unclear else "found", table, followed)


def around(polar: int) -> Int[np.ndarray, "20"]:
    """The polar angles that are tried around the best coarse one.

    Parity: without `polar + 10`, as the reference's range ends before it.
    """
    return np.arange(polar - 10, polar + 10)


def join(matches: Matches) -> Tracks:
    """Follows the matches of images (0, 1), (1, 2) and (2, 3) into the two other images.

    A match is followed by the match with the nearest end in its first image, if that is less than `JOIN` away. Each of the six
    ways weighs the same, and in it each track by the confidence of the match that follows.
    """
    views, xy, point, view, end, weight = [], [], [], [], [], []
    count = 0
    for first in range(3):
        second, *others = (np.arange(first + 1, first + 4) % 4).tolist()
        pair = _directed(matches, first, second)
        views.append(np.tile([first, second], (len(pair), 1)))
        xy.append(pair[:, :4].reshape(-1, 2, 2))
        for other in others:
            onward = _directed(matches, first, other)
            # Of matches that begin at the same point, the first one counts, as in the reference.
            onward = onward[np.unique(onward[:, :2], axis=0, return_index=True)[1]]
            distance, nearest = cKDTree(onward[:, :2]).query(pair[:, :2])
            joined = np.flatnonzero(distance < JOIN)
            onward = onward[nearest[joined]]
            point.append(count + joined)
            view.append(np.full(len(joined), other))
            end.append(onward[:, 2:4])
            weight.append(onward[:, 4] / onward[:, 4].sum())
        count += len(pair)
    return Tracks(*(np.concatenate(x) for x in (views, xy, point, view, end, weight)))


def _directed(matches: Matches, first: int, second: int) -> Float[np.ndarray, "M 5"]:
    """The matches of two images as rows that begin with the end in `first`."""
    if first < second:
        return np.asarray(matches[first, second], float).reshape(-1, 5)
    pair = np.asarray(matches[second, first], float).reshape(-1, 5)
    return pair[:, [2, 3, 0, 1, 4]]


def scores(tracks: Tracks, polars: Int[np.ndarray, "E"]) -> Float[np.ndarray, "E"]:
    """For each polar angle, the mean distance in pixels between projections and matched points, summed over the six ways."""
    projections = projection_matrices(polars)
    used, point = np.unique(tracks.point, return_inverse=True)
    xyz = triangulate(projections[:, tracks.views[used]], tracks.xy[used])
    homogeneous = np.concatenate([xyz, np.ones_like(xyz[..., :1])], axis=-1)[:, point]
    uvw = np.einsum("etij,etj->eti", projections[:, tracks.view], homogeneous)
    distance = np.linalg.norm(uvw[..., :2] / uvw[..., 2:] - tracks.end, axis=-1)
    return distance @ tracks.weight


def possible(
    pair: tuple[int, int], xy_a: Float[np.ndarray, "A 2"], xy_b: Float[np.ndarray, "B 2"]
) -> Bool[np.ndarray, "A B"]:
    """Whether a point of one image can be a point of the other, at any elevation: for a matcher that has many candidates.

    It has to be near, as the cameras are at most 20 degrees apart, and within `SLACK` pixels of the epipolar line that one of the
    elevations gives.
    """
    near = np.linalg.norm(xy_a[:, None] - xy_b, axis=-1) < REACH
    on_a_line = np.zeros_like(near)
    ends_a, ends_b = (np.column_stack([xy, np.ones(len(xy))]) for xy in (xy_a, xy_b))
    for matrices in projection_matrices(np.arange(LOWEST, HIGHEST + 1, 5)):
        first, second = matrices[pair[0]], matrices[pair[1]]
        epipole = second @ np.append(np.linalg.solve(first[:, :3], -first[:, 3]), 1)
        # The line through the epipole and any other point on the ray: here the one at infinity.
        directions = np.linalg.solve(first[:, :3], ends_a.T)
        lines = np.cross(epipole, (second[:, :3] @ directions).T)
        lines /= np.linalg.norm(lines[:, :2], axis=-1, keepdims=True)
        on_a_line |= np.abs(lines @ ends_b.T) < SLACK
    return near & on_a_line


def projection_matrices(polars: Int[np.ndarray, "E"]) -> Float[np.ndarray, "E 4 3 4"]:
    """From the world to pixels of the four neighbours of an image at each polar angle."""
    return np.stack([_neighbours(int(polar)) for polar in polars])


@functools.cache  # the cameras take longer than all else here, and there are 130 polar angles at most
def _neighbours(polar: int) -> Float[np.ndarray, "4 3 4"]:
    rig = cameras_lib.one2345_rig(float(polar))
    fx, fy, cx, cy = SIDE * rig.fxfycxcy[0].astype(float)
    intrinsics = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    return intrinsics @ np.linalg.inv(rig.c2w[8:12].astype(float))[:, :3]


def triangulate(
    projections: Float[np.ndarray, "*E M 2 3 4"], xy: Float[np.ndarray, "M 2 2"]
) -> Float[np.ndarray, "*E M 3"]:
    """The world points that two images see at these pixels: the homogeneous linear method (Hartley and Zisserman, sec. 12.2)."""
    rows = xy[..., None] * projections[..., 2:, :] - projections[..., :2, :]
    rows = rows.reshape(*rows.shape[:-3], 4, 4)
    smallest = np.linalg.svd(rows)[2][..., -1, :]
    return smallest[..., :3] / smallest[..., 3:]


def off_white(images: UInt8[np.ndarray, "V H W 3"]) -> Bool[np.ndarray, "V H W"]:
    """The foreground of images on white: pixels where any channel is at most 245."""
    return (images <= 245).any(-1)


def on_foreground(matches: Matches, masks: Bool[np.ndarray, "4 H W"]) -> Matches:
    """The matches both of whose ends are on the foreground of their own image.

    The reference looks up the row of the first end with the column of the second in the first image. That is not copied.
    """
    scale = np.array(masks.shape[:0:-1]) / SIDE

    def inside(view: int, xy: np.ndarray) -> np.ndarray:
        column, row = np.floor(xy * scale).astype(int).T
        height, width = masks.shape[1:]
        return masks[view, row.clip(0, height - 1), column.clip(0, width - 1)]

    return {
        (i, j): rows[inside(i, rows[:, :2]) & inside(j, rows[:, 2:4])]
        for (i, j), rows in matches.items()
    }
