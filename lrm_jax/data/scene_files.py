"""Finds and reads scenes of posed images, one by one, in four layouts.

    root/index.json, 000000.torch ...        pixelSplat's RealEstate10K: {key: chunk}. A chunk is a list of {"key", "cameras"
                                             [V 18], "images": V JPEG files as uint8 tensors}. A row of cameras is
                                             (fx, fy, cx, cy) as fractions, 0, 0, and world to camera [3 4]
    root/metadata/<scene>.json, images/<scene>/00000.png ...
                                             LVSM's: {"frames": [{"image_path" or "file_path", "fxfycxcy", "w2c" [4 4]}]}
    root/<scene>/transforms.json, or root/<scene>/sparse/0 and images
                                             NeRF's and COLMAP's: `images/captures.py`

The first two are in `root/train` and `root/test`, which are then the splits, or in `root` itself. In the other two, `root` itself
may be a scene. This follows the descriptions at https://github.com/dcharatan/pixelsplat and https://github.com/Haian-Jin/LVSM
(README); the data could not be downloaded. Three things are not verified for LVSM's layout: the name of the image field (both are
accepted), the unit of `fxfycxcy` (both pixels and fractions are accepted), and the folder that paths are relative to (only the
last three parts of a path are used, then the whole path).
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lrm_jax.data import splits
from lrm_jax.images import captures
from lrm_jax.types import InputError
from lrm_jax.weights import tensor_files

STAGES = {"train": ("train",), "val": ("test",), "all": ("train", "test")}


@dataclasses.dataclass(frozen=True)
class Place:
    """The location of a scene."""

    name: str
    path: Path  # of its chunk, JSON file or folder
    reader: Callable[[Path, str], captures.Frames]  # called with (path, name)

    def read(self) -> captures.Frames:
        """The frames.

        Raises:
          InputError: a file is missing or damaged, or a camera is invalid. The message does not name the scene.
        """
        return captures.checked(self.reader(self.path, self.name))


def find(root: Path, split: str) -> list[Place]:
    """The scenes of a split, sorted by file and name within each folder.

    If both `root/train` and `root/test` exist, they are "train" and "val". Otherwise a hash of the name decides, as for objects.
    "all": both.

    Raises:
      InputError: there is no such folder or split, or no scene in it.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder: check data.root")
    if split not in STAGES:
        raise InputError(f"split {split!r}: must be train, val or all")
    stages = [root / name for name in STAGES["all"] if _is_set(root / name)]
    if len(stages) == 2:
        places = [place for name in STAGES[split] for place in _list(root / name)]
        chosen = range(len(places))
    else:
        places = _list((stages or [root])[0])
        chosen = splits.select([place.name for place in places], split, str(root)) if places else []
    if not places:
        raise InputError(
            f"{root}: no scene in it: expected index.json with .torch files, metadata/*.json, <scene>/transforms.json"
            " or <scene>/sparse/0"
        )
    return [places[i] for i in chosen]


def _is_set(folder: Path) -> bool:
    """Whether a folder has pixelSplat's or LVSM's layout."""
    return (folder / "metadata").is_dir() or any(folder.glob("*.torch"))


def _list(folder: Path) -> list[Place]:
    """All scenes of a folder, in any layout."""
    if (folder / "metadata").is_dir():
        files = sorted((folder / "metadata").glob("*.json"))
        return [Place(path.stem, path, _read_frames_json) for path in files]
    if any(folder.glob("*.torch")):
        chunks = captures.load_json(folder / "index.json", f"{folder}/index.json")
        return [
            Place(key, folder / chunks[key], _read_chunk)
            for key in sorted(chunks, key=lambda key: (chunks[key], key))
        ]
    if captures.is_scene(folder):
        return [Place(folder.resolve().name, folder, captures.read_frames)]
    scenes = sorted(path for path in folder.iterdir() if path.is_dir() and captures.is_scene(path))
    return [Place(path.name, path, captures.read_frames) for path in scenes]


# -- the layouts


@functools.lru_cache(maxsize=4)
def _chunk(path: Path) -> dict[str, dict]:
    content, _ = tensor_files.read(path)
    if not isinstance(content, list) or not all(
        isinstance(x, dict) and "key" in x for x in content
    ):
        raise InputError(
            f"{path.name}: not a chunk of pixelSplat's, which is a list of scenes with keys"
        )
    return {scene["key"]: scene for scene in content}


def _read_chunk(path: Path, name: str) -> captures.Frames:
    scene = _chunk(path).get(name)
    if scene is None:
        raise InputError(f"{path.name} lacks it, although index.json lists it there")
    try:
        cameras, images = np.asarray(scene["cameras"], float), tuple(scene["images"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path.name}: no valid cameras or images ({error})") from None
    if cameras.shape != (len(images), 18):
        raise InputError(f"{path.name}: cameras {list(cameras.shape)} for {len(images)} images")
    w2c = np.tile(np.eye(4), (len(cameras), 1, 1))
    w2c[:, :3] = cameras[:, 6:].reshape(-1, 3, 4)
    return captures.Frames(images, captures.inverse(w2c), cameras[:, :4])


def _read_frames_json(path: Path, name: str) -> captures.Frames:
    """One scene of LVSM's layout."""
    stage, content = path.parents[1], captures.load_json(path, path.name)
    try:
        frames = content["frames"]
        files = [Path(frame.get("image_path") or frame["file_path"]) for frame in frames]
        w2c = np.array([frame["w2c"] for frame in frames], float)
        fxfycxcy = np.array([frame["fxfycxcy"] for frame in frames], float)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path.name} cannot be read ({type(error).__name__}: {error})") from None
    if not files or w2c.shape[1:] != (4, 4) or fxfycxcy.shape[1:] != (4,):
        raise InputError(f"{path.name}: w2c {list(w2c.shape)}, fxfycxcy {list(fxfycxcy.shape)}")
    images = [stage.joinpath(*file.parts[-3:]) for file in files]
    images = tuple(
        here if here.is_file() else stage / file for here, file in zip(images, files, strict=True)
    )
    # Values up to 1 are fractions: no principal point is within a pixel of the corner.
    if fxfycxcy[:, 2:].max() > 1:
        fxfycxcy /= np.tile(captures.image_size(images[0]), 2)
    return captures.Frames(images, captures.inverse(w2c), fxfycxcy)
