"""Turns sources into batches: this process's part of every global batch, prefetched and resumable bit for bit.

The batch of step n consists of positions n B ... (n + 1) B - 1 of its source. They are cut into P equal, contiguous parts, and
process p of P makes the p-th. So the global batch has the same elements for any number of processes. They are also in the same
order if the shards of each process are neighbours; in a TPU's torus they may not be. The only state is the number of batches
that the consumer has received. (grain.experimental.ElasticIterator has the same state, but deals positions out in turn, so that
another number of processes permutes the batch.)
"""

import dataclasses
import functools
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from lrm_jax.data import Source
from lrm_jax.types import InputError

MAX_TRIES = 100  # bad records in a row; after so many, something else must be wrong


def open_batches(
    sources: Source | Sequence[tuple[Source, int]],
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    prefetch: int = 2,
) -> "Batches":
    """Batches of one source, or of several sources in turn.

    Args:
      sources: one source, or (source, weight) pairs. Of every `sum(weights)` batches, `weight` come from that source, evenly
        spread. A batch never mixes sources, because each has its own `finish` on the device.
      batch_size: B, the size of the global batch.
      process_index, process_count: which part of the batch to make, p of P.
      num_workers: number of worker processes; 0: use threads of this process.
      prefetch: number of batches that each worker makes ahead. 0 without workers: the caller's thread makes each batch.

    Returns:
      An endless iterator if the source is endless or there are several. Otherwise ceil(length / B) batches; the last one is
      filled up from the beginning of the source.

    Raises:
      InputError: the batch size is not a multiple of the number of processes. While iterating: no record can be used.
    """
    if process_count < 1 or batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"data.batch_size={batch_size} does not divide over {process_count} processes: make it a multiple"
        )
    pairs = [(sources, 1)] if isinstance(sources, Source) else list(sources)
    weights = [weight for _, weight in pairs]
    if not weights or any(weight != int(weight) or weight < 1 for weight in weights):
        raise InputError(
            f"data: weights {weights} of the sources: must be whole numbers, at least 1"
        )
    num_steps = -(-len(pairs[0][0].elements) // batch_size) if len(pairs) == 1 else sys.maxsize
    part = _Part(
        tuple(source for source, _ in pairs),
        _schedule(weights),
        batch_size,
        process_index * (batch_size // process_count),
        batch_size // process_count,
    )
    return Batches(grain.MapDataset.range(num_steps).map(part), num_workers, prefetch)


def order(count: int, split: str, seed: int) -> grain.MapDataset:
    """Indices of `count` objects by position. "train" is endless and reshuffled each epoch; "val" and "all" are in order."""
    if split not in ("train", "val", "all"):
        raise InputError(f"split {split!r}: must be train, val or all")
    if seed < 0:
        raise InputError(f"data.seed={seed}: must not be negative")
    if split != "train":
        return grain.MapDataset.range(count)
    return grain.MapDataset.range(sys.maxsize).map(
        functools.partial(_shuffled, count=count, seed=seed)
    )


def _shuffled(position: int, *, count: int, seed: int) -> int:
    # MapDataset.shuffle is too slow: it tries 65536 / count numbers to find one index, 6 ms of CPU for 12 objects.
    epoch, place = divmod(position, count)
    return int(_permutation(seed, epoch, count)[place])


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def rate(batches: "Batches", batch_size: int, *, num_batches: int = 50) -> float:
    """Samples per second of the loader on its own, once it is running. Times at least two batches of each worker."""
    num_workers = max(1, batches.num_workers)
    # Do not time the batches that were prefetched while waiting for the first one.
    for _ in range(1 + batches.prefetch * num_workers):
        next(batches)
    num_batches = max(num_batches, 2 * num_workers)
    start = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    return num_batches * batch_size / (time.perf_counter() - start)


class Batches:
    """Iterates over (index of the source, stacked elements). Made by `open_batches`.

    `bad` counts the records that could not be used, by cause. The first of each cause is reported on stderr.
    """

    def __init__(self, steps: grain.MapDataset, num_workers: int, prefetch: int):
        self.bad: dict[str, int] = {}
        self.num_workers, self.prefetch = num_workers, prefetch
        self._steps = steps
        self._step, self._iterator = 0, None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[int, Any]:
        if self._iterator is None:
            self._iterator = iter(self._open())
        which, batch, bad = next(self._iterator)
        self._step += 1
        for cause in bad:
            self.bad[cause] = self.bad.get(cause, 0) + 1
            if self.bad[cause] == 1:
                print(
                    f"bad record: {cause}: the next one takes its place ({len(self.bad)} so far)",
                    file=sys.stderr,
                )
        return which, batch

    def get_state(self) -> dict[str, int]:
        """The state, as JSON-serialisable values, the same in every process. It ignores batches that are only prefetched."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues where the iterator with this state was, even if that ran on another number of processes."""
        self.close()
        self._step = state["step"]

    def close(self) -> None:
        """Stops the threads and workers. A later `next` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _open(self) -> grain.IterDataset:
        # One thread for each prefetched batch.
        read = grain.ReadOptions(num_threads=self.prefetch, prefetch_buffer_size=self.prefetch)
        if not self.num_workers:
            return self._steps[self._step :].to_iter_dataset(read)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain passes its own flags on to the workers
        workers = grain.MultiprocessingOptions(self.num_workers, max(1, self.prefetch))
        one = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        return (
            self._steps[self._step :]
            .to_iter_dataset(one)
            .mp_prefetch(workers, worker_init_fn=_leave_signals_to_the_parent)
        )


def _leave_signals_to_the_parent(index: int, count: int) -> None:
    """Makes workers ignore Ctrl-C and a scheduler's SIGTERM: if they stopped, the run could not go on and save itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Makes this process's part of a step's batch: (index of the source, stacked elements, causes of bad records)."""

    sources: tuple[Source, ...]
    schedule: tuple[int, ...]
    batch_size: int
    offset: int  # of the part in the global batch
    size: int

    def __call__(self, step: int) -> tuple[int, Any, list[str]]:
        round_, turn = divmod(step, len(self.schedule))
        which = self.schedule[turn]
        own_step = round_ * self.schedule.count(which) + self.schedule[:turn].count(which)
        first, bad = own_step * self.batch_size + self.offset, []
        source = self.sources[which]
        elements = [_usable(source, position, bad) for position in range(first, first + self.size)]
        return which, jax.tree.map(lambda *leaves: np.stack(leaves), *elements), bad


def _usable(source: Source, position: int, bad: list[str]) -> Any:
    """The element at a position or, if it is bad, the next usable one. Appends the causes to `bad`."""
    length, causes = len(source.elements), []
    # Any 2 N consecutive positions, for N objects, contain a whole epoch.
    tries = min(length, MAX_TRIES, 2 * len(source.names or range(MAX_TRIES)))
    for attempt in range(tries):
        try:
            element = source.elements[(position + attempt) % length]
        except InputError as error:
            causes.append(str(error))
        else:
            bad += causes
            return element
    raise InputError(f"none of {len(causes)} records in a row can be used: the first: {causes[0]}")


def _schedule(weights: Sequence[int]) -> tuple[int, ...]:
    """The source of each of sum(weights) batches: every source occurs `weight` times, evenly spread."""
    credit, turns = np.zeros(len(weights), int), []
    for _ in range(sum(weights)):
        credit += weights
        turns.append(int(credit.argmax()))
        credit[turns[-1]] -= sum(weights)
    return tuple(turns)
