"""Shared by the benchmarks: inputs, peak memory, and a description of the machine."""

import platform
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lrm_jax.mesh import lattice
from lrm_jax.parallel import sharding
from lrm_jax.training import flops
from lrm_jax.types import TrainState

NORMAL = np.random.default_rng(0).standard_normal(2**20, np.float32)


def image() -> np.ndarray:
    """A disc on a transparent background."""
    y, x = np.mgrid[:256, :256] - 127.5
    alpha = np.where(x**2 + y**2 < 100**2, 255, 0)
    return np.stack([x + 128, y + 128, 255 - x / 2 - 128, alpha], axis=-1).astype(np.uint8)


def normal(x: jax.ShapeDtypeStruct) -> jax.Array:
    """Normal random numbers of this shape, without compiling a program. A product of zeros would take less power, and so less time."""
    return _placed(np.resize(NORMAL, x.shape), x)


def random_params(shapes):
    """Parameters with about the magnitude of initial ones, without compiling a program."""

    def one(path, x):
        name = str(path[-1].key)
        if name.startswith(("bias", "scale")):
            return _placed(np.full(x.shape, name.startswith("scale"), np.float32), x)
        fan_in = x.shape[-2] if x.ndim > 1 else x.size
        return _placed(np.resize(NORMAL, x.shape) * np.float32(fan_in**-0.5), x)

    return jax.tree_util.tree_map_with_path(one, shapes)


def random_state(abstract: TrainState) -> TrainState:
    """A training state before the first step, with `random_params`, sharded like `abstract`."""
    return TrainState(
        step=_placed(np.zeros(()), abstract.step),
        params=random_params(abstract.params),
        ema_params=random_params(abstract.ema_params),
        opt_state=jax.tree.map(lambda x: _placed(np.zeros(x.shape), x), abstract.opt_state),
        key=jax.device_put(jax.random.key(0), abstract.key.sharding),
    )


def _placed(values: np.ndarray, x: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(values.astype(x.dtype), getattr(x, "sharding", None))


def mesh_extraction(
    model, decoder: dict, scene: dict, resolution: int
) -> tuple[Callable[[], int], float]:
    """Prepares to extract the mesh of a smooth blob, at the cost of the model's own decoder, because random weights have no surface.

    Returns:
      A function that extracts the mesh and returns at how many points it evaluated the field, and the operations per point.
    """

    def query(decoder, scene, xyz):
        field, _ = model.apply({"params": decoder}, scene, xyz[None], method="query")
        # A sphere with ripples. The model's own value is computed too, but is too small to matter.
        blob = 0.6 * model.radius - jnp.linalg.norm(xyz, axis=-1) + 0.05 * jnp.sin(12 * xyz).sum(-1)
        return model.surface_level * jnp.exp(8 * blob) + 1e-30 * field[0]

    compiled_query = sharding.jit(query)

    def extract() -> int:
        evaluated = 0

        def field(xyz):
            nonlocal evaluated
            evaluated += xyz.shape[0]
            return compiled_query(decoder, scene, xyz)

        _, faces = lattice.extract(field, resolution, model.radius, model.surface_level)
        assert len(faces) > resolution**2 / 10
        return evaluated

    per_point = flops.count(query, decoder, scene, jnp.zeros((2**15, 3))) / 2**15
    return extract, per_point


def reset_peak() -> None:
    """Resets the peak of resident memory, if Linux allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_gb() -> float:
    """Peak of the accelerator's memory or, without an accelerator, of this process's resident memory since `reset_peak`."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def machine() -> str:
    """Device, cores and versions."""
    device = jax.devices()[0]
    return f"{device.device_kind}, {jax.device_count()} device(s), jax {jax.__version__}, Python {platform.python_version()}"


def commit() -> str:
    """The commit that was measured. Empty if git cannot tell."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # a copy without git
        return ""
