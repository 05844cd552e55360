"""The software versions and devices that computed a result."""

import platform

import flax
import jax
import numpy as np

import lrm_jax


def versions() -> dict[str, str]:
    """The versions and devices, by name."""
    return {
        "lrm_jax": lrm_jax.__version__,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
