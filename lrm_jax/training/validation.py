"""Validates a run: scores of held-out scenes, and a grid of images."""

import contextlib

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lrm_jax.parallel import batch_axes
from lrm_jax.parallel.messages import progress
from lrm_jax.training.inputs import Data
from lrm_jax.training.reports import (
    GRID_SCENES,
    image_grid,
)
from lrm_jax.training.setup import Run, eval_batch_size


def evaluate(
    run: Run, params, data: Data, device_mesh: Mesh, train: ConfigDict
) -> tuple[dict[str, float], np.ndarray]:
    """Mean scores of the first `train.eval_scenes` held-out scenes, and an image grid of the first few on this process.

    Returns:
      "val/psnr" and, for families with alpha, "val/iou", over views that the model was not given; "val/source_psnr", over views
      that it was given. And the grid, uint8 [height width 3].
    """
    batch_size = eval_batch_size(train, device_mesh)
    num_scenes, rows, shown = min(train.eval_scenes, data.num_val), [], []
    missing = min(GRID_SCENES, num_scenes)

    def evaluated(elements):
        batch = data.finish[0](batch_axes.global_batch(elements, device_mesh))
        return run.evaluate(params, batch)

    with contextlib.closing(data.val(batch_size)) as batches:
        for _ in progress(range(-(-num_scenes // batch_size)), label="evaluation"):
            scores, of_batch = evaluated(next(batches)[1])
            rows.append(jax.device_get(scores))
            if missing > 0:
                shown.append(batch_axes.local_rows(of_batch, missing))
                missing -= len(shown[-1]["source"])
            del of_batch  # free it before the next batch
    # The last batch was filled up with other scenes: drop their scores.
    of_views = {k: np.concatenate([row[k] for row in rows])[:num_scenes] for k in rows[0]}
    is_source = of_views.pop("is_source")
    means = {f"val/{k}": v[~is_source].mean() for k, v in of_views.items() if not is_source.all()}
    if is_source.any():
        means["val/source_psnr"] = of_views["psnr"][is_source].mean()
    grid = image_grid(jax.tree.map(lambda *parts: np.concatenate(parts), *shown))
    return {name: float(value) for name, value in means.items()}, grid
