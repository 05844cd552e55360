"""`lrm evaluate`: how near a model comes to objects that are known from all sides, or to videos of scenes.

    lrm evaluate --data data/kaykit --split val --baseline-data data/kaykit         the bundled model
    lrm evaluate --weights hf:stabilityai/TripoSR --data data/gso --lpips lpips_vgg16.safetensors
    lrm evaluate --weights scene_decoder_only_256.pt --data data/re10k --index evaluation_index_re10k.json

One view of each object is given to the model, or to a family that takes posed views (LVSM) as many as it was trained with.
Other views are compared with what it renders (PSNR, SSIM, LPIPS, foreground IoU), the surface that it finds with the true one
(Chamfer distance, F-scores), and both with the mean object, a guess that looks at no picture. With --index, views of scenes
are compared: given and asked for are those that pixelSplat's index names, of all scenes, and the guess is the nearest given picture.
Prints a table; leaves `evaluation.json` and `evaluation.html`. An object that cannot be read, or has no surface, is named and
left out of the means.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lrm_jax import convert, evaluation_page, lpips, mean_object, models, report, surface_metrics
from lrm_jax.data import held_out, samples, scenes
from lrm_jax.data.held_out import HeldOut
from lrm_jax.evaluation_scores import (
    Programs,
    Result,
    compiled,
    on_white,
    picture_protocol,
    summarize,
)
from lrm_jax.ops import cameras, surface
from lrm_jax.reconstruct import versions
from lrm_jax.step import on_background
from lrm_jax.types import Batch, Cameras, InputError, Views

# Families whose world is that of the source camera; the others' is upright, with the source at azimuth 0.
SEEN_BY_SOURCE = ("lrm",)
BATCH = 4  # objects that go through the model together


@dataclasses.dataclass(frozen=True)
class PosedViews:
    """How training gives views to a family that takes them with their cameras: fields of the config's `data`."""

    num_source: int
    source_size: int
    foreground_ratio: float | None
    normalize: str | None
    source_background: float


class World(NamedTuple):
    """The world of a model that takes single pictures."""

    normalize: str | None  # and the next: of `samples.Recipe`
    assumed_camera: tuple[float, float] | None
    scale: str  # "data" or "picture": --scale


def main(argv: list[str]) -> int:
    """Runs `lrm evaluate`. Returns the exit code: 0 where at least one object could be evaluated."""
    args = parse(argv)
    stages = report.Stages()
    report.check_writable(args.out)
    folders = [] if args.index else held_out.find(args.data, args.split)
    network = None if args.lpips is None else lpips.load(args.lpips)
    with stages("load", f" {args.weights or 'the bundled model'}"):
        model, params, info = convert.load_weights(args.weights)
    if args.index:
        results, skipped, words = evaluate_scenes(model, params, network, info, args, stages)
    else:
        results, skipped, words = evaluate_objects(
            model, params, network, info, folders, args, stages
        )
    tell(skipped)
    count = len(results.keys() | skipped.keys())
    if not results:
        uid, cause = next(iter(skipped.items()))
        raise InputError(
            f"{args.data}: none of {count} objects can be used: the first, {uid}: {cause}"
        )
    summary = summarize(results, skipped) | {
        "protocol": words,
        "model": {k: info[k] for k in ("family", "variant", "path", "training")},
        "data": {"path": str(args.data), "split": args.index or args.split, "objects": count},
        "seconds": stages.seconds,
        "versions": versions(),
    }
    page = evaluation_page.page(summary, {uid: x.strip for uid, x in results.items()})
    text = json.dumps(summary, indent=2, default=str, allow_nan=False)
    files = {"evaluation.json": text.encode(), "evaluation.html": page}
    report.write_files(args.out, files)
    print(evaluation_page.table(summary))
    stages.say(f"done: {', '.join(str(args.out / name) for name in files)}")
    return 0


def evaluate_objects(model, params, network, info: dict, folders: list[Path], args, stages):
    """Results by uid, causes of absence by uid, and the protocol, of objects."""
    args.size = args.size or 128
    posed = None if hasattr(model, "prepare") else posed_views(info)
    if posed is None and args.sources not in (None, 1):
        raise InputError(f"--sources {args.sources}: {info['family']} takes one picture")
    args.sources = args.sources or (1 if posed is None else posed.num_source)
    world = posed or model_world(model, info["training"], args.scale)
    programs = compiled(model, params, network, args.size)
    with stages("average", " the mean object"):
        others, baseline_from = baseline_objects(args, folders)
        read = (item for _, item in read_ahead(others, args) if isinstance(item, HeldOut))
        mean = mean_object.average(read, args.size)
    with stages("evaluate", f" {len(folders)} objects of {args.data}"):
        results, skipped = evaluate(model, programs, mean, folders, world, args)
    return results, skipped, protocol(args, model, world, baseline_from)


def baseline_objects(args: argparse.Namespace, folders: list[Path]) -> tuple[list[Path], str]:
    """The objects that the mean object is made of, and what to say about them."""
    if args.baseline_data is None:
        where = "of the other evaluated objects, which favours it: give --baseline-data"
        return folders, where
    others = held_out.find(args.baseline_data, "train")
    return others, f"of the {len(others)} training objects of {args.baseline_data}"


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        prog="lrm evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        required=True,
        help="folder of rendered objects (tools/render_objects.py); with --index, of scenes",
    )
    add(
        "--index",
        metavar="FILE",
        help="pixelSplat's file of the views of each scene: evaluate scenes, with a family that takes posed views",
    )
    add(
        "--sources",
        type=int,
        help="views of an object that are given, to a family that takes posed views (default: as in training)",
    )
    add(
        "--weights",
        help="model file, reference checkpoint, folder, training workdir, or hf:ORG/NAME (default: the bundled model)",
    )
    add("--out", type=Path, default=Path("out"), help="folder for the results (default: out)")
    add(
        "--split",
        choices=("all", "val", "train"),
        default="all",
        help="which objects: val are those that training on this folder holds out (default: all)",
    )
    add("--views", type=int, default=8, help="target views of each object (default: 8)")
    add(
        "--size",
        type=int,
        help="side of the compared pictures (default: 128; with --index, that of the model's)",
    )
    add(
        "--resolution",
        type=int,
        default=128,
        help="lattice points along an axis of the surface's grid (default: 128)",
    )
    add(
        "--lpips", metavar="FILE", help=f"weights of LPIPS; without, it is left out: {lpips.REMEDY}"
    )
    add(
        "--baseline-data",
        type=Path,
        metavar="DIR",
        help="folder whose training objects the mean object is made of (default: the other evaluated objects, which favours it)",
    )
    add(
        "--scale",
        choices=("data", "picture"),
        help="data: objects have the size in the model's world that they have in the data's, as where it was trained by `lrm train`; "
        "picture: the size that they seem to have from the source camera that the model assumes (default: data for models that "
        "were trained so, picture for the references' checkpoints and for models trained with data.normalize=picture)",
    )
    args = parser.parse_args(argv)
    report.check_ranges(
        args, views=(1, 1000), size=(16, 2048), resolution=(8, 2048), sources=(1, 100)
    )
    return args


def protocol(
    args: argparse.Namespace, model, world: World | PosedViews, baseline_from: str
) -> dict[str, str | dict]:
    """What was measured of objects, in words."""
    low, high = held_out.SOURCE_ELEVATION
    axes = {
        "source": "that of the source camera (0, -d, 0), looking along +y",
        "azimuth": "the data's, turned about its vertical so that the source camera is at azimuth 0",
        "picture": "that in which the picture looks as if taken by the camera that the model assumes, at the true elevation",
        None: "the data's",
    }[world.normalize]
    if isinstance(world, PosedViews):
        given = f"{args.sources} views with an elevation of {low:g} to {high:g} degrees, with their true cameras, as in training"
        scale = "data"
    else:
        given = f"the first view with an elevation of {low:g} to {high:g} degrees, prepared as `lrm reconstruct` does"
        scale = world.scale
    scale = {
        "data": "as in the data",
        "picture": "by the size in the source picture: that which the model's assumed source camera would see",
    }[scale]
    return {
        "source": given,
        "targets": f"{args.views} other views, evenly spread over their order, {args.size} x {args.size} pixels, on white",
        "world": f"the model's is {axes}; scale: {scale}",
        **picture_protocol(args.lpips is not None),
        "iou": "of the foregrounds (alpha above 0.5) of a view; a family without alpha has none",
        "surface": f"where the field is {getattr(model, 'surface_level', None)}, on {args.resolution}^3 lattice points"
        if hasattr(model, "query")
        else "this family has none",
        "surface metrics": surface_metrics.PROTOCOL,
        "unaligned": "the same surface metrics in the data's own world and unit: nothing is normalised or aligned",
        "baseline": f"the mean {baseline_from}; of two guesses at the pictures, and two at the surface, the better one",
    }


# -- the worlds of the data and of the model


def model_world(model, training: dict, scale: str | None) -> World:
    """The world of a model that takes single pictures, by its record of training; {}: a reference's.

    Raises:
      InputError: its scale is not the one asked for.
    """
    trained = convert.training_data(training)
    if trained.get("normalize") == "picture":
        if scale == "data":
            raise InputError(
                "--scale data: this model was trained where the picture gives the scale (data.normalize=picture): leave it out"
            )
        return World("picture", tuple(trained["assumed_camera"]), "picture")
    normalize = "source" if models.name_of(model) in SEEN_BY_SOURCE else "azimuth"
    return World(normalize, None, scale or ("data" if training else "picture"))


def world_of(
    model, source: np.ndarray, camera: Cameras, assumed: Cameras, world: World
) -> np.ndarray:
    """The similarity [4 4] that takes points of the data's world to where the model has them, given the source view.

    Args:
      source: uint8 [H H 4], the whole source picture.
      camera: the true one of the source picture.
      assumed: the one that `model.prepare` takes the picture that it has made of it to be seen by.
    """
    c2w, fxfycxcy = np.asarray(camera.c2w), np.asarray(camera.fxfycxcy)
    ratio = getattr(model, "foreground_ratio", None)
    _, box = samples.source_crop(source, len(source), ratio, "source")
    cropped = samples.crop_intrinsics(fxfycxcy[None], box[None])[0]
    motion = samples.world_motion(c2w, cropped, world.normalize, world.assumed_camera)
    motion = motion.astype(np.float64)
    if world.normalize == "picture" or world.scale == "data":
        return motion
    size = cropped[1] / np.linalg.norm(c2w[:3, 3])
    assumed_size = assumed.fxfycxcy[1] / np.linalg.norm(assumed.c2w[:3, 3])
    return np.diag([*(size / assumed_size).repeat(3), 1]) @ motion


def moved(world: np.ndarray, c2w: np.ndarray) -> np.ndarray:
    """Poses [*B 4 4] in the world that a similarity [4 4] leads to, float32."""
    return cameras.moved(world, c2w.astype(np.float64)).astype(np.float32)


# -- object by object


@dataclasses.dataclass(frozen=True)
class Given:
    """One object as the model is given it: cameras in its world."""

    item: HeldOut
    source: Views  # [1 N]
    targets: Cameras  # [V]
    world: np.ndarray  # [4 4] from the data's world to the model's


def evaluate(
    model,
    programs: Programs,
    mean,
    folders: list[Path],
    world: World | PosedViews,
    args: argparse.Namespace,
) -> tuple[dict[str, Result], dict[str, str]]:
    """Results by uid; and the causes by uid of what is absent: of the whole object, or of its surface metrics."""
    results, skipped, jobs = {}, {}, {}
    shapes = mean_object.shapes(mean, surface_metrics.NUM_POINTS, np.random.default_rng(0))
    # The device is fed from this thread; surfaces are aligned beside it.
    with ThreadPoolExecutor() as pool:
        items = given(model, folders, skipped, world, args)
        while group := list(itertools.islice(items, BATCH)):
            scene, found = predict(programs, mean, group)
            for i, (x, result) in enumerate(zip(group, found, strict=True)):
                uid = x.item.uid
                if result is None:
                    skipped[uid] = "what the model renders of it is not finite"
                    continue
                results[uid] = result
                if programs.field is None:
                    continue
                try:
                    one = jax.tree.map(lambda x, i=i: x[i : i + 1], scene)
                    points = surface_points(model, programs, one, x, args.resolution)
                except InputError as error:
                    skipped[uid] = f"no surface metrics: {error}"
                else:
                    jobs[uid] = pool.submit(score_surface, points, x.item.points, shapes)
        for uid, job in report.progress(jobs.items(), len(jobs), "surfaces"):
            try:
                scores, results[uid].unaligned, guesses = job.result()
            except InputError as error:
                skipped[uid] = f"no surface metrics: {error}"
            else:
                results[uid].scores |= scores
                results[uid].guesses |= guesses
    return results, skipped


def tell(skipped: dict[str, str]) -> None:
    """What is left out of the means, on stderr: one line for a cause."""
    by_cause = {}
    for uid, cause in skipped.items():
        by_cause.setdefault(cause, []).append(uid)
    for cause, uids in by_cause.items():
        names = ", ".join(uids[:5]) + (f" and {len(uids) - 5} more" if len(uids) > 5 else "")
        print(f"lrm: {names}: {cause}", file=sys.stderr, flush=True)


def read_ahead(
    folders: list[Path], args: argparse.Namespace
) -> Iterator[tuple[Path, HeldOut | InputError]]:
    """Each object in turn, or what is wrong with it; threads decode the next ones meanwhile."""

    def read(folder: Path) -> HeldOut | InputError:
        try:
            return held_out.read(folder, args.views, args.size, args.sources)
        except InputError as error:
            return error

    with ThreadPoolExecutor() as pool:
        jobs = collections.deque()
        for i, folder in enumerate(report.progress(folders, len(folders), "objects")):
            while len(jobs) < min(2 * BATCH, len(folders) - i):
                jobs.append(pool.submit(read, folders[i + len(jobs)]))
            yield folder, jobs.popleft().result()


def given(
    model, folders: list[Path], skipped: dict[str, str], world, args: argparse.Namespace
) -> Iterator[Given]:
    """The objects that can be evaluated; notes the others."""
    for folder, item in read_ahead(folders, args):
        if isinstance(item, HeldOut) and item.sources[..., 3].any((1, 2)).all():
            yield (
                pose(item, world) if isinstance(world, PosedViews) else prepare(model, item, world)
            )
        elif isinstance(item, HeldOut):
            skipped[folder.name] = "a source view is transparent everywhere"
        else:
            skipped[folder.name] = str(item)


def prepare(model, item: HeldOut, world: World) -> Given:
    """The source picture as the model takes it, and the cameras in its world."""
    view = jax.tree.map(np.asarray, model.prepare([item.source]))
    assumed = jax.tree.map(lambda x: x[0, 0], view.cameras)
    motion = world_of(model, item.source, item.source_camera, assumed, world)
    if world.scale == "data" and world.normalize == "source":
        true = jax.tree.map(lambda x: x[None, None], item.source_camera)
        view = view.replace(cameras=true.replace(c2w=moved(motion, true.c2w)))
    targets = item.target_cameras.replace(c2w=moved(motion, item.target_cameras.c2w))
    return Given(item, view, targets, motion)


def posed_views(info: dict) -> PosedViews:
    """The record that training left with a model.

    Raises:
      InputError: there is none, or it was not trained on objects.
    """
    data = convert.training_data(info["training"])
    names = [field.name for field in dataclasses.fields(PosedViews)]
    if not set(names) <= set(data):
        raise InputError(
            f"{info['path']}: {info['family']} takes views with cameras, and how objects were given to this one is not known: "
            "give a model that `lrm train` has trained on objects, or evaluate scenes with --index"
        )
    return PosedViews(**{name: data[name] for name in names})


def pose(item: HeldOut, posed: PosedViews) -> Given:
    """The source pictures and the cameras as training has them."""
    crops = [samples.source_crop(rgba, posed.source_size, posed.foreground_ratio, item.uid) for rgba in item.sources]  # fmt: skip
    pictures, boxes = (np.stack(x) for x in zip(*crops, strict=True))
    fxfycxcy = samples.crop_intrinsics(item.source_cameras.fxfycxcy, boxes)
    world = samples.world_motion(item.source_camera.c2w, fxfycxcy[0], posed.normalize)
    world = world.astype(np.float64)
    given = Cameras(c2w=moved(world, item.source_cameras.c2w), fxfycxcy=fxfycxcy)
    targets = item.target_cameras.replace(c2w=moved(world, item.target_cameras.c2w))
    views = Views(rgb=pictures[..., :3], alpha=pictures[..., 3], cameras=given)
    views = jax.tree.map(
        lambda x: np.asarray(x)[None], on_background(views, posed.source_background)
    )
    return Given(item, views, targets, world)


def predict(programs: Programs, mean, group: list[Given]) -> tuple[Any, list[Result | None]]:
    """Their scenes, and what their pictures score; None where these are not finite."""
    # Filled up, so that a last group of fewer objects is not compiled anew.
    full = group + group[-1:] * (BATCH - len(group))
    source = jax.tree.map(lambda *x: np.concatenate(x), *(x.source for x in full))
    cameras = jax.tree.map(lambda *x: np.stack(x), *(x.targets for x in full))
    scene, rgb, alpha = programs.predict(source, cameras)
    target = mean_object.premultiplied(np.stack([x.item.targets for x in full]))
    target_rgb, target_alpha = on_white(target), target[..., 3]
    scores = programs.compare(rgb, alpha, target_rgb, target_alpha)
    guesses = [mean_object.pictures(mean, x.item) for x in full]
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
        strip = evaluation_page.strip(x.item.source, target_rgb[i], rgb[i])
        results.append(Result(mine, theirs, strip))
    return scene, results


def surface_points(model, programs: Programs, scene, x: Given, resolution: int) -> np.ndarray:
    """Points [NUM_POINTS 3] on the surface of one scene [1 ...], in the world of the data.

    Raises:
      InputError: there is no surface, or no true one to compare it with.
    """
    if programs.field is None:
        raise InputError("this family has no surface")
    if x.item.points is None:
        raise InputError(x.item.no_points)
    field = functools.partial(programs.field, scene)
    vertices, faces = surface.extract(field, resolution, model.radius, model.surface_level)
    rng = np.random.default_rng(0)
    points = surface_metrics.sample_surface(vertices, faces, surface_metrics.NUM_POINTS, rng)
    back = np.linalg.inv(x.world)
    return points @ back[:3, :3].T + back[:3, 3]


def score_surface(
    points: np.ndarray, truth: np.ndarray, shapes: dict[str, np.ndarray]
) -> tuple[dict[str, float], dict[str, float], dict[str, dict[str, float]]]:
    """Scores of predicted points: aligned, unaligned, and those of the guesses at the surface."""
    truth = np.random.default_rng(0).permutation(truth)[: surface_metrics.NUM_POINTS]
    guesses = {name: surface_metrics.aligned_scores(x, truth) for name, x in shapes.items()}
    aligned = surface_metrics.aligned_scores(points, truth)
    return aligned, surface_metrics.scores(points, truth), guesses


# -- scene by scene


def evaluate_scenes(model, params, network, info: dict, args: argparse.Namespace, stages):
    """Results by scene, causes of absence by scene, and the protocol, of the views that an index names."""
    if hasattr(model, "prepare"):
        raise InputError(
            f"{info['family']} reconstructs objects from one picture: evaluate it without --index"
        )
    args.size = args.size or model.image_size
    trained = convert.training_data(info["training"]).get("normalize")
    normalize = trained if trained in scenes.NORMALIZATIONS[:2] else "all_views"
    views = scenes.evaluation_views(args.data, args.index, args.size, normalize)
    programs = compiled(model, params, network, args.size)
    results, skipped = {}, dict.fromkeys(views.absent, f"absent from {args.data}")
    with stages("evaluate", f" {len(views)} scenes of {args.data} (compiled first)"):
        for i in report.progress(range(len(views)), len(views), "scenes"):
            try:
                results[views.names[i]] = score_scene(programs, views[i][1])
            except InputError as error:
                skipped[views.names[i]] = str(error)
    source = "the views that the index calls context"
    words = {
        "source": source,
        "targets": f"the views that the index calls target, {args.size} x {args.size} pixels",
        "world": f"poses are normalised by {normalize.replace('_', ' ')}",
        **picture_protocol(args.lpips is not None),
        "baseline": "for each target the source picture whose camera stands nearest to it",
    }
    return results, skipped, words


def score_scene(programs: Programs, batch: Batch) -> Result:
    """One scene [V], all its targets at once.

    Raises:
      InputError: what is rendered is not finite.
    """
    given, target = (x.rgb.astype(np.float32)[None] / 255 for x in (batch.source, batch.target))
    cameras = jax.tree.map(lambda x: x[None], (batch.source.cameras, batch.target.cameras))
    _, rgb, _ = programs.predict(Views(rgb=given, cameras=cameras[0]), cameras[1])
    if not np.isfinite(rgb).all():
        raise InputError("what the model renders of it is not finite")
    places = [x.c2w[0, :, :3, 3] for x in cameras]
    distance = np.linalg.norm(places[1][:, None] - places[0], axis=-1)
    guess = given[:, distance.argmin(1)]
    scores, guessed = jax.tree.map(
        lambda x: float(x.mean()),
        (programs.compare(rgb, None, target, None), programs.compare_guess(guess, None, target, None)),
    )  # fmt: skip
    opaque = np.pad(batch.source.rgb[0], ((0, 0), (0, 0), (0, 1)), constant_values=255)
    strip = evaluation_page.strip(opaque, target[0], np.asarray(rgb[0]))
    return Result(scores, {"nearest picture": guessed}, strip)
