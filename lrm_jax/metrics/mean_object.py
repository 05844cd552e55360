"""A baseline for a model's scores that ignores the input image: the mean of other objects.

For images it is the mean of their target views; for surfaces, a box or an ellipsoid of their mean extents. There are two
variants of each; the evaluation uses the one that scores better.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lrm_jax.data.held_out import HeldOut

IMAGES = ("mean image", "mean image by view")
SHAPES = ("mean box", "mean ellipsoid")
NUM_AZIMUTHS, NUM_ELEVATIONS = 8, 6  # bins of 45 and 30 degrees


@dataclasses.dataclass(frozen=True)
class MeanObject:
    """Sums over the target views of some objects, in A x E bins: azimuth relative to the source's, and elevation."""

    members: frozenset[Path]  # the objects' folders
    total: np.ndarray  # [A E S S 4] float64, premultiplied RGBA
    whole: np.ndarray  # [S S 4] sum over all bins
    seen: np.ndarray  # [A E] number of views
    extents: dict[
        Path, np.ndarray
    ]  # [3] sides of the bounding box along the world axes, for the objects with points


def average(objects: Iterable[HeldOut], size: int) -> MeanObject:
    """The mean object.

    Args:
      objects: any number; the mean of none is white everywhere.
      size: S, the side of their target images.
    """
    total = np.zeros((NUM_AZIMUTHS, NUM_ELEVATIONS, size, size, 4))
    seen = np.zeros((NUM_AZIMUTHS, NUM_ELEVATIONS), int)
    members, extents = set(), {}
    for item in objects:
        members.add(item.folder)
        bins = _bins(item)
        np.add.at(total, bins, premultiplied(item.targets))
        np.add.at(seen, bins, 1)
        if item.points is not None:
            extents[item.folder] = np.ptp(item.points, axis=0)
    return MeanObject(
        members=frozenset(members),
        total=total,
        whole=total.sum((0, 1)),
        seen=seen,
        extents=extents,
    )


def images(mean: MeanObject, item: HeldOut) -> dict[str, np.ndarray]:
    """The baseline's images [V S S 4] for the object's target views, float32 premultiplied RGBA in [0, 1], by name.

    If the object is in the mean, it is removed first: with few objects in a bin, it would be predicted from itself.
    """
    bins = _bins(item)
    total, seen = mean.total[bins], mean.seen[bins]
    whole, views = mean.whole, mean.seen.sum()
    if item.folder in mean.members:
        own = premultiplied(item.targets)
        same = (bins[0][:, None] == bins[0]) & (bins[1][:, None] == bins[1])  # [V V]
        total = total - np.einsum("vw,w...->v...", same, own)
        seen = seen - same.sum(1)
        whole, views = whole - own.sum(0), views - len(own)
    whole = np.broadcast_to(whole / max(views, 1), total.shape)
    count = seen[:, None, None, None]
    by_view = np.where(count > 0, total / np.maximum(count, 1), whole)
    return dict(zip(IMAGES, (x.astype(np.float32) for x in (whole, by_view)), strict=True))


def shapes(
    mean: MeanObject, item: HeldOut, count: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Points [count 3] on the baseline's surfaces for the object, uniform in area, by name; none without other objects' extents."""
    others = [extents for folder, extents in mean.extents.items() if folder != item.folder]
    if not others:
        return {}
    sphere = rng.normal(size=(4 * count, 3))
    sphere /= np.linalg.norm(sphere, axis=-1, keepdims=True)
    half = np.maximum(np.mean(others, axis=0) / 2, 1e-6)
    # Scaling the sphere by `half` scales the area around each point by this, up to a constant.
    stretch = np.linalg.norm(sphere / half, axis=-1)
    kept = sphere[rng.uniform(0, 1 / half.min(), len(sphere)) < stretch]
    ellipsoid = rng.choice(kept, count) * half
    box = rng.uniform(-1, 1, (count, 3))
    area = np.prod(half) / half  # of the faces at right angles to each axis
    axis = rng.choice(3, count, p=area / area.sum())
    box[np.arange(count), axis] = rng.choice([-1.0, 1.0], count)
    return dict(zip(SHAPES, (box * half, ellipsoid), strict=True))


def premultiplied(rgba: np.ndarray) -> np.ndarray:
    """Converts uint8 [*B S S 4] with straight alpha to premultiplied float32 in [0, 1]."""
    straight = rgba.astype(np.float32) / 255
    return np.concatenate([straight[..., :3] * straight[..., 3:], straight[..., 3:]], -1)


def _bins(item: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    """The bins of each target view: the nearest to its azimuth relative to the source's, and the one that its elevation is in."""
    source, eye = item.source_camera.c2w[:3, 3], item.target_cameras.c2w[:, :3, 3]
    azimuth = np.arctan2(eye[:, 1], eye[:, 0]) - np.arctan2(source[1], source[0])
    elevation = np.arctan2(eye[:, 2], np.hypot(eye[:, 0], eye[:, 1]))
    column = np.rint(azimuth / (2 * np.pi) * NUM_AZIMUTHS).astype(int) % NUM_AZIMUTHS
    row = np.floor((elevation / np.pi + 0.5) * NUM_ELEVATIONS).astype(int)
    return column, np.clip(row, 0, NUM_ELEVATIONS - 1)
