"""Evaluates a model on scenes, with the views that pixelSplat's index names. The command is in `commands/evaluate.py`."""

import argparse
from collections.abc import Iterator

import jax
import numpy as np

from lrm_jax.data import scenes
from lrm_jax.evaluation import report_page
from lrm_jax.evaluation.scores import (
    COMPILING,
    Programs,
    Result,
    compiled,
    image_protocol,
    nearest_source,
)
from lrm_jax.parallel import messages
from lrm_jax.types import Batch, InputError, Views
from lrm_jax.weights import loading


def evaluate(
    model, params, network, info: dict, args: argparse.Namespace, stages: messages.Stages
) -> tuple[dict[str, Result], dict[str, str], dict[str, str]]:
    """Returns results by scene; by scene, why it has no result; and the protocol. Arguments: see `objects.evaluate`."""
    if hasattr(model, "prepare"):
        raise InputError(
            f"{info['family']} reconstructs objects from one image: evaluate it without --index"
        )
    args.size = args.size or model.image_size
    trained = loading.training_data(info["training"]).get("normalize")
    normalize = trained if trained in scenes.NORMALIZATIONS[:2] else "all_views"
    views = scenes.evaluation_views(args.data, args.index, args.size, normalize)
    programs = compiled(model, params, network, args.size)
    results, skipped = {}, dict.fromkeys(views.absent, f"absent from {args.data}")
    with stages("evaluate", f" {len(views)} scenes of {args.data}", first=COMPILING):
        for names, batches in groups(views, programs.num_devices, skipped):
            for name, result in zip(names, score(programs, batches), strict=True):
                if result is None:
                    skipped[name] = "the model renders values that are not finite"
                else:
                    results[name] = result
    source = "the context views of the index"
    words = {
        "source": source,
        "targets": f"the target views of the index, {args.size} x {args.size} pixels",
        "world": f"poses are normalised by {normalize.replace('_', ' ')}",
        **image_protocol(args.lpips is not None),
        "baseline": "for each target, the source image with the nearest camera",
    }
    return results, skipped, words


def groups(
    views: scenes.EvaluationViews, size: int, skipped: dict[str, str]
) -> Iterator[tuple[list[str], list[Batch]]]:
    """Yields the readable scenes, in groups of up to `size` neighbours with as many views. Adds the others to `skipped`."""
    names, batches = [], []
    for i in messages.progress(range(len(views)), len(views), "scenes"):
        try:
            name, batch = views[i]
        except InputError as error:
            skipped[views.names[i]] = str(error)
            continue
        if len(names) == size or (names and num_views(batch) != num_views(batches[0])):
            yield names, batches
            names, batches = [], []
        names.append(name)
        batches.append(batch)
    if names:
        yield names, batches


def num_views(batch: Batch) -> tuple[int, int]:
    """The numbers of source and target views of a scene [V]."""
    return len(batch.source.rgb), len(batch.target.rgb)


def score(programs: Programs, batches: list[Batch]) -> list[Result | None]:
    """The result of each scene [V], or None if its renderings are not finite. Each device takes one scene."""
    # Pad, so that every device has a scene.
    full = batches + batches[-1:] * (programs.num_devices - len(batches))
    whole = jax.tree.map(lambda *x: np.stack(x), *full)
    source, target = (x.rgb.astype(np.float32) / 255 for x in (whole.source, whole.target))
    _, rgb, _ = programs.predict(
        Views(rgb=source, cameras=whole.source.cameras), whole.target.cameras
    )
    nearest_BV = nearest_source(whole.source.cameras.c2w, whole.target.cameras.c2w)
    guess = source[np.arange(len(full))[:, None], nearest_BV]
    scores, guessed, rgb = jax.tree.map(
        np.asarray,
        (programs.compare(rgb, None, target, None), programs.compare_guess(guess, None, target, None), rgb),
    )  # fmt: skip
    results = []
    for i, batch in enumerate(batches):
        if not np.isfinite(rgb[i]).all():
            results.append(None)
            continue
        mine, theirs = (
            {name: float(value[i].mean()) for name, value in x.items()} for x in (scores, guessed)
        )
        opaque = np.pad(batch.source.rgb[0], ((0, 0), (0, 0), (0, 1)), constant_values=255)
        strip = report_page.strip(opaque, target[i], rgb[i])
        results.append(Result(mine, {"nearest image": theirs}, strip))
    return results
