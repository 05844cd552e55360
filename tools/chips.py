"""Chips that this machine need not have: their makers' numbers, their descriptions for the compiler, and the costs of a program on them."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping

import hlo
import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from lrm_jax.kernels import attention_cuda
from lrm_jax.training import flops
from lrm_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip."""

    flops: float  # operations per second, bfloat16
    memory: float  # bytes
    bandwidth: float  # bytes per second of that memory
    links: float  # bytes per second that leave the chip when all links are busy; for a GPU, links to GPUs of the same host
    tile: tuple[int, int, int]  # rows, columns and depth of the smallest product of the matrix unit
    lookups: Mapping[str, float]  # bytes per second, see `lookup_seconds`
    network: float = 0.0  # bytes per second between hosts, for each GPU
    target: str = ""  # XLA's description of a GPU


def _tpu(peak, gib, bandwidth, links, tile, lookups):
    # XLA's cost analysis (`optimal_seconds`) in libtpu 0.0.52 charges for each row that is looked up all 8 rows of its tile, over the
    # row's width. For each row that is added to, it charges reading and writing them. tests/tools/test_chips.py checks that the rates
    # here give the same times.
    rates = {"gather": lookups, "scatter-add": lookups / 2, "scatter": lookups / 2}
    return Chip(peak, gib * 2**30, bandwidth, links, (8, tile, tile), rates)


def _gpu(peak, bandwidth, links, network, tile, target, lookups):
    # Measured on one H200 for 25,165,824 rows of 64 channels (2,097,152 points, four corners in three planes): reading takes 1.1 ms in
    # bfloat16 from L2. Adding takes 12.4 ms in float32 and 4.19 s in bfloat16. Other GPUs are assumed to have the same rate per core and
    # clock.
    rates = {"gather": 2.9e12, "scatter-add": 0.52e12, "scatter-add of 16 bits": 0.77e9}
    rates = {kind: rate * lookups for kind, rate in rates.items()} | {"scatter": bandwidth / 2}
    memory = float(re.search(r"device_memory_size: (\d+)", target)[1])
    return Chip(peak, memory, bandwidth, links, tile, rates, network, target)


def _target(name, cores, fpus, shared, shared_optin, bandwidth, l2, clock, memory, major):
    """XLA's description of a GPU."""
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth:.0f} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory} shared_memory_per_block_optin: {shared_optin} cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 14 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""


# The makers' numbers. TPUs: https://cloud.google.com/tpu/docs/v4, v5p, v5e and v6e. Their links are the number of links (6 in a 3-D, 4 in
# a 2-D torus) times the one-way rate of one link in https://jax-ml.github.io/scaling-book/tpus. GPUs:
# https://www.nvidia.com/en-us/data-center/h100/ and a100/ (H100 SXM, A100 SXM of 40 GB), with NVLink one way. The rates between hosts are
# an assumption: one adapter per GPU, NDR of 400 Gb/s with an H100 or H200, HDR of 200 Gb/s with an A100. Tiles of GPUs are the smallest
# of Hopper's wgmma and of Ampere's mma in 16 bits.
CHIPS = {
    "v4": _tpu(flops.PEAK["TPU v4"], 32, 1.2e12, 6 * 45e9, 128, 0.983e12),
    "v5p": _tpu(flops.PEAK["TPU v5"], 95, 2.765e12, 6 * 90e9, 128, 2.35e12),
    "v5e": _tpu(flops.PEAK["TPU v5 lite"], 16, 0.819e12, 4 * 45e9, 128, 0.738e12),
    "v6e": _tpu(flops.PEAK["TPU v6 lite"], 32, 1.64e12, 4 * 90e9, 256, 1.638e12),
    "a100": _gpu(
        flops.PEAK["NVIDIA A100"], 1.555e12, 300e9, 25e9, (16, 8, 16),
        _target("NVIDIA A100-SXM4-40GB", 108, 64, 167936, 166912, 1.5552e12, 41943040, 1.41, 42481549312, 8),
        (108 * 1.41) / (132 * 1.98),
    ),
    "h100": _gpu(
        flops.PEAK["NVIDIA H100"], 3.35e12, 450e9, 50e9, (64, 8, 16),
        _target("NVIDIA H100 80GB HBM3", 132, 128, 233472, 232448, 3.35232e12, 52428800, 1.98, 84929347584, 9),
        1.0,
    ),
    "h200": _gpu(
        flops.PEAK["NVIDIA H200"], 4.8e12, 450e9, 50e9, (64, 8, 16),
        _target("NVIDIA H200", 132, 128, 233472, 232448, 4.8e12, 52428800, 1.98, 150754820096, 9),
        1.0,
    ),
}  # fmt: skip


# -- costs of a program's parts


def tiled_flops(products: Mapping[flops.Product, float], tile: tuple[int, int, int]) -> float:
    """Operations of the whole tiles that products fill. The rows are the longer of the two sides that are not summed over.

    A TPU's tile is 128 x 128 (v6e: 256 x 256) columns x depth, and rows pass through it in groups of eight. A product with 64 columns
    and a depth of 64 takes as long as one that is four times as large (v6e: 16 times).
    """

    def padded(sizes):
        *sides, depth = sizes
        sizes = max(sides), min(sides), depth
        return tuple(-(-size // unit) * unit for size, unit in zip(sizes, tile, strict=True))

    return sum(2.0 * times * math.prod(padded(sizes)) for sizes, times in products.items())


def lookup_seconds(lookups: Mapping[hlo.Lookup, float], chip: Chip) -> float:
    """Time of gathers and scatters, from XLA's own estimate for a TPU, and from measurements for a GPU.

    GPU memory has no tiles. It moves in sectors of 32 bytes.
    """
    seconds = 0.0
    for lookup, count in lookups.items():
        kind = lookup.kind
        if chip.target and kind == "scatter-add" and lookup.dtype in ("bf16", "f16"):
            kind = "scatter-add of 16 bits"
        touched = -(-lookup.window // 32) * 32 if chip.target else lookup.touched
        seconds += count * touched / chip.lookups[kind]
    return seconds


def link_seconds(links: Mapping[int, float], chip: Chip) -> float:
    """Time to send the data of collectives. If a group spans several hosts of GPUs, it uses the adapters of its devices in one host."""
    return sum(
        sent / (min(chip.links, devices * chip.network) if devices and chip.network else chip.links)
        for devices, sent in links.items()
    )


# -- devices


def open_topology(name: str) -> list:
    """The devices of a topology, which this machine need not have.

    Raises:
      InputError: there is no such topology, or no installed library compiles for it.
    """
    if name == "cpu":
        return jax.devices("cpu")[:1]
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if match is None or match[1] not in CHIPS:
        raise InputError(
            f"--topology {name}: must be cpu, or one of {', '.join(CHIPS)} with the chips along each axis, such as v4:4x4x4; for GPUs "
            "with the number of GPUs, or hosts x GPUs, such as h100:8 or a100:16x8"
        )
    if CHIPS[match[1]].target:
        return _gpus(name, CHIPS[match[1]], match[2])
    return _tpus(name, match[1], match[2])


def _tpus(name: str, kind: str, sizes: str) -> list:
    # Without these, libtpu asks the cloud's metadata server about this machine's chips, and only one program can use it at a time.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ.update(TPU_ACCELERATOR_TYPE="v4-8", TPU_WORKER_HOSTNAMES="localhost")
    options = {}
    if kind in ("v4", "v5p"):
        options["chip_config_name"] = "megacore"  # the two cores of a chip as one device
    if set(sizes.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise InputError(
            f'--topology {name}: {cause}: this needs libtpu (pip install "jax[tpu]"), and a size in which the chip exists'
        ) from None


def _gpus(name: str, chip: Chip, sizes: str) -> list:
    # JAX reads these when it starts its back ends. Then it uses no GPU of this machine, and a missing GPU or driver is no error.
    os.environ.update(CUDA_VISIBLE_DEVICES="-1", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1")
    if attention_cuda.HOPPER_OR_LATER.search(chip.target):
        # JAX asks the GPU of this machine whether heads may be wider than 128.
        fused_attention_stablehlo.check_compute_capability = lambda _: True
    sizes = [int(x) for x in sizes.split("x")]
    hosts, per_host = sizes if len(sizes) == 2 else (1, *sizes[:1])
    try:
        if len(sizes) > 2:
            raise ValueError("more than hosts x GPUs")
        return topologies.get_topology_desc(
            platform="cuda", target_config=chip.target, topology=f"1x{hosts}x{per_host}"
        ).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise InputError(
            f'--topology {name}: {cause}: this needs pip install "jax[cuda13]", and the number of GPUs, or hosts x GPUs'
        ) from None
