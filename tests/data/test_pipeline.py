"""Batches are the same for every number of processes and workers and after a resume. Bad records are replaced and reported."""

import contextlib
import functools
import json
import multiprocessing
import os
import signal

import grain
import jax
import numpy as np
import pytest

from lrm_jax.data import Source, pipeline
from lrm_jax.types import Batch, Cameras, InputError, Views


def element(position: int, index: int, *, bad: tuple[int, ...] = ()) -> Batch:
    """One scene that contains its position and its object. Objects in `bad` cannot be read."""
    if index in bad:
        raise InputError(f"object {index}: cut short")
    views = Views(
        rgb=np.full((1, 2, 2, 3), index, np.uint8),
        alpha=np.full((1, 2, 2), 255, np.uint8),
        cameras=Cameras(
            c2w=np.full((1, 4, 4), position, np.float32), fxfycxcy=np.ones((1, 4), np.float32)
        ),
    )
    return Batch(source=views, target=views)


def make(split: str = "train", count: int = 7, seed: int = 0, bad: tuple[int, ...] = ()) -> Source:
    load = functools.partial(element, bad=bad)
    names = tuple(f"object {i}" for i in range(count))
    return Source(pipeline.order(count, split, seed).map_with_index(load), names=names)


def positions(batch: Batch) -> list[int]:
    return batch.source.cameras.c2w[:, 0, 0, 0].astype(int).tolist()


def objects(batch: Batch) -> list[int]:
    return batch.source.rgb[:, 0, 0, 0, 0].tolist()


def take(batches: pipeline.Batches, count: int) -> list[Batch]:
    return [next(batches)[1] for _ in range(count)]


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_batch_holds_the_next_positions_and_every_epoch_all_objects():
    batches = pipeline.open_batches(make(), 3)
    taken = take(batches, 7)
    assert sum(map(positions, taken), []) == list(range(21))
    epochs = np.reshape(sum(map(objects, taken), []), (3, 7))
    assert (np.sort(epochs) == np.arange(7)).all() and len({tuple(e) for e in epochs}) > 1
    assert taken[0].target.rgb.dtype == np.uint8


@pytest.mark.parametrize("num_workers", [0, 2])
def test_restored_batches_are_the_uninterrupted_ones(num_workers):
    """In the middle of an epoch, with batches prefetched but not received, then on two processes."""
    straight = take(pipeline.open_batches(make(), 4), 8)
    first = pipeline.open_batches(make(), 4, num_workers=num_workers, prefetch=3)
    assert_same(take(first, 3), straight[:3])
    state = json.loads(json.dumps(first.get_state()))
    assert state == {"step": 3}
    first.close()
    resumed = pipeline.open_batches(make(), 4, num_workers=num_workers)
    resumed.set_state(state)
    assert_same(take(resumed, 3), straight[3:6])
    resumed.close()
    again = pipeline.open_batches(make(), 4)
    take(again, 5)
    again.set_state(state)  # back
    assert_same(take(again, 2), straight[3:5])
    halves = []
    for index in range(2):
        half = pipeline.open_batches(make(), 4, process_index=index, process_count=2)
        half.set_state(state)
        halves.append(take(half, 5))
        assert half.get_state() == {"step": 8}
    joined = [
        jax.tree.map(lambda a, b: np.concatenate([a, b]), *pair)
        for pair in zip(*halves, strict=True)
    ]
    assert_same(joined, straight[3:])


def test_a_seed_is_another_order():
    a, b = (take(pipeline.open_batches(make(seed=seed), 7), 1)[0] for seed in (0, 1))
    assert objects(a) != objects(b) and sorted(objects(a)) == sorted(objects(b))
    with pytest.raises(InputError, match="data.seed"):
        make(seed=-1)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_finite_source_ends_with_a_full_batch(prefetch):
    batches = pipeline.open_batches(make("val"), 3, prefetch=prefetch)
    taken = [objects(batch) for _, batch in batches]
    assert taken == [[0, 1, 2], [3, 4, 5], [6, 0, 1]]
    assert [objects(b) for _, b in pipeline.open_batches(make("all", 2), 5)] == [[0, 1, 0, 1, 0]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_record_is_replaced_by_the_next_and_reported_once(capsys, num_workers):
    good = sum(map(objects, take(pipeline.open_batches(make(), 4), 7)), [])
    batches = pipeline.open_batches(make(bad=(2, 5)), 4, num_workers=num_workers)
    taken = sum(map(objects, take(batches, 7)), [])
    batches.close()
    for i in range(27):
        wanted = next(index for index in good[i:] + [0] if index not in (2, 5))
        if not {2, 5} >= set(good[i:]):  # the next usable one was also read
            assert taken[i] == wanted
    assert batches.bad.keys() == {"object 2: cut short", "object 5: cut short"}
    assert min(batches.bad.values()) >= 4  # once per epoch
    error = capsys.readouterr().err
    assert error.count("object 2: cut short") == error.count("object 5: cut short") == 1
    assert "(2 so far)" in error


@pytest.mark.parametrize("num_workers", [0, 1])
def test_only_bad_records_are_an_input_error(num_workers):
    batches = pipeline.open_batches(make(count=3, bad=(0, 1, 2)), 2, num_workers=num_workers)
    with pytest.raises(InputError, match=r"none of 6 records .*: object \d: cut short"):
        next(batches)
    batches.close()
    # Of two objects, the usable one is found from every position.
    assert set(
        sum(map(objects, take(pipeline.open_batches(make(count=2, bad=(1,)), 2), 20)), [])
    ) == {0}


def test_a_mixture_alternates_by_weight_and_each_source_continues_where_it_was():
    def mixture():
        return pipeline.open_batches([(make(), 3), (make(seed=5), 1)], 2)

    batches = mixture()
    taken = [next(batches) for _ in range(12)]
    turns = [which for which, _ in taken]
    assert all(turns[i : i + 4].count(1) == 1 for i in range(0, 12, 4))
    for which in (0, 1):
        own = [positions(batch) for turn, batch in taken if turn == which]
        assert sum(own, []) == list(range(2 * len(own)))
    resumed = mixture()
    resumed.set_state({"step": 6})
    assert_same([next(resumed) for _ in range(6)], taken[6:])


def test_the_schedule_spreads_sources_evenly():
    for weights in ([1], [3, 1], [2, 3, 5]):
        turns = pipeline._schedule(weights)
        assert [turns.count(i) for i in range(len(weights))] == weights
        for which, weight in enumerate(weights):  # always within one batch of the exact share
            counts = np.cumsum(np.array(turns) == which)
            share = weight / sum(weights) * np.arange(1, len(turns) + 1)
            assert np.abs(counts - share).max() < 1


def test_sizes_that_do_not_divide_are_an_input_error():
    with pytest.raises(InputError, match="batch_size=6 does not divide over 4 processes"):
        pipeline.open_batches(make(), 6, process_count=4)
    for weights in ([0, 1], [1.5, 1]):
        with pytest.raises(InputError, match="whole numbers"):
            pipeline.open_batches([(make(), weight) for weight in weights], 2)


def test_elements_may_be_anything_that_finish_takes():
    source = Source(grain.MapDataset.range(10).map(np.int64), finish=lambda x: x)
    which, batch = next(pipeline.open_batches(source, 4))
    np.testing.assert_array_equal(batch, [0, 1, 2, 3])


def test_rate_counts_samples():
    assert pipeline.rate(pipeline.open_batches(make(), 4), 4, num_batches=5) > 100


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_continue_if_a_scheduler_or_a_terminal_signals_all_processes(number):
    batches = pipeline.open_batches(make(), 4, num_workers=1, prefetch=1)
    with contextlib.closing(batches):
        taken = take(batches, 2)
        for child in multiprocessing.active_children():
            os.kill(child.pid, number)
        taken += take(batches, 4)
    assert_same(taken, take(pipeline.open_batches(make(), 4), 6))
