"""Checks of arguments that the commands share."""

import argparse

from lrm_jax.types import InputError


def check_ranges(args: argparse.Namespace, **limits: tuple[float, float]) -> None:
    """Raises InputError for a number of the command line that is outside its (low, high); None is inside."""
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name} {value} is out of range: choose {low} to {high}")
