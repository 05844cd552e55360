"""From sources to batches: this process's part of every global batch, prefetched, resumable to the bit.

The batch of step n is made of the positions n B ... (n + 1) B - 1 of its source, and process p of P holds the p-th of P
equal runs of them: the global batch has the same elements for every number of processes. (In the same order, too, where the
shards of a process are neighbours; in a TPU's torus they may not be.) All that there is to restore is the number of batches
that the consumer has received. (grain.experimental.ElasticIterator counts likewise, but deals positions out in
turn, so that another number of processes permutes the batch.)
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

MAX_TRIES = 100  # bad records in a row, after which it is not the records that are at fault


def open_batches(
    sources: Source | Sequence[tuple[Source, int]],
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    prefetch: int = 2,
) -> "Batches":
    """Batches of a source, or of several in turn.

    Args:
      sources: one, or (source, weight) pairs: of `sum(weights)` batches in a row, `weight` are of that source, evenly
        spread. A batch is never mixed: what a source finishes on the device differs.
      batch_size: B of the global batch.
      process_index, process_count: whose part.
      num_workers: processes that make the batches; 0: threads of this one.
      prefetch: batches that are made ahead, of each worker; 0 without workers: none, in the caller's thread.

    Returns:
      An endless iterator where the source is endless, or where there are several. Otherwise ceil(length / B) batches:
      the last one is filled up from the source's beginning.

    Raises:
      InputError: the batch does not divide over the processes. While iterating: no record can be used.
    """
    if process_count < 1 or batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"data.batch_size={batch_size} does not divide over {process_count} processes: make it a multiple"
        )
    pairs = [(sources, 1)] if isinstance(sources, Source) else list(sources)
    weights = [weight for _, weight in pairs]
    if not weights or any(weight != int(weight) or weight < 1 for weight in weights):
        raise InputError(f"data: weights {weights} of the sources: must be whole numbers from 1")
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
    """Indices of `count` objects by position: "train" without end, shuffled anew each epoch; "val" and "all" as they are."""
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
    # Not MapDataset.shuffle: it tries 65536 / count numbers for one of them, 6 ms of CPU for 12 objects.
    epoch, place = divmod(position, count)
    return int(_permutation(seed, epoch, count)[place])


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def rate(batches: "Batches", batch_size: int, *, num_batches: int = 50) -> float:
    """Samples per second that the loader makes on its own, once it is running: at least two batches of each worker are timed."""
    num_workers = max(1, batches.num_workers)
    # What was made while the first were waited for is not counted.
    for _ in range(1 + batches.prefetch * num_workers):
        next(batches)
    num_batches = max(num_batches, 2 * num_workers)
    start = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    return num_batches * batch_size / (time.perf_counter() - start)


class Batches:
    """An iterator of (index of the source, stacked elements), made by `open_batches`.

    Records that could not be used are in `bad`, cause -> how often; each is reported on stderr when it is first met.
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
        """JSON-able, and the same in every process. Batches that are only prefetched do not count."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on as the iterator whose state it was, also where that ran on another number of processes."""
        self.close()
        self._step = state["step"]

    def close(self) -> None:
        """Ends threads and workers. A later `next` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _open(self) -> grain.IterDataset:
        # As many threads as batches ahead: each makes one.
        read = grain.ReadOptions(num_threads=self.prefetch, prefetch_buffer_size=self.prefetch)
        if not self.num_workers:
            return self._steps[self._step :].to_iter_dataset(read)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain hands its own flags on to the workers
        workers = grain.MultiprocessingOptions(self.num_workers, max(1, self.prefetch))
        one = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        return (
            self._steps[self._step :]
            .to_iter_dataset(one)
            .mp_prefetch(workers, worker_init_fn=_leave_signals_to_the_parent)
        )


def _leave_signals_to_the_parent(index: int, count: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the workers too: without them the run could not go on to save."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Makes this process's part of the batch of a step: (index of the source, stacked elements, causes of bad records)."""

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
    """The element at a position, or where it is bad the first usable one after; notes the causes in `bad`."""
    length, causes = len(source.elements), []
    # Among twice as many positions as there are objects is a whole epoch.
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
    """Which source each of sum(weights) batches is of: every source `weight` times, evenly spread."""
    credit, turns = np.zeros(len(weights), int), []
    for _ in range(sum(weights)):
        credit += weights
        turns.append(int(credit.argmax()))
        credit[turns[-1]] -= sum(weights)
    return tuple(turns)
