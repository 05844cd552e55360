"""Checks of arguments that several commands share."""

import argparse

from lrm_jax.types import InputError


def check_ranges(args: argparse.Namespace, **limits: tuple[float, float]) -> None:
    """Raises InputError if an argument is outside its (low, high). An argument that is None is not checked."""
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {value} is out of range: choose {low} to {high}")
