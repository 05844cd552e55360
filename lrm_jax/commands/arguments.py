"""Checks of arguments that the commands share."""

import argparse

from lrm_jax.types import InputError


def check_ranges(args: argparse.Namespace, **limits: tuple[float, float]) -> None:
    """Raises InputError for a number of the command line that is outside its (low, high); None is inside."""
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name} {value} is out of range: choose {low} to {high}")


# The help of --weights.
WEIGHTS = (
    "model file, checkpoint of TripoSR, OpenLRM or LVSM, folder with one, training run (runs/x, or runs/x@5000 at a step), or "
    "hf:ORG/NAME (default: the small bundled model)"
)


def parser(name: str, about: str) -> argparse.ArgumentParser:
    """A parser whose --help shows `about`, the docstring of a command, as it is."""
    return argparse.ArgumentParser(
        prog=name, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
