"""Times the training step of a config and its data loader, on this machine's devices.

    python tools/bench.py train --config configs/nano.py [--config.data.name=procedural ...] [--steps 10] [--json FILE]

Printed, and written as JSON:
  samples/s, seconds     of the step alone, on a batch that is already on the devices: median of `--steps` steps after two
  mfu                    three times the model's forward products per second, as a share of the peak rate
  with recomputation     the same for all products of the step as traced, with rematerialisation and the networks of the losses
  peak rate              from the table in lrm_jax/training/flops.py, or measured now if the device is not in the table
  peak_gb                peak of the accelerator's memory, or of this process; also what XLA planned for one device
  loader                 samples/s that the config's data source makes on its own: at least twice the rate of the step is good

Weights are random. Those of the losses' networks are zeros, so their files are not needed.

Exit code: 0 measured; 2 wrong usage or input.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lrm_jax.commands import train
from lrm_jax.data import pipeline
from lrm_jax.parallel import batch_axes, sharding
from lrm_jax.training import flops, inputs, losses, setup
from lrm_jax.training.step import needed_flops
from lrm_jax.types import InputError

sys.path.insert(0, str(Path(__file__).parent))
import measure  # noqa: E402


def main(argv: list[str]) -> int:
    """Measures, prints and writes. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, default=10, help="number of steps to time (default: 10)"
    )
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args, rest = parser.parse_known_args(argv)
    try:
        config, *_ = train.parse([*rest, "--workdir", "unused"])
        device_mesh = sharding.make_device_mesh(**config.sharding)
        setup.check_batch_size(config, device_mesh)
        data = inputs.open_data(*batch_axes.process_slice(device_mesh), **config.data)
        with contextlib.closing(data.train) as batches:
            loader = pipeline.rate(batches, config.data.batch_size, num_batches=args.steps)
            which, elements = next(batches)
        with jax.set_mesh(device_mesh):
            batch = data.finish[which](batch_axes.global_batch(elements, device_mesh))
        row = measure_step(config, device_mesh, batch, args.steps)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    row |= {
        "loader_samples_per_second": loader,
        "loader_over_step": loader / row["samples_per_second"],
    }
    print_row(row)
    if args.json:
        report = {"machine": measure.machine(), "commit": measure.commit(), "config": config.to_dict(), **row}  # fmt: skip
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure_step(config, device_mesh, batch, num_steps: int) -> dict[str, float]:
    """Rates and memory of the step, by name. The batch is already on the devices."""
    with jax.set_mesh(device_mesh):
        run = setup.make_run(config, device_mesh)
        networks = jax.device_put(
            jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), losses.abstract_networks(config.losses)
            ),
            NamedSharding(device_mesh, PartitionSpec()),
        )
        work = flops.count(run.step, run.abstract_state, batch, networks)
        needed = needed_flops(run.model, config.train.patch, run.abstract_state.params, batch)
        measure.reset_peak()
        state = measure.random_state(run.abstract_state)
        start = time.perf_counter()
        compiled = run.step.lower(state, batch, networks).compile()
        compile_seconds = time.perf_counter() - start
        planned = compiled.memory_analysis()
        times = []
        for _ in range(2 + num_steps):
            start = time.perf_counter()
            state, scalars = compiled(state, batch, networks)
            jax.block_until_ready(scalars)
            times.append(time.perf_counter() - start)
        seconds = float(np.median(times[2:]))
    peak = flops.peak_rate()
    return {
        "samples_per_second": config.data.batch_size / seconds,
        "seconds": seconds,
        "mfu": needed / seconds / peak,
        "with_recomputation": work / seconds / peak,
        "tflop": work / 1e12,
        "peak_rate_tflops": peak / 1e12,
        "peak_gb": measure.peak_gb(),
        "planned_gb": (planned.argument_size_in_bytes + planned.temp_size_in_bytes) / 1e9,
        "compile_seconds": compile_seconds,
    }


def print_row(row: dict[str, float]) -> None:
    """Prints the lines that the module's docstring describes."""
    print(
        f"step    {row['samples_per_second']:.2f} samples/s, {row['seconds']:.3f} s; {row['tflop']:.3f} TFLOP"
    )
    print(
        f"mfu     {row['mfu']:.1%}, {row['with_recomputation']:.1%} with recomputation; peak rate {row['peak_rate_tflops']:.2f} TFLOP/s"
    )
    print(
        f"memory  {row['peak_gb']:.2f} GB peak; planned for one device {row['planned_gb']:.2f} GB"
    )
    print(f"loader  {row['loader_samples_per_second']:.1f} samples/s, {row['loader_over_step']:.1f} times the rate of the step")  # fmt: skip
