"""Renders many objects in parallel, in processes, because the C libraries that read 3D files can crash their process."""

import concurrent.futures
import itertools
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED
from pathlib import Path

from rendering.output import unfinished


def run_in_processes(
    function: Callable, objects: dict[str, tuple], out: Path, workers: int
) -> Iterator[tuple]:
    """Yields (uid, function(uid, *where)) for the items uid -> where of `objects`, in any order.

    If a file crashes its process, only that file fails. The objects that were in progress, which have unfinished folders in `out`, are
    tried again one by one.
    """
    # "spawn", because jax has threads, which do not survive a fork. The parent handles Ctrl-C. The children get a handler that does
    # nothing: if they ignored the signal, Blender would inherit that, and would not end.
    context, quiet = multiprocessing.get_context("spawn"), (signal.SIGINT, _nothing)
    batches = [dict(objects)]
    while batches:
        batch = batches.pop()
        with concurrent.futures.ProcessPoolExecutor(
            min(workers, len(batch) or 1), context, signal.signal, quiet
        ) as pool:
            waiting, running = iter(list(batch.items())), {}
            try:
                while True:
                    # Submit no more than can run, because a pool starts its queued jobs even after an interruption.
                    for uid, where in itertools.islice(waiting, workers - len(running)):
                        running[pool.submit(function, uid, *where)] = uid
                    if not running:
                        break
                    for job in concurrent.futures.wait(running, return_when=FIRST_COMPLETED).done:
                        result, uid = job.result(), running.pop(job)
                        del batch[uid]
                        yield uid, result
                continue
            except concurrent.futures.BrokenExecutor:
                pass  # handled below, after the pool is shut down
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        suspects = {uid: where for uid, where in batch.items() if unfinished(out, uid).exists()}
        if not suspects:
            raise OSError(
                "a process ended before it started its work: is there enough memory for the workers?"
            )
        for uid in suspects:
            shutil.rmtree(unfinished(out, uid), ignore_errors=True)
        if len(suspects) == 1:
            cause = "its process crashed, or the system ended it because memory ran out"
            yield next(iter(suspects)), cause
        else:
            batches += [{uid: where} for uid, where in suspects.items()]
        if rest := {uid: where for uid, where in batch.items() if uid not in suspects}:
            batches.append(rest)


def _nothing(*_) -> None:
    pass
