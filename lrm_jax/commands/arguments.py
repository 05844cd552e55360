"""Arguments that several commands share, and their checks."""

import argparse
from pathlib import Path

from lrm_jax.types import InputError

EXAMPLES = Path(__file__).parents[1] / "assets" / "examples"
# The help of --weights.
WEIGHTS = (
    "model file, checkpoint of TripoSR, OpenLRM, LVSM or One-2-3-45, folder that holds one, training run (runs/x, or runs/x@5000 "
    "for step 5000), or hf:ORG/NAME (default: the small bundled model)"
)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, as all other errors."""

    def error(self, message: str):
        raise InputError(f"{message}: see {self.prog} --help")


def parser(name: str, about: str) -> argparse.ArgumentParser:
    """A parser whose --help shows `about`, a command's docstring, without reflowing it."""
    return _Parser(
        prog=name, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def check_ranges(args: argparse.Namespace, **limits: tuple[float, float]) -> None:
    """Raises InputError if an argument is outside its (low, high). None is always accepted."""
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {value} is out of range: choose {low} to {high}")
