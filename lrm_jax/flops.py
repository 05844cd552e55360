"""Operations of a traced function, and what the device could do: for model FLOPs utilisation (MFU).

MFU as in PaLM (https://arxiv.org/abs/2204.02311, appendix B): operations of the model's matrix products that the step has to do
(`step.needed_flops`: none repeated by rematerialisation, none of the losses' networks), over time, as a share of the peak rate.
"""

import math
import time

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

# Dense bfloat16 operations per second of one chip, by jax's `device_kind`; from the makers' data sheets.
PEAK = {
    "NVIDIA A100": 312e12,  # https://www.nvidia.com/en-us/data-center/a100/
    "NVIDIA H100": 989e12,  # SXM: https://www.nvidia.com/en-us/data-center/h100/
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,  # https://cloud.google.com/tpu/docs/v4
    "TPU v5 lite": 197e12,  # https://cloud.google.com/tpu/docs/v5e
    "TPU v5": 459e12,  # https://cloud.google.com/tpu/docs/v5p
    "TPU v6 lite": 918e12,  # https://cloud.google.com/tpu/docs/v6e
}


def count(function, *arguments) -> float:
    """Operations of the matrix products and convolutions of `function(*arguments)` (arrays or their shapes), traced, not run."""
    # A function that is jitted with options for the compiler cannot be traced inside of another.
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    return count_jaxpr(jitted.trace(*arguments).jaxpr.jaxpr)


def count_jaxpr(jaxpr, only_in_kernels: bool = False) -> float:
    """Operations of a jaxpr's products: 2 a multiplication; bodies of scans, kernels and shard_map as often as they run.

    Of alternatives (the attention of each platform), the costliest counts.

    Args:
      only_in_kernels: Pallas's, which a compiler takes as they are and does not look into.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        output = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if only_in_kernels and name in ("dot_general", "conv_general_dilated"):
            continue
        if name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * output * math.prod(left[i] for i in contracting)
        elif name == "conv_general_dilated":
            kernel, spec = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
            total += 2 * output * math.prod(kernel) / kernel[spec.rhs_spec[0]]
        inner = [
            count_jaxpr(sub, only_in_kernels and name != "pallas_call")
            for sub in jaxprs_in_params(equation.params)
        ]
        if name == "cond":
            total += max(inner)
        elif name == "pallas_call":
            total += sum(inner) * math.prod(equation.params["grid_mapping"].grid)
        elif name == "shard_map":
            total += sum(inner) * equation.params["mesh"].size
        else:
            total += sum(inner) * equation.params.get("length", 1)
    return total


def peak_rate() -> float:
    """Operations per second of all devices: from `PEAK`, or measured with one product (about a second) where it has no entry.

    It is measured in float32 on a CPU, in bfloat16 elsewhere.
    """
    devices = jax.devices()
    for kind in sorted(PEAK, key=len, reverse=True):
        if devices[0].device_kind.startswith(kind):
            return PEAK[kind] * len(devices)
    # Virtual CPU devices share the cores, which one product keeps busy.
    cpu = devices[0].platform == "cpu"
    size, dtype, count = (1024, jnp.float32, 1) if cpu else (8192, jnp.bfloat16, len(devices))
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        product(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return count * 2 * size**3 / min(times)
