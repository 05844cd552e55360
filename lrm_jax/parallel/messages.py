"""What a long job says on stderr while it runs: its stages, and bars."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm


class Stages:
    """The steps of a command: each is named on stderr when it starts, and timed.

    stages = Stages()
    with stages("encode"):
        ...
    stages.seconds  # {"encode": 1.2}; a stage entered twice adds up
    """

    def __init__(self):
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def elapsed(self) -> float:
        """Seconds since the command began."""
        return time.perf_counter() - self._start

    def say(self, message: str) -> None:
        """One line on stderr, with the time since the start before it."""
        print(f"[{self.elapsed():6.1f} s] {message}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def __call__(self, name: str, detail: str = "") -> Iterator[None]:
        self.say(name + detail)
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


def progress(iterable: Iterable, total: int | None = None, label: str = "") -> Iterable:
    """The iterable, with a bar on stderr once it has run for two seconds; the bar goes when it is done."""
    quiet = {} if sys.stderr.isatty() else {"mininterval": 10}  # a log file wants few lines
    return tqdm(iterable, label, total, delay=2, leave=False, file=sys.stderr, **quiet)
