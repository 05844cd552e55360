"""Where arrays live: the device mesh, and regex rules from parameter names to shardings.

Every run uses one device mesh with three axes. `data` and `fsdp` both split the batch; `fsdp` also splits parameters and
optimiser state (fully sharded data parallelism); `tensor` splits the width of each layer. Axes are `Auto`: the compiler
propagates shardings from the arrays that are pinned here to the others, as in
https://docs.jax.dev/en/latest/notebooks/Distributed_arrays_and_automatic_parallelization.html.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import mesh_utils
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
# The first match wins, by `re.search` on the path ("blocks/attn/qkv/kernel"; the optimiser's moments end in the same path). A
# spec is for the last dimensions: layers stacked by `nn.scan` keep the spec of one layer. Column-parallel in, row-parallel out.
RULES = (
    (r"(bias(_\d+)?|scale\d?)$", PartitionSpec()),
    (r"(out|fc2)/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"kernel(_\d+)?$", PartitionSpec("fsdp", "tensor")),
    (r".*", PartitionSpec("fsdp")),
)


def make_device_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """Arranges devices (default: all) as (data, fsdp, tensor). At most one size may be -1: the rest.

    If there are several TPU slices, only `data` crosses them, over the slower network.

    Raises:
      InputError: the product of the sizes is not the number of devices, or `data` is not divisible by the number of slices.
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
            "their product must be that number (one of them may be -1: the rest)"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise InputError(
            f"sharding data={sizes[0]} does not divide over {slices} slices: make it a multiple, as no other axis may cross them"
        )
    # Not jax.make_mesh: it refuses several slices, and sizes that split an axis of a TPU's torus.
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
    """A device mesh (data, fsdp, tensor) of devices that need not exist, for tracing with `jax.sharding.use_abstract_mesh`."""
    device = AbstractDevice(device_kind=device_kind, num_cores=1, platform=platform)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)


def spec_for(path: str, shape: tuple[int, ...], device_mesh: Mesh, rules=RULES) -> PartitionSpec:
    """The sharding of one array by the first matching rule. A dimension that is not divisible by its axis stays whole."""
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
    """A tree of NamedShardings for a tree of arrays or ShapeDtypeStructs, by each leaf's path."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(device_mesh, spec_for(name, leaf.shape, device_mesh, rules))

    return jax.tree_util.tree_map_with_path(one, tree)


def platform() -> str:
    """The platform of the current device mesh, or JAX's default if there is none: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """The kind of the current device mesh's devices, or of JAX's default ones if there is none: "NVIDIA H100 80GB HBM3"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def jit(function: Callable, **arguments) -> Callable:
    """`jax.jit`, not for use inside another. On a CPU, XLA uses vectors of 512 bits if there are any, not its usual 256."""
    options = {"xla_cpu_prefer_vector_width": 512} if platform() == "cpu" else None
    return jax.jit(function, compiler_options=options, **arguments)
