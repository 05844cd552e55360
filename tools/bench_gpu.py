"""Times the full-size families, their training steps, and pieces of both on a GPU, in four minutes.

    python tools/bench.py gpu [WORD ...] [--minutes 4] [--out out/bench_gpu.jsonl]

With words, it runs only works whose names contain one of them: `bench.py gpu TripoSR`, `bench.py gpu "training step"`. The works are
defined in tools/bench_steps.py. tools/bench_results/originals_h200.json has the figures for comparison, of the PyTorch originals and
of this code in 2026.

Separate processes run the works, and this process does not use the GPU itself. If a work takes too long or ends its process, that is
reported and the others continue. After `--minutes`, no more works are started. Each result is printed and appended to `--out` as it comes.
Compiled programs are kept in LRM_JAX_CACHE (~/.cache/lrm_jax), so a second run has time for more works.

Run as a program, this file is such a process: `python tools/bench_gpu.py WORK ...` prints a JSON line for the machine, and one for
each work.

Exit code: 0 every work has a result; 1 some works have none; 2 no work has one, no GPU, or wrong usage.
"""

import argparse
import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parent))
import measure  # noqa: E402
from bench_steps import STEPS, Step  # noqa: E402

ORIGINALS = Path(__file__).parent / "bench_results" / "originals_h200.json"
START = 60.0  # seconds that a process may take to find the GPU
NO_GPU = 2  # exit code of a child process, and then also of the benchmark


class NoGpuError(Exception):
    """A child process found no GPU and printed that."""


def main(argv: list[str]) -> int:
    """Runs the steps. Returns the exit code: 0 all have a result, 1 some have none, 2 none has one or there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words",
        nargs="*",
        help="run only works whose names contain one of these words (default: all works)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=4.0,
        help="start no more works after this time (default: 4)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/bench_gpu.jsonl"),
        help="append the results to this file, as JSON lines",
    )
    args = parser.parse_args(argv)
    steps = [x for x in STEPS if not args.words or any(word in x.work for word in args.words)]
    if not steps:
        parser.error(f"no work has such a name; the works are {'; '.join(x.work for x in STEPS)}")
    originals, commit, rows = read_originals(), measure.commit(), []

    def record(row: dict) -> None:
        if not rows:
            print(HEADER)
        rows.append(row)
        print(table_row(originals[row["work"]], row), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write(json.dumps(row | {"commit": commit}) + "\n")

    start = time.monotonic()
    try:
        run_steps(steps, [sys.executable, __file__], 60 * args.minutes, record)
    except NoGpuError:
        return NO_GPU
    failed = sum("failed" in row for row in rows)
    seconds = time.monotonic() - start
    print(f"{len(rows) - failed} of {len(rows)} works in {seconds:.0f} s: {args.out}; {rows[-1].get('machine', '')}")  # fmt: skip
    return 2 if failed == len(rows) else 1 if failed else 0


# -- the parent


def run_steps(
    steps: Sequence[Step], program: list[str], seconds: float, record: Callable[[dict], None]
) -> None:
    """Runs the steps, and calls `record` with a row for each: a result, or under "failed" the reason why there is none.

    Args:
      program: command that, followed by names of works, runs them one after another, as `run_here` does.
      seconds: time for all steps together.

    Raises:
      NoGpuError: a child process found no GPU.
    """
    deadline = time.monotonic() + seconds
    while steps:
        if time.monotonic() >= deadline:
            for step in steps:
                record(
                    {
                        "work": step.work,
                        "failed": f"not run: the {seconds:g} s for all works were over",
                    }
                )
            return
        together = list(itertools.takewhile(lambda step: not step.alone, steps))
        done = run_process(together or steps[:1], program, deadline, record)
        steps = steps[done:]


def run_process(
    steps: Sequence[Step], program: list[str], deadline: float, record: Callable[[dict], None]
) -> int:
    """Runs steps in one process, up to the first failure, which may make the GPU's context unusable. Returns how many were recorded."""
    with started([*program, *(step.work for step in steps)]) as (child, lines):
        where = next_row(child, lines, START, deadline)
        if child.returncode == NO_GPU:
            raise NoGpuError
        for count, step in enumerate(steps, 1):
            row = where
            if "failed" not in where:
                row = where | next_row(child, lines, step.limit, deadline)
            record({"work": step.work} | row)
            if "failed" in row:
                return count
    return len(steps)


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[tuple[subprocess.Popen, queue.Queue]]:
    """Starts a process. Yields it and a queue of the lines that it prints, ended by None. Then kills it and the compilers it started."""
    environment = {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        **os.environ,
    }  # hides XLA's warnings about slow compilation
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    lines = queue.Queue()

    def read():
        for line in child.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        yield child, lines
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def next_row(child: subprocess.Popen, lines: queue.Queue, limit: float, deadline: float) -> dict:
    """The next JSON object that the process prints, or under "failed" the reason why there is none."""
    left = max(deadline - time.monotonic(), 0.0)
    try:
        line = lines.get(timeout=min(limit, left))
    except queue.Empty:
        if left < limit:
            return {"failed": f"stopped after {left:.0f} s: the time for all works was over"}
        return {"failed": f"took longer than {limit:g} s"}
    if line is None:
        return {"failed": f"its process ended with code {child.wait()}"}
    return json.loads(line)


# -- the child process


def child_main(works: list[str]) -> int:
    """Runs works on a GPU, by name. Returns the exit code."""
    try:
        platform = jax.default_backend()
    except RuntimeError as error:  # JAX_PLATFORMS names a platform that is not available
        platform = str(error).splitlines()[0]
    if platform != "gpu":
        print(f"bench.py gpu: JAX finds no GPU ({platform}): use a machine with a GPU, and pip install 'jax[cuda13]'", file=sys.stderr)  # fmt: skip
        return NO_GPU
    cache = os.environ.get("LRM_JAX_CACHE") or Path.home() / ".cache" / "lrm_jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    run_here([step for step in STEPS if step.work in works])
    return 0


def run_here(steps: Sequence[Step]) -> None:
    """Prints a JSON line for the machine, then one for each step. If a step raises, its line has the error."""
    print(json.dumps({"machine": measure.machine()}), flush=True)
    for step in steps:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                row = step.run()
        except Exception as error:
            first_line = (str(error).strip() or "no message").splitlines()[0]
            row = {"failed": f"{type(error).__name__}: {first_line[:300]}"}
        print(json.dumps(row), flush=True)


# -- the table

HEADER = """\
| work | PyTorch original | ours at 02fb77f | goal | bench.py gpu | TFLOP | TFLOP/s | GB |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def read_originals() -> dict[str, dict]:
    """The rows of originals_h200.json, by work."""
    return {row["work"]: row for row in json.loads(ORIGINALS.read_text())["rows"]}


def table_row(known: dict, row: dict) -> str:
    """One line of the table, in Markdown.

    Args:
      known: a row of `read_originals`.
      row: a result, or {} before there is one.
    """
    unit = known["unit"]
    value = row.get("samples_per_second" if unit == "samples/s" else "ms")
    now = row.get("failed", "not yet run on this code") if value is None else f"{value:.4g} {unit}"
    measured = [f"{row[name]:.3g}" if name in row else "" for name in ("tflop", "tflop_per_second", "peak_gb")]  # fmt: skip
    originals = ", ".join(f"{x} {unit} ({how})" if how else f"{x} {unit}" for how, x in known["original"].items())  # fmt: skip
    ours = known["ours"] if isinstance(known["ours"], str) else f"{known['ours']} {unit}"
    sign = ">=" if unit == "samples/s" else "<="
    goal = "" if known["goal"] is None else f"{sign} {known['goal']} {unit}"
    return f"| {' | '.join([known['work'], originals, ours, goal, now, *measured])} |"


if __name__ == "__main__":
    sys.exit(child_main(sys.argv[1:]))
