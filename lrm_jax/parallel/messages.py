"""Messages of a long job on stderr: the stages of a command, and the progress of a loop."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

DELAY = 2.0  # seconds: a shorter loop shows nothing
INTERVAL = 10.0  # seconds between two lines in a log file


class Stages:
    """The stages of a command. Each is printed on stderr when it starts, and timed.

    stages = Stages()
    with stages("encode", " 4 images", first=" (compiling)"):
        ...
    stages.seconds  # {"encode": 1.2}; the times of a repeated stage add up
    """

    def __init__(self):
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def elapsed(self) -> float:
        """Seconds since the command began."""
        return time.perf_counter() - self._start

    def say(self, message: str) -> None:
        """Prints one line on stderr, preceded by the time since the start."""
        print(f"[{self.elapsed():6.1f} s] {message}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def __call__(self, name: str, detail: str = "", first: str = "") -> Iterator[None]:
        """Runs a stage.

        Args:
          name: the key in `seconds`.
          detail: printed after the name.
          first: printed after the detail, but only the first time that a stage of this name starts.
        """
        self.say(name + detail + (first if name not in self.seconds else ""))
        self.seconds.setdefault(name, 0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


def progress(iterable: Iterable, total: int | None = None, label: str = "") -> Iterable:
    """Yields the items, and shows the loop's progress on stderr once it has run for DELAY seconds.

    On a terminal this is a bar, which disappears at the end. Elsewhere it is whole lines: at most one every INTERVAL seconds,
    and one at the end with the total time.

    Args:
      total: number of items. None: `len(iterable)`, or unknown.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, label, total, delay=DELAY, leave=False, file=sys.stderr)
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    return _lines(iterable, total, label)


def _lines(iterable: Iterable, total: int | None, label: str) -> Iterator:
    start = last = time.perf_counter()
    count = 0

    def tell(now: float) -> None:
        name, of_total = (f"{label}: " if label else ""), ("" if total is None else f" of {total}")
        print(f"{name}{count}{of_total} ({now - start:.1f} s)", file=sys.stderr, flush=True)

    for item in iterable:
        now = time.perf_counter()
        if count and now - last >= INTERVAL:
            tell(now)
            last = now
        yield item
        count += 1
    now = time.perf_counter()
    if now - start >= DELAY:
        tell(now)
