"""Counts the operations of a traced function and knows the peak rate of devices, for model FLOPs utilisation (MFU).

MFU is defined as in PaLM (https://arxiv.org/abs/2204.02311, appendix B): the operations per second of the model's matrix
products, as a share of the peak rate. Only operations that a step needs count (`step.needed_flops`): none that rematerialisation
repeats, and none of the losses' networks.
"""

import collections
import math
import re
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

# Dense bfloat16 operations per second of one chip, by JAX's `device_kind`, from the manufacturers' data sheets.
PEAK = {
    "NVIDIA A100": 312e12,  # https://www.nvidia.com/en-us/data-center/a100/
    "NVIDIA H100": 989e12,  # SXM: https://www.nvidia.com/en-us/data-center/h100/
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,  # https://cloud.google.com/tpu/docs/v4
    "TPU v5 lite": 197e12,  # https://cloud.google.com/tpu/docs/v5e
    "TPU v5": 459e12,  # https://cloud.google.com/tpu/docs/v5p
    "TPU v6 lite": 918e12,  # https://cloud.google.com/tpu/docs/v6e
}

Product = tuple[int, int, int]  # rows, columns, and depth (the summed dimension)
Shapes = tuple[tuple[int, ...], ...]
_CUDNN_ATTENTION = re.compile(r"dot_product_attention_(?:fp8_)?(fwd|bwd)(?:_wrapper)?")


def count(function, *arguments) -> float:
    """Operations of the matrix products and convolutions in `function(*arguments)`, which is traced but not run.

    The arguments may be arrays or their shapes.
    """
    # A function that is jitted with compiler options cannot be traced inside another.
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    return count_jaxpr(jitted.trace(*arguments).jaxpr.jaxpr)


def count_jaxpr(jaxpr, only_in_kernels: bool = False) -> float:
    """Operations of a jaxpr's products, 2 per multiplication: see `products`."""
    return total(products(jaxpr, only_in_kernels))


def total(products: Mapping[Product, float]) -> float:
    """Operations of products, 2 per multiplication."""
    return sum(2.0 * times * math.prod(sizes) for sizes, times in products.items())


def products(jaxpr, only_in_kernels: bool = False) -> collections.Counter[Product]:
    """How often each size of matrix product runs, including repetitions in scans, kernels and shard_map.

    If there are alternatives (such as the attention for each platform), only the most expensive one counts. A convolution counts
    as the matrix product of its patches, and cuDNN's attention as the products that it runs: see `attention_products`.

    Args:
      only_in_kernels: count only products in Pallas kernels. Compilers do not see into these.
    """
    found = collections.Counter()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if not only_in_kernels:
            found.update(_own_products(equation))
        inner = [
            products(sub, only_in_kernels and name != "pallas_call")
            for sub in jaxprs_in_params(equation.params)
        ]
        if name == "cond":
            inner = [max(inner, key=total)]
        times = _repetitions(equation)
        for sub in inner:
            found.update({sizes: times * count for sizes, count in sub.items()})
    return found


def kernels(jaxpr) -> dict[Shapes, collections.Counter[Product]]:
    """The products of one call of each Pallas kernel, by the shapes of its operands and results on one device."""
    found = {}
    for equation in jaxpr.eqns:
        inner = [kernels(sub) for sub in jaxprs_in_params(equation.params)]
        if equation.primitive.name == "pallas_call":
            shapes = tuple(tuple(x.aval.shape) for x in (*equation.invars, *equation.outvars))
            (body,) = jaxprs_in_params(equation.params)
            times = _repetitions(equation)
            inner = [{shapes: collections.Counter({sizes: times * count for sizes, count in products(body).items()})}]  # fmt: skip
        for shapes, counts in (item for sub in inner for item in sub.items()):
            found[shapes] = max(found.get(shapes, collections.Counter()), counts, key=total)
    return found


def attention_products(
    kind: str, batch: int, heads: int, queries: int, keys: int, width: int, value_width: int
) -> dict[Product, float]:
    """The products of one call of cuDNN's fused attention, ignoring masks.

    Args:
      kind: "forward" has two products: the scores, and weights times values. "backward" has five: the scores again, and the
        gradients of weights, values, queries and keys. Without fusion, the backward pass has four, since the weights are kept.
    """
    scores, result = (queries, keys, width), (queries, value_width, keys)
    sizes = [scores, result]
    if kind == "backward":
        weights, values = (queries, keys, value_width), (keys, value_width, queries)
        sizes = [scores, weights, values, (queries, width, keys), (keys, width, queries)]
    found = collections.Counter()
    for product in sizes:
        found[product] += batch * heads
    return found


def _own_products(equation) -> dict[Product, float]:
    """The products of one equation, without those of jaxprs inside it."""
    name = equation.primitive.name
    if name == "dot_general":
        (contracting, _), (batch, _) = equation.params["dimension_numbers"]
        left, right = (x.aval.shape for x in equation.invars[:2])
        depth = math.prod(left[i] for i in contracting)
        times = math.prod(left[i] for i in batch)
        rows, columns = (math.prod(x) // max(1, depth * times) for x in (left, right))
        return {(rows, columns, depth): times}
    if name == "conv_general_dilated":
        kernel, spec = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
        columns = kernel[spec.rhs_spec[0]]
        rows = math.prod(equation.outvars[0].aval.shape) // columns
        return {(rows, columns, math.prod(kernel) // columns): 1}
    if match := _CUDNN_ATTENTION.fullmatch(name):
        query, key, value = (x.aval.shape for x in equation.invars[:3])
        if equation.params["layout"] == 1:  # B N L K
            query, key, value = ((x[0], x[2], x[1], x[3]) for x in (query, key, value))
        batch, queries, heads, width = query
        kind = "forward" if match[1] == "fwd" else "backward"
        return attention_products(kind, batch, heads, queries, key[1], width, value[3])
    return {}


def _repetitions(equation) -> int:
    """How often the jaxprs inside an equation run."""
    if equation.primitive.name == "pallas_call":
        return math.prod(equation.params["grid_mapping"].grid)
    if equation.primitive.name == "shard_map":
        return equation.params["mesh"].size
    return equation.params.get("length", 1)


def peak_rate() -> float:
    """Operations per second of all devices, from `PEAK`, or measured with one matrix product if `PEAK` has no entry.

    Measuring takes about a second. It uses float32 on CPUs and bfloat16 elsewhere.
    """
    devices = jax.devices()
    for kind in sorted(PEAK, key=len, reverse=True):
        if devices[0].device_kind.startswith(kind):
            return PEAK[kind] * len(devices)
    # Virtual CPU devices share the cores, and one product keeps all cores busy.
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
