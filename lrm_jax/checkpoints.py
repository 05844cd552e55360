"""A run's checkpoints: Orbax, written in the background, complete or absent."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lrm_jax.types import InputError


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
    """The latest state, placed as `abstract_state` says (ShapeDtypeStructs with shardings); None if there is none.

    Raises:
      InputError: the checkpoint is damaged, or its names or shapes are others.
    """
    step = manager.latest_step()
    if step is None:
        return None
    try:
        return manager.restore(step, args=ocp.args.StandardRestore(abstract_state))
    except (ValueError, KeyError, OSError) as error:
        raise InputError(
            f"{manager.directory / str(step)}: damaged, or of another model ({str(error).splitlines()[0][:120]}): "
            "choose another --workdir, or delete this folder to go on from the one before"
        ) from error


def restore_part(manager: ocp.CheckpointManager, shapes: dict) -> dict:
    """The named parts of the latest state as NumPy arrays, whatever devices it was saved on.

    Raises:
      ValueError, KeyError, OSError: there is no checkpoint, it is damaged, or it has other names or shapes.
    """
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    args = ocp.args.PyTreeRestore(shapes, restore_args=as_numpy, partial_restore=True)
    return manager.restore(manager.latest_step(), args=args)


def abstract(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with their shardings, from an `eval_shape` result."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )
