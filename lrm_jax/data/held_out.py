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


def read(
    folder: Path,
    num_targets: int,
    size: int,
    num_sources: int = 1,
    elevation: tuple[float, float] | None = SOURCE_ELEVATION,
    source_views: tuple[int, int] | None = None,
    source_images: str = "rgba",
) -> HeldOut:
    """Reads an object. A hash of its name chooses the first source and the targets.

    The first source is one of the views in a range of elevations; further sources are evenly spread over them. The other views
    are split into `num_targets` consecutive parts, with one target from each. A fixed choice, such as view 0 as source or every
    fourth view as target, would give all objects similar views: see `choose_cameras` in tools/rendering/protocols.py.

    Args:
      num_targets: V.
      size: S, the side of the target images after resizing, pixels.
      num_sources: N.
      elevation, source_views, source_images: which views may be sources, and the folder of their images: see
        `elements.Recipe`. With `source_views`, the targets are from the views outside that range.

    Raises:
      InputError: a file is missing or damaged, or has the wrong shape; no view can be the source; there are too few views.
    """
    cameras = folders.read_cameras(folder)
    if cameras.size[0] != cameras.size[1]:
        raise InputError(f"its images are {cameras.size[0]}x{cameras.size[1]}, not square")
    count = len(cameras.images)
    candidates = np.flatnonzero(elements.is_source(cameras.c2w, elevation, source_views))
    if len(candidates) < num_sources:
        raise InputError(
            f"{len(candidates) or 'no'} view has {which(elevation, source_views)}; number of sources needed: {num_sources}"
        )
    digest = hashlib.sha256(folder.name.encode()).digest()
    first, rng = int.from_bytes(digest[:8]) % len(candidates), np.random.default_rng(list(digest))
    sources = _spread(np.roll(candidates, -first), num_sources)
    given = sources if source_views is None else slice(*source_views)
    others = np.delete(np.arange(count), given)
    if len(others) < num_targets:
        where = "" if source_views is None else f" with {which(None, source_views)} for sources"
        raise InputError(
            f"{count} views{where} are too few for {num_sources} source and {num_targets} target views: lower --views"
        )
    chosen = [rng.choice(part) for part in np.array_split(others, num_targets)]
    points, no_points = _points(folder / "points.npy")
    if source_images == "rgba":
        images = [folders.read_image(cameras, i) for i in sources]
    else:
        images = [folders.read_prediction(cameras, i, source_images) for i in sources]
    return HeldOut(
        folder=folder.absolute(),
        sources=np.stack(images),
        source_cameras=_at(cameras, sources),
        targets=np.stack([elements.shrink(folders.read_image(cameras, i), size) for i in chosen]),
        target_cameras=_at(cameras, chosen),
        points=points,
        no_points=no_points,
    )


def which(elevation: tuple[float, float] | None, source_views: tuple[int, int] | None) -> str:
    """What views must have to be sources, in words."""
    words = []
    if elevation is not None:
        words.append(f"an elevation of {elevation[0]:g} to {elevation[1]:g} degrees")
    if source_views is not None:
        words.append(f"a number from {source_views[0]} to {source_views[1] - 1}")
    return " and ".join(words) or "any elevation"


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
