"""Tolerances by platform for comparison with tensors that a reference computed on a CPU."""

import jax


def tolerance(on_cpu: float) -> float:
    """The tolerance for a comparison with a golden tensor: the given one on a CPU, ten times as much elsewhere.

    A GPU sums in another order, in tiles and with atomic additions, and has its own exp, rsqrt and erf. Norms and the exponential of the
    field amplify its rounding errors. Its products are in float32, as on a CPU, because conftest.py turns TF32 off.
    """
    return on_cpu if jax.default_backend() == "cpu" else 10 * on_cpu
