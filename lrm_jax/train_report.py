"""What a person sees of a training run: the parameters, a line of progress, pictures, and a profiler's trace."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview as clu_overview
from PIL import Image

from lrm_jax.report import depth_pictures, to_uint8, write_file
from lrm_jax.step import on_background
from lrm_jax.types import Batch, Rendering


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
    """The mean of each named scalar over the steps where it is finite (the others were skipped); NaN where it never is."""
    rows, means = jax.device_get(scalars), {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows], np.float64)
        finite = values[np.isfinite(values)]
        means[name] = float(finite.mean()) if finite.size else math.nan
    means["skipped"] = float(rows[-1]["skipped"])
    return means


def picture_grid(batch: Batch, rendering: Rendering) -> np.ndarray:
    """A row a scene: the source, then target, render and (of families that have it) depth of each view, on white.

    uint8 [height width 3].
    """
    source, target = (
        np.asarray(on_background(views, 1.0).rgb) for views in (batch.source, batch.target)
    )
    pictures = [target, rendering.rgb]
    if rendering.depth is not None:
        depth = [depth_pictures(*x) for x in zip(rendering.depth, rendering.alpha, strict=True)]
        pictures.append(np.stack(depth) / 255)
    pairs = np.stack(pictures, axis=2)  # [B V 2|3 H W 3]
    size, rows = target.shape[2:4], []
    for first, pictures in zip(source[:, 0], pairs, strict=True):
        first = Image.fromarray(to_uint8(first)).resize(size[::-1], Image.Resampling.BOX)
        pictures = to_uint8(pictures.reshape(-1, *pictures.shape[2:]))
        rows.append(np.concatenate([np.asarray(first), *pictures], axis=1))
    return np.concatenate(rows)


def progress_line(row: Mapping[str, float], steps: int, batch_size: int) -> str:
    """A report as one line: where the run is, how good, how fast, and how long it will take.

    Args:
      row: `step`, `train/loss` and `samples_per_second`; where it has them also `train/psnr` and `val/psnr` (dB), `mfu` and
        `data_wait` (shares of 1: of the device's peak rate, of the time spent waiting for data), `skipped` (updates) and
        `bad_records`.
      steps: of the whole run.
      batch_size: samples a step.
    """
    parts = [f"step {row['step']:.0f}/{steps}", f"loss {row['train/loss']:.4f}"]
    for name, text in [
        ("train/psnr", "psnr {:.2f} dB"),
        ("val/psnr", "val {:.2f} dB"),
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
