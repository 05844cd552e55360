"""The training loop: reads batches, runs steps, writes reports and checkpoints, and evaluates."""

import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lrm_jax.images.png import png
from lrm_jax.parallel import batch_axes, processes
from lrm_jax.parallel.whole_files import write_file
from lrm_jax.training import checkpoints, metric_writer, optim
from lrm_jax.training.inputs import Data
from lrm_jax.training.reports import (
    evaluation_line,
    mean_of,
    profiler,
    progress_line,
    write_overview,
)
from lrm_jax.training.setup import Run
from lrm_jax.training.step import needed_flops
from lrm_jax.training.validation import evaluate
from lrm_jax.types import InputError, TrainState

MAX_SKIPPED = 200  # updates in a row; after so many, single bad batches cannot be the cause
INTERRUPTED = 143  # exit code after SIGTERM or Ctrl-C, 128 + 15: the run is saved, and the same command resumes it


@dataclasses.dataclass
class Tally:
    """Data for the next report: the steps since the last one, and the problems so far."""

    skipped: float  # updates skipped in the whole run
    stuck: int = 0  # updates skipped in a row, up to the last report
    bad: int = 0  # records that this process could not use
    scalars: list = dataclasses.field(
        default_factory=list
    )  # one dict per step, still on the device
    waited: float = 0.0  # seconds spent waiting for data
    start: float = dataclasses.field(default_factory=time.perf_counter)

    def restart(self) -> None:
        """Starts a new interval, after a report is done."""
        self.scalars, self.waited, self.start = [], 0.0, time.perf_counter()


def fit(
    state: TrainState,
    networks: dict,
    data: Data,
    run: Run,
    device_mesh: Mesh,
    manager,
    workdir: Path,
    train: ConfigDict,
    peak_rate: float,
) -> TrainState:
    """Trains up to `train.steps`, or until SIGTERM or Ctrl-C, and saves the state that it returns.

    Args:
      peak_rate: see `flops.peak_rate`; for MFU.

    Raises:
      InputError: too many updates in a row were skipped, see `check_updates`. The state since the last checkpoint is not saved.
    """
    first = int(state.step)
    writer = metric_writer.open_writer(workdir, first, train.tensorboard)
    tally = Tally(skipped=int(optim.num_skipped(state.opt_state)))
    work = None  # operations needed for one step
    previous = {}  # scalars of the step before
    with (
        terminated() as stop,
        contextlib.closing(writer),
        profiler(workdir, train.profile_steps) as profile,
    ):
        for step in range(first + 1, train.steps + 1):
            before = time.perf_counter()
            which, elements = next(data.train)
            tally.waited += time.perf_counter() - before
            batch = data.finish[which](batch_axes.global_batch(elements, device_mesh))
            if work is None:
                work = needed_flops(run.model, train.patch, state.params, batch)
                write_overview(workdir, state.params)
            profile(step - first)
            state, scalars = run.step(state, batch, networks)
            tally.scalars.append(scalars)
            # Keep two steps in flight: the next batch is read and copied while this step runs, but batches do not pile up.
            jax.block_until_ready(previous)
            previous = scalars
            last = step == train.steps or asked_to_stop(stop, step, train.log_every)
            evaluating = step % train.eval_every == 0 or step == train.steps
            # Also save before an evaluation: if it crashes, no training is lost.
            saving = step % train.save_every == 0 or last or evaluating
            if step % train.log_every == 0 or saving:
                batch_size = batch.source.rgb.shape[0]
                row = report(tally, data, batch_size, work / peak_rate)
                check_updates(tally, row, step, train.steps, manager)
                writer.write_scalars(step, row)
                tell(progress_line({"step": step, **row}, train.steps, batch_size))
                if saving:
                    checkpoints.save(manager, step, state, data.train.get_state())
                if evaluating:
                    checkpoints.finish(manager)
                    scores, grid = evaluate(run, state.ema_params, data, device_mesh, train)
                    publish(writer, workdir, step, scores, grid)
                    tell(evaluation_line(step, train.steps, scores))
                tally.restart()
            if last:
                break
    checkpoints.finish(manager)
    return state


def report(tally: Tally, data: Data, batch_size: int, ideal: float) -> dict[str, float]:
    """The row of a report. Also updates the problem counts in `tally`.

    Args:
      ideal: seconds that a step would take at the devices' peak rate.
    """
    row, count = mean_of(tally.scalars), len(tally.scalars)
    seconds = time.perf_counter() - tally.start
    row["samples_per_second"] = count * batch_size / seconds
    row["mfu"] = count * ideal / seconds
    row["data_wait"] = tally.waited / seconds
    bad = sum(data.train.bad.values())
    row["bad_records"] = processes.total(float(bad - tally.bad))
    all_skipped = row["skipped"] - tally.skipped == count
    tally.stuck = tally.stuck + count if all_skipped else 0
    tally.bad, tally.skipped = bad, row["skipped"]
    return row


def check_updates(tally: Tally, row: dict[str, float], step: int, steps: int, manager) -> None:
    """Raises InputError if too many updates in a row were skipped, or all updates of a finished run."""
    if tally.stuck >= MAX_SKIPPED or step == tally.skipped == steps:
        raise InputError(
            f"all of the last {tally.stuck} updates were skipped: the gradient is not finite, or its norm always exceeds "
            f"optim.skip_norm (norm: {row['grad_norm']:.3g}); the last checkpoint is of step {manager.latest_step()}: "
            "lower schedule.learning_rate"
        )


def publish(writer, workdir: Path, step: int, scores: dict[str, float], grid: np.ndarray) -> None:
    """Writes the results of an evaluation."""
    writer.write_scalars(step, scores)
    if jax.process_index() == 0:
        writer.write_images(step, {"val": grid})
        write_file(workdir / "grids" / f"{step:07d}.png", png(grid))


def tell(line: str) -> None:
    """Prints a line to stderr, on process 0 only."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def terminated() -> Iterator[threading.Event]:
    """Yields an event that the first SIGTERM or Ctrl-C sets. A second one ends the process as usual."""
    stop = threading.Event()
    previous = {}

    def note(number, frame):
        stop.set()
        signal.signal(number, previous[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def asked_to_stop(stop: threading.Event, step: int, every: int) -> bool:
    """Whether to stop after this step. All processes get the same answer; they communicate every `every` steps."""
    if jax.process_count() == 1:
        return stop.is_set()
    return step % every == 0 and processes.any_process(stop.is_set())
