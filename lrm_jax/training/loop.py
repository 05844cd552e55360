"""`lrm train`: a sharded, resumable run of any family from a config.

    lrm train --config configs/nano.py --workdir runs/nano [--config.train.steps=100]
    lrm train --config configs/nano.py --dry_run    compiles the step and the evaluation, prints what memory a device needs, and ends

Resumes where the workdir's last checkpoint ends, to the bit, also on another device mesh or number of processes. It leaves there

    metrics.jsonl           one object a line: `step`, `train/loss`, every term; an evaluation's scores (`val/psnr`, of views that
                            were not given, and `val/source_psnr`) are a line of their own; the same for TensorBoard
    checkpoints/            parameters, their running mean, optimiser, step, key and place in the data
    grids/                  source, then target, render and depth of each view, of up to eight held-out scenes
    config.json, parameters.txt
    model.safetensors       at the end: the running mean of the parameters (before it: `lrm convert WORKDIR FILE`)

SIGTERM saves and exits with code 143 (of several processes at the next multiple of `log_every`); the same command goes on. Several processes: Slurm, GKE and Cloud TPU are recognised;
elsewhere give each process --coordinator HOST:PORT --num_processes N --process_id I.
"""

import contextlib
import functools
import importlib
import inspect
import json
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict, config_flags

from lrm_jax import checkpoints, convert, flops, losses, metric_writer, optim, sharding
from lrm_jax.data import Source, pipeline
from lrm_jax.data.samples import check_normalize
from lrm_jax.models import build
from lrm_jax.references import what_it_is
from lrm_jax.report import png, progress, write_file
from lrm_jax.step import eval_step, init_state, needed_flops, train_step
from lrm_jax.train_report import (
    GRID_SCENES,
    evaluation_line,
    grid_images,
    image_grid,
    mean_of,
    memory_line,
    profiler,
    progress_line,
    write_overview,
)
from lrm_jax.types import Batch, Cameras, InputError, TrainState, Views

MAX_SKIPPED = 200  # updates in a row, after which it is not single batches that are at fault
INTERRUPTED = 143  # exit code after SIGTERM, 128 + 15: saved, and the same command goes on
SOURCES = ("objects", "records", "mvimgnet", "scenes", "procedural")  # modules of lrm_jax.data
# Fields of `config.data` that every source takes, the procedural one too.
SHARED = (
    "seed", "num_source", "num_target", "source_size", "target_size", "source_elevation", "foreground_ratio", "normalize",
    "assumed_camera",
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Runs `lrm train`. Returns the exit code: 0, or 143 where SIGTERM ended the run after saving it."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    config, workdir, processes, only_compile = parse(argv)
    sharding.start(**processes)
    device_mesh = sharding.make_device_mesh(**config.sharding)
    check_batch_size(config, device_mesh)
    if only_compile:
        return dry_run(config, device_mesh)
    networks = losses.load_networks(config.losses, config.networks)
    peak_rate = flops.peak_rate()  # before the loader's threads and the first program are at work
    data = open_data(*sharding.process_share(device_mesh), **config.data)
    run = make_run(config, device_mesh)
    # Before anything is left in the workdir.
    params = initial_params(run, config.train.init_from) if checkpoints.is_empty(workdir) else None
    claim(workdir, config)

    with (
        jax.set_mesh(device_mesh),
        checkpoints.open_folder(
            workdir, keep=config.train.keep, keep_every=config.train.keep_every
        ) as manager,
        contextlib.closing(data.train) as batches,
    ):
        restored = checkpoints.restore(manager, run.abstract_state)
        if restored is not None:
            state, place = restored
            batches.set_state(place)
        else:
            state = run.init(params)
        networks = jax.device_put(networks, NamedSharding(device_mesh, PartitionSpec()))
        state = fit(
            state, networks, data, run, device_mesh, manager, workdir, config.train, peak_rate
        )
    if int(state.step) < config.train.steps:
        return INTERRUPTED
    params = sharding.to_host(state.ema_params)
    if jax.process_index() == 0:
        path = workdir / "model.safetensors"
        training = {"steps": int(state.step), "config": config.to_dict()}
        convert.save_model(path, run.model, params, training)
        print(f"wrote {path} (step {training['steps']})", file=sys.stderr)
    return 0


# -- what a config makes


class Run(NamedTuple):
    """The compiled functions of a run, and the shapes and shardings that they take."""

    model: nn.Module
    init: Callable[[Any], TrainState]  # from parameters, or from None: random ones
    step: Callable[[TrainState, Batch, dict], tuple[TrainState, dict]]  # donates the state
    evaluate: Callable[[Any, Batch], tuple[dict, dict]]  # scores, and the batch's images for a grid
    abstract_state: TrainState  # ShapeDtypeStructs with shardings


def make_run(config: ConfigDict, device_mesh: Mesh) -> Run:
    """Everything of a run that is jitted. Nothing is allocated or compiled before it is called."""
    train = config.train
    check_counts(train)
    model = build_model(**config.model)
    check_assumed_camera(config, model)
    schedule = optim.make_schedule(steps=train.steps, **config.schedule)
    optimizer = optim.make_optimizer(schedule, **config.optim)
    render_size = tuple(train.render_size) or (config.data.target_size,) * 2
    if len(render_size) != 2 or not train.patch <= render_size[0] <= render_size[1]:
        raise InputError(
            f"train.render_size={render_size}: must be (low, high) with train.patch={train.patch} <= low <= high"
        )
    init = functools.partial(
        init_state,
        model=model,
        optimizer=optimizer,
        seed=train.seed,
        source=abstract_batch(config, device_mesh, config.data.batch_size).source,
        patch=train.patch,
    )
    shapes = jax.eval_shape(init)
    shardings = sharding.infer(shapes, device_mesh)
    replicated, split = (
        NamedSharding(device_mesh, PartitionSpec(*axes)) for axes in ((), (sharding.BATCH_AXES,))
    )

    def start(params) -> TrainState:
        if params is None:
            return jax.jit(init, out_shardings=shardings)()

        def from_params(params):
            state = init()
            return state.replace(
                params=params,
                ema_params=jax.tree.map(jax.numpy.copy, params),
                opt_state=optimizer.init(params),
            )

        return jax.jit(from_params, out_shardings=shardings)(
            jax.device_put(params, shardings.params)
        )

    step = functools.partial(
        train_step,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        loss_weights=dict(config.losses),
        source_background=config.data.source_background,
        patch=train.patch,
        render_size=render_size,
        antialias=train.antialias,
        foreground_crops=train.foreground_crops,
        recolor=train.recolor,
        backgrounds=tuple(train.backgrounds),
        accumulate=train.accumulate,
        ema_decay=train.ema_decay,
    )

    def evaluate(params, batch: Batch):
        scores, rendering = eval_step(
            params, batch, model=model, source_background=config.data.source_background
        )
        return scores, grid_images(batch, rendering)

    return Run(
        model=model,
        init=start,
        step=sharding.jit(step, donate_argnums=0, out_shardings=(shardings, replicated)),
        # Renderings stay where they were made: those of a whole batch would not fit one device.
        evaluate=sharding.jit(evaluate, out_shardings=(replicated, split)),
        abstract_state=checkpoints.abstract(shapes, shardings),
    )


def trace_programs(config: ConfigDict, device_mesh: Mesh) -> dict[str, jax.stages.Traced]:
    """The "step" and the "evaluation" of a run, traced for a device mesh; nothing is allocated or compiled."""
    check_batch_size(config, device_mesh)
    run = make_run(config, device_mesh)
    batch, held_out = (
        abstract_batch(config, device_mesh, size)
        for size in (config.data.batch_size, eval_batch_size(config.train, device_mesh))
    )
    with jax.set_mesh(device_mesh):
        step = run.step.trace(run.abstract_state, batch, losses.abstract_networks(config.losses))
        evaluation = run.evaluate.trace(run.abstract_state.ema_params, held_out)
    return {"step": step, "evaluation": evaluation}


def dry_run(config: ConfigDict, device_mesh: Mesh) -> int:
    """Compiles both programs of a run and prints the memory that they need. Returns the exit code: 1 where one does not fit."""
    limit = (device_mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    fits = True
    for name, traced in trace_programs(config, device_mesh).items():
        start = time.perf_counter()
        try:
            needed = traced.lower().compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{name}: does not fit: {str(error).splitlines()[0]}", flush=True)
            fits = False
            continue
        line, total = memory_line(needed, limit)
        fits &= limit is None or total <= limit
        print(f"{name}: {line}, compiled in {time.perf_counter() - start:.0f} s", flush=True)
    return 0 if fits else 1


def abstract_batch(config: ConfigDict, device_mesh: Mesh, batch_size: int) -> Batch:
    """A global batch of the config's images as ShapeDtypeStructs, split over the device mesh."""
    data = config.data
    split = NamedSharding(device_mesh, PartitionSpec(sharding.BATCH_AXES))

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=split)

    def views(count, size):
        return Views(
            rgb=array(np.uint8, count, size, size, 3),
            alpha=array(np.uint8, count, size, size),
            cameras=Cameras(
                c2w=array(np.float32, count, 4, 4), fxfycxcy=array(np.float32, count, 4)
            ),
        )

    return Batch(
        source=views(data.num_source, data.source_size),
        target=views(data.num_source + data.num_target, data.target_size),
    )


class Data(NamedTuple):
    """What a run reads."""

    train: pipeline.Batches
    val: Callable[
        [int], pipeline.Batches
    ]  # held-out scenes from the first on, in batches of a size
    num_val: int  # how many there are
    finish: list[Callable[[Any], Batch]]  # by source: see `Source.finish`


def open_data(
    process_index: int,
    process_count: int,
    *,
    name: str,
    mix: tuple[int, int],
    batch_size: int,
    num_workers: int,
    prefetch: int,
    source_background: float,
    **fields,
) -> Data:
    """This process's part of the batches of `lrm_jax.data.<name>`; of mix[0] + mix[1] of them, mix[1] of procedural shapes."""

    def make(name: str, split: str) -> Source:
        module = importlib.import_module(f"lrm_jax.data.{name}")
        kept = {k: v for k, v in fields.items() if k in SHARED} if name == "procedural" else fields
        try:
            inspect.signature(module.make).bind(split=split, **kept)
        except TypeError as error:
            raise InputError(
                f"config.data does not fit data.name={name} ({error}): use a config that is made for such data"
            ) from None
        return module.make(split=split, **kept)

    if name not in SOURCES:
        raise InputError(f"data.name={name!r}: must be one of {', '.join(SOURCES)}")
    if len(mix) not in (0, 2):
        raise InputError(f"data.mix={tuple(mix)}: must be (), or two numbers as (3, 1)")
    sources, weights = [make(name, "train")], [1]
    if mix:
        sources, weights = [*sources, make("procedural", "train")], list(mix)
    val = make(name, "val")
    share = dict(process_index=process_index, process_count=process_count)
    train = pipeline.open_batches(
        list(zip(sources, weights, strict=True)), batch_size, num_workers=num_workers, prefetch=prefetch, **share
    )  # fmt: skip
    return Data(
        train=train,
        val=lambda size: pipeline.open_batches(val, size, prefetch=0, **share),
        num_val=len(val.samples),
        finish=[jax.jit(source.finish) if source.finish else lambda batch: batch for source in sources],
    )  # fmt: skip


def check_counts(train: ConfigDict) -> None:
    """Raises InputError for a number of steps, batches or pixels below 1."""
    for name in ("steps", "patch", "accumulate", "log_every", "save_every", "keep", "eval_every", "eval_scenes"):  # fmt: skip
        if train[name] < 1:
            raise InputError(f"train.{name}={train[name]}: must be at least 1")


def build_model(name: str, variant: str, **fields) -> nn.Module:
    """`models.build`, with its errors as a person should see them."""
    try:
        return build(name, variant, **fields)
    except ValueError as error:
        raise InputError(f"config.model: {error}") from None


def initial_params(run: Run, init_from: str):
    """Parameters of `train.init_from`, which is anything that `lrm reconstruct --weights` takes; None where it is empty.

    Raises:
      InputError: its parameters have other names or shapes than the config's model.
    """
    if not init_from:
        return None
    model, params, _ = convert.load_weights(init_from)
    wanted, given = (
        {name: leaf.shape for name, leaf in optim.named(tree)}
        for tree in (run.abstract_state.params, params)
    )
    if wrong := sorted(
        name for name in wanted | given if wanted.get(name, ()) != given.get(name, ())
    ):
        name = wrong[0]
        raise InputError(
            f"train.init_from={init_from}: {len(wrong)} parameters are not those of config.model, the first {name}: "
            f"{given.get(name, 'absent')} there, {wanted.get(name, 'absent')} here: set config.model to that model"
        )
    return params


def check_assumed_camera(config: ConfigDict, model: nn.Module) -> None:
    """Raises InputError where pictures give the world (data.normalize="picture") and the model assumes another camera than the data."""
    if config.data.get("normalize") != "picture":
        return
    check_normalize(config.data.normalize, config.data.assumed_camera)
    if not hasattr(model, "prepare"):
        raise InputError(
            f"data.normalize=picture: {config.model.name} is given true cameras: choose another"
        )
    distance, fov = config.data.assumed_camera
    blank = np.full((model.image_size, model.image_size, 4), 255, np.uint8)
    assumed = jax.tree.map(np.asarray, model.prepare([blank]).cameras)
    (x, y, z), focal = assumed.c2w[0, 0, :3, 3], assumed.fxfycxcy[0, 0, 1]
    named = distance, 0.5 / np.tan(np.radians(fov) / 2)
    at_azimuth_0 = abs(y) < 1e-4 < x
    if not (at_azimuth_0 and np.allclose((np.hypot(x, z), focal), named, atol=1e-3)):
        raise InputError(
            f"data.assumed_camera={(distance, fov)}: is not the camera that {config.model.name}:{config.model.variant} "
            "assumes, at azimuth 0: make them equal (distance, field of view)"
        )


def check_batch_size(config: ConfigDict, device_mesh: Mesh) -> None:
    """Raises InputError where the batch does not divide over accumulation steps and the batch axes of the device mesh."""
    check_counts(config.train)
    shards = sharding.num_batch_shards(device_mesh) * config.train.accumulate
    if config.data.batch_size % shards:
        raise InputError(
            f"data.batch_size={config.data.batch_size} does not divide by {shards} (sharding.data x sharding.fsdp devices x "
            "train.accumulate): make it a multiple, or set sharding.tensor"
        )
    eval_batch_size(config.train, device_mesh)


def eval_batch_size(train: ConfigDict, device_mesh: Mesh) -> int:
    """How many scenes are evaluated at a time.

    Raises:
      InputError: they do not divide over the batch axes of the device mesh.
    """
    shards = sharding.num_batch_shards(device_mesh)
    size = shards if train.eval_batch_size is None else train.eval_batch_size
    if size < 1 or size % shards:
        raise InputError(
            f"train.eval_batch_size={size} does not divide by {shards} (sharding.data x sharding.fsdp devices): make it a "
            "multiple, or None for one scene on each device"
        )
    return size


# -- the loop


def fit(
    state: TrainState,
    networks: dict,
    data: Data,
    run: Run,
    device_mesh: Mesh,
    manager,
    workdir: Path,
    train: ConfigDict,
    peak_rate: float,
) -> TrainState:
    """Trains to `train.steps`, or to SIGTERM; the state it returns is saved. `peak_rate`: for MFU, see `flops.peak_rate`.

    Raises:
      InputError: no update since the last report could be made. Nothing of that state is saved.
    """
    first = int(state.step)
    writer = metric_writer.open_writer(workdir, first, train.tensorboard)
    pending = []  # scalars of the steps since the last report, still on the device
    work = None  # operations that a step needs
    skipped, stuck, bad = int(optim.num_skipped(state.opt_state)), 0, 0
    clock, waited = time.perf_counter(), 0.0
    with (
        terminated() as stop,
        contextlib.closing(writer),
        profiler(workdir, train.profile_steps) as profile,
    ):
        for step in range(first + 1, train.steps + 1):
            before = time.perf_counter()
            which, elements = next(data.train)
            waited += time.perf_counter() - before
            batch = data.finish[which](sharding.global_batch(elements, device_mesh))
            if work is None:
                work = needed_flops(run.model, train.patch, state.params, batch)
                write_overview(workdir, state.params)
            profile(step - first)
            state, scalars = run.step(state, batch, networks)
            pending.append(scalars)
            # At most two steps under way: batches are not hoarded.
            jax.block_until_ready(pending[-2:][0])
            last = step == train.steps or asked_to_stop(stop, step, train.log_every)
            evaluating = step % train.eval_every == 0 or step == train.steps
            # Before an evaluation, too: what that dies of must not come again.
            saving = step % train.save_every == 0 or last or evaluating
            if step % train.log_every == 0 or saving:
                row = mean_of(pending)
                stuck = stuck + len(pending) if row["skipped"] - skipped == len(pending) else 0
                skipped = row["skipped"]
                if stuck >= MAX_SKIPPED or step == skipped == train.steps:
                    raise InputError(
                        f"all of the last {stuck} updates were skipped: the gradient is not finite, or always longer than "
                        f"optim.skip_norm (its norm: {row['grad_norm']:.3g}); the last checkpoint is of step {manager.latest_step()}; "
                        "lower schedule.learning_rate"
                    )
                seconds = time.perf_counter() - clock
                row["samples_per_second"] = len(pending) * batch.source.rgb.shape[0] / seconds
                row["mfu"] = len(pending) * work / seconds / peak_rate
                row["data_wait"] = waited / seconds
                bad, before_bad = sum(data.train.bad.values()), bad
                row["bad_records"] = sharding.total(float(bad - before_bad))
                writer.write_scalars(step, row)
                if jax.process_index() == 0:
                    line = progress_line(
                        {"step": step, **row}, train.steps, batch.source.rgb.shape[0]
                    )
                    print(line, file=sys.stderr, flush=True)  # fmt: skip
                pending, waited = [], 0.0
                if saving:
                    checkpoints.save(manager, step, state, data.train.get_state())
                if evaluating:
                    checkpoints.finish(manager)
                    scores, grid = evaluate(run, state.ema_params, data, device_mesh, train)
                    writer.write_scalars(step, scores)
                    if jax.process_index() == 0:
                        writer.write_images(step, {"val": grid})
                        write_file(workdir / "grids" / f"{step:07d}.png", png(grid))
                        print(
                            evaluation_line(step, train.steps, scores), file=sys.stderr, flush=True
                        )
                clock = time.perf_counter()
            if last:
                break
    checkpoints.finish(manager)
    return state


def evaluate(
    run: Run, params, data: Data, device_mesh: Mesh, train: ConfigDict
) -> tuple[dict[str, float], np.ndarray]:
    """Mean scores of the first `train.eval_scenes` held-out scenes, and a grid of the first few that this process has.

    Returns:
      "val/psnr" and, of families with alpha, "val/iou", of the views that were not given; "val/source_psnr" of those that were.
    """
    batch_size = eval_batch_size(train, device_mesh)
    num_scenes, rows, shown = min(train.eval_scenes, data.num_val), [], []
    missing = min(GRID_SCENES, num_scenes)

    def evaluated(elements):
        batch = data.finish[0](sharding.global_batch(elements, device_mesh))
        return run.evaluate(params, batch)

    with contextlib.closing(data.val(batch_size)) as batches:
        for _ in progress(range(-(-num_scenes // batch_size)), label="evaluation"):
            scores, of_batch = evaluated(next(batches)[1])
            rows.append(jax.device_get(scores))
            if missing > 0:
                shown.append(sharding.local_rows(of_batch, missing))
                missing -= len(shown[-1]["source"])
            del of_batch  # before the next batch
    # The last batch is filled up.
    of_views = {k: np.concatenate([row[k] for row in rows])[:num_scenes] for k in rows[0]}
    given = of_views.pop("is_source")
    means = {f"val/{k}": v[~given].mean() for k, v in of_views.items() if not given.all()}
    if given.any():
        means["val/source_psnr"] = of_views["psnr"][given].mean()
    grid = image_grid(jax.tree.map(lambda *parts: np.concatenate(parts), *shown))
    return {name: float(value) for name, value in means.items()}, grid


@contextlib.contextmanager
def terminated() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or Ctrl-C sets; a second one ends the process as usual."""
    stop = threading.Event()
    previous = {}

    def note(number, frame):
        stop.set()
        signal.signal(number, previous[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def asked_to_stop(stop: threading.Event, step: int, every: int) -> bool:
    """Whether to stop after this step: the same answer in every process, which they compare every `every` steps."""
    if jax.process_count() == 1:
        return stop.is_set()
    return step % every == 0 and sharding.any_process(stop.is_set())


# -- start


class Arguments(NamedTuple):
    """What the command line says."""

    config: ConfigDict
    workdir: Path | None  # None: --dry_run without one
    processes: dict  # arguments of `sharding.start`
    dry_run: bool


def parse(argv: list[str]) -> Arguments:
    """The config with its overrides, and the other flags.

    Raises:
      InputError: an unknown flag or config key, or a value of the wrong type.
    """
    for arg in argv:
        path = Path(arg.split("=", 1)[-1].split(":")[0])
        if path.suffix == ".py":
            if not path.is_file():
                raise InputError(f"{path}: no such config: check the path")
            # A config starts from its siblings, or from those of the repository: `configs.common`.
            sys.path[:0] = [str(folder) for folder in path.absolute().parents[:2]]
    values = flags.FlagValues()
    argv = ["lrm train", *argv]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "how many there are", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which one this is", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "compile, print the memory, end", flag_values=values)
    try:
        rest = values(argv)[1:]
    except Exception as error:  # a config is a program
        if near := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(error)):
            raise InputError(
                f"the config has no key {near[2]!r}: did you mean {near[1]!r}?"
            ) from None
        message = " ".join(str(error).split()).strip('"')
        if "Traceback" in message:  # of a config file
            message = " ".join(str(error).strip().splitlines()[-1].split())
        elif not isinstance(error, (flags.Error, AttributeError, KeyError, TypeError, ValueError)):
            message = f"{type(error).__name__}: {message}"
        raise InputError(f"lrm train: {message}: check it against the config file") from None
    if rest or values.config is None or (values.workdir is None and not values.dry_run):
        raise InputError(
            "lrm train needs --config FILE --workdir FOLDER, and single keys as --config.train.steps=100"
        )
    processes = {
        name: values[name].value for name in ("coordinator", "num_processes", "process_id")
    }
    workdir = None if values.workdir is None else Path(values.workdir)
    return Arguments(values.config, workdir, processes, values.dry_run)


def claim(workdir: Path, config: ConfigDict) -> None:
    """Writes `config.json` into a new workdir; in one that is resumed the model must be the same, however it is run."""
    path = workdir / "config.json"
    if path.exists():
        try:
            there = what_it_is(json.loads(path.read_text())["model"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is not that of a training run ({type(error).__name__}): choose another --workdir"
            ) from None
        if there != what_it_is(config.model.to_dict()):
            raise InputError(f"{workdir} holds a run of another model: choose another --workdir")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_file(path, config.to_json(indent=2).encode())
