"""Objects as evaluation sees them: source views, other views as targets, and points of the true surface.

Read from OpenLRM's layout (see `folders`), with one file more, which `tools/render_objects.py` writes:

    root/<uid>/points.npy         [N 3] points of the true surface, uniform in area, in the world of the poses
"""

import dataclasses
import hashlib
from pathlib import Path

import jax
import numpy as np

from lrm_jax.data import elements, folders, splits
from lrm_jax.types import Cameras, InputError

SOURCE_ELEVATION = (5.0, 35.0)  # degrees, both included: as photographs are taken


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """One object. Cameras are NumPy, OpenCV axes, in the world of the data."""

    folder: Path  # absolute
    sources: np.ndarray  # uint8 [N H H 4] straight alpha, the whole images
    source_cameras: Cameras  # [N]
    targets: np.ndarray  # uint8 [V S S 4] straight alpha
    target_cameras: Cameras  # [V]
    points: np.ndarray | None  # float64 [N 3] world; None: not known
    no_points: str  # why not

    @property
    def uid(self) -> str:
        return self.folder.name

    @property
    def source(self) -> np.ndarray:
        """The first source [H H 4], the only one of families that take single images."""
        return self.sources[0]

    @property
    def source_camera(self) -> Cameras:
        return jax.tree.map(lambda x: x[0], self.source_cameras)


def find(root: Path, split: str) -> list[Path]:
    """The folders of a split's objects, by name; "all" is both splits.

    Raises:
      InputError: no such folder, or no object in it or in the split.
    """
    uids = folders.find(root)
    return [root / uids[i] for i in splits.select(uids, split, str(root))]


def read(folder: Path, num_targets: int, size: int, num_sources: int = 1) -> HeldOut:
    """Reads an object: its name draws the first source, from those in SOURCE_ELEVATION, and a target of each part of the other views.

    Further sources are evenly spread over the views in SOURCE_ELEVATION. Were the source the first view, or every fourth one a target, they
    would be alike in all objects: see `choose_cameras` of tools/rendering/protocols.py.

    Args:
      num_targets: V.
      size: S, the side to which the target images are scaled.
      num_sources: N.

    Raises:
      InputError: a file is missing, damaged or of another shape; no view can be the source; too few views.
    """
    cameras = folders.read_cameras(folder)
    if cameras.size[0] != cameras.size[1]:
        raise InputError(f"its images are {cameras.size[0]}x{cameras.size[1]}, not square")
    in_band = np.flatnonzero(elements.in_band(cameras.c2w, SOURCE_ELEVATION))
    if len(in_band) < num_sources:
        low, high = SOURCE_ELEVATION
        raise InputError(
            f"{len(in_band) or 'no'} view has an elevation of {low:g} to {high:g} degrees, of {num_sources} sources"
        )
    digest = hashlib.sha256(folder.name.encode()).digest()
    first, rng = int.from_bytes(digest[:8]) % len(in_band), np.random.default_rng(list(digest))
    sources, count = _spread(np.roll(in_band, -first), num_sources), len(cameras.images)
    if count < num_sources + num_targets:
        raise InputError(
            f"{count} views are too few for {num_sources} as source and {num_targets} as targets: lower --views"
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
    """`count` of them, the first one first."""
    return views[np.arange(count) * len(views) // count]


def _at(cameras: folders.Cameras, views) -> Cameras:
    c2w, fxfycxcy = cameras.c2w[views], cameras.fxfycxcy[views]
    return Cameras(c2w=c2w.astype(np.float32), fxfycxcy=fxfycxcy.astype(np.float32))


def _points(path: Path) -> tuple[np.ndarray | None, str]:
    """The points, or why there are none: images can be compared without."""
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
