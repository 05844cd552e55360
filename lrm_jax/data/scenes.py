"""Whole scenes from posed video frames and photographs: RealEstate10K, and any folder with cameras (see `scene_files`).

Views are chosen, images cropped and poses normalised as in LVSM (https://arxiv.org/abs/2410.17242;
https://github.com/Haian-Jin/LVSM/blob/2fea924/data/dataset_scene.py#L54-L180). Evaluation views come from pixelSplat's index
file.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np

from lrm_jax.data import Source, pipeline, scene_files
from lrm_jax.images import captures
from lrm_jax.ops import cameras, normalization
from lrm_jax.types import Batch, Cameras, InputError, Views

NORMALIZATIONS = ("all_views", "source_views", None)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to make a sample from a scene's frames: fields of `make`."""

    num_source: int
    num_target: int
    size: int
    normalize: str | None
    min_gap: int
    max_gap: int


def make(
    root: str | Path,
    *,
    split: str,
    seed: int,
    num_source: int,
    num_target: int,
    source_size: int,
    target_size: int,
    normalize: str | None = "all_views",
    min_gap: int = 25,
    max_gap: int = 192,
) -> Source:
    """Opens a folder of scenes.

    A sample shows a random window of the video. The two ends of the window are the sources; further sources are drawn from
    the frames between. As many frames between as there are targets are then drawn, and the targets are drawn from all these
    frames, including the sources. The images are opaque.

    Args:
      root: the folder, in one of the layouts of `scene_files`.
      split: "train", "val" or "all", see `scene_files.find`.
      seed: seed of the order of the scenes and the choice of views.
      num_source: number of views that the model is given. With one, it is an end of the window.
      num_target: there are num_source + num_target target views, as in all data sources. LVSM's 2 source and 6 target views are
        num_source = 2 and num_target = 4.
      source_size, target_size: side of the square images, pixels; they must be equal.
      normalize: see `ops.normalization.scene_motion`.
      min_gap, max_gap: range of the distance between the ends of a window, in frames; both are limited by the video's length.

    Raises:
      InputError: there is no scene, or a field is out of range. An unusable scene is noticed only when it is read.
    """
    if num_source < 1 or num_target < 0 or not 1 <= min_gap <= max_gap:
        raise InputError(
            f"data.num_source={num_source}, num_target={num_target}, min_gap={min_gap}, max_gap={max_gap}: "
            "must be at least 1 and 0, and 1 <= min_gap <= max_gap"
        )
    if source_size != target_size:
        raise InputError(
            f"data.source_size={source_size}, data.target_size={target_size}: must be equal for scenes"
        )
    check_normalize(normalize, num_source)
    root = Path(root)
    places = tuple(scene_files.find(root, split))
    recipe = Recipe(num_source, num_target, source_size, normalize, min_gap, max_gap)
    load = functools.partial(_load, root=root, places=places, recipe=recipe, seed=seed)
    return Source(
        _order(places, split, seed).map_with_index(load),
        names=tuple(place.name for place in places),
    )


class EvaluationViews(Sequence):
    """The source and target views of every scene in an index: (name, Batch without the B axis) by position.

    Reading an unusable scene raises InputError with its name; other scenes can still be read.
    """

    def __init__(
        self, root: Path, items: list, absent: list[str], unused: list[str], size: int, normalize
    ):
        self.absent = tuple(absent)  # scenes in the index that are not in the folder
        self.unused = tuple(unused)  # scenes for which the index names no views
        self.names = tuple(place.name for place, *_ in items)
        self._root, self._items, self._size, self._normalize = root, items, size, normalize

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, position: int) -> tuple[str, Batch]:
        place, sources, targets = self._items[position]
        try:
            frames = place.read()
            if max(*sources, *targets) >= len(frames.c2w):
                raise InputError(
                    f"{len(frames.c2w)} frames, but the index asks for frame {max(*sources, *targets)}"
                )
            num_source, num_views = len(sources), len(sources) + len(targets)
            return place.name, assemble(
                frames, [*sources, *targets], num_source, range(num_source, num_views), self._size, self._normalize
            )  # fmt: skip
        except InputError as error:
            raise InputError(f"{self._root}: {place.name}: {error}") from None


def evaluation_views(
    root: str | Path, index_path: str | Path, size: int, normalize: str | None = "all_views"
) -> EvaluationViews:
    """The views that pixelSplat's index file names: https://github.com/dcharatan/pixelsplat, assets/.

    Scenes for which the index names no views (null) are left out. So are scenes that are absent from the folder; they are
    reported on stderr. Scenes that share a file follow each other.

    Args:
      root: folder of scenes in one of the layouts of `scene_files`; both splits are searched.
      index_path: JSON file, {scene: {"context": [i, j], "target": [a, b, c]} or null}.
      size: side of the square images, pixels.
      normalize: see `ops.normalization.scene_motion`; LVSM's published scores and weights use "all_views".

    Raises:
      InputError: a file or folder does not exist, the file is not such an index, or no scene of it is in the folder.
    """
    root, index = Path(root), _read_index(Path(index_path))
    posed = {name: views for name, views in index.items() if views}
    check_normalize(normalize, min((len(sources) for sources, _ in posed.values()), default=2))
    places = {place.name: place for place in scene_files.find(root, "all")}
    items = [(places[name], *views) for name, views in posed.items() if name in places]
    items.sort(key=lambda item: str(item[0].path))
    absent = [name for name in posed if name not in places]
    for name in absent:
        print(f"{root}: absent: {name}", file=sys.stderr)
    if absent:
        print(f"{root}: {len(absent)} of {len(posed)} scenes of {index_path} are absent", file=sys.stderr)  # fmt: skip
    if not items:
        raise InputError(
            f"{root}: none of the {len(posed)} scenes of {index_path} is in it: check that this is the test split"
        )
    unused = [name for name, views in index.items() if not views]
    return EvaluationViews(root, items, absent, unused, size, normalize)


def _read_index(path: Path) -> dict[str, tuple[list[int], list[int]] | None]:
    """scene -> (source frames, target frames), or None."""
    try:
        index = json.loads(path.read_text())
        read = {
            name: None if views is None else (_numbers(views["context"]), _numbers(views["target"]))
            for name, views in index.items()
        }
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: get it from assets/ of pixelSplat") from None
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is not an index of pixelSplat, {{scene: {{context, target}}}} ({type(error).__name__}): check the path"
        ) from None
    return read


def _numbers(frames: list) -> list[int]:
    if not frames or any(frame != int(frame) or frame < 0 for frame in frames):
        raise ValueError("frames must be whole numbers, at least 0")
    return [int(frame) for frame in frames]


# -- one sample


def _order(places: Sequence[scene_files.Place], split: str, seed: int) -> grain.MapDataset:
    """As `pipeline.order`, but scenes that share a file follow each other, so that each file is opened once per epoch."""
    shuffled = pipeline.order(len(places), split, seed)
    if split != "train":
        return shuffled
    files = np.unique([str(place.path) for place in places], return_inverse=True)[1]
    return grain.MapDataset.range(sys.maxsize).map(_Shuffled(files, seed))


class _Shuffled:
    """Maps a position to the index of a scene: in each epoch, shuffles the files, and the scenes within each file."""

    def __init__(self, files: np.ndarray, seed: int):
        self.files, self.seed, self.epochs = files, seed, {}

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, len(self.files))
        if (shuffled := self.epochs.get(epoch)) is None:
            rng = np.random.default_rng((self.seed, epoch))
            rank = rng.permutation(self.files.max() + 1)[self.files]
            shuffled = np.lexsort((rng.random(len(rank)), rank))
            # Batches in flight can come from these two epochs.
            self.epochs = {epoch - 1: self.epochs.get(epoch - 1), epoch: shuffled}
        return int(shuffled[place])


def _load(
    position: int,
    index: int,
    *,
    root: Path,
    places: Sequence[scene_files.Place],
    recipe: Recipe,
    seed: int,
) -> Batch:
    place = places[index]
    try:
        frames = place.read()
        rng = np.random.default_rng((seed, position, 1))
        views, targets = draw(len(frames.c2w), recipe, rng)
        return assemble(frames, views, recipe.num_source, targets, recipe.size, recipe.normalize)
    except InputError as error:
        raise InputError(f"{root}: {place.name}: {error}") from None


def draw(
    num_frames: int, recipe: Recipe, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws (frames, the sources first; which of these are the targets) from a scene, as `make` describes.

    Raises:
      InputError: the scene is too short.
    """
    num_target = recipe.num_source + recipe.num_target
    count = max(recipe.num_source, 2) + num_target
    if num_frames < count:
        raise InputError(
            f"{num_frames} frames, but {count} are needed for {recipe.num_source} sources and the targets between them"
        )
    # The window must be long enough for all frames to differ.
    low = max(min(recipe.min_gap, num_frames - 1), count - 1)
    high = max(min(recipe.max_gap, num_frames - 1), low)
    gap = rng.integers(low, high, endpoint=True)
    start = rng.integers(num_frames - gap)
    between = start + 1 + rng.choice(gap - 1, count - 2, replace=False)
    return np.array([start, start + gap, *between]), rng.choice(count, num_target, replace=False)


def assemble(
    frames: captures.Frames,
    views: Sequence[int],
    num_source: int,
    targets: Sequence[int],
    size: int,
    normalize: str | None,
) -> Batch:
    """A sample without the B axis, with opaque uint8 images [V size size 3].

    Args:
      views: frames to use; the first `num_source` are the sources.
      targets: which of `views` are the target views, by position in `views`.

    Raises:
      InputError: an image cannot be read, or the cameras cannot be normalised.
    """
    views = np.asarray(views)
    motion, scale = normalization.scene_motion(frames.c2w[views], num_source, normalize)
    c2w = normalization.apply(motion, scale, frames.c2w[views])
    sources, targets = np.arange(num_source), np.asarray(targets)
    crops = {
        view: captures.crop(captures.read_image(frames, view), size)
        for view in {*views[sources].tolist(), *views[targets].tolist()}
    }

    def chosen(which: np.ndarray) -> Views:
        rgb, boxes = zip(*(crops[view] for view in views[which].tolist()), strict=True)
        fxfycxcy = cameras.crop_intrinsics(frames.fxfycxcy[views[which]], np.stack(boxes))
        seen_by = Cameras(c2w=c2w[which], fxfycxcy=fxfycxcy)
        return Views(rgb=np.stack(rgb), cameras=seen_by)

    return Batch(source=chosen(sources), target=chosen(targets))


def check_normalize(normalize: str | None, num_source: int) -> None:
    """Raises InputError if there is no such normalisation, or if it needs more sources."""
    if normalize not in NORMALIZATIONS:
        raise InputError(f"normalize {normalize!r}: must be all_views, source_views or None")
    if normalize == "source_views" and num_source < 2:
        raise InputError(
            "normalize 'source_views' takes two sources or more: a single camera gives no scale"
        )
