"""The processes of a run: how they find each other at the start, and what they exchange."""

import os
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lrm_jax.types import InputError

TIMEOUT = 300.0  # seconds that processes wait for each other at the start


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of one run. Call it before anything else uses JAX. Does nothing for a single process.

    Without arguments the cluster's environment variables decide (`cluster_of`), and JAX reads the rest from them
    (https://docs.jax.dev/en/latest/multi_process.html). Under Slurm each task gets one GPU, the one with its local number, unless
    JAX_LOCAL_DEVICE_IDS lists more. A Kubernetes job without TPUs needs the package `kubernetes` and permission to read its pods.

    Args:
      coordinator: HOST:PORT of process 0, a free port that all processes can reach. Give all three arguments or none; they
        override the cluster's.
      num_processes: 1 starts nothing, on any cluster.
      process_id: 0 .. num_processes - 1.

    Raises:
      InputError: the arguments do not fit together, or the processes do not find each other.
    """
    if num_processes == 1 or jax.distributed.is_initialized():
        return
    flags = (coordinator, num_processes, process_id)
    cluster = cluster_of(os.environ)
    if flags != (None, None, None):
        check_processes(*flags)
        _meet(coordinator, process_id)
        options = dict(cluster_detection_method="deactivate")  # otherwise Slurm's chooses the GPUs
        cluster = coordinator
    elif cluster is not None:
        options = {}
    else:
        return
    try:
        jax.distributed.initialize(*flags, initialization_timeout=int(TIMEOUT), **options)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        # A Cloud TPU with one machine for the whole slice.
        if cluster == "Cloud TPU" and "coordinator_address should be defined" in str(error):
            return
        raise InputError(
            f"{cluster}: the processes of the run did not find each other ({' '.join(str(error).split())[:300]}): "
            "give --coordinator HOST:PORT --num_processes N --process_id I, or --num_processes 1 for a run with one process"
        ) from error


def cluster_of(environ: Mapping[str, str]) -> str | None:
    """The cluster whose environment variables say that this process is one of several, or None.

    Slurm: SLURM_NTASKS above 1, and SLURM_STEP_NODELIST, which `srun` sets and `sbatch` alone does not.
    GKE with TPUs: several names in TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES, or MEGASCALE_NUM_SLICES above 1.
    GKE and other Kubernetes: KUBERNETES_SERVICE_HOST, and JOB_COMPLETION_INDEX of an indexed job.
    Cloud TPU: TPU_ML_PLATFORM, which JAX itself sets if there are TPU chips; the machine's metadata name the other machines.
    """
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
    if "SLURM_STEP_NODELIST" in environ:
        return "Slurm" if int(environ.get("SLURM_NTASKS") or 1) > 1 else None
    if "," in hosts or int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return "GKE"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "Kubernetes"
    return "Cloud TPU" if "TPU_ML_PLATFORM" in environ and not hosts else None


def check_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Raises InputError if the three arguments of `start` do not fit together."""
    if None in (coordinator, num_processes, process_id):
        raise InputError(
            f"coordinator={coordinator} num_processes={num_processes} process_id={process_id}: give all three, or none"
        )
    if not re.fullmatch(r".+:\d+", coordinator):
        raise InputError(f"coordinator={coordinator}: must be HOST:PORT of process 0")
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"process_id={process_id}: must be from 0 to num_processes - 1 = {num_processes - 1}"
        )


def _meet(coordinator: str, process_id: int) -> None:
    """Checks first for a port in use and a missing coordinator: JAX would abort the process with a stack trace."""
    host, port = coordinator.rsplit(":", 1)
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            if process_id == 0:
                socket.create_server(("", int(port))).close()
            else:
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            return
        except (OSError, OverflowError) as error:
            if process_id == 0 or isinstance(error, OverflowError) or time.monotonic() > deadline:
                raise InputError(
                    f"coordinator={coordinator}: process {process_id} cannot "
                    f"{'listen on this port' if process_id == 0 else 'reach process 0'} ({error}): "
                    "give the address of process 0's machine and a free port on it"
                ) from error
        time.sleep(0.5)


def any_process(flag: bool) -> bool:
    """Whether the flag is true in any process. Every process must call it."""
    return total(flag) > 0


def total(number: float) -> float:
    """The sum over the processes. Every process must call it."""
    if jax.process_count() == 1:
        return number
    return float(multihost_utils.process_allgather(np.array(number, np.float32)).sum())


def to_host(tree: Any) -> Any:
    """Whole NumPy arrays on every process, even from arrays that are split over the processes. Every process must call it.

    It gathers one array at a time, so no device holds more than one whole array.
    """

    def one(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(one, tree)
