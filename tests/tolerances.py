"""How near results are to tensors that a reference computed on a CPU, by platform."""

import jax


def tolerance(on_cpu: float) -> float:
    """The tolerance of a comparison with a golden tensor: as given on a CPU, ten times as much elsewhere.

    A GPU sums in another order, in tiles and by atomic additions, and has its own exp, rsqrt and erf; what its sums lose is
    amplified by norms and by the field's exponential. Its products are in float32 like a CPU's: conftest.py turns TF32 off.
    """
    return on_cpu if jax.default_backend() == "cpu" else 10 * on_cpu
