"""Single objects from ArrayRecord shards, for data sets with many or large images. `tools/build_dataset.py` writes them.

A record is one object with all its views, so that a sample needs one read, wherever the shards are. It holds the original PNG
files, of which only the drawn views are decoded, and cameras in our convention. The shards form a tensorflow-datasets data set,
written and read without TensorFlow. Other programs open it with `tfds.data_source("lrm_objects", data_dir=root)`.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from lrm_jax.data import Source, elements, folders, pipeline, splits
from lrm_jax.parallel import messages
from lrm_jax.types import Batch, InputError

SPLIT = "objects"  # the only one: train and val are told apart when reading, as for folders


def make(root: str | Path, *, split: str, seed: int, **fields) -> Source:
    """Opens a built data set.

    Args:
      root: the folder that `tools/build_dataset.py` wrote.
      split: "train", "val" or "all"; objects are split as in `objects`.
      seed: seed of the order of the objects and the choice of views.
      fields: fields of `elements.Recipe`; `source_images` must be "rgba".

    Raises:
      InputError: the folder holds no data set, or no object in this split.
    """
    root, recipe = Path(root), elements.make_recipe(split, **fields)
    elements.check_source_images(recipe, "records")
    uids = _open(root).info.metadata["names"]
    numbers = splits.select(uids, split, str(root))
    names = tuple(uids[i] for i in numbers)
    load = _Load(root, tuple(numbers), names, recipe, seed)
    return Source(pipeline.order(len(names), split, seed).map_with_index(load), names=names)


class LrmObjects(tfds.core.GeneratorBasedBuilder):
    """The data set. Unusable objects are left out and listed in `skipped`, uid -> cause."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # nothing to download; without this, tfds looks for a list and needs a package that it does not install

    def __init__(self, source: Path | None = None, **kwargs):
        self.source, self.skipped = source, {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(None, None, 4), encoding_format="png")
        features = {
            "uid": tfds.features.Text(),
            "rgba": tfds.features.Sequence(image),  # straight alpha
            "c2w": tfds.features.Tensor(shape=(None, 4, 4), dtype=np.float32),  # OpenCV axes
            "fxfycxcy": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),  # fractions
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Objects in many views with known cameras, for lrm_jax.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # keeps names and records in the same order; reading shuffles
            metadata=tfds.core.MetadataDict({"names": []}),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {SPLIT: self._generate_examples(folders.find(self.source))}

    def _generate_examples(self, uids: list[str]) -> Iterator[tuple[int, dict]]:
        names = self.info.metadata["names"]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:

            def read():
                # A few objects at a time: those that are read ahead stay in memory.
                for first in range(0, len(uids), 16):
                    chunk = uids[first : first + 16]
                    records = pool.map(_try_read, [self.source / uid for uid in chunk])
                    yield from zip(chunk, records, strict=True)

            for uid, record in messages.progress(read(), len(uids), self.source.name):
                if isinstance(record, InputError):
                    self.skipped[uid] = str(record)
                else:
                    names.append(uid)
                    yield len(names) - 1, record
        if not names:
            uid, cause = next(iter(self.skipped.items()))
            raise InputError(f"none of {len(uids)} objects can be used: the first, {uid}: {cause}")


def build(source: Path, root: Path) -> LrmObjects:
    """Writes the objects of a folder as a data set. The data set appears only when it is complete.

    Raises:
      InputError: there is a data set already, no usable object, or no space on the disk. Nothing is left behind.
    """
    folder = _folder(root)
    if folder.exists():
        raise InputError(f"{folder} exists: delete it, or choose another folder to write to")
    folders.find(source)
    builder = LrmObjects(source, data_dir=os.fspath(root), file_format="array_record")
    tfds.disable_progress_bar()
    try:
        # tfds prints about downloads, and makes a folder for them.
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as downloads:
            builder.download_and_prepare(download_dir=downloads)
    except (OSError, RuntimeError) as error:  # array_record's writer raises RuntimeError
        cause = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(
            f"{root} cannot be written ({cause}): free some space, or choose another folder"
        ) from None
    return builder


def _folder(root: Path) -> Path:
    return root / LrmObjects.name / str(LrmObjects.VERSION)


def _try_read(folder: Path) -> dict[str, Any] | InputError:
    """The record of an object, or why it is unusable. Decodes every image, so that a damaged one is found now."""
    try:
        cameras = folders.read_cameras(folder)
        images = [_encoded(cameras, view) for view in range(len(cameras.images))]
    except InputError as error:
        return error
    return {
        "uid": folder.name,
        "rgba": [io.BytesIO(image) for image in images],
        "c2w": cameras.c2w.astype(np.float32),
        "fxfycxcy": cameras.fxfycxcy.astype(np.float32),
    }


def _encoded(cameras: folders.Cameras, view: int) -> bytes:
    """An image as an 8-bit RGBA PNG: the file itself if it is one already."""
    rgba, path = folders.read_image(cameras, view), cameras.images[view]
    with Image.open(path) as image:
        if (image.format, image.mode) == ("PNG", "RGBA"):
            return path.read_bytes()
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, format="PNG")
    return buffer.getvalue()


class _Encoded(tfds.decode.SkipDecoding):
    """Leaves images as bytes, in sequences too, which tfds' SkipDecoding does not cover."""

    def decode_batch_example_np(self, examples):
        return examples


@functools.lru_cache(maxsize=2)
def _open(root: Path) -> Any:
    folder = _folder(root)
    if not (folder / "dataset_info.json").is_file():
        raise InputError(f"{root}: no data set there: build one with tools/build_dataset.py")
    try:
        return tfds.builder_from_directory(os.fspath(folder))
    except Exception as error:  # tfds and protobuf raise all kinds
        raise InputError(
            f"{folder}: cannot be opened ({type(error).__name__}): build it again"
        ) from None


@functools.lru_cache(maxsize=2)
def _records(root: Path) -> Any:
    return _open(root).as_data_source(split=SPLIT, decoders={"rgba": _Encoded()})


@dataclasses.dataclass(frozen=True)
class _Load:
    """Maps (position, index of an object) to a sample. Each process of the loader opens the shards itself."""

    root: Path
    numbers: tuple[int, ...]  # of the records
    names: tuple[str, ...]
    recipe: elements.Recipe
    seed: int

    def __call__(self, position: int, index: int) -> Batch:
        try:
            record = _read(self.root, self.numbers[index])
            return elements.make(
                functools.partial(_decode, record["rgba"]),
                record["c2w"],
                record["fxfycxcy"],
                self.recipe,
                self.seed,
                position,
            )
        except InputError as error:
            raise InputError(f"{self.root}: {self.names[index]}: {error}") from None


def _read(root: Path, number: int) -> dict[str, Any]:
    records = _records(root)
    try:
        record = records[number]
    except Exception as error:  # a damaged shard: array_record and protobuf raise all kinds
        raise InputError(f"the record cannot be read ({type(error).__name__})") from None
    if not (np.isfinite(record["c2w"]).all() and np.isfinite(record["fxfycxcy"]).all()):
        raise InputError("a camera has values that are not finite")
    return record


def _decode(images: Any, view: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(images[view])) as image:
            return np.array(image.convert("RGBA"))
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ValueError ...
        raise InputError(f"view {view} cannot be decoded ({type(error).__name__})") from None
