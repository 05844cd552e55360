"""Reads objects for evaluation: source views, other views as targets, and points on the true surface.

The layout is OpenLRM's (see `folders`) with one more file, which `tools/render_objects.py` also writes:

    root/<uid>/points.npy         [N 3] points on the true surface, uniform in area, in the world of the poses
"""

import dataclasses
import hashlib
from pathlib import Path

import jax
import numpy as np

from lrm_jax.data import elements, folders, splits
from lrm_jax.types import Cameras, InputError

SOURCE_ELEVATION = (5.0, 35.0)  # degrees, inclusive: typical of photographs


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """One object. Cameras are NumPy, OpenCV axes, in the world of the data."""

    folder: Path  # absolute
    sources: np.ndarray  # uint8 [N H H 4] straight alpha, the whole images
    source_cameras: Cameras  # [N]
    targets: np.ndarray  # uint8 [V S S 4] straight alpha
    target_cameras: Cameras  # [V]
    points: np.ndarray | None  # float64 [N 3] world; None: unknown
    no_points: str  # why they are unknown

    @property
    def uid(self) -> str:
        return self.folder.name

    @property
    def source(self) -> np.ndarray:
        """The first source [H H 4]; families that take a single image use only this one."""
        return self.sources[0]

    @property
    def source_camera(self) -> Cameras:
        return jax.tree.map(lambda x: x[0], self.source_cameras)


def find(root: Path, split: str) -> list[Path]:
    """The folders of the objects in a split, sorted by name. "all" is both splits.

    Raises:
      InputError: the folder does not exist, or there is no object in it or in the split.
    """
    uids = folders.find(root)
    return [root / uids[i] for i in splits.select(uids, split, str(root))]


def read(folder: Path, num_targets: int, size: int, num_sources: int = 1) -> HeldOut:
    """Reads an object. A hash of its name chooses the first source and the targets.

    The first source is one of the views in SOURCE_ELEVATION; further sources are evenly spread over them. The other views are
    split into `num_targets` consecutive parts, with one target from each. A fixed choice, such as view 0 as source or every
    fourth view as target, would give all objects similar views: see `choose_cameras` in tools/rendering/protocols.py.

    Args:
      num_targets: V.
      size: S, the side of the target images after resizing, pixels.
      num_sources: N.

    Raises:
      InputError: a file is missing or damaged, or has the wrong shape; no view can be the source; there are too few views.
    """
    cameras = folders.read_cameras(folder)
    if cameras.size[0] != cameras.size[1]:
        raise InputError(f"its images are {cameras.size[0]}x{cameras.size[1]}, not square")
    in_band = np.flatnonzero(elements.in_band(cameras.c2w, SOURCE_ELEVATION))
    if len(in_band) < num_sources:
        low, high = SOURCE_ELEVATION
        raise InputError(
            f"{len(in_band) or 'no'} view has an elevation of {low:g} to {high:g} degrees, but {num_sources} sources are needed"
        )
    digest = hashlib.sha256(folder.name.encode()).digest()
    first, rng = int.from_bytes(digest[:8]) % len(in_band), np.random.default_rng(list(digest))
    sources, count = _spread(np.roll(in_band, -first), num_sources), len(cameras.images)
    if count < num_sources + num_targets:
        raise InputError(
            f"{count} views are too few for {num_sources} source and {num_targets} target views: lower --views"
        )
    others = np.delete(np.arange(count), sources)
    chosen = [rng.choice(part) for part in np.array_split(others, num_targets)]
    points, no_points = _points(folder / "points.npy")
    return HeldOut(
        folder=folder.absolute(),
        sources=np.stack([folders.read_image(cameras, i) for i in sources]),
        source_cameras=_at(cameras, sources),
        targets=np.stack([elements.shrink(folders.read_image(cameras, i), size) for i in chosen]),
        target_cameras=_at(cameras, chosen),
        points=points,
        no_points=no_points,
    )


def _spread(views: np.ndarray, count: int) -> np.ndarray:
    """`count` of the views, evenly spread, beginning with the first."""
    return views[np.arange(count) * len(views) // count]


def _at(cameras: folders.Cameras, views) -> Cameras:
    c2w, fxfycxcy = cameras.c2w[views], cameras.fxfycxcy[views]
    return Cameras(c2w=c2w.astype(np.float32), fxfycxcy=fxfycxcy.astype(np.float32))


def _points(path: Path) -> tuple[np.ndarray | None, str]:
    """The points, or None and why they are unknown. Images can be compared without points."""
    try:
        points = np.asarray(np.load(path), np.float64)
    except FileNotFoundError:
        return None, "points.npy is missing: render with tools/render_objects.py"
    except Exception as error:  # numpy raises ValueError, EOFError, OSError, SyntaxError ...
        return None, f"points.npy cannot be read ({type(error).__name__})"
    if points.ndim != 2 or points.shape[1] != 3 or not len(points):
        return None, f"points.npy has shape {points.shape}, not (N, 3)"
    if not np.isfinite(points).all():
        return None, "points.npy has values that are not finite"
    return points, ""
