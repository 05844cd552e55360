"""All images of a folder, decoded once at the sizes needed for training, in `root/.cache-<key>`. They are memory-mapped.

This makes small images cheap on two CPU cores: making a sample only copies its bytes.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lrm_jax.data import elements, folders
from lrm_jax.ops.cameras import crop_intrinsics
from lrm_jax.parallel import messages
from lrm_jax.types import InputError

MAX_COPIED = (
    2**30
)  # bytes: the largest store in memory that may be copied to each process of the loader
IMAGES = ("source_rgb", "source_alpha", "target_rgb", "target_alpha")  # memory-mapped


@dataclasses.dataclass(frozen=True)
class Settings:
    """How images are processed before they are stored: fields of `elements.Recipe`."""

    source_size: int
    target_size: int
    source_elevation: tuple[float, float] | None
    foreground_ratio: float | None
    source_views: tuple[int, int] | None = None
    source_images: str = "rgba"


@dataclasses.dataclass(frozen=True)
class Store:
    """All views of all objects, concatenated: object i has views start[i] up to, but not including, start[i + 1]."""

    folder: Path | None  # None: kept in memory
    uids: list[str]
    skipped: dict[str, str]  # uid -> cause
    start: np.ndarray  # [N+1]
    c2w: np.ndarray  # [K 4 4] float32, OpenCV axes
    fxfycxcy: np.ndarray  # [K 4] float32, of the whole images
    source_row: np.ndarray  # [K] row in the source arrays, or -1: never a source
    source_fxfycxcy: np.ndarray  # [rows 4] float32, of the crops
    # Colour and alpha are separate: splitting them for every batch would cost more than everything else.
    source_rgb: np.ndarray  # [rows s s 3] uint8, straight
    source_alpha: np.ndarray  # [rows s s] uint8
    target_rgb: np.ndarray  # [K t t 3] uint8, straight
    target_alpha: np.ndarray  # [K t t] uint8

    def __reduce__(self):
        """Lets each process of the loader open the files itself. Pickling a memory map would copy its whole content."""
        if self.folder is not None:
            return open_store, (self.folder,)
        fields = [getattr(self, f.name) for f in dataclasses.fields(self)]
        if sum(getattr(x, "nbytes", 0) for x in fields) > MAX_COPIED:
            raise InputError(
                "the decoded images are in memory, and each process of the loader would copy them: set data.num_workers=0 "
                "(threads), or put the data where a cache can be written"
            )
        return Store, tuple(fields)


def get_store(root: Path, uids: list[str], settings: Settings) -> Store:
    """The store of these objects. Builds it unless there is one for exactly these files."""
    files = folders.fingerprint(root, uids, settings.source_images)
    key = hashlib.sha256(repr((3, dataclasses.astuple(settings), files)).encode()).hexdigest()[:16]
    return _get_store(root, tuple(uids), settings, key)


@functools.lru_cache(maxsize=2)
def _get_store(root: Path, uids: tuple[str, ...], settings: Settings, key: str) -> Store:
    """Cached, so that both splits share the store even if it is in memory."""
    folder = root / f".cache-{key}"
    if not folder.is_dir():
        with _alone(root) as alone:
            for left in root.glob(f"{folder.name}.*.unfinished") if alone else ():
                shutil.rmtree(left, ignore_errors=True)  # left by a killed process
            if not folder.is_dir():
                return _build(root, uids, settings, folder)
    return open_store(folder)


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[bool]:
    """Waits until no other process on this machine builds a cache in the folder. Yields False if the folder cannot be locked."""
    try:
        descriptor = os.open(root, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def open_store(folder: Path) -> Store:
    """Opens a store on disk.

    Raises:
      InputError: the store is damaged.
    """
    try:
        names = json.loads((folder / "objects.json").read_text())
        with np.load(folder / "views.npz") as arrays:
            big = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in IMAGES}
            return Store(folder=folder, **names, **arrays, **big)
    except Exception as error:
        raise InputError(
            f"{folder}: cache is damaged ({type(error).__name__}: {error}): delete this folder"
        ) from None


def _build(root: Path, uids: tuple[str, ...], settings: Settings, folder: Path) -> Store:
    """Decodes everything into `folder`, or into memory if `folder` cannot be written."""
    cameras, skipped = {}, {}
    for uid in uids:
        try:
            cameras[uid] = folders.read_cameras(root / uid)
        except InputError as error:
            skipped[uid] = str(error)
    start = np.cumsum([0, *(len(c.c2w) for c in cameras.values())])
    c2w = np.concatenate([np.zeros((0, 4, 4)), *(c.c2w for c in cameras.values())])
    fxfycxcy = np.concatenate([np.zeros((0, 4)), *(c.fxfycxcy for c in cameras.values())])
    is_source = np.concatenate([
        np.zeros(0, bool),
        *(elements.is_source(c.c2w, settings.source_elevation, settings.source_views) for c in cameras.values()),
    ])  # fmt: skip
    source_row = np.where(is_source, np.cumsum(is_source) - 1, -1)
    arrays, unfinished = _allocate(folder, int(is_source.sum()), int(start[-1]), settings)
    try:
        boxes, broken = _decode(cameras, settings, start, source_row, arrays)
        store = Store(
            folder=None,
            uids=list(cameras),
            skipped=dict(
                sorted({**skipped, **broken}.items())
            ),  # objects with broken images keep their rows
            start=start,
            c2w=c2w.astype(np.float32),
            fxfycxcy=fxfycxcy.astype(np.float32),
            source_row=source_row,
            source_fxfycxcy=crop_intrinsics(fxfycxcy[is_source], boxes),
            **arrays,
        )
        if unfinished is not None:
            _save(unfinished, store)
            try:
                unfinished.rename(folder)
            except OSError:  # another process has built it in the meantime
                pass
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
    return open_store(folder) if folder.is_dir() else store


def _allocate(
    folder: Path, num_sources: int, num_views: int, settings: Settings
) -> tuple[dict[str, np.ndarray], Path | None]:
    """The big arrays: files in a new folder beside `folder`, or arrays in memory (and None) if the disk is full or read-only.

    Raises:
      InputError: the memory is too small as well.
    """
    source = (num_sources, settings.source_size, settings.source_size)
    target = (num_views, settings.target_size, settings.target_size)
    shapes = dict(zip(IMAGES, [(*source, 3), source, (*target, 3), target], strict=True))
    made = None
    try:
        made = Path(tempfile.mkdtemp(".unfinished", f"{folder.name}.", folder.parent))
        made.chmod(folder.parent.stat().st_mode & 0o777)  # mkdtemp gives access to its user alone
        return {name: _allocate_file(made / f"{name}.npy", s) for name, s in shapes.items()}, made
    except OSError as error:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        bytes_ = sum(math.prod(shape) for shape in shapes.values())
        problem = f"{folder.parent}: no cache can be written there ({error.strerror})"
        if bytes_ > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise InputError(
                f"{problem}, and its {bytes_ / 1e9:.1f} GB are more than the memory: free some space, or make records with "
                "tools/build_dataset.py and set config.data.name=records"
            ) from None
        print(f"{problem}: keeping {bytes_ / 1e9:.1f} GB in memory instead", file=sys.stderr)
        return {name: np.zeros(shape, np.uint8) for name, shape in shapes.items()}, None


def _allocate_file(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    # A full disk raises OSError here. If it filled up while writing to the map, a bus error would kill the process.
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _decode(cameras: dict[str, folders.Cameras], settings: Settings, start, source_row, arrays):
    """Fills `arrays`. Returns the crop boxes [rows 4] of the sources as fractions, and the cause by uid of each broken object."""
    boxes, broken = np.tile([0.0, 0.0, 1.0, 1.0], (len(arrays["source_rgb"]), 1)), {}

    def decode(index: int, uid: str) -> None:
        for i, path in enumerate(cameras[uid].images):
            rgba = folders.read_image(cameras[uid], i)
            _put(arrays, "target", start[index] + i, elements.shrink(rgba, settings.target_size))
            if (row := source_row[start[index] + i]) >= 0:
                if settings.source_images != "rgba":
                    rgba = folders.read_prediction(cameras[uid], i, settings.source_images)
                name = f"{settings.source_images}/{path.name}"
                crop, boxes[row] = elements.source_crop(
                    rgba, settings.source_size, settings.foreground_ratio, name
                )
                _put(arrays, "source", row, crop)

    # Pillow releases the GIL while decoding.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {pool.submit(decode, index, uid): uid for index, uid in enumerate(cameras)}
        done = concurrent.futures.as_completed(jobs)
        for job in messages.progress(done, len(jobs), "decoding"):
            try:
                job.result()
            except InputError as error:
                broken[jobs[job]] = str(error)
    return boxes, broken


def _put(arrays: dict[str, np.ndarray], kind: str, row: int, rgba: np.ndarray) -> None:
    arrays[f"{kind}_rgb"][row], arrays[f"{kind}_alpha"][row] = rgba[..., :3], rgba[..., 3]


def _save(folder: Path, store: Store) -> None:
    """Writes everything except the big arrays, which are in the folder already."""
    fields = {f.name: getattr(store, f.name) for f in dataclasses.fields(store)}
    arrays = {k: v for k, v in fields.items() if isinstance(v, np.ndarray) and k not in IMAGES}
    (folder / "objects.json").write_text(json.dumps({"uids": store.uids, "skipped": store.skipped}))
    np.savez(folder / "views.npz", **arrays)
    for name in IMAGES:
        fields[name].flush()
