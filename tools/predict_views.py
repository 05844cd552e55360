"""Draws the views that One-2-3-45 is given with a trained Zero123: `predict_views.py FOLDER --weights runs/zero123`.

FOLDER holds objects that `tools/render_objects.py --protocol one2345` rendered. Views 0 to 7 of each are the truth that the model
starts from; it draws their four neighbours, 8 to 39, as at inference (One-2-3-45, https://arxiv.org/abs/2306.16928, section 3.2). A
reconstruction model then trains on the mistakes that it will be given:

    FOLDER/<uid>/predicted/008.png ... 039.png   RGB on white, in the size of Zero123's images
    FOLDER/<uid>/predicted/origin.json           the seed, and a digest of the weights

Train with `--config.data.source_images=predicted --config.data.source_views="(8,40)"`, see docs/data.md.

An interrupted run continues where it stopped: views that exist are kept. A view depends only on the weights, the seed, the object's name
and the view's number, so one whose file was deleted comes out the same. Views of other weights or another seed are not mixed in: delete
the folders `predicted` first. Objects that cannot be used are named on stderr.

Exit code: 0 all views exist; 1 some objects could not be used, the views of the others exist; 2 no object could be used, wrong usage,
or a disk error stopped the run; 130 interrupted.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lrm_jax.data import elements, folders
from lrm_jax.images.png import png, to_uint8
from lrm_jax.ops import cameras as cameras_lib
from lrm_jax.ops.compositing import on_background
from lrm_jax.parallel import batch_axes, messages, sharding, whole_files
from lrm_jax.types import Cameras, InputError, Views
from lrm_jax.weights import loading

GIVEN, NEIGHBOURS = 8, 4  # view 8 + 4 i + k is a neighbour of view i: `ops.cameras.one2345_rig`
NUM_VIEWS = GIVEN * (1 + NEIGHBOURS)
APART = 15.0  # degrees; neighbours are 10 apart


@dataclasses.dataclass(frozen=True)
class Missing:
    """A view that is to be drawn, and what it is drawn from."""

    folder: Path  # of the object
    view: int
    source: np.ndarray  # uint8 [S S 4] straight alpha
    cameras: Cameras  # [2]: of the source, and of the view

    @property
    def path(self) -> Path:
        return image_path(self.folder, self.view)


def image_path(folder: Path, view: int) -> Path:
    return folder / "predicted" / f"{view:03d}.png"


def missing_views(folder: Path, size: int, origin: dict) -> Iterator[Missing]:
    """Yields the views of an object that have no image yet, and first writes where they come from.

    Args:
      size: S, the side of the model's images in pixels.
      origin: the content of origin.json.

    Raises:
      InputError: the object does not have the images and cameras of One-2-3-45, or already has views of another origin.
    """
    views = [view for view in range(GIVEN, NUM_VIEWS) if not image_path(folder, view).exists()]
    check_origin(folder, origin, new=len(views) == NUM_VIEWS - GIVEN)
    if not views:
        return
    found = folders.read_cameras(folder)
    check_cameras(found)
    whole_files.write_file(folder / "predicted/origin.json", json.dumps(origin).encode())
    for given, neighbours in itertools.groupby(views, lambda view: (view - GIVEN) // NEIGHBOURS):
        rgba = folders.read_image(found, given)
        source, _ = elements.source_crop(rgba, size, None, f"view {given}")
        for view in neighbours:
            pair = [given, view]
            c2w, fxfycxcy = found.c2w[pair], found.fxfycxcy[pair]
            cameras = Cameras(c2w=c2w.astype(np.float32), fxfycxcy=fxfycxcy.astype(np.float32))
            yield Missing(folder, view, source, cameras)


def check_origin(folder: Path, origin: dict, new: bool) -> None:
    """Raises InputError if the object has views, and they are of another origin."""
    path = folder / "predicted/origin.json"
    try:
        there = json.loads(path.read_text())
    except (OSError, ValueError):
        there = None
    if not new and there != origin:
        names = [name for name in origin if there is None or there.get(name) != origin[name]]
        raise InputError(
            f"predicted holds views with other {' and '.join(names)}: give the same, or delete predicted"
        )


def check_cameras(found: folders.Cameras) -> None:
    """Raises InputError if these are not 40 square views, of which four follow each of the first eight."""
    remedy = "render with tools/render_objects.py --protocol one2345"
    if len(found.images) != NUM_VIEWS:
        raise InputError(f"{len(found.images)} views, not {NUM_VIEWS}: {remedy}")
    if found.size[0] != found.size[1]:
        raise InputError(f"its images are {found.size[0]}x{found.size[1]}, not square: {remedy}")
    outward = found.c2w[:, :3, 3] / np.linalg.norm(found.c2w[:, :3, 3], axis=-1, keepdims=True)
    cosine = (outward[GIVEN:] * outward[:GIVEN].repeat(NEIGHBOURS, axis=0)).sum(-1)
    apart = np.degrees(np.arccos(cosine.clip(-1, 1)))
    if not apart.max() < APART:
        first = int(np.argmax(~(apart < APART)))
        raise InputError(
            f"view {GIVEN + first} is {apart[first]:.0f} degrees from view {first // NEIGHBOURS}, not 10: {remedy}"
        )


def compiled(model, params, seed: int) -> tuple[Callable, int]:
    """(a function from a batch of views [B ...] to float32 images [B S S 3], the number of devices: B must be a multiple of it)."""
    device_mesh = sharding.make_device_mesh(devices=jax.local_devices())
    params = jax.device_put(params, NamedSharding(device_mesh, PartitionSpec()))
    size = model.image_size

    def draw(params, batch):
        source, targets, uid_B, view_B = batch
        variables = {"params": params}
        scene = model.apply(variables, on_background(source, 1.0), method="encode")
        rays = cameras_lib.pixel_rays(targets, size, size)
        keys_B = jax.vmap(lambda uid, view: view_key(seed, uid, view))(uid_B, view_B)
        rendering = model.apply(variables, scene, rays, keys_B, method="render")
        return rendering.rgb[:, 0].astype("float32")

    program = sharding.jit(lambda params, batch: batch_axes.split_batch(draw, params, batch))

    def predict(batch) -> np.ndarray:
        with jax.set_mesh(device_mesh):
            return np.asarray(program(params, batch))

    return predict, device_mesh.size


def view_key(seed: int, uid: jax.Array, view: jax.Array) -> jax.Array:
    """The random key of a view. `uid`: `number_of` the object's name."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), uid), view)


def number_of(name: str) -> int:
    """32 bits that stand for a name, the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])


def batch_of(group: list[Missing], size: int) -> tuple:
    """The arguments of the program for up to `size` views. The last one fills the batch: a smaller one would be compiled again."""
    full = group + group[-1:] * (size - len(group))
    cameras = jax.tree.map(lambda *x: np.stack(x), *(x.cameras for x in full))
    source, targets = (
        jax.tree.map(lambda x, part=part: x[:, part], cameras) for part in (slice(1), slice(1, 2))
    )
    rgba = np.stack([x.source for x in full])[:, None]
    views = Views(rgb=rgba[..., :3], alpha=rgba[..., 3], cameras=source)
    uids = np.array([number_of(x.folder.name) for x in full], np.uint32)
    return views, targets, uids, np.array([x.view for x in full], np.uint32)


def predict_all(model, params, root: Path, seed: int, batch: int) -> tuple[int, dict[str, str]]:
    """Draws all views that are missing. Returns how many, and uid -> cause for the objects that could not be used.

    Raises:
      InputError: there is no object in `root`.
      OSError: an image cannot be written.
    """
    uids, failures = folders.find(root), {}
    size, origin = model.image_size, {"seed": seed, "weights": digest_of(params)}
    predict, num_devices = compiled(model, params, seed)
    batch = -(-batch // num_devices) * num_devices

    def missing() -> Iterator[Missing]:
        for uid in uids:
            try:
                yield from missing_views(root / uid, size, origin)
            except InputError as error:
                failures[uid] = str(error)

    there = sum(1 for uid in uids for _ in (root / uid).glob("predicted/*.png"))
    total, count = len(uids) * (NUM_VIEWS - GIVEN) - there, 0
    print(f"{len(uids)} objects, {there} views exist, {total} to draw", file=sys.stderr)
    rows = iter(messages.progress(missing(), total, "views"))
    while group := list(itertools.islice(rows, batch)):
        for row, rgb in zip(group, predict(batch_of(group, batch)), strict=False):
            if not np.isfinite(rgb).all():
                failures[row.folder.name] = f"view {row.view} is not finite: use other weights"
                continue
            whole_files.write_file(row.path, png(to_uint8(rgb)))
            count += 1
    return count, failures


def digest_of(params) -> str:
    """A digest of the parameters."""
    found = hashlib.sha256()
    for x in jax.tree.leaves(params):
        found.update(np.ascontiguousarray(x))
    return found.hexdigest()[:16]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="objects of --protocol one2345")
    add("--weights", required=True, help="Zero123: a model file, a checkpoint, or a training run")
    add("--seed", type=int, default=0, help="random seed of the views (default: 0)")
    add("--batch", type=int, default=8, help="views that are drawn at once (default: 8)")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error(f"--batch {args.batch}: must be at least 1")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed}: must be in [0, 2^32)")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    args = parse_arguments(argv)
    try:
        model, params, info = loading.load_weights(args.weights)
        if info["family"] != "zero123":
            raise InputError(f"{args.weights}: a model of {info['family']}: give one of Zero123")
        count, failures = predict_all(model, params, args.folder, args.seed, args.batch)
    except InputError as error:
        print(f"predict_views: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        stopped = "interrupted"
    except OSError as error:
        stopped = f"stopped: {error.filename}: {error.strerror}"
    else:
        return _report(args.folder, count, failures)
    print(f"predict_views: {stopped}: views are kept, run again to continue", file=sys.stderr)
    return 130 if stopped == "interrupted" else 2


def _report(root: Path, count: int, failures: dict[str, str]) -> int:
    """Prints what was drawn and what was not. Returns the exit code."""
    for uid, cause in failures.items():
        print(f"{root}: skipped {uid}: {cause}", file=sys.stderr)
    if len(failures) == len(folders.find(root)):
        print(f"predict_views: none of {len(failures)} objects could be used", file=sys.stderr)
        return 2
    skipped = f"; objects skipped: {len(failures)}" if failures else ""
    print(f"{root}: views drawn: {count}{skipped}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
