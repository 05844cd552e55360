"""`lrm train`: a sharded, resumable run of any family from a config, or its dry run.

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
import json
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict, config_flags

from lrm_jax.parallel import batch_axes, processes, sharding
from lrm_jax.parallel.whole_files import write_file
from lrm_jax.training import checkpoints, flops, losses
from lrm_jax.training.inputs import open_data
from lrm_jax.training.loop import INTERRUPTED, fit
from lrm_jax.training.reports import (
    memory_line,
)
from lrm_jax.training.setup import check_batch_size, initial_params, make_run, trace_programs
from lrm_jax.types import InputError
from lrm_jax.weights import model_file
from lrm_jax.weights.references import what_it_is


def main(argv: list[str]) -> int:
    """Runs `lrm train`. Returns the exit code: 0, or 143 where SIGTERM ended the run after saving it."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    config, workdir, cluster, only_compile = parse(argv)
    processes.start(**cluster)
    device_mesh = sharding.make_device_mesh(**config.sharding)
    check_batch_size(config, device_mesh)
    if only_compile:
        return dry_run(config, device_mesh)
    networks = losses.load_networks(config.losses, config.networks)
    peak_rate = flops.peak_rate()  # before the loader's threads and the first program are at work
    data = open_data(*batch_axes.process_slice(device_mesh), **config.data)
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
    params = processes.to_host(state.ema_params)
    if jax.process_index() == 0:
        path = workdir / "model.safetensors"
        training = {"steps": int(state.step), "config": config.to_dict()}
        model_file.save_model(path, run.model, params, training)
        print(f"wrote {path} (step {training['steps']})", file=sys.stderr)
    return 0


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
