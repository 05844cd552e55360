"""Times the full-size families, or the training step of a config, on this machine.

    python tools/bench.py [FAMILY:VARIANT ...] [--json FILE]
    python tools/bench.py train --config configs/nano.py [--config.data.name=procedural ...] [--json FILE]
    python tools/bench.py gpu [WORD ...] [--minutes 4] [--out out/bench_gpu.jsonl]

The second is tools/bench_train.py, the third tools/bench_gpu.py. The first times these stages of each triplane family:

    encode     one image to planes
    view       a 128 x 128 view with 128 samples per ray
    gradient   the same view, forward and backward
    surface    a 256^3 surface

and for LVSM, on images of the variant's size:

    encode-4   encoding 4 images (also 1, 2, 8 and 16)
    frame-4    rendering one frame from them (on an accelerator, one frame's share of 8 rendered together)
    gradient   forward and backward of 6 target views (1 on a CPU) from 2 source views

Weights are random, which costs as much as trained weights. Random weights have no surface, so the surface is a smooth blob. It is
evaluated through the model's own decoder, at the same cost. Beside each time, the table has the floating-point operations of the
matrix products (counted by lrm_jax/training/flops.py, with recomputation), their rate as a fraction of the rate of plain matrix
products, and the peak memory of the process.

Children run with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 unless you set that variable. Large arrays then use huge pages. Without them, page
faults take up to a fifth of the time on a CPU.

Times and rates are medians of a few runs after compilation. The plain products are timed in turn with the stage. Machines are shared and
noisy, so compare ratios within one run.

Exit code: 0 every family was timed; 1 some families failed, the others were timed; 2 none could be timed, or wrong usage.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lrm_jax import models
from lrm_jax.ops import cameras
from lrm_jax.parallel import sharding
from lrm_jax.training import flops
from lrm_jax.types import Views

sys.path.insert(0, str(Path(__file__).parent))
import bench_gpu  # noqa: E402
import bench_train  # noqa: E402
from measure import commit, image, machine, mesh_extraction, peak_gb, reset_peak  # noqa: E402

DEFAULT = (
    "triposr:triposr",
    "lrm:lrm",
    "lrm:openlrm-small-1.1",
    "lrm:openlrm-base-1.1",
    "lrm:openlrm-large-1.1",
    "lvsm:decoder-only-256",
    "lvsm:encoder-decoder-256",
)
STAGES = ("encode", "view", "gradient", "surface")
NUM_VIEWS = (1, 2, 4, 8, 16)
VIEW_STAGES = (*(f"{x}-{n}" for n in NUM_VIEWS for x in ("encode", "frame")), "gradient")


def main() -> int:
    """Runs each family in its own process, so that its peak memory is not mixed with others, and prints a table. Returns the exit code.

    This process does not use the accelerator itself.
    """
    if sys.argv[1:2] == ["train"]:
        return bench_train.main(sys.argv[2:])
    if sys.argv[1:2] == ["gpu"]:
        return bench_gpu.main(sys.argv[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "families",
        nargs="*",
        default=DEFAULT,
        metavar="FAMILY:VARIANT",
        help=f"models to time (default: {' '.join(DEFAULT)})",
    )
    parser.add_argument(
        "--stages",
        type=lambda names: names.split(","),
        help=f"stages to time, separated by commas: {', '.join(STAGES)}; for LVSM {', '.join(VIEW_STAGES)} (default: all)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=7,
        help="number of timed runs after the first (default: 7)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="number format to compute in (default: float32)",
    )
    parser.add_argument(
        "--json", type=Path, help="also write the rows to this file, with the machine and versions"
    )
    parser.add_argument(
        "--one", action="store_true", help=argparse.SUPPRESS
    )  # in a child process: one family, rows as JSON lines
    args = parser.parse_args()
    if args.one:
        print(json.dumps(machine()), flush=True)
        name, *rest = args.families[0], args.stages, args.repeats, args.dtype
        for row in (measure_views if name.startswith("lvsm:") else measure)(name, *rest):
            print(json.dumps(row), flush=True)
        return 0
    print(f"{'family':28s} {'stage':9s} {'seconds':>8s} {'TFLOP':>7s} {'of rate':>8s} {'GB':>6s}")
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ}
    rows, where, failed = [], None, []
    for family in args.families:
        stages = args.stages or (VIEW_STAGES if family.startswith("lvsm:") else STAGES)
        command = [sys.executable, __file__, "--one", family, "--stages", ",".join(stages)]
        command += ["--dtype", args.dtype, "--repeats", str(args.repeats)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
            where = json.loads(child.stdout.readline() or "null") or where
            for line in child.stdout:
                rows.append(json.loads(line))
                print_row(rows[-1])
        if child.returncode:
            print(f"bench: {family}: its process ended with {child.returncode}", file=sys.stderr)
            failed.append(family)
    if not rows:
        return 2
    print(where)
    if args.json:
        report = {"machine": where, "commit": commit(), "dtype": args.dtype, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {args.json}")
    return 1 if failed else 0


def measure(name: str, stages: list[str], repeats: int, dtype: str):
    """Yields a row for each stage of one triplane family."""
    family, variant = name.split(":")
    fields = models.family(family).VARIANTS[variant]
    importance = fields.get("num_importance", 0) > 0
    samples = dict(num_samples=64, num_importance=64) if importance else dict(num_samples=128)
    model = models.build(family, variant, dtype=dtype, **samples)
    source = model.prepare([image()])
    camera = cameras.orbit(1, model.source_distance, 20.0, 40.0)
    rays = jax.tree.map(lambda x: x[None], cameras.pixel_rays(camera, 128, 128))
    few = jax.tree.map(lambda x: x[:, :, :2, :2], rays)
    params = jax.jit(model.init)(jax.random.key(0), source, few)["params"]
    products = plain_products(dtype)
    decoder = {"decoder": params["decoder"], "plane_queries": params["plane_queries"]}
    side = model.plane_tokens * getattr(model, "upsample", 2)
    scene = {
        "triplane": jax.random.normal(jax.random.key(1), (1, 3, side, side, model.plane_channels))
    }

    def encode(params, source):
        return model.apply({"params": params}, source, method="encode")

    def view(params, scene, rays):
        return model.apply({"params": params}, scene, rays, method="render").rgb

    def gradient(params, scene, rays):
        return jax.grad(lambda p, s: jnp.mean(view(p, s, rays) ** 2), argnums=(0, 1))(params, scene)

    calls = {
        "encode": (encode, params, source),
        "view": (view, decoder, scene, rays),
        "gradient": (gradient, decoder, scene, rays),
    }
    for stage in stages:
        reset_peak()
        if stage == "surface":
            seconds, rate, work = surface(model, decoder, scene, repeats, products)
        else:
            function, *arguments = calls[stage]
            work = flops.count(function, *arguments)
            seconds, rate = median_time(compiled(function, arguments), repeats, products)
        yield row(name, stage, seconds, work, rate)


def measure_views(name: str, stages: list[str], repeats: int, dtype: str):
    """Yields a row for each stage of one variant of LVSM."""
    family, variant = name.split(":")
    model = models.build(family, variant, dtype=dtype)
    num_frames = 1 if jax.default_backend() == "cpu" else 8
    products = plain_products(dtype)

    def views(count):
        ring = jax.tree.map(lambda x: x[None], cameras.orbit(count, 1.0, 20.0, 50.0))
        return Views(rgb=jnp.full((1, count, *[model.image_size] * 2, 3), 0.5), cameras=ring)

    def rays(count):
        return cameras.pixel_rays(views(count).cameras, model.image_size, model.image_size)

    def encode(params, source):
        return model.apply({"params": params}, source, method="encode")

    def frames(params, scene, rays):
        return model.apply({"params": params}, scene, rays, method="render").rgb

    def gradient(params, source, rays):
        return jax.grad(lambda p: jnp.mean(frames(p, encode(p, source), rays) ** 2))(params)

    params = jax.jit(model.init)(jax.random.key(0), views(1), rays(1))["params"]
    for stage in stages:
        kind, _, count = stage.partition("-")
        reset_peak()
        if kind == "gradient":
            num_targets = 1 if num_frames == 1 else 6  # six would take ten minutes on a CPU
            function, *arguments = gradient, params, views(2), rays(num_targets)
        elif kind == "encode":
            function, *arguments = encode, params, views(int(count))
        else:
            scene = jax.jit(encode)(params, views(int(count)))
            function, *arguments = frames, params, scene, rays(num_frames)
        frames_a_call = num_frames if kind == "frame" else 1
        work = flops.count(function, *arguments) / frames_a_call
        seconds, rate = median_time(compiled(function, arguments), repeats, products)
        yield row(name, stage, seconds / frames_a_call, work, rate)


def row(name: str, stage: str, seconds: float, work: float, rate: float) -> dict:
    """One line of the results."""
    return {
        "family": name, "stage": stage, "seconds": round(seconds, 4), "tflop": round(work / 1e12, 4),
        "of_rate": round(work / seconds / rate, 3), "rate_gflops": round(rate / 1e9, 1), "peak_gb": round(peak_gb(), 2),
    }  # fmt: skip


def surface(
    model, decoder: dict, scene: dict, repeats: int, products
) -> tuple[float, float, float]:
    """Returns the seconds of a 256^3 surface (coarse to fine, after compilation), the rate of plain products, and the operations."""
    extract, per_point = mesh_extraction(model, decoder, scene, 256)
    evaluated = extract()  # compiles
    seconds, rate = median_time(extract, repeats, products)
    return seconds, rate, per_point * evaluated


def plain_products(dtype: str):
    """Returns a call that runs plain products of 2048^2 (8192^2 on an accelerator) for about a second, and their operations.

    One product is not enough: a processor cannot sustain the rate of a tenth of a second for the time of an encoder.
    """
    cpu = jax.default_backend() == "cpu"
    side, times = (2048, 20) if cpu else (8192, 500)
    a = jnp.eye(side, dtype=dtype)
    run = compiled(lambda a: jax.lax.fori_loop(0, times, lambda _, x: x @ a, a), (a,))
    return run, 2 * side**3 * times


def compiled(function, arguments):
    """Compiles `function(*arguments)` as a call without arguments that returns when the device is done."""
    function = sharding.jit(function).lower(*arguments).compile()
    jax.block_until_ready(arguments)
    return lambda: jax.block_until_ready(function(*arguments))


def median_time(run, repeats: int, products) -> tuple[float, float]:
    """Returns the median seconds of a run, and the median rate of plain products per second.

    Both are timed `repeats` + 1 times in turn, because the clock of a shared processor changes by a tenth within minutes. Medians are
    used because the best times of the two may come from different clocks.
    """
    run_products, work = products
    times, times_of_products = [], []
    for _ in range(1 + repeats):
        for call, record in ((run_products, times_of_products), (run, times)):
            start = time.perf_counter()
            call()
            record.append(time.perf_counter() - start)
    return float(np.median(times)), work / float(np.median(times_of_products))


def print_row(row: dict) -> None:
    """One line of the table."""
    print(
        f"{row['family']:28s} {row['stage']:9s} {row['seconds']:8.2f} {row['tflop']:7.3f} {row['of_rate']:8.0%} "
        f"{row['peak_gb']:6.2f}   rate {row['rate_gflops']:.0f} GFLOP/s",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
