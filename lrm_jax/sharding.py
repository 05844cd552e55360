"""Where arrays live: the device mesh, regex rules from parameter names to shardings, and the batch axes.

One device mesh with three axes serves every run. `data` and `fsdp` both split the batch; `fsdp` also splits parameters and
optimiser state (fully sharded data parallelism), `tensor` splits the width of each layer. Axes are `Auto`: the compiler
propagates shardings between the ones that are pinned here, as in https://docs.jax.dev/en/latest/notebooks/Distributed_arrays_and_automatic_parallelization.html.
"""

import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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


def make_device_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """Arranges devices (default: all) as (data, fsdp, tensor). At most one size may be -1: what is left.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
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
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


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


def num_batch_shards(device_mesh: Mesh) -> int:
    """In how many parts a batch is split."""
    return device_mesh.shape["data"] * device_mesh.shape["fsdp"]


def constrain_batch(tree: Any) -> Any:
    """Pins the leading axis of every array to the batch axes of the device mesh in use.

    Identity outside `jax.set_mesh`, and for arrays whose leading axis the batch axes do not divide.
    """
    device_mesh = jax.sharding.get_abstract_mesh()
    if device_mesh.empty:
        return tree
    shards = device_mesh.shape["data"] * device_mesh.shape["fsdp"]

    def one(x):
        return (
            x
            if x.shape[0] % shards
            else jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))
        )

    return jax.tree.map(one, tree)


def global_batch(tree: Any, device_mesh: Mesh) -> Any:
    """Global arrays, split along the leading axis, from what this process read of the batch (NumPy arrays)."""
    sharding = NamedSharding(device_mesh, PartitionSpec(BATCH_AXES))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)
