"""Human-readable output of a training run: a table of parameters, progress lines, images, and a profiler trace."""

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
)  # largest number of scenes in an evaluation's grid, and largest side of its images in pixels


def parameter_overview(params: Any) -> str:
    """A table of all parameters (arrays or their shapes): name, shape, dtype, size and sharding, and the totals."""
    return clu_overview.get_parameter_overview(params, include_stats="sharding")


def write_overview(workdir: Path, params) -> None:
    """Writes the names, shapes and sizes of all parameters to `parameters.txt`."""
    if jax.process_index() == 0:
        write_file(workdir / "parameters.txt", parameter_overview(params).encode())


@contextlib.contextmanager
def profiler(workdir: Path, num_steps: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call before each step. It traces `num_steps` steps, from the fifth on, to `profile/` for TensorBoard.

    If the run ends earlier, the trace has the steps up to then.
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
    """The mean of each scalar over the steps where it is finite (others were skipped), or NaN if it never is.

    For "train/psnr", the PSNR of the mean error. For "skipped", the last value.
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
    """The images that `image_grid` shows of each scene, reduced to every n-th pixel and 8-bit colour.

    Args:
      rendering: rendering of the target views, with its colour on white.

    Returns:
      "source" [B 1 . . 3], "target" and "render" [B V H W 3]: uint8, on white. If the family renders them, "depth" and "alpha"
      [B V H W]: float32. H and W are at most GRID_SIDE.
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
    """One row per scene: the source, then target, rendering and (if the family has it) depth of each view.

    Args:
      images: from `grid_images`.

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
    """The memory that a compiled program needs on one device, as text, and its total in bytes.

    Args:
      needed: result of `compiled.memory_analysis()`.
      limit: memory of the device in bytes, if known.
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
    """A report as one line: step, loss, speed, and remaining time.

    Args:
      row: `step`, `train/loss` and `samples_per_second`. Optional: `train/psnr` (dB), `mfu` (fraction of the devices' peak rate),
        `data_wait` (fraction of time spent waiting for data), `skipped` (updates) and `bad_records`.
      steps: number of steps of the whole run.
      batch_size: samples per step.
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
    """The scores of an evaluation as one line."""
    texts = {
        "val/psnr": "psnr {:.2f} dB",
        "val/iou": "IoU {:.3f}",
        "val/source_psnr": "given views {:.2f} dB",
    }
    shown = [text.format(scores[name]) for name, text in texts.items() if name in scores]
    return "  ".join([f"step {step}/{steps}", "held-out scenes:", *shown])
