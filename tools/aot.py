"""Compiles a config's training step and evaluation for chips that this machine does not have, and prints their costs per chip.

    python tools/aot.py --topology v4:4x4x4 --config configs/lrm.py [--config.data.batch_size=512]
    python tools/aot.py --topology v4:1x1x1 --config configs/lrm.py --config.data.batch_size=8
    python tools/aot.py --topology h100:1 --config configs/openlrm.py:base --config.data.batch_size=8
    python tools/aot.py --topology a100:16x8 --config configs/lrm.py
    python tools/aot.py --topology h100:1 --config configs/zero123.py --inference 28

Topologies:
  v4:XxYxZ, v5p:XxYxZ, v5e:XxY, v6e:XxY    chips along each axis. They need `pip install "jax[tpu]"`. A later libtpu compiles too,
                                           but this jax may be unable to read all of its programs
  h100:N, h200:N, a100:N (of 40 GB)        number of GPUs, or hosts x GPUs. They need `pip install "jax[cuda13]"`
  cpu                                      one CPU device

With --inference N, it compiles what inference does instead, on one chip: "encode", the scene of the config's number of source views, and
"render", one view of it; for a model that draws views, "draw", N views from as many images.

Printed for one chip:
  * its memory;
  * its collectives with their payload, the bytes that it sends, and the part that no matrix product hides;
  * cuDNN calls, and scatters that add;
  * its matrix products, beside its share of the products as traced;
  * the shortest time that its arithmetic, its memory and its links each allow.

Counts are read from the compiled program, loops included (tools/hlo.py). The time of a product depends on the tiles that it fills. The
time of a lookup comes from the compiler's estimate or from a measurement (tools/chips.py), and nothing else runs during it. The inputs of
a Pallas kernel count as read once, unless its cost estimate is higher. Lookups and additions inside a kernel are not known.
Nothing is measured. JAX takes 75 % of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION is higher.

Exit code: 0 both programs fit; 1 one of them does not fit; 2 wrong usage, or a compiled program cannot be read.
"""

import argparse
import sys
import time
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parent))
import chips  # noqa: E402
import hlo  # noqa: E402

from lrm_jax.commands import train
from lrm_jax.parallel import sharding
from lrm_jax.training import (
    flops,
    setup,  # noqa: E402
)
from lrm_jax.training.step import needed_flops  # noqa: E402
from lrm_jax.types import Cameras, InputError, Rays, Views  # noqa: E402
from lrm_jax.weights import references  # noqa: E402


def main(argv: list[str]) -> int:
    """Compiles and prints. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )  # fmt: skip
    parser.add_argument("--topology", required=True, help="chips to compile for: v4:4x4x4, v5e:16x16, h100:8, a100:16x8, ...; or cpu")  # fmt: skip
    parser.add_argument("--inference", type=int, metavar="N", help="compile inference, with N drawn views, not a training step")  # fmt: skip
    args, rest = parser.parse_known_args(argv)
    jax.config.update("jax_platforms", "cpu")
    try:
        config = train.parse([*rest, "--workdir", "unused"]).config
        devices = chips.open_topology(args.topology)
        device_mesh = sharding.make_device_mesh(**config.sharding, devices=devices)
        if args.inference is None:
            programs = setup.trace_programs(config, device_mesh)
            needed = {"step": needed_by_step(config, device_mesh) / len(devices)}
        else:
            programs, needed = trace_inference(config, device_mesh, args.inference), {}
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    shape = ", ".join(f"{axis} {size}" for axis, size in device_mesh.shape.items())
    print(f"{config.model.name}:{config.model.variant} on {len(devices)} x {devices[0].device_kind} ({args.topology}: {shape})")  # fmt: skip
    batch = f"{args.inference} views" if args.inference else f"batch {config.data.batch_size}"
    print(f"{batch}; of one chip:\n", flush=True)
    chip = chips.CHIPS.get(args.topology.split(":")[0])
    fits, kept = True, 0
    for name, traced in programs.items():
        program, note = compiled(traced, device_mesh)
        if program is None:
            print(f"{name}: does not fit: {note}\n")
            fits = False
            continue
        rows = memory_rows(program.memory_analysis(), kept)
        fits &= print_memory(name, rows, chip, note)
        kept = rows["arguments"]
        try:
            costs = read(program, traced, device_mesh)
        except (Unreadable, hlo.UnknownCost) as error:
            print(error, file=sys.stderr)
            return 2
        print_collectives(costs)
        if devices[0].platform == "gpu":
            print_calls(costs)
        own_flops = flops.count_jaxpr(traced.jaxpr.jaxpr) / len(devices)
        print_work(costs, own_flops, needed.get(name), chip)
        if chip is not None and name in needed:
            print_roofline(costs, chip, needed[name], config.data.batch_size)
    return 0 if fits else 1


class Unreadable(Exception):
    """This jax cannot write the text of a compiled program."""


def compiled(traced, device_mesh):
    """Compiles a traced program for the device mesh. Returns it and how long that took, or None and why it does not fit."""
    start = time.perf_counter()
    gpu = device_mesh.devices.flat[0].platform == "gpu"
    try:
        # Without this, a program traced for a GPU that is not there would be lowered for the CPU.
        lowered = traced.lower(lowering_platforms=("cuda",)) if gpu else traced.lower()
        return lowered.compile(), f"compiled in {time.perf_counter() - start:.0f} s"
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, str(error).splitlines()[0]


def read(compiled, traced, device_mesh) -> hlo.Costs:
    """Counts the costs of a compiled program from its text.

    Raises:
      Unreadable: jax cannot write the text.
      hlo.UnknownCost: the program has a kernel of unknown cost.
    """
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise Unreadable(
            f"this jax cannot read what this libtpu compiled ({str(error).splitlines()[0]}): "
            'pip install "jax[tpu]" installs a version that it can read'
        ) from None
    gpu = device_mesh.devices.flat[0].platform == "gpu"
    hosts = [device.process_index for device in device_mesh.devices.flat] if gpu else []
    return hlo.count(text, flops.kernels(traced.jaxpr.jaxpr), hosts)


def trace_inference(config, device_mesh, num_views: int) -> dict[str, jax.stages.Traced]:
    """The programs of inference, traced for the device mesh: see the help."""
    model = setup.build_model(**config.model)
    params = references.param_shapes(model)

    def views(count, num_source):
        size = model.image_size
        cameras = Cameras(array(count, num_source, 4, 4), array(count, num_source, 4))
        return Views(array(count, num_source, size, size, 3), cameras)

    def rays(count, size):
        return Rays(array(count, 1, size, size, 3), array(count, 1, size, size, 3))

    def encode(params, source):
        return model.apply({"params": params}, source, method="encode")

    def render(params, scene, rays, *keys):
        return model.apply({"params": params}, scene, rays, *keys, method="render")

    def draw(params, source, rays, keys):
        return render(params, encode(params, source), rays, keys)

    with jax.set_mesh(device_mesh):
        if hasattr(model, "prepare") and not hasattr(model, "query"):
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_views))
            of_all = (views(num_views, 1), rays(num_views, model.image_size), keys)
            return {"draw": jax.jit(draw).trace(params, *of_all)}
        source = views(1, config.data.num_source)
        scene = jax.eval_shape(encode, params, source)
        return {
            "encode": jax.jit(encode).trace(params, source),
            "render": jax.jit(render).trace(params, scene, rays(1, model.image_size)),
        }


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, "float32")


def needed_by_step(config, device_mesh) -> float:
    """Operations that a training step cannot avoid, on all chips together."""
    run = setup.make_run(config, device_mesh)
    batch = setup.abstract_batch(config, device_mesh, config.data.batch_size)
    with jax.set_mesh(device_mesh):
        return needed_flops(run.model, config.train.patch, run.abstract_state.params, batch)


# -- output


def memory_rows(memory, kept: int) -> dict[str, int]:
    """Bytes by purpose, from XLA's buffer assignment.

    Args:
      kept: bytes of the step's arguments. They stay in memory while an evaluation uses a few of them. 0 for the step itself.
    """
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
        "kept for the step": max(0, kept - memory.argument_size_in_bytes),
    }


def print_memory(name: str, rows: dict[str, int], chip: chips.Chip | None, note: str) -> bool:
    """Prints the memory of one chip. Returns whether the program fits."""
    total = sum(rows.values())
    fits = chip is None or total <= chip.memory
    of_chip = f", {total / chip.memory:.0%} of {chip.memory / 1e9:.1f}" if chip else ""
    print(f"{name}: {total / 1e9:.2f} GB in all{of_chip}{'' if fits else ': does not fit'}; {note}\n")  # fmt: skip
    print(f"  {'memory':26s} {'GB':>10s}")
    for row, size in rows.items():
        print(f"    {row:24s} {size / 1e9:10.2f}")
    print(flush=True)
    return fits


def print_collectives(costs: hlo.Costs) -> None:
    """Prints counts and bytes of collectives by kind. "Exposed": no matrix product runs between start and end, or it is synchronous."""
    if not costs.collectives:
        print("  collectives: none\n")
        return
    print(f"  {'collectives':26s} {'number':>10s} {'payload GB':>12s} {'sent GB':>10s} {'exposed':>10s} {'sent GB':>10s}")  # fmt: skip
    for kind, traffic in sorted(costs.collectives.items()):
        print(
            f"    {kind:24s} {traffic.count:10.0f} {traffic.payload / 1e9:12.3f} {traffic.sent / 1e9:10.3f} "
            f"{traffic.exposed_count:10.0f} {traffic.exposed_sent / 1e9:10.3f}"
        )
    print("    exposed: no matrix product runs between its start and its end\n")


def print_calls(costs: hlo.Costs) -> None:
    """Prints cuDNN calls by kind, and by dtype the scatters that add, which devices do one after the other."""
    print(f"  {'calls':26s} {'written':>10s} {'run':>10s}")
    kinds = {"cuDNN attention forward", "cuDNN attention backward"}
    kinds |= {"scatter-add of f32", "scatter-add of bf16", "scatter-add of f16"}
    for kind in sorted(kinds | set(costs.calls)):
        calls = costs.calls.get(kind, hlo.Calls())
        print(f"    {kind:24s} {calls.written:10d} {calls.count:10.0f}")
    print()


def print_work(costs: hlo.Costs, own_flops: float, needed: float | None, chip: chips.Chip | None) -> None:  # fmt: skip
    """Prints matrix products as compiled, lookups and memory traffic."""
    print(f"  {'work':26s} {'TFLOP':>10s}")
    if needed is not None:
        print(f"    {'forward x 3':24s} {needed / 1e12:10.2f}   this chip's share of the model's products, without recomputation")  # fmt: skip
    print(f"    {'as traced':24s} {own_flops / 1e12:10.2f}   with recomputation and the networks of the losses")  # fmt: skip
    print(f"    {'as compiled':24s} {costs.flops / 1e12:10.2f}   {costs.flops / own_flops:.2f} of the share; above 1: chips repeat work")  # fmt: skip
    if chip is not None:
        rows, columns, depth = chip.tile
        print(f"    {'in whole tiles':24s} {tiled(costs, chip) / 1e12:10.2f}   of {rows} rows x {columns} columns x {depth}")  # fmt: skip
    read, added = (
        sum(count for lookup, count in costs.lookups.items() if (lookup.kind == "gather") == reads)
        for reads in (True, False)
    )
    print(f"    memory traffic {costs.memory_bytes / 1e9:.0f} GB; {read / 1e6:.1f} million rows looked up, {added / 1e6:.1f} million scattered")  # fmt: skip
    if costs.loops_of_unknown_length:
        print(f"    {costs.loops_of_unknown_length} loops of unknown length were counted once")
    print()


def tiled(costs: hlo.Costs, chip: chips.Chip) -> float:
    """Operations of the whole tiles that a program's products fill."""
    return chips.tiled_flops(costs.products, chip.tile) + costs.noted_flops


def print_roofline(costs: hlo.Costs, chip: chips.Chip, needed: float, batch_size: int) -> None:
    """Prints the shortest times that arithmetic, memory and links allow, and the time of the lookups, which is added."""
    source = "measured on an H200" if chip.target else "as estimated by XLA"
    network = f", {chip.network / 1e9:.0f} for each GPU between hosts" if chip.network else ""
    rows = {
        "arithmetic": (tiled(costs, chip) / chip.flops, f"at {chip.flops / 1e12:.0f} TFLOP/s"),
        "memory": (costs.memory_bytes / chip.bandwidth, f"at {chip.bandwidth / 1e9:.0f} GB/s"),
        "links": (chips.link_seconds(costs.links, chip), f"at {chip.links / 1e9:.0f} GB/s{network}"),
        "lookups": (chips.lookup_seconds(costs.lookups, chip), f"gathers and scatters, {source}"),
    }  # fmt: skip
    print(f"  {'roofline':26s} {'seconds':>10s}")
    for name, (seconds, rate) in rows.items():
        print(f"    {name:24s} {seconds:10.3f}   {rate}")
    bound = max(rows, key=lambda name: rows[name][0])
    lookups = rows.pop("lookups")[0]
    seconds = lookups + max(seconds for seconds, _ in rows.values())
    print(f"    {'in all':24s} {seconds:10.3f}   the lookups, plus the longest of the others\n")
    print(f"bound by {bound}: at best {batch_size / seconds:.0f} samples/s, MFU {needed / chip.flops / seconds:.0%}\n")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
