"""What a person sees of a training run: the parameters, a line of progress, images, and a profiler's trace."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview as clu_overview
from PIL import Image

from lrm_jax.images.png import to_uint8
from lrm_jax.images.sheets import depth_images
from lrm_jax.ops.compositing import on_background
from lrm_jax.parallel.whole_files import write_file
from lrm_jax.types import Batch, Rendering, Views

GRID_SCENES, GRID_SIDE = (
    8,
    256,
)  # of the grid of an evaluation: scenes at most, and pixels of an image at most


def parameter_overview(params: Any) -> str:
    """A table of all parameters, arrays or their shapes: name, shape, dtype, size and sharding; and what they come to."""
    return clu_overview.get_parameter_overview(params, include_stats="sharding")


def write_overview(workdir: Path, params) -> None:
    """The names, shapes and sizes of all parameters, in `parameters.txt`."""
    if jax.process_index() == 0:
        write_file(workdir / "parameters.txt", parameter_overview(params).encode())


@contextlib.contextmanager
def profiler(workdir: Path, num_steps: int) -> Iterator[Callable[[int], None]]:
    """Gives what is to be called before each step: it traces `num_steps` from the fifth on into `profile/`, for TensorBoard.

    A run that ends before leaves the trace of the steps that it made.
    """
    tracing = False

    def before(step: int) -> None:
        nonlocal tracing
        if num_steps and step == 5:
            jax.profiler.start_trace(workdir / "profile")
            tracing = True
        elif tracing and step == 5 + num_steps:
            jax.profiler.stop_trace()
            tracing = False

    try:
        yield before
    finally:
        if tracing:
            jax.profiler.stop_trace()


def mean_of(scalars: list[dict[str, jax.Array]]) -> dict[str, float]:
    """The mean of each named scalar over the steps where it is finite (the others were skipped); NaN where it never is.

    That of "train/psnr" is the PSNR of the mean error.
    """
    rows, means = jax.device_get(scalars), {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows], np.float64)
        finite = values[np.isfinite(values)]
        means[name] = float(finite.mean()) if finite.size else math.nan
        if name == "train/psnr" and finite.size:
            means[name] = float(-10 * np.log10((10 ** (-finite / 10)).mean()))
    means["skipped"] = float(rows[-1]["skipped"])
    return means


def grid_images(batch: Batch, rendering: Rendering) -> dict[str, jax.Array]:
    """What `image_grid` shows of each scene, small: every n-th pixel, colours in 8 bits.

    Args:
      rendering: of the target views, its colour on white.

    Returns:
      "source" [B 1 . . 3], and "target" and "render" [B V H W 3], uint8, on white; of families that have them "depth" and "alpha"
      [B V H W], float32. H and W are at most GRID_SIDE.
    """

    def fewer(x):
        step = -(-max(x.shape[2:4]) // GRID_SIDE)
        return x[:, :, ::step, ::step]

    def on_white(views: Views):
        alpha = None if views.alpha is None else fewer(views.alpha)
        return to_uint8(on_background(views.replace(rgb=fewer(views.rgb), alpha=alpha), 1.0).rgb)

    images = {
        "source": on_white(batch.source)[:, :1],
        "target": on_white(batch.target),
        "render": to_uint8(fewer(rendering.rgb)),
    }
    if rendering.depth is not None:
        images |= {"depth": fewer(rendering.depth), "alpha": fewer(rendering.alpha)}
    return images


def image_grid(images: dict[str, np.ndarray]) -> np.ndarray:
    """A row a scene: the source, then target, render and (of families that have it) depth of each view.

    Args:
      images: of `grid_images`.

    Returns:
      uint8 [height width 3].
    """
    count, views, height, width, _ = images["target"].shape
    kinds = ["target", "render"] + ["depth"] * ("depth" in images)
    grid = np.empty((count, height, 1 + views * len(kinds), width, 3), np.uint8)
    for i in range(count):
        first = Image.fromarray(images["source"][i, 0])
        grid[i, :, 0] = np.asarray(first.resize((width, height), Image.Resampling.BOX))
        for k, kind in enumerate(kinds):
            of_scene = images[kind][i]
            if kind == "depth":
                of_scene = depth_images(of_scene, images["alpha"][i])
            grid[i, :, 1 + k :: len(kinds)] = of_scene.swapaxes(0, 1)
    return grid.reshape(count * height, -1, 3)


def memory_line(needed, limit: float | None) -> tuple[str, float]:
    """What a compiled program needs of one device, as text, and in all in bytes.

    Args:
      needed: of `compiled.memory_analysis()`.
      limit: bytes that the device has, if that is known.
    """
    outputs = needed.output_size_in_bytes - needed.alias_size_in_bytes
    total = needed.argument_size_in_bytes + outputs + needed.temp_size_in_bytes
    of_limit = "" if limit is None else f" of {limit / 1e9:.3f}"
    text = (
        f"{total / 1e9:.3f}{of_limit} GB on each device ({needed.argument_size_in_bytes / 1e9:.3f} arguments, "
        f"{outputs / 1e9:.3f} outputs, {needed.temp_size_in_bytes / 1e9:.3f} temporaries)"
    )
    return text, total


def progress_line(row: Mapping[str, float], steps: int, batch_size: int) -> str:
    """A report as one line: where the run is, how good, how fast, and how long it will take.

    Args:
      row: `step`, `train/loss` and `samples_per_second`; where it has them also `train/psnr` (dB), `mfu` and
        `data_wait` (shares of 1: of the device's peak rate, of the time spent waiting for data), `skipped` (updates) and
        `bad_records`.
      steps: of the whole run.
      batch_size: samples a step.
    """
    parts = [f"step {row['step']:.0f}/{steps}", f"loss {row['train/loss']:.4f}"]
    for name, text in [
        ("train/psnr", "psnr {:.2f} dB"),
        ("samples_per_second", "{:.2f} samples/s"),
        ("mfu", "MFU {:.1%}"),
        ("data_wait", "data wait {:.0%}"),
    ]:
        if name in row:
            parts.append(text.format(row[name]))
    seconds = round((steps - row["step"]) * batch_size / row["samples_per_second"])
    parts.append(f"ETA {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}")
    for name in ("skipped", "bad_records"):
        if row.get(name):
            parts.append(f"{name.replace('_', ' ')} {row[name]:.0f}")
    return "  ".join(parts)


def evaluation_line(step: int, steps: int, scores: Mapping[str, float]) -> str:
    """An evaluation's scores as one line."""
    texts = {
        "val/psnr": "psnr {:.2f} dB",
        "val/iou": "IoU {:.3f}",
        "val/source_psnr": "given views {:.2f} dB",
    }
    shown = [text.format(scores[name]) for name, text in texts.items() if name in scores]
    return "  ".join([f"step {step}/{steps}", "held-out scenes:", *shown])
