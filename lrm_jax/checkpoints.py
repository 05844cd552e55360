"""A run's checkpoints: Orbax, written in the background, complete or absent."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def open_folder(
    workdir: str | Path, *, keep: int = 2, read_only: bool = False
) -> ocp.CheckpointManager:
    """The checkpoints of `workdir`. Steps are written to a temporary name and renamed, and the last `keep` of them kept."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else keep, read_only=read_only, create=not read_only
    )
    return ocp.CheckpointManager(Path(workdir).absolute() / "checkpoints", options=options)


def save(manager: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Starts to save `state`; returns when its values are copied. Does nothing if `step` is there already."""
    if step != manager.latest_step():
        manager.save(step, args=ocp.args.StandardSave(state))


def restore(manager: ocp.CheckpointManager, abstract_state: Any) -> Any | None:
    """The latest state, placed as `abstract_state` says (ShapeDtypeStructs with shardings); None if there is none."""
    if manager.latest_step() is None:
        return None
    return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(abstract_state))


def abstract(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with their shardings, from an `eval_shape` result."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )
