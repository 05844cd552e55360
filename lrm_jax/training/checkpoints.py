"""A run's checkpoints. Orbax writes them in the background; each is either complete or absent.

A step is a folder `checkpoints/<step>` with two items: `state` has the arrays, and `data` has the state of the data iterator as
JSON. It is written as `<step>.orbax-checkpoint-tmp` and then renamed. Older steps are deleted only after that, so the last
complete step survives however a run ends. If a killed run leaves a temporary folder, the next run deletes it.
"""

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from lrm_jax.types import InputError


@contextlib.contextmanager
def open_folder(
    workdir: str | Path, *, keep: int = 2, keep_every: int | None = None, read_only: bool = False
) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of `workdir`, for a `with` statement. Leaving it waits until everything is written.

    Args:
      keep: number of checkpoints to keep, counted from the last.
      keep_every: steps that are multiples of this are kept forever.
      read_only: create, clean up and delete nothing, because another process may be writing to the folder.

    Raises:
      InputError: a number is not positive; or, on leaving, the last checkpoint could not be written.
    """
    if keep < 1 or (keep_every is not None and keep_every < 1):
        raise InputError(f"train.keep={keep} train.keep_every={keep_every}: must be 1 or more")
    _quieten_orbax()
    kept = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
    options = ocp.CheckpointManagerOptions(
        preservation_policy=None if read_only else policies.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=not read_only,
        create=not read_only,
        read_only=read_only,
    )
    manager = ocp.CheckpointManager(Path(workdir).absolute() / "checkpoints", options=options)
    try:
        yield manager
    except BaseException:
        # Report the error that ended the run, not a later one from closing.
        with contextlib.suppress(Exception):
            manager.close()
        raise
    with _saving(manager):
        manager.close()


def is_empty(workdir: str | Path) -> bool:
    """Whether there is no step to restore."""
    return not any(path.name.isdigit() for path in (Path(workdir) / "checkpoints").glob("*"))


def save(
    manager: ocp.CheckpointManager, step: int, state: Any, data_state: dict | None = None
) -> None:
    """Starts saving a step, and returns once the values are copied. Does nothing if `step` exists already.

    Every process must call it. `data_state` is JSON-serialisable and the same on every process.

    Raises:
      InputError: the disk is full, or the previous checkpoint could not be written. Older checkpoints are still there.
    """
    if step == manager.latest_step():
        return
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state or {})
    )
    with _saving(manager):
        manager.save(step, args=args)


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits until all saved steps are on the disk. Raises InputError like `save`."""
    with _saving(manager):
        manager.wait_until_finished()


def restore(manager: ocp.CheckpointManager, abstract_state: Any) -> tuple[Any, dict] | None:
    """(state, data_state) of the latest step, or None if there is no step.

    Args:
      abstract_state: ShapeDtypeStructs with the shardings to restore to. Other devices and processes may have saved the values.

    Raises:
      InputError: the checkpoint is damaged, or has other names or shapes.
    """
    step = manager.latest_step()
    if step is None:
        return None
    args = ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()
    )
    try:
        restored = _read(manager, step, args)
    except Exception as error:
        if not _is_of_files(error):
            raise
        before = max((s for s in manager.all_steps() if s < step), default=None)
        onward = "start again" if before is None else f"go on from step {before}"
        raise InputError(
            f"{manager.directory / str(step)}: damaged, or of another model ({_reason(error)}): "
            f"choose another --workdir, or delete this folder to {onward}"
        ) from error
    return restored["state"], restored["data"]


def restore_part(manager: ocp.CheckpointManager, shapes: dict, step: int | None = None) -> dict:
    """The named parts of the latest state, or of that of `step`, as NumPy arrays. The devices that saved it do not matter.

    Raises:
      ValueError: there is no checkpoint, it is damaged, or it has other names or shapes. The message is one line.
    """
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    args = ocp.args.PyTreeRestore(shapes, restore_args=as_numpy, partial_restore=True)
    try:
        step = manager.latest_step() if step is None else step
        return _read(manager, step, ocp.args.Composite(state=args))["state"]
    except Exception as error:
        if not _is_of_files(error):
            raise
        raise ValueError(_reason(error)) from error


def abstract(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with their shardings, from an `eval_shape` result."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _read(manager, step, args):
    """`manager.restore`, with less noise. After one array fails, TensorStore still delivers the others, to an event loop that is
    closed by then. Each of them would print a traceback above the actual error.
    """
    hook = sys.unraisablehook

    def tell(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = tell
    restored = manager.restore(step, args=args)
    sys.unraisablehook = hook
    return restored


@contextlib.contextmanager
def _saving(manager):
    """Turns errors in writing, at once or from the background, into one line that says which checkpoint is left."""
    try:
        yield
    except Exception as error:
        if not _is_of_files(error):
            raise
        manager.reload()
        last = manager.latest_step()
        there = "there is no earlier one" if last is None else f"that of step {last} is complete"
        raise InputError(
            f"{manager.directory}: the last checkpoint could not be written ({_reason(error)}): {there}; "
            "free some space, then repeat the command"
        ) from error


def _is_of_files(error: Exception) -> bool:
    """Whether Orbax raises this error for files that are missing, truncated or have other names or shapes, or for a full disk.

    tests/training/test_checkpoints.py damages every file of a checkpoint. A block that cannot be decompressed is a bare
    Exception.
    """
    return isinstance(error, (ValueError, KeyError, OSError)) or type(error) is Exception


def _reason(error: Exception) -> str:
    """The cause in a few words: TensorStore's messages contain kilobytes of its configuration."""
    if type(error) is Exception and error.__cause__ is not None:
        error = error.__cause__
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if of_array := re.match(r'([A-Z_]+): .*? (?:reading|writing|at) "(.+?)/[^/"]*"', line):
        return f"{of_array[2]}: {of_array[1].lower().replace('_', ' ')}"
    return line.strip("'\"")[:200]


def _quieten_orbax() -> None:
    """Silences Orbax, which logs an error with its traceback in each of its threads before raising it.

    To see this log, set absl's flag --verbosity=1.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_orbax)
    warnings.filterwarnings("ignore", "coroutine '.*CheckpointHandler", RuntimeWarning)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    if logging.getLogger("absl").isEnabledFor(logging.INFO):
        return True
    return "/orbax/" not in record.pathname and "tensorstore" not in record.getMessage()
