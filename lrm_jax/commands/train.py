"""Train a model from a config, or check whether a run fits in memory.

    lrm train --config configs/nano.py --workdir runs/nano --config.train.steps=100
    lrm train --config configs/nano.py --dry_run
    lrm train --config configs/nano.py --help

To resume a run from its last checkpoint, bit for bit, repeat the command. The device mesh and the number of processes may differ.
The workdir holds:

    metrics.jsonl        one JSON object per line: `step`, `train/loss` and each term of the loss. The scores of an evaluation
                         have a line of their own: `val/psnr` for views that the model was not given, `val/source_psnr` for views
                         that it was given. TensorBoard files hold the same numbers
    checkpoints/         parameters, their running mean, optimiser, step, random key and position in the data
    grids/               images of up to eight held-out scenes: the source, then target, rendering and depth of each view
    config.json          the config
    parameters.txt       names, shapes and sizes of the parameters
    model.safetensors    the model, written at the end. To get it earlier, run `lrm convert WORKDIR FILE`

On SIGTERM or Ctrl-C, the run saves a checkpoint and exits; with several processes, at the next multiple of `log_every` steps. On
Slurm, GKE and Cloud TPU, several processes need no flags. Elsewhere, give each --coordinator, --num_processes and --process_id.

Exit code: 0 trained, or the dry run fits; 1 the dry run does not fit; 2 wrong usage or input; 130 interrupted; 143 saved after
SIGTERM or Ctrl-C.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from lrm_jax.commands import train_flags
from lrm_jax.models import objective_terms
from lrm_jax.parallel import batch_axes, processes, sharding
from lrm_jax.parallel.whole_files import write_file
from lrm_jax.training import checkpoints, flops, losses
from lrm_jax.training.inputs import open_data
from lrm_jax.training.loop import INTERRUPTED, fit
from lrm_jax.training.reports import memory_line
from lrm_jax.training.setup import check_batch_size, initial_params, make_run, trace_programs
from lrm_jax.types import InputError
from lrm_jax.weights import model_file
from lrm_jax.weights.references import what_it_is


def main(argv: list[str]) -> int:
    """Runs `lrm train`. Returns the exit code: 0; 1 if a dry run does not fit; 143 if a signal ended the run, which is saved."""
    if {"-h", "--help"} & set(argv):
        print(train_flags.help_text(argv, __doc__))
        return 0
    config, workdir, cluster, only_compile = parse(argv)
    processes.start(**cluster)
    device_mesh = sharding.make_device_mesh(**config.sharding)
    check_batch_size(config, device_mesh)
    if only_compile:
        return dry_run(config, device_mesh)
    run = make_run(config, device_mesh)
    networks = losses.load_networks(config.losses, config.networks, objective_terms(run.model))
    peak_rate = flops.peak_rate()  # measured before the loader's threads and the first program run
    data = open_data(*batch_axes.process_slice(device_mesh), **config.data)
    # Before anything is written to the workdir.
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
    """Compiles both programs of a run and prints how much memory they need. Returns the exit code: 1 if one does not fit."""
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
    """The parsed command line."""

    config: ConfigDict
    workdir: Path | None  # None: --dry_run without --workdir
    processes: dict  # arguments of `processes.start`
    dry_run: bool


def parse(argv: list[str]) -> Arguments:
    """The config, with the values that flags override, and the other flags.

    Raises:
      InputError: as in `train_flags.read`; or there is no config or no workdir.
    """
    values = train_flags.read(argv)
    if values.config is None or (values.workdir is None and not values.dry_run):
        raise InputError("lrm train needs --config FILE --workdir FOLDER: see lrm train --help")
    cluster = {name: values[name].value for name in ("coordinator", "num_processes", "process_id")}
    workdir = None if values.workdir is None else Path(values.workdir)
    return Arguments(values.config, workdir, cluster, bool(values.dry_run))


def claim(workdir: Path, config: ConfigDict) -> None:
    """Writes `config.json` to the workdir. If the workdir holds a run already, its model must be the same; the rest may differ.

    Raises:
      InputError: the workdir holds a run of another model, or its config.json is not that of a run.
    """
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
