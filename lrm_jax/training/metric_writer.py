"""Writes the metrics of a training run to `metrics.jsonl` and TensorBoard event files, behind clu's MetricWriter interface.

Each call of `write_scalars` adds one line to `metrics.jsonl`: {"step": 25, "train/loss": 0.1, ...}. Numbers that are not finite
become null, because JSON cannot represent them.
"""

import importlib.util
import json
import math
import sys
import types
from pathlib import Path

import jax
import numpy as np
import tensorboardX

from lrm_jax.parallel.whole_files import write_file

# clu.metric_writers imports a writer that needs TensorFlow. If TensorFlow is not installed, an empty module replaces that writer;
# TensorBoardWriter below writes the same files.
if importlib.util.find_spec("tensorflow") is None:
    stand_in = types.ModuleType("clu.metric_writers.summary_writer")
    stand_in.SummaryWriter = None
    sys.modules.setdefault(stand_in.__name__, stand_in)
from clu import metric_writers  # noqa: E402


def open_writer(
    workdir: str | Path, first_step: int, tensorboard: bool
) -> metric_writers.MetricWriter:
    """The writer of a run. It writes on process 0 only.

    It writes to `metrics.jsonl`, to absl's log (shown with --verbosity=0) and, if `tensorboard`, to event files in
    `tensorboard/`. If a killed run wrote steps after `first_step`, they are removed from `metrics.jsonl` and hidden in
    TensorBoard.

    Raises:
      OSError: the folder cannot be written.
    """
    writers = []
    if jax.process_index() == 0:
        writers.append(JsonLinesWriter(Path(workdir) / "metrics.jsonl", first_step))
        writers.append(metric_writers.LoggingWriter())
        if tensorboard:
            writers.append(TensorBoardWriter(Path(workdir) / "tensorboard", first_step))
    return metric_writers.MultiWriter(writers)


class _Writer(metric_writers.MetricWriter):
    """clu's interface, writing nothing."""

    def write_scalars(self, step, scalars):
        pass

    def write_images(self, step, images):
        pass

    def write_texts(self, step, texts):
        pass

    def write_hparams(self, hparams):
        pass

    def write_summaries(self, step, values, metadata=None):
        raise NotImplementedError("summaries")

    def write_videos(self, step, videos):
        raise NotImplementedError("videos")

    def write_audios(self, step, audios, *, sample_rate):
        raise NotImplementedError("audios")

    def write_histograms(self, step, arrays, num_buckets=None):
        raise NotImplementedError("histograms")

    def flush(self):
        pass

    def close(self):
        pass


class JsonLinesWriter(_Writer):
    """Writes scalars as lines of JSON. A line is in the file when `write_scalars` returns."""

    def __init__(self, path: Path, first_step: int):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        write_file(path, b"".join(line for line in lines if _is_before(line, first_step)))
        self._file = path.open("a", buffering=1)

    def write_scalars(self, step, scalars):
        row = {"step": int(step)} | {name: _finite(value) for name, value in scalars.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")

    def close(self):
        self._file.close()


class TensorBoardWriter(_Writer):
    """Writes scalars, images and texts to TensorBoard event files. Images: [N H W C] or [H W C], uint8 or in [0, 1]."""

    def __init__(self, folder: Path, first_step: int):
        self._writer = tensorboardX.SummaryWriter(
            str(folder),
            purge_step=first_step + 1,
            filename_suffix=f".{first_step}",  # otherwise names differ only in the time, in seconds
            flush_secs=10,
        )

    def write_scalars(self, step, scalars):
        for name, value in scalars.items():
            self._writer.add_scalar(name, float(value), int(step))

    def write_images(self, step, images):
        for name, image in images.items():
            image = np.asarray(image)
            if image.dtype != np.uint8:
                image = np.clip(image.astype(np.float32), 0, 1)
            image = image.reshape(-1, *image.shape[-3:])
            self._writer.add_images(name, image, int(step), dataformats="NHWC")

    def write_texts(self, step, texts):
        for name, text in texts.items():
            self._writer.add_text(name, text, int(step))

    def flush(self):
        self._writer.flush()

    def close(self):
        self._writer.close()


def _is_before(line: bytes, first_step: int) -> bool:
    """Whether a line is complete (the last line of a killed run may not be) and of a step up to `first_step`."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= first_step
    except (ValueError, KeyError, TypeError):
        return False


def _finite(value) -> float | None:
    return float(value) if math.isfinite(value) else None
