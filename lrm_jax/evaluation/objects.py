"""Evaluates a model on objects: held-out views, and points on the true surface. The command is in `commands/evaluate.py`."""

import argparse
import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lrm_jax import models
from lrm_jax.data import elements, held_out
from lrm_jax.data.held_out import HeldOut
from lrm_jax.evaluation import report_page
from lrm_jax.evaluation.scores import (
    COMPILING,
    Programs,
    Result,
    compiled,
    image_protocol,
    nearest_source,
    on_white,
)
from lrm_jax.mesh import lattice
from lrm_jax.metrics import mean_object, surface_metrics, visual_hull
from lrm_jax.ops import cameras, normalization
from lrm_jax.ops.compositing import on_background
from lrm_jax.parallel import messages
from lrm_jax.types import Cameras, InputError, Views
from lrm_jax.weights import loading

# Families whose world is that of the source camera. The other families have an upright world with the source at azimuth 0.
SEEN_BY_SOURCE = ("lrm",)
NUM_SOURCE = (
    32  # views that are given to published weights of a family with a surface: One-2-3-45's number
)
BATCH = 4  # objects per batch, rounded up to a multiple of the number of devices

# How the protocol describes `elements.Recipe.normalize` and --scale.
WORLDS = {
    "source": "that of the source camera, which is at (0, -d, 0) and looks along +y",
    "azimuth": "the data's, rotated about its vertical axis so that the source camera is at azimuth 0",
    "image": "the one in which the camera that the model assumes, at the true elevation, would take the source image",
    "frusta": "that of the first source camera, with the box around the frusta of all source cameras in [-1, 1]^3",
    "common_view": "upright, with the first source camera at azimuth 0 and all that every source camera sees in [-1, 1]^3",
    None: "the data's",
}
SCALES = {
    "data": "as in the data",
    "image": "from the object's size in the source image, as seen by the camera that the model assumes",
    "views": "from the source cameras",
}


@dataclasses.dataclass(frozen=True)
class PosedViews:
    """How a model that takes posed views was given views in training: fields of the config's `data`."""

    num_source: int
    source_size: int
    foreground_ratio: float | None
    normalize: str | None
    source_background: float
    source_elevation: tuple[float, float] | None = held_out.SOURCE_ELEVATION
    source_views: tuple[int, int] | None = None
    source_images: str = "rgba"


class Alignment(NamedTuple):
    """How to map the world of the data to the world of a model that takes single images."""

    normalize: str | None  # this and the next field: see `elements.Recipe`
    assumed_camera: tuple[float, float] | None
    scale: str  # "data" or "image": --scale


def evaluate(
    model,
    params,
    network,
    info: dict,
    folders: list[Path],
    args: argparse.Namespace,
    stages: messages.Stages,
) -> tuple[dict[str, Result], dict[str, str], dict[str, str | dict]]:
    """Evaluates the objects in `folders`.

    Args:
      network: weights of LPIPS, or None.
      info: as `loading.load_weights` returns it.
      args: arguments of the command. This sets `sources` and `size` if they are None.

    Returns:
      (results, skipped, protocol): results by uid; by uid, why an object has no result or no surface metrics; and the protocol.

    Raises:
      InputError: an argument does not fit the model.
    """
    args.size = args.size or 128
    given = given_images if reconstructs_images(model) else given_views
    read, pose, words = given(model, info, args)
    programs = compiled(model, params, network, args.size)
    with stages("average", " other objects, for the baseline"):
        others, baseline_from = baseline_objects(args, folders)
        averaged = (item for _, item in read_ahead(others, read) if isinstance(item, HeldOut))
        mean = mean_object.average(averaged, args.size)
    with stages("evaluate", f" {len(folders)} objects of {args.data}", first=COMPILING):
        skipped = {}
        items = posed_objects(folders, skipped, read, pose)
        results = score(model, programs, mean, items, skipped, args.resolution)
    return results, skipped, words | protocol(model, args, baseline_from)


def reconstructs_images(model) -> bool:
    """Whether a model gets an image as `lrm reconstruct` prepares it, and no camera. One that draws views (Zero123) gets true cameras."""
    return hasattr(model, "prepare") and hasattr(model, "query")


def given_images(model, info: dict, args: argparse.Namespace) -> tuple[Callable, Callable, dict]:
    """(read, pose, words) for a family that takes one image: how objects are read and prepared, and the protocol's words for it."""
    if args.sources not in (None, 1):
        raise InputError(
            f"--sources {args.sources}: {info['family']} takes one image: leave it out"
        )
    args.sources = 1
    alignment = alignment_of(model, info["training"], args.scale)
    low, high = held_out.SOURCE_ELEVATION
    words = {
        "source": f"one view with an elevation of {low:g} to {high:g} degrees, chosen by a hash of the object's name, prepared as in `lrm reconstruct`",
        "world": f"the model's is {WORLDS[alignment.normalize]}; scale: {SCALES[alignment.scale]}",
    }
    read = functools.partial(held_out.read, num_targets=args.views, size=args.size)
    return read, functools.partial(posed_by_image, model, alignment), words


def given_views(model, info: dict, args: argparse.Namespace) -> tuple[Callable, Callable, dict]:
    """`given_images` for a family that takes posed views."""
    if args.scale is not None:
        raise InputError(
            f"--scale has no effect on {info['family']}, which takes true cameras: leave it out"
        )
    posed = posed_views(model, info)
    args.sources = args.sources or posed.num_source
    by_all = posed.normalize in normalization.BY_ALL_SOURCES
    if by_all and args.sources < 2:
        raise InputError(f"--sources {args.sources}: {info['family']} needs 2 or more views")
    read = functools.partial(
        held_out.read,
        num_targets=args.views,
        size=args.size,
        num_sources=args.sources,
        elevation=posed.source_elevation,
        source_views=posed.source_views,
        source_images=posed.source_images,
    )
    chosen = held_out.which(posed.source_elevation, posed.source_views)
    words = {
        "source": f"{args.sources} views with {chosen}, the first chosen by a hash of the object's name, with their true cameras, as in training",
        "world": f"the model's is {WORLDS[posed.normalize]}; scale: {SCALES['views' if by_all else 'data']}",
    }
    return read, functools.partial(posed_by_views, posed), words


def protocol(model, args: argparse.Namespace, baseline_from: str) -> dict[str, str | dict]:
    """The parts of the protocol that do not depend on what the model is given."""
    words = {
        "targets": f"{args.views} other views, spread over their order and chosen by a hash of the object's name, {args.size} x {args.size} pixels, on white",
        **image_protocol(args.lpips is not None),
        "iou": "of the foregrounds (alpha above 0.5), for each view; only for families with alpha",
        "surface": f"where the field is {getattr(model, 'surface_level', None)}, on a grid of {args.resolution}^3 points"
        if hasattr(model, "query")
        else "this family has none",
        "surface metrics": surface_metrics.PROTOCOL,
        "empty surfaces": "F-scores of 0, and no Chamfer distance",
        "unaligned": "the same surface metrics, in the world and unit of the data, without normalisation or alignment",
        "baseline": f"the mean {baseline_from}; images and surface are each predicted in two ways, and the better one counts",
    }
    if not reconstructs_images(model):
        words["nearest image"] = "for each target, the source image with the nearest camera"
        if hasattr(model, "query"):
            words[visual_hull.NAME] = visual_hull.PROTOCOL
    return words


def baseline_objects(args: argparse.Namespace, folders: list[Path]) -> tuple[list[Path], str]:
    """The folders of the objects that are averaged into the mean object, and a description of them for the protocol."""
    if args.baseline_data is None:
        where = "of the other evaluated objects, which makes the baseline look better: give --baseline-data"
        return folders, where
    others = held_out.find(args.baseline_data, "train")
    return others, f"of the {len(others)} training objects of {args.baseline_data}"


# -- the worlds of the data and of the model


def alignment_of(model, training: dict, scale: str | None) -> Alignment:
    """The world of a model that takes single images, from its training record ({} for a PyTorch checkpoint).

    Raises:
      InputError: the model was trained with another scale.
    """
    trained = loading.training_data(training)
    if trained.get("normalize") == "image":
        if scale == "data":
            raise InputError(
                "--scale data: this model was trained with the scale of the image (data.normalize=image): leave it out"
            )
        return Alignment("image", tuple(trained["assumed_camera"]), "image")
    usual = "source" if models.name_of(model) in SEEN_BY_SOURCE else "azimuth"
    return Alignment(
        trained.get("normalize", usual), None, scale or ("data" if training else "image")
    )


def motion_to_model(
    model, source: np.ndarray, camera: Cameras, assumed: Cameras, alignment: Alignment
) -> np.ndarray:
    """The similarity transform [4 4] from the world of the data to the world of the model, for one source view.

    Args:
      source: uint8 [H H 4], the whole source image.
      camera: the true camera of the source image.
      assumed: the camera that `model.prepare` assumes for the image that it crops from `source`.
    """
    c2w, fxfycxcy = np.asarray(camera.c2w), np.asarray(camera.fxfycxcy)
    ratio = getattr(model, "foreground_ratio", None)
    _, box = elements.recentered(source, ratio, "source")
    cropped = cameras.crop_intrinsics(fxfycxcy[None], box[None])[0]
    motion = normalization.object_motion(
        c2w, cropped, alignment.normalize, alignment.assumed_camera
    )
    motion = motion.astype(np.float64)
    if alignment.normalize == "image" or alignment.scale == "data":
        return motion
    size = cropped[1] / np.linalg.norm(c2w[:3, 3])
    assumed_size = assumed.fxfycxcy[1] / np.linalg.norm(assumed.c2w[:3, 3])
    return np.diag([*(size / assumed_size).repeat(3), 1]) @ motion


def move_poses(motion: np.ndarray, c2w: np.ndarray) -> np.ndarray:
    """Poses [*B 4 4] after a similarity transform [4 4] of the world, float32."""
    return cameras.move_poses(motion, c2w.astype(np.float64)).astype(np.float32)


# -- one object at a time


@dataclasses.dataclass(frozen=True)
class PosedObject:
    """One object, with its cameras in the world of the model."""

    item: HeldOut
    source: Views  # [1 N]
    targets: Cameras  # [V]
    to_model: np.ndarray  # [4 4] from the world of the data to the world of the model
    masks: np.ndarray | None = (
        None  # [N s s] alpha of the source images; None: the family takes one image
    )


def score(
    model,
    programs: Programs,
    mean: mean_object.MeanObject,
    items: Iterator[PosedObject],
    skipped: dict[str, str],
    resolution: int,
) -> dict[str, Result]:
    """Computes the results of `evaluate`. Adds the causes why objects have none to `skipped`."""
    results, jobs = {}, {}
    batch_size = -(-BATCH // programs.num_devices) * programs.num_devices
    # One thread per device extracts meshes, while other threads compare them.
    with ThreadPoolExecutor(programs.num_devices) as devices, ThreadPoolExecutor() as pool:
        while group := list(itertools.islice(items, batch_size)):
            scenes, found = predict(programs, mean, group, batch_size)
            known = []  # objects whose true surface is known
            for x, scene, result in zip(group, scenes, found, strict=False):
                uid = x.item.uid
                if result is None:
                    skipped[uid] = "the model renders values that are not finite"
                    continue
                results[uid] = result
                if programs.field is None:
                    continue
                if x.item.points is None:
                    skipped[uid] = f"no surface metrics: {x.item.no_points}"
                    continue
                known.append((x, scene))
            find = functools.partial(predicted_points, model, programs, resolution)
            for (x, _), (points, empty) in zip(known, devices.map(find, known), strict=True):
                if empty:
                    skipped[x.item.uid] = f"no Chamfer distance, F-scores of 0: {empty}"
                jobs[x.item.uid] = pool.submit(score_surface, points, x, mean, model, resolution)
        for uid, job in messages.progress(jobs.items(), len(jobs), "surfaces"):
            try:
                scores, results[uid].unaligned, guesses = job.result()
            except InputError as error:
                skipped[uid] = f"no surface metrics: {error}"
            else:
                results[uid].scores |= scores
                results[uid].guesses |= guesses
    return results


def read_ahead(
    folders: list[Path], read: Callable[[Path], HeldOut]
) -> Iterator[tuple[Path, HeldOut | InputError]]:
    """Yields each object, or the error in reading it. Threads read the next objects in the meantime."""

    def attempt(folder: Path) -> HeldOut | InputError:
        try:
            return read(folder)
        except InputError as error:
            return error

    with ThreadPoolExecutor() as pool:
        jobs = collections.deque()
        for i, folder in enumerate(messages.progress(folders, len(folders), "objects")):
            while len(jobs) < min(2 * BATCH, len(folders) - i):
                jobs.append(pool.submit(attempt, folders[i + len(jobs)]))
            yield folder, jobs.popleft().result()


def posed_objects(
    folders: list[Path],
    skipped: dict[str, str],
    read: Callable[[Path], HeldOut],
    pose: Callable[[HeldOut], PosedObject],
) -> Iterator[PosedObject]:
    """Yields the objects that can be evaluated. Adds the others to `skipped`."""
    for folder, item in read_ahead(folders, read):
        if not isinstance(item, HeldOut):
            skipped[folder.name] = str(item)
        elif not item.sources[..., 3].any((1, 2)).all():
            skipped[folder.name] = "a source view is transparent everywhere"
        else:
            try:
                one = pose(item)
            except InputError as error:
                skipped[folder.name] = str(error)
            else:
                yield one


def posed_by_image(model, alignment: Alignment, item: HeldOut) -> PosedObject:
    """Prepares an object for a model that takes one image."""
    view = jax.tree.map(np.asarray, model.prepare([item.source]))
    assumed = jax.tree.map(lambda x: x[0, 0], view.cameras)
    motion = motion_to_model(model, item.source, item.source_camera, assumed, alignment)
    if alignment.scale == "data":
        true = jax.tree.map(lambda x: x[None, None], item.source_camera)
        view = view.replace(cameras=true.replace(c2w=move_poses(motion, true.c2w)))
    targets = item.target_cameras.replace(c2w=move_poses(motion, item.target_cameras.c2w))
    return PosedObject(item, view, targets, motion)


def posed_views(model, info: dict) -> PosedViews:
    """How a model was given views in training, from its training record.

    Published weights have no record. Those of a family with a surface are given whole images of the model's size on white, of any
    views, in the world that the family's `normalize` names.

    Raises:
      InputError: there is no such record, or the model was not trained on objects.
    """
    data = loading.training_data(info["training"])
    if not info["training"] and hasattr(model, "query"):
        return PosedViews(NUM_SOURCE, model.image_size, None, model.normalize, 1.0, None)
    if not info["training"] and hasattr(model, "prepare"):
        return PosedViews(1, model.image_size, None, "azimuth", 1.0, held_out.SOURCE_ELEVATION)
    fields = dataclasses.fields(PosedViews)
    known = {field.name: data[field.name] for field in fields if field.name in data}
    if any(x.name not in known for x in fields if x.default is dataclasses.MISSING):
        raise InputError(
            f"{info['path']}: {info['family']} takes posed views, but this model has no record of how it was trained on objects: "
            "use a model that `lrm train` trained on objects, or evaluate scenes with --index"
        )
    if known.get("source_views") is None:
        known["source_elevation"] = held_out.SOURCE_ELEVATION
    return PosedViews(**known)


def posed_by_views(posed: PosedViews, item: HeldOut) -> PosedObject:
    """Prepares an object for a model that takes posed views: images and cameras as in training."""
    crops = [elements.source_crop(rgba, posed.source_size, posed.foreground_ratio, item.uid) for rgba in item.sources]  # fmt: skip
    images, boxes = (np.stack(x) for x in zip(*crops, strict=True))
    c2w = item.source_cameras.c2w
    fxfycxcy = cameras.crop_intrinsics(item.source_cameras.fxfycxcy, boxes)
    motion = normalization.sources_motion(c2w, fxfycxcy, posed.normalize)
    source_cameras = Cameras(c2w=move_poses(motion, c2w), fxfycxcy=fxfycxcy)
    targets = item.target_cameras.replace(c2w=move_poses(motion, item.target_cameras.c2w))
    views = Views(rgb=images[..., :3], alpha=images[..., 3], cameras=source_cameras)
    views = jax.tree.map(
        lambda x: np.asarray(x)[None], on_background(views, posed.source_background)
    )
    masks = images[..., 3].astype(np.float32) / 255
    return PosedObject(item, views, targets, motion, masks)


def predict(
    programs: Programs, mean, group: list[PosedObject], batch_size: int
) -> tuple[list, list[Result | None]]:
    """The scene [1 ...] and the image scores of each object; the scores are None if its renderings are not finite."""
    # Pad the group: a smaller one would be compiled again.
    full = group + group[-1:] * (batch_size - len(group))
    source = jax.tree.map(lambda *x: np.concatenate(x), *(x.source for x in full))
    cameras = jax.tree.map(lambda *x: np.stack(x), *(x.targets for x in full))
    scenes, rgb, alpha = programs.predict(source, cameras)
    target = mean_object.premultiplied(np.stack([x.item.targets for x in full]))
    target_rgb, target_alpha = on_white(target), target[..., 3]
    scores = programs.compare(rgb, alpha, target_rgb, target_alpha)
    guesses = [guessed_images(mean, x) for x in full]
    guesses = jax.tree.map(lambda *x: np.stack(x), *guesses)
    guesses = {
        name: programs.compare_guess(on_white(x), x[..., 3], target_rgb, target_alpha)
        for name, x in guesses.items()
    }
    scores, guesses, rgb = jax.tree.map(np.asarray, (scores, guesses, rgb))
    results = []
    for i, x in enumerate(group):
        if not np.isfinite(rgb[i]).all():
            results.append(None)
            continue
        mine = {name: float(value[i].mean()) for name, value in scores.items()}
        theirs = {
            guess: {name: float(value[i].mean()) for name, value in values.items()}
            for guess, values in guesses.items()
        }
        strip = report_page.strip(x.item.source, target_rgb[i], rgb[i])
        results.append(Result(mine, theirs, strip))
    return scenes, results


def guessed_images(mean: mean_object.MeanObject, x: PosedObject) -> dict[str, np.ndarray]:
    """The baselines' images [V S S 4] for the target views, float32 premultiplied RGBA in [0, 1], by name."""
    guesses = mean_object.images(mean, x.item)
    if x.masks is None:
        return guesses
    item, size = x.item, x.item.targets.shape[1]
    nearest = nearest_source(item.source_cameras.c2w, item.target_cameras.c2w)
    shown = np.stack([elements.shrink(item.sources[i], size) for i in nearest])
    return guesses | {"nearest image": mean_object.premultiplied(shown)}


def predicted_points(
    model, programs: Programs, resolution: int, object_and_scene: tuple[PosedObject, Any]
) -> tuple[np.ndarray | None, str]:
    """`surface_points` of a scene [1 ...]."""
    x, scene = object_and_scene
    field = functools.partial(programs.field, scene)
    return surface_points(field, model.surface_level, model.radius, resolution, x.to_model)


def surface_points(
    field: Callable, level: float, radius: float, resolution: int, to_model: np.ndarray
) -> tuple[np.ndarray | None, str]:
    """Points [NUM_POINTS 3] on the surface of a field, in the world of the data. Or None, and why there is no surface."""
    rng = np.random.default_rng(0)
    try:
        vertices, faces = lattice.extract(field, resolution, radius, level)
        points = surface_metrics.sample_surface(vertices, faces, surface_metrics.NUM_POINTS, rng)
    except InputError as error:
        return None, str(error)
    back = np.linalg.inv(to_model)
    return points @ back[:3, :3].T + back[:3, 3], ""


def score_surface(
    points: np.ndarray | None,
    x: PosedObject,
    mean: mean_object.MeanObject,
    model,
    resolution: int,
) -> tuple[dict[str, float], dict[str, float], dict[str, dict[str, float]]]:
    """Scores of predicted points (None: an empty surface): aligned, unaligned, and aligned for the baselines."""
    count = surface_metrics.NUM_POINTS
    truth = np.random.default_rng(0).permutation(x.item.points)[:count]
    shapes = mean_object.shapes(mean, x.item, count, np.random.default_rng(0))
    if x.masks is not None and not (x.masks > visual_hull.OUTLINE).all((1, 2)).any():
        hull = visual_hull.field(x.masks, jax.tree.map(lambda leaf: leaf[0], x.source.cameras))
        shapes[visual_hull.NAME], _ = surface_points(
            hull, 0.0, model.radius, resolution, x.to_model
        )
    nothing = dict.fromkeys(surface_metrics.NAMES[1:], 0.0)
    guesses = {
        name: nothing if shape is None else surface_metrics.aligned_scores(shape, truth)
        for name, shape in shapes.items()
    }
    if points is None:
        return nothing, nothing, guesses
    aligned = surface_metrics.aligned_scores(points, truth)
    return aligned, surface_metrics.scores(points, truth), guesses
