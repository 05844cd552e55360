"""Single objects from folders of pictures with known cameras: OpenLRM's layout, which `tools/render_objects.py` writes.

    root/<uid>/rgba/000.png ...   sRGB with straight alpha
    root/<uid>/pose/000.npy ...   [3 4] camera to world, Blender's camera axes, z-up world, object around the origin
    root/<uid>/intrinsics.npy     [3 2] (fx, fy), (cx, cy), (width, height) in pixels

A batch is a pure function of the seed and the step, so that resuming needs no state. The first start decodes every picture
once, at the sizes that training wants, into `root/.cache-<key>`, which is memory-mapped from then on.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tqdm
from PIL import Image

from lrm_jax.ops import cameras as cameras_lib
from lrm_jax.ops.images import load_image, recenter_foreground
from lrm_jax.types import Batch, Cameras, InputError, Views

VALIDATION_SHARE = 0.08
PICTURES = ("source_rgb", "source_alpha", "target_rgb", "target_alpha")  # memory-mapped
_COLORS = "black|blue|brown|gold|gr[ae]y|green|orange|pink|purple|red|silver|white|yellow"
_VARIANT = re.compile(rf"_(?:{_COLORS}|[A-Z]|\d+)(?=_|$)|(?<=[a-z])(?:[A-Z]|\d+)(?=_|$)")


def make(
    root: str | Path,
    *,
    split: str,
    seed: int,
    batch_size: int,
    num_target: int,
    source_size: int,
    target_size: int,
    num_source: int = 1,
    source_elevation: tuple[float, float] = (5.0, 35.0),
    foreground_ratio: float | None = 0.85,
    mirror: bool = False,
) -> "Objects":
    """Opens a folder of rendered objects.

    Args:
      root: the folder.
      split: "train" or "val": the objects whose `group` hashes into the last 8 %. Variants of an object are on one side.
      seed: of the order of the objects and the choice of views.
      batch_size: B.
      num_target: views besides the sources; the target views are the sources (uncropped), then these.
      source_size, target_size: sides of the square pictures, pixels.
      num_source: views that are given.
      source_elevation: degrees; the sources are drawn from the views within.
      foreground_ratio: the sources are cropped to the object, which fills this share of the square (TripoSR: 0.85), and
        their cameras are those of the crops; None keeps the whole pictures.
      mirror: in "train", every other object on average is mirrored in the vertical plane through the first source's axis.

    Raises:
      InputError: no such folder, nothing usable in it, or no object in this split. Single broken objects are skipped and
        reported on stderr.
    """
    root = Path(root)
    if split not in ("train", "val"):
        raise InputError(f"split {split!r}: must be train or val")
    files = _find(root)
    recipe = _Recipe(source_size, target_size, tuple(source_elevation), foreground_ratio)
    key = hashlib.sha256(repr((1, recipe, files)).encode()).hexdigest()[:16]
    store = _get_store(root, tuple(files), recipe, key)
    usable, skipped = [], dict(store.skipped)
    for index, uid in enumerate(store.uids):
        if uid in skipped:
            continue
        views = np.arange(store.start[index], store.start[index + 1])
        in_band = int((store.source_row[views] >= 0).sum())
        if in_band < num_source:
            skipped[uid] = (
                f"{in_band} views with an elevation in {recipe.elevation} for {num_source} sources"
            )
        elif len(views) < num_source + num_target:
            skipped[uid] = (
                f"{len(views)} views for {num_source} sources and {num_target} other targets"
            )
        else:
            usable.append(index)
    for uid, cause in skipped.items():
        print(f"{root}: skipped {uid}: {cause}", file=sys.stderr)
    if skipped:
        print(f"{root}: skipped {len(skipped)} of {len(files)} objects", file=sys.stderr)
    if not usable:
        uid, cause = next(iter(skipped.items()))
        raise InputError(
            f"{root}: none of {len(files)} objects can be used: the first, {uid}: {cause}"
        )
    indices = np.array([i for i in usable if in_validation(store.uids[i]) == (split == "val")], int)
    if not len(indices):
        raise InputError(
            f"{root}: none of its {len(usable)} objects falls into the {split} split: render more objects"
        )
    return Objects(
        store, indices, split, seed, batch_size, num_source, num_target, mirror and split == "train"
    )


def group(uid: str) -> str:
    """The uid without what tells variants apart: `_blue`, `_A`, `_2`, and letters and digits glued to a word's end."""
    return _VARIANT.sub("", uid)


def in_validation(uid: str) -> bool:
    """Whether an object is held out of training. Depends on its group's name only."""
    digest = hashlib.sha256(group(uid).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 >= 1 - VALIDATION_SHARE


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What is done to a picture before it is stored."""

    source_size: int
    target_size: int
    elevation: tuple[float, float]
    foreground_ratio: float | None


@dataclasses.dataclass
class _Store:
    """All views of all objects, one after the other: object i has views start[i] to start[i + 1]."""

    uids: list[str]
    skipped: dict[str, str]  # uid -> cause
    start: np.ndarray  # [N+1]
    c2w: np.ndarray  # [K 4 4] float32, OpenCV axes
    fxfycxcy: np.ndarray  # [K 4] float32, of the whole pictures
    source_row: np.ndarray  # [K] row in `source`, or -1: not in the elevation band
    source_fxfycxcy: np.ndarray  # [rows 4] float32, of the crops
    # Colour and alpha apart: taking them apart in every batch would cost more than all else.
    source_rgb: np.ndarray  # [rows s s 3] uint8, straight
    source_alpha: np.ndarray  # [rows s s] uint8
    target_rgb: np.ndarray  # [K t t 3] uint8, straight
    target_alpha: np.ndarray  # [K t t] uint8


@dataclasses.dataclass
class Objects:
    """A source of batches; see `make`."""

    store: _Store
    indices: np.ndarray  # of this split's objects in the store
    split: str
    seed: int
    batch_size: int
    num_source: int
    num_target: int
    mirror: bool

    @property
    def num_objects(self) -> int:
        return len(self.indices)

    @property
    def uids(self) -> list[str]:
        """Names of this split's objects."""
        return [self.store.uids[i] for i in self.indices]

    def batch(self, step: int) -> Batch:
        """The batch of a step: NumPy float32, a pure function of the seed and the step.

        Source V = num_source, target V = num_source + num_target: the sources' whole pictures come first. The world is
        turned about its z axis so that the first source's camera is at azimuth 0, above or below the +x axis; its
        elevation and distance stay as they are. Colour is straight, alpha is given.
        """
        first = step * self.batch_size
        sources, targets, mirrored = map(
            np.array, zip(*map(self._draw, range(first, first + self.batch_size)), strict=True)
        )
        turn = _turn_to_azimuth_0(self.store.c2w[sources[:, 0]])[:, None]
        store, rows = self.store, self.store.source_row[sources]
        return Batch(
            source=_views(
                store.source_rgb[rows], store.source_alpha[rows], turn @ store.c2w[sources], store.source_fxfycxcy[rows], mirrored
            ),
            target=_views(
                store.target_rgb[targets], store.target_alpha[targets], turn @ store.c2w[targets], store.fxfycxcy[targets], mirrored
            ),
        )  # fmt: skip

    def _draw(self, position: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Source views, target views and whether to mirror, for the sample at a position in the endless sequence."""
        epoch, place = divmod(position, self.num_objects)
        index = self.indices[_permutation(self.seed, epoch, self.num_objects)[place]]
        rng = np.random.default_rng((self.seed, position, 1))
        views = np.arange(self.store.start[index], self.store.start[index + 1])
        sources = rng.choice(
            views[self.store.source_row[views] >= 0], self.num_source, replace=False
        )
        others = rng.choice(np.setdiff1d(views, sources), self.num_target, replace=False)
        return sources, np.concatenate([sources, others]), self.mirror and rng.random() < 0.5


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def _turn_to_azimuth_0(c2w: np.ndarray) -> np.ndarray:
    """[B 4 4] rotations about world z that bring cameras c2w[B 4 4] to y = 0, x >= 0."""
    azimuth = np.arctan2(c2w[:, 1, 3], c2w[:, 0, 3])
    turn = np.tile(np.eye(4, dtype=np.float32), (len(c2w), 1, 1))
    turn[:, 0, 0] = turn[:, 1, 1] = np.cos(azimuth)
    turn[:, 0, 1], turn[:, 1, 0] = np.sin(azimuth), -np.sin(azimuth)
    return turn


def _views(
    rgb: np.ndarray,
    alpha: np.ndarray,
    c2w: np.ndarray,
    fxfycxcy: np.ndarray,
    mirrored: np.ndarray,
) -> Views:
    """Float views [B V] of 8-bit pictures; those of mirrored [B] samples as they are in the world with y -> -y.

    With M = diag(1, -1, 1, 1), a point M p has in the camera M c2w diag(-1, 1, 1, 1) the coordinates that p has in c2w,
    with x negated: the picture is flipped left to right, and its centre with it. Overwrites its arguments.
    """
    if mirrored.any():
        rgb[mirrored], alpha[mirrored] = rgb[mirrored, :, :, ::-1], alpha[mirrored, :, :, ::-1]
        c2w[mirrored] *= np.outer([1, -1, 1, 1], [-1, 1, 1, 1]).astype(np.float32)
        fxfycxcy[mirrored, :, 2] = 1 - fxfycxcy[mirrored, :, 2]
    rgb, alpha = np.divide(rgb, np.float32(255)), np.divide(alpha, np.float32(255))
    return Views(rgb=rgb, cameras=Cameras(c2w=c2w, fxfycxcy=fxfycxcy), alpha=alpha)


# -- reading the folder


def _find(root: Path) -> dict[str, list[tuple[str, int, int]]]:
    """uid -> (name, size, time of change) of its files, which identify the contents. Raises InputError if there is none."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder: render one with tools/render_objects.py")
    files = {}
    for folder in sorted(root.iterdir()):
        if not folder.name.startswith(".") and (folder / "rgba").is_dir():
            found = [*folder.glob("*.npy"), *folder.glob("pose/*.npy"), *folder.glob("rgba/*.png")]
            stats = ((path.relative_to(folder).as_posix(), path.stat()) for path in sorted(found))
            files[folder.name] = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    if not files:
        raise InputError(
            f"{root}: no object (<uid>/rgba, pose, intrinsics.npy) in it: render some with tools/render_objects.py"
        )
    return files


@dataclasses.dataclass
class _Cameras:
    """The cameras of one object, in pixels, and which views can be sources."""

    c2w: np.ndarray  # [V 4 4] Blender axes
    intrinsics: np.ndarray  # [3 2]
    is_source: np.ndarray  # [V]


def _read_cameras(folder: Path, elevation: tuple[float, float]) -> _Cameras:
    pictures = sorted(folder.glob("rgba/*.png"))
    if not pictures:
        raise InputError("no rgba/*.png")
    intrinsics = _load_array(folder / "intrinsics.npy", (3, 2))
    if (intrinsics[[0, 2]] <= 0).any():
        raise InputError("intrinsics.npy: a focal length or a size is not positive")
    poses = np.stack([_load_array(folder / "pose" / f"{p.stem}.npy", (3, 4)) for p in pictures])
    c2w = np.concatenate([poses, np.tile([[[0, 0, 0, 1.0]]], (len(poses), 1, 1))], axis=1)
    eye = c2w[:, :3, 3]
    degrees = np.degrees(np.arctan2(eye[:, 2], np.hypot(eye[:, 0], eye[:, 1])))
    return _Cameras(c2w, intrinsics, (elevation[0] <= degrees) & (degrees <= elevation[1]))


def _load_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    name = "/".join(path.parts[-2:]) if path.parent.name == "pose" else path.name
    try:
        array = np.load(path)
    except FileNotFoundError:
        raise InputError(f"{name} is missing") from None
    except (
        Exception
    ) as error:  # numpy's reader raises ValueError, EOFError, OSError, SyntaxError ...
        raise InputError(f"{name} cannot be read ({type(error).__name__})") from None
    if array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}, not {shape}")
    if not np.isfinite(array).all():
        raise InputError(f"{name} has values that are not finite")
    return array.astype(np.float64)


def _prepare_view(path: Path, size: np.ndarray, recipe: _Recipe, is_source: bool):
    """(target picture, source picture or None, the source's (top, left, height, width) in pixels of the file)."""
    rgba = load_image(path)
    if rgba.shape[:2] != (size[1], size[0]):
        raise InputError(
            f"rgba/{path.name} is {rgba.shape[1]}x{rgba.shape[0]}, intrinsics.npy says {size[0]:g}x{size[1]:g}"
        )
    # Pillow resizes RGBA premultiplied, and its box filter is the area average.
    target = np.asarray(
        Image.fromarray(rgba).resize([recipe.target_size] * 2, Image.Resampling.BOX)
    )
    if not is_source:
        return target, None, None
    box = (0, 0, *rgba.shape[:2])
    if recipe.foreground_ratio is not None:
        if not rgba[..., 3].any():
            raise InputError(f"rgba/{path.name} is transparent everywhere")
        whole, rgba = rgba, recenter_foreground(rgba, recipe.foreground_ratio)
        # The crop only moves pixels, so its corner is where the foreground went.
        box = (*(_first_foreground(whole) - _first_foreground(rgba)), *rgba.shape[:2])
    source = np.asarray(
        Image.fromarray(rgba).resize([recipe.source_size] * 2, Image.Resampling.BILINEAR)
    )
    return target, source, np.array(box)


def _first_foreground(rgba: np.ndarray) -> np.ndarray:
    """(row, column) of the upper left corner of the foreground's box."""
    return np.array([np.flatnonzero(rgba[..., 3].any(axis))[0] for axis in (1, 0)])


# -- the store on disk


@functools.lru_cache(maxsize=2)
def _get_store(root: Path, uids: tuple[str, ...], recipe: _Recipe, key: str) -> _Store:
    """The store of these files. Both splits share it, also where it is in memory."""
    return _open_store(root / f".cache-{key}") or _build(root, uids, recipe, key)


def _build(root: Path, uids: tuple[str, ...], recipe: _Recipe, key: str) -> _Store:
    """Decodes everything into root/.cache-<key>, or into memory where that cannot be written."""
    cameras, skipped = {}, {}
    for uid in uids:
        try:
            cameras[uid] = _read_cameras(root / uid, recipe.elevation)
        except InputError as error:
            skipped[uid] = str(error)
    start = np.cumsum([0, *(len(c.c2w) for c in cameras.values())])
    is_source = np.concatenate([np.zeros(0, bool), *(c.is_source for c in cameras.values())])
    source_row = np.where(is_source, np.cumsum(is_source) - 1, -1)
    sides = {
        "source": (is_source.sum(), *[recipe.source_size] * 2),
        "target": (start[-1], *[recipe.target_size] * 2),
    }
    shapes = {
        name: sides[name.split("_")[0]] + ((3,) if name.endswith("rgb") else ())
        for name in PICTURES
    }
    folder, unfinished = root / f".cache-{key}", root / f".cache-{key}.{os.getpid()}.unfinished"
    try:
        unfinished.mkdir()
        arrays = {
            name: _allocate(unfinished / f"{name}.npy", shape) for name, shape in shapes.items()
        }
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        gigabytes = sum(np.prod(shape, dtype=float) for shape in shapes.values()) / 1e9
        print(
            f"{root}: no cache can be written there ({error.strerror}): {gigabytes:.1f} GB kept in memory",
            file=sys.stderr,
        )
        arrays = {name: np.zeros(shape, np.uint8) for name, shape in shapes.items()}
    try:
        boxes, broken = _decode(root, cameras, recipe, start, source_row, arrays)
        store = _assemble(cameras, {**skipped, **broken}, start, source_row, boxes, arrays)
        if unfinished.is_dir():
            _save_store(unfinished, store)
            try:
                unfinished.rename(folder)
            except OSError:  # another process has made it meanwhile
                pass
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return _open_store(folder) or store


def _allocate(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    array = np.lib.format.open_memmap(path, "w+", np.uint8, tuple(map(int, shape)))
    with (
        open(path, "r+b") as file
    ):  # a full disk is an OSError here; a bus error ends the process when it is met in the map
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _decode(root: Path, cameras: dict[str, _Cameras], recipe: _Recipe, start, source_row, arrays):
    """Fills `arrays`. Returns the boxes [rows 4] of the sources, in pixels, and uid -> cause of objects with broken pictures."""
    boxes, broken = np.zeros((len(arrays["source_rgb"]), 4)), {}

    def decode(index: int, uid: str) -> None:
        for i, path in enumerate(sorted((root / uid / "rgba").glob("*.png"))):
            view = start[index] + i
            row = source_row[view]
            target, source, box = _prepare_view(path, cameras[uid].intrinsics[2], recipe, row >= 0)
            arrays["target_rgb"][view], arrays["target_alpha"][view] = (
                target[..., :3],
                target[..., 3],
            )
            if row >= 0:
                arrays["source_rgb"][row], arrays["source_alpha"][row] = (
                    source[..., :3],
                    source[..., 3],
                )
                boxes[row] = box

    with concurrent.futures.ThreadPoolExecutor(
        os.cpu_count()
    ) as pool:  # Pillow decodes without the interpreter's lock
        jobs = {pool.submit(decode, index, uid): uid for index, uid in enumerate(cameras)}
        done = concurrent.futures.as_completed(jobs)
        for job in tqdm.tqdm(done, f"decoding {root.name}", len(jobs), unit="object", delay=2):
            try:
                job.result()
            except InputError as error:
                broken[jobs[job]] = str(error)
    return boxes, broken


def _assemble(
    cameras: dict[str, _Cameras], skipped: dict[str, str], start, source_row, boxes, arrays
) -> _Store:
    """The store, with all cameras in our convention. Objects with broken pictures keep their rows."""
    c2w = np.concatenate([np.zeros((0, 4, 4)), *(c.c2w for c in cameras.values())])
    c2w = np.asarray(cameras_lib.opengl_to_opencv(jnp.asarray(c2w, jnp.float32)))
    pixels = [np.repeat(c.intrinsics[None], len(c.c2w), axis=0) for c in cameras.values()]
    pixels = np.concatenate([np.zeros((0, 3, 2)), *pixels])
    fxfycxcy = (pixels[:, :2] / pixels[:, 2:]).reshape(-1, 4).astype(np.float32)
    is_source = source_row >= 0
    height_width = pixels[is_source, 2, ::-1]
    top_left, size = (
        jnp.asarray(box / height_width, jnp.float32) for box in np.split(boxes, 2, axis=1)
    )
    whole = Cameras(c2w=jnp.asarray(c2w[is_source]), fxfycxcy=jnp.asarray(fxfycxcy[is_source]))
    crops = cameras_lib.crop_cameras(whole, top_left, size)
    return _Store(
        uids=list(cameras),
        skipped=dict(sorted(skipped.items())),
        start=start,
        c2w=c2w,
        fxfycxcy=fxfycxcy,
        source_row=source_row,
        source_fxfycxcy=np.asarray(crops.fxfycxcy),
        **arrays,
    )


def _save_store(folder: Path, store: _Store) -> None:
    """Writes all but the two big arrays, which are in the folder already."""
    fields = {f.name: getattr(store, f.name) for f in dataclasses.fields(store)}
    arrays = {k: v for k, v in fields.items() if isinstance(v, np.ndarray) and k not in PICTURES}
    (folder / "objects.json").write_text(json.dumps({"uids": store.uids, "skipped": store.skipped}))
    np.savez(folder / "views.npz", **arrays)
    for name in PICTURES:
        fields[name].flush()


def _open_store(folder: Path) -> _Store | None:
    if not folder.is_dir():
        return None
    try:
        names = json.loads((folder / "objects.json").read_text())
        with np.load(folder / "views.npz") as arrays:
            big = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in PICTURES}
            return _Store(**names, **arrays, **big)
    except Exception as error:
        raise InputError(
            f"{folder}: cache is damaged ({type(error).__name__}: {error}): delete that folder"
        ) from None
