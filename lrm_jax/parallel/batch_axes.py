"""How a batch is split over the device mesh: which part each process reads, and which part each device works on."""

from typing import Any

import jax
import numpy as np
from jax.sharding import (
    Mesh,
    NamedSharding,
    PartitionSpec,
)

from lrm_jax.parallel.sharding import AXES, BATCH_AXES, infer
from lrm_jax.types import InputError


def num_batch_shards(device_mesh: Mesh) -> int:
    """The number of parts that a batch is split into."""
    return device_mesh.shape["data"] * device_mesh.shape["fsdp"]


def constrain_batch(tree: Any) -> Any:
    """Pins the leading axis of every array to the batch axes of the current device mesh; the compiler decides the other axes.

    The identity outside `jax.set_mesh`, where each device already has its part, and for arrays whose leading axis is not
    divisible by the batch axes.
    """
    device_mesh = jax.sharding.get_abstract_mesh()
    if device_mesh.empty or device_mesh.manual_axes:
        return tree
    shards = num_batch_shards(device_mesh)

    def one(x):
        if x.shape[0] % shards:
            return x
        free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *free))

    return jax.tree.map(one, tree)


def split_batch_and_heads(function, heads: tuple, rows: jax.Array | None) -> jax.Array:
    """`function(*heads, rows)` -> [B L N K]; each device of the current device mesh computes its part of the batch and heads.

    An axis that is not divisible by the device mesh stays whole, and its work is repeated.

    Args:
      heads: arrays [B L N K].
      rows: [B ...].
    """
    device_mesh = jax.sharding.get_abstract_mesh()
    if device_mesh.empty or device_mesh.manual_axes:
        return function(*heads, rows)
    B, _, N, _ = heads[0].shape
    batch = None if B % num_batch_shards(device_mesh) else BATCH_AXES
    split = PartitionSpec(batch, None, None if N % device_mesh.shape["tensor"] else "tensor")
    specs = (*(split for _ in heads), PartitionSpec(batch))
    return jax.shard_map(function, in_specs=specs, out_specs=split, check_vma=False)(*heads, rows)


def split_batch(function, shared: Any, batch: Any) -> Any:
    """`function(shared, batch [B ...])` -> a tree of arrays [B ...]; each device of the current device mesh computes its part.

    All axes of the device mesh split the batch, `tensor` too. A batch that is not divisible by the devices stays whole, and its
    work is repeated. Inside another such call, each device already has its part.
    """
    device_mesh = jax.sharding.get_abstract_mesh()
    if device_mesh.empty or device_mesh.manual_axes:
        return function(shared, batch)
    B = jax.tree.leaves(batch)[0].shape[0]
    split = PartitionSpec(None if B % device_mesh.size else AXES)
    specs = (PartitionSpec(), split)
    return jax.shard_map(function, in_specs=specs, out_specs=split, check_vma=False)(shared, batch)


def gradient_over_shards(function, params: Any, shared: Any, parts: Any) -> tuple[Any, Any]:
    """`function(params, shared, parts [C B ...])` -> (a tree like `params`, scalars), both of them means over scenes.

    Each device computes them for its scenes: it gathers the parameters once, and the sums of its gradients are reduced once,
    to the parts that `sharding.infer` gives each device. Unlike where the compiler decides, a loop in `function` communicates
    nothing, but a device holds all parameters and their gradient. If `tensor` splits the parameters, the compiler decides.
    """
    device_mesh = jax.sharding.get_abstract_mesh()
    if device_mesh.empty or device_mesh.shape["tensor"] > 1:
        return function(params, shared, parts)
    specs = jax.tree.map(lambda x: x.spec, infer(params, device_mesh))
    axes = [axis for axis in BATCH_AXES if device_mesh.shape[axis] > 1]

    def reduced(x, spec):
        if "fsdp" in spec:
            x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=spec.index("fsdp"), tiled=True)
        return jax.lax.psum(x, [axis for axis in axes if axis not in spec])

    def local(params, shared, parts):
        gradient, scalars = function(params, shared, parts)
        shards = num_batch_shards(device_mesh)
        gradient = jax.tree.map(lambda x, spec: reduced(x / shards, spec), gradient, specs)
        return gradient, jax.lax.pmean(scalars, axes)

    whole, split = PartitionSpec(), PartitionSpec(None, BATCH_AXES)
    return jax.shard_map(
        local, in_specs=(whole, whole, split), out_specs=(specs, whole), check_vma=False
    )(params, shared, parts)


def process_slice(device_mesh: Mesh) -> tuple[int, int]:
    """The part of every batch that this process reads: (index, count). `global_batch` puts the parts together.

    This is not (`process_index`, `process_count`): processes that differ only along the `tensor` axis read the same part.

    Raises:
      InputError: the axes cut across the processes so that their parts overlap.
    """
    shards = NamedSharding(device_mesh, PartitionSpec(BATCH_AXES))
    parts = {}  # process: the shards of the batch on its devices
    for device, (rows,) in shards.devices_indices_map((num_batch_shards(device_mesh),)).items():
        parts.setdefault(device.process_index, set()).add(rows.start or 0)
    distinct = sorted({tuple(sorted(part)) for part in parts.values()})
    sizes = [len(part) for part in distinct]
    if sum(sizes) != num_batch_shards(device_mesh) or len(set(sizes)) > 1:
        raise InputError(
            f"sharding {dict(device_mesh.shape)} cuts across the {len(parts)} processes: make sharding.tensor a divisor, "
            "or a multiple, of the number of devices of a process"
        )
    return distinct.index(tuple(sorted(parts[jax.process_index()]))), len(distinct)


def global_batch(tree: Any, device_mesh: Mesh) -> Any:
    """Global arrays, split along the leading axis, from this process's part of the batch (NumPy arrays; see `process_slice`)."""
    sharding = NamedSharding(device_mesh, PartitionSpec(BATCH_AXES))
    num_slices = process_slice(device_mesh)[1]

    def one(x):
        shape = (len(x) * num_slices, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(one, tree)


def local_rows(tree: Any, count: int) -> Any:
    """The first `count` of this process's rows, as NumPy arrays, from arrays that are split along the leading axis."""

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
    """Each device's part of a tree of arrays: its rows, or its copy. All devices of the device mesh must be this process's."""

    def on(device):
        return jax.tree.map(
            lambda x: next(s.data for s in x.addressable_shards if s.device == device), tree
        )

    return {device: on(device) for device in device_mesh.devices.flat}


def micro_batches(tree: Any, count: int) -> Any:
    """Cuts a batch [B ...] into `count` parts [count B/count ...] for `lax.scan`; each part is split over all devices.

    Part i has the rows i, i + count, ...: every device keeps its own rows, and nothing is communicated.

    Raises:
      InputError: the batch is not divisible.
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
