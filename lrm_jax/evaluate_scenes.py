"""The evaluation of scenes, on the views that pixelSplat's index names. The command is in `evaluate.py`."""

import argparse

import jax
import numpy as np

from lrm_jax import convert, evaluation_page, report
from lrm_jax.data import scenes
from lrm_jax.evaluation_scores import Programs, Result, compiled, picture_protocol
from lrm_jax.types import Batch, InputError, Views


def evaluate(
    model, params, network, info: dict, args: argparse.Namespace, stages: report.Stages
) -> tuple[dict[str, Result], dict[str, str], dict[str, str]]:
    """Results by scene, causes of absence by scene, and the protocol. The arguments: see `evaluate_objects.evaluate`."""
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
                results[views.names[i]] = score(programs, views[i][1])
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


def score(programs: Programs, batch: Batch) -> Result:
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
