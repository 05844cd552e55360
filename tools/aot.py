"""Compiles a config's training step for a TPU pod, without a TPU, and says what one chip holds, does and sends.

    python tools/aot.py --topology v4:4x4x4 --config configs/lrm.py [--config.data.batch_size=512]
    python tools/aot.py --topology v4:1x1x1 --config configs/lrm.py --config.data.batch_size=8

Topologies: v4:XxYxZ, v5p:XxYxZ, v5e:XxY and v6e:XxY with the chips along each axis, from `pip install "jax[tpu]"` (a later
libtpu compiles, but not all of what it says can be read); or cpu, for one CPU device. There is none for GPUs, whose compiler wants to see one.

Printed: memory of a chip; its collectives with their payload and the bytes that it sends; its matrix products, beside its share of
those in the step as it was traced; and the shortest time that its arithmetic, its memory and its links each allow, of which
the longest is a bound on the step. Counts are read from the compiled program, loops included (tools/hlo.py); what a Pallas
kernel (attention) computes is as traced, and its inputs are taken to be read once. Nothing is measured. Exit code 1: it does not fit.
"""

import argparse
import dataclasses
import os
import re
import sys
import time
from pathlib import Path

import jax
from jax.experimental import topologies

sys.path.insert(0, str(Path(__file__).parent))
import hlo  # noqa: E402

from lrm_jax import flops, losses, sharding, train  # noqa: E402
from lrm_jax.step import needed_flops  # noqa: E402
from lrm_jax.types import InputError  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the maker says of one chip."""

    flops: float  # a second, bfloat16
    memory: float  # bytes
    bandwidth: float  # bytes a second, of that memory
    links: float  # bytes a second that leave the chip when all its links to others are busy


# https://cloud.google.com/tpu/docs/v4, v5p, v5e and v6e for arithmetic and memory; links: their number (6 in a 3-D, 4 in a 2-D
# torus) times the one-way rate of one in https://jax-ml.github.io/scaling-book/tpus.
CHIPS = {
    "v4": Chip(flops.PEAK["TPU v4"], 32 * 2**30, 1.2e12, 6 * 45e9),
    "v5p": Chip(flops.PEAK["TPU v5"], 95 * 2**30, 2.765e12, 6 * 90e9),
    "v5e": Chip(flops.PEAK["TPU v5 lite"], 16 * 2**30, 0.819e12, 4 * 45e9),
    "v6e": Chip(flops.PEAK["TPU v6 lite"], 32 * 2**30, 1.64e12, 4 * 90e9),
}


def main(argv: list[str]) -> int:
    """Compiles and prints. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )  # fmt: skip
    parser.add_argument("--topology", required=True, help="v4:4x4x4, v5e:16x16, ...; or cpu")
    args, rest = parser.parse_known_args(argv)
    jax.config.update("jax_platforms", "cpu")
    try:
        config, *_ = train.parse([*rest, "--workdir", "unused"])
        devices = open_topology(args.topology)
        traced, needed = trace(config, devices)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    start = time.perf_counter()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"does not fit {args.topology}: {str(error).splitlines()[0]}")
        return 1
    seconds = time.perf_counter() - start
    shape = ", ".join(f"{axis} {size}" for axis, size in device_mesh_shape(config, devices).items())
    print(f"{config.model.name}:{config.model.variant} on {len(devices)} x {devices[0].device_kind} ({args.topology}: {shape})")  # fmt: skip
    print(f"batch {config.data.batch_size}, compiled in {seconds:.0f} s; one chip:\n")
    chip = CHIPS.get(args.topology.split(":")[0])
    print_memory(compiled.memory_analysis(), chip)
    try:
        costs = hlo.count(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:
        print(
            f"this jax cannot read what this libtpu compiled ({str(error).splitlines()[0]}): "
            'pip install "jax[tpu]" takes one that it can',
            file=sys.stderr,
        )
        return 2
    print_collectives(costs)
    jaxpr = traced.jaxpr.jaxpr
    share = flops.count_jaxpr(jaxpr) / len(devices)
    costs.flops += flops.count_jaxpr(jaxpr, only_in_kernels=True) / len(devices)
    print_work(costs, share, needed / len(devices))
    if chip is not None:
        print_roofline(costs, chip, needed / len(devices), config.data.batch_size)
    return 0


def open_topology(name: str) -> list:
    """The devices of a topology that need not exist.

    Raises:
      InputError: no such topology, or no libtpu.
    """
    if name == "cpu":
        return jax.devices("cpu")[:1]
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if match is None or match[1] not in CHIPS:
        raise InputError(
            f"--topology {name}: must be cpu, or one of {', '.join(CHIPS)} with the chips along each axis, as v4:4x4x4"
        )
    # It would ask the cloud's metadata server about the chips of this machine, and other programs may use the library too.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ.update(TPU_ACCELERATOR_TYPE="v4-8", TPU_WORKER_HOSTNAMES="localhost")
    options = {}
    if match[1] in ("v4", "v5p"):
        options["chip_config_name"] = "megacore"  # the two cores of a chip as one device
    if set(match[2].split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise InputError(
            f'--topology {name}: {cause}: it needs libtpu (pip install "jax[tpu]"), and sizes that the chip comes in'
        ) from None


def trace(config, devices: list):
    """The training step of a config, traced for these devices, and the operations that it cannot do without.

    Nothing is allocated.

    Raises:
      InputError: as `lrm train`.
    """
    device_mesh = sharding.make_device_mesh(**config.sharding, devices=devices)
    train.check_batch_size(config, device_mesh)
    with jax.set_mesh(device_mesh):
        run = train.make_run(config, device_mesh)
        batch = train.abstract_batch(config, device_mesh, config.data.batch_size)
        traced = run.step.trace(run.abstract_state, batch, losses.abstract_networks(config.losses))
    return traced, needed_flops(run.model, config.train.patch, run.abstract_state.params, batch)


def device_mesh_shape(config, devices: list) -> dict[str, int]:
    """Sizes of the device mesh's axes."""
    return dict(sharding.make_device_mesh(**config.sharding, devices=devices).shape)


# -- what is printed


def print_memory(memory, chip: Chip | None) -> None:
    """What XLA's buffer assignment says."""
    rows = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    print(f"{'memory':24s} {'GB':>10s}")
    for name, size in rows.items():
        print(f"  {name:22s} {size / 1e9:10.2f}")
    total = sum(rows.values())
    of_chip = f"   {total / chip.memory:.0%} of {chip.memory / 1e9:.1f}" if chip else ""
    print(f"  {'in all':22s} {total / 1e9:10.2f}{of_chip}\n")


def print_collectives(costs: hlo.Costs) -> None:
    """Counts and bytes of a step, by kind."""
    print(f"{'collectives':24s} {'number':>10s} {'payload GB':>12s} {'sent GB':>10s}")
    for kind, traffic in sorted(costs.collectives.items()):
        print(f"  {kind:22s} {traffic.count:10.0f} {traffic.payload / 1e9:12.3f} {traffic.sent / 1e9:10.3f}")  # fmt: skip
    if not costs.collectives:
        print("  none")
    print()


def print_work(costs: hlo.Costs, share: float, needed: float) -> None:
    """Matrix products as compiled, and memory traffic."""
    print(f"{'work':24s} {'TFLOP':>10s}")
    print(f"  {'forward x 3':22s} {needed / 1e12:10.2f}   this chip's share of the model's products, none done twice")  # fmt: skip
    print(f"  {'step as traced':22s} {share / 1e12:10.2f}   with rematerialisation and the losses' networks")  # fmt: skip
    print(f"  {'step as compiled':22s} {costs.flops / 1e12:10.2f}   {costs.flops / share:.2f} of the share: above 1 is work that chips repeat")  # fmt: skip
    print(f"  memory traffic {costs.memory_bytes / 1e9:.0f} GB")
    if costs.loops_of_unknown_length:
        print(f"  {costs.loops_of_unknown_length} loops of unknown length were counted once")
    print()


def print_roofline(costs: hlo.Costs, chip: Chip, needed: float, batch_size: int) -> None:
    """The shortest times that arithmetic, memory and links allow."""
    sent = sum(traffic.sent for traffic in costs.collectives.values())
    times = {
        "arithmetic": (costs.flops / chip.flops, f"{chip.flops / 1e12:.0f} TFLOP/s"),
        "memory": (costs.memory_bytes / chip.bandwidth, f"{chip.bandwidth / 1e9:.0f} GB/s"),
        "links": (sent / chip.links, f"{chip.links / 1e9:.0f} GB/s"),
    }
    print(f"{'roofline':24s} {'seconds':>10s}")
    for name, (seconds, rate) in times.items():
        print(f"  {name:22s} {seconds:10.3f}   at {rate}")
    bound = max(times, key=lambda name: times[name][0])
    seconds = times[bound][0]
    print(f"bound by {bound}: at best {batch_size / seconds:.0f} samples/s, MFU {needed / chip.flops / seconds:.0%}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
