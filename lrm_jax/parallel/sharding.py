"""Where arrays live: the processes, the device mesh, regex rules from parameter names to shardings, and the batch axes.

One device mesh with three axes serves every run. `data` and `fsdp` both split the batch; `fsdp` also splits parameters and
optimiser state (fully sharded data parallelism), `tensor` splits the width of each layer. Axes are `Auto`: the compiler
propagates shardings between the ones that are pinned here, as in https://docs.jax.dev/en/latest/notebooks/Distributed_arrays_and_automatic_parallelization.html.
"""

import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)

from lrm_jax.types import InputError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# First match wins, by `re.search` on the path ("blocks/attn/qkv/kernel"; the optimiser's moments end with the same path). A spec
# names the last dimensions: layers stacked by `nn.scan` keep the spec of one layer. Column-parallel in, row-parallel out.
RULES = (
    (r"(bias(_\d+)?|scale\d?)$", PartitionSpec()),
    (r"(out|fc2)/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"kernel(_\d+)?$", PartitionSpec("fsdp", "tensor")),
    (r".*", PartitionSpec("fsdp")),
)


TIMEOUT = 300.0  # seconds that processes wait for each other at the start


# -- processes


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of one run, before anything else of JAX is used. Does nothing for a single process.

    Without arguments the cluster's own variables decide (`cluster_of`), and JAX takes the rest from them
    (https://docs.jax.dev/en/latest/multi_process.html): under Slurm each task gets the one GPU of its local number, unless
    JAX_LOCAL_DEVICE_IDS lists more; a Kubernetes job without TPUs needs the package `kubernetes` and the right to read its pods.

    Args:
      coordinator: HOST:PORT of process 0, a free port that all can reach. The three go together, and override the cluster's.
      num_processes: 1 starts nothing, whatever the cluster.
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
        options = dict(cluster_detection_method="deactivate")  # or Slurm's would choose the GPUs
        cluster = coordinator
    elif cluster is not None:
        options = {}
    else:
        return
    try:
        jax.distributed.initialize(*flags, initialization_timeout=int(TIMEOUT), **options)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        # A Cloud TPU whose machine is the whole slice.
        if cluster == "Cloud TPU" and "coordinator_address should be defined" in str(error):
            return
        raise InputError(
            f"{cluster}: the processes of the run did not find each other ({' '.join(str(error).split())[:300]}): "
            "give --coordinator HOST:PORT --num_processes N --process_id I, or --num_processes 1 for a run of its own"
        ) from error


def cluster_of(environ: Mapping[str, str]) -> str | None:
    """The cluster whose variables say that this process is one of several, or None.

    Slurm: SLURM_NTASKS above 1 with SLURM_STEP_NODELIST, which `srun` sets, and `sbatch` alone does not.
    GKE with TPUs: several names in TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES, or MEGASCALE_NUM_SLICES above 1.
    GKE and other Kubernetes: KUBERNETES_SERVICE_HOST, and JOB_COMPLETION_INDEX of an indexed job.
    Cloud TPU: TPU_ML_PLATFORM, which JAX itself sets where there are TPU chips; the machine's metadata name the others.
    """
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
    if "SLURM_STEP_NODELIST" in environ:
        return "Slurm" if int(environ.get("SLURM_NTASKS", 1)) > 1 else None
    if "," in hosts or int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return "GKE"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "Kubernetes"
    return "Cloud TPU" if "TPU_ML_PLATFORM" in environ and not hosts else None


def check_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Raises InputError where the three arguments of `start` do not fit together."""
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
    """Finds out by hand what makes JAX abort the process with a stack trace: a port in use, a coordinator that is not there."""
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
                    "give the address of process 0's machine and a free port of it"
                ) from error
        time.sleep(0.5)


def any_process(flag: bool) -> bool:
    """Whether any process says yes. Every process calls it."""
    return total(flag) > 0


def total(number: float) -> float:
    """The sum over the processes. Every process calls it."""
    if jax.process_count() == 1:
        return number
    return float(multihost_utils.process_allgather(np.array(number, np.float32)).sum())


def to_host(tree: Any) -> Any:
    """Whole NumPy arrays on every process, also of what is split over the processes. Every process calls it.

    One array at a time: no device holds more than one whole array.
    """

    def one(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(one, tree)


# -- the device mesh


def make_device_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """Arranges devices (default: all) as (data, fsdp, tensor). At most one size may be -1: what is left.

    Of several TPU slices `data` alone goes across them, over the slower network.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or `data` does not divide over the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
        known = len(devices)
    if min(sizes) < 1 or known != len(devices):
        raise InputError(
            f"sharding data={data} fsdp={fsdp} tensor={tensor} does not arrange {len(devices)} devices: "
            "the three must multiply to that number (one of them may be -1: the rest)"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise InputError(
            f"sharding data={sizes[0]} does not divide over {slices} slices: make it a multiple, as nothing else may cross them"
        )
    # jax.make_mesh refuses several slices, and sizes that split an axis of a TPU's torus.
    if slices > 1:
        within, across = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
        arranged = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    else:
        arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 3)


def abstract_device_mesh(
    sizes: tuple[int, int, int], platform: str, device_kind: str = ""
) -> AbstractMesh:
    """A device mesh (data, fsdp, tensor) of devices that need not exist, for tracing: `jax.sharding.use_abstract_mesh`."""
    device = AbstractDevice(device_kind=device_kind, num_cores=1, platform=platform)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)


# -- parameters


def spec_for(path: str, shape: tuple[int, ...], device_mesh: Mesh, rules=RULES) -> PartitionSpec:
    """The sharding of one array by the first rule that matches; dimensions that an axis does not divide stay whole."""
    spec = next((spec for pattern, spec in rules if re.search(pattern, path)), None)
    if spec is None:
        raise ValueError(f"no sharding rule matches {path}: add one, or end the rules with '.*'")
    axes = (None,) * (len(shape) - len(spec)) + tuple(spec)[max(len(spec) - len(shape), 0) :]
    return PartitionSpec(
        *(
            axis if axis is not None and size % device_mesh.shape[axis] == 0 else None
            for size, axis in zip(shape, axes, strict=True)
        )
    )


def infer(tree: Any, device_mesh: Mesh, rules=RULES) -> Any:
    """A tree of NamedShardings for a tree of arrays or ShapeDtypeStructs, from each leaf's path."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(device_mesh, spec_for(name, leaf.shape, device_mesh, rules))

    return jax.tree_util.tree_map_with_path(one, tree)


def platform() -> str:
    """What the device mesh in use is made of, or else JAX's default: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def jit(function: Callable, **arguments) -> Callable:
    """`jax.jit`, not inside of another; on a CPU for vectors of 512 bits, if it has them, where XLA takes 256."""
    options = {"xla_cpu_prefer_vector_width": 512} if platform() == "cpu" else None
    return jax.jit(function, compiler_options=options, **arguments)


# -- the batch


def num_batch_shards(device_mesh: Mesh) -> int:
    """In how many parts a batch is split."""
    return device_mesh.shape["data"] * device_mesh.shape["fsdp"]


def constrain_batch(tree: Any) -> Any:
    """Pins the leading axis of every array to the batch axes of the device mesh in use; the other axes are the compiler's.

    Identity outside `jax.set_mesh`, and for arrays whose leading axis the batch axes do not divide.
    """
    device_mesh = jax.sharding.get_abstract_mesh()
    if device_mesh.empty:
        return tree
    shards = num_batch_shards(device_mesh)

    def one(x):
        if x.shape[0] % shards:
            return x
        free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *free))

    return jax.tree.map(one, tree)


def split_batch_and_heads(function, heads: tuple, rows: jax.Array | None) -> jax.Array:
    """`function(*heads, rows)` -> [B L N K], run by each device of the mesh in use for its part of the batch and of the heads.

    An axis that the device mesh does not divide stays whole, and its work is repeated.

    Args:
      heads: arrays [B L N K].
      rows: [B ...].
    """
    device_mesh = jax.sharding.get_abstract_mesh()
    if device_mesh.empty:
        return function(*heads, rows)
    B, _, N, _ = heads[0].shape
    batch = None if B % num_batch_shards(device_mesh) else BATCH_AXES
    split = PartitionSpec(batch, None, None if N % device_mesh.shape["tensor"] else "tensor")
    specs = (*(split for _ in heads), PartitionSpec(batch))
    return jax.shard_map(function, in_specs=specs, out_specs=split, check_vma=False)(*heads, rows)


def split_batch(function, shared: Any, batch: Any) -> Any:
    """`function(shared, batch)` -> a tree of arrays [B ...], run by each device of the mesh in use for its part of a batch [B ...].

    All axes split it, `tensor` too. A batch that the devices do not divide stays whole, and its work is repeated.
    """
    device_mesh = jax.sharding.get_abstract_mesh()
    if device_mesh.empty:
        return function(shared, batch)
    B = jax.tree.leaves(batch)[0].shape[0]
    split = PartitionSpec(None if B % device_mesh.size else AXES)
    specs = (PartitionSpec(), split)
    return jax.shard_map(function, in_specs=specs, out_specs=split, check_vma=False)(shared, batch)


def process_share(device_mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads: (index, count), and `global_batch` puts the parts together.

    Not `process_index` and `process_count`: processes that only the `tensor` axis tells apart read the same part.

    Raises:
      InputError: the axes cut the processes so that their parts overlap.
    """
    shards = NamedSharding(device_mesh, PartitionSpec(BATCH_AXES))
    parts = {}  # process: the shards of the batch that are on its devices
    for device, (rows,) in shards.devices_indices_map((num_batch_shards(device_mesh),)).items():
        parts.setdefault(device.process_index, set()).add(rows.start or 0)
    distinct = sorted({tuple(sorted(part)) for part in parts.values()})
    sizes = [len(part) for part in distinct]
    if sum(sizes) != num_batch_shards(device_mesh) or len(set(sizes)) > 1:
        raise InputError(
            f"sharding {dict(device_mesh.shape)} cuts across the {len(parts)} processes: make sharding.tensor a divisor, "
            "or a multiple, of the devices of one"
        )
    return distinct.index(tuple(sorted(parts[jax.process_index()]))), len(distinct)


def global_batch(tree: Any, device_mesh: Mesh) -> Any:
    """Global arrays, split along the leading axis, from this process's part of the batch (NumPy arrays; `process_share`)."""
    sharding = NamedSharding(device_mesh, PartitionSpec(BATCH_AXES))
    shares = process_share(device_mesh)[1]

    def one(x):
        shape = (len(x) * shares, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(one, tree)


def local_rows(tree: Any, count: int) -> Any:
    """The first `count` rows, as NumPy arrays, of what this process holds of arrays that are split along the leading axis."""

    def one(x):
        shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        rows, missing = [], count
        for _, part in sorted(shards.items(), key=lambda item: item[0]):
            rows.append(np.asarray(part[:missing]))
            missing -= len(rows[-1])
            if missing == 0:
                break
        return np.concatenate(rows)

    return jax.tree.map(one, tree)


def by_device(tree: Any, device_mesh: Mesh) -> dict[jax.Device, Any]:
    """What each device of the mesh, all of this process, holds of a tree of arrays: its rows, or its copy."""

    def on(device):
        return jax.tree.map(
            lambda x: next(s.data for s in x.addressable_shards if s.device == device), tree
        )

    return {device: on(device) for device in device_mesh.devices.flat}


def micro_batches(tree: Any, count: int) -> Any:
    """Cuts a batch [B ...] into `count` parts [count B/count ...] for `lax.scan`, each of them split over all devices.

    Part i takes the rows i, i + count, ...: every device keeps the rows that it has, and nothing is sent.

    Raises:
      InputError: the batch does not divide.
    """
    device_mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if device_mesh.empty else num_batch_shards(device_mesh)

    def one(x):
        if x.shape[0] % (count * shards):
            raise InputError(
                f"a batch of {x.shape[0]} does not divide into {count} parts over {shards} devices: "
                f"make it a multiple of {count * shards}"
            )
        parts = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        if device_mesh.empty:
            return parts
        return jax.lax.with_sharding_constraint(parts, PartitionSpec(None, BATCH_AXES))

    return jax.tree.map(one, tree)
