"""Files that appear whole or not at all, whatever else is running or fails."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lrm_jax.types import InputError


@contextlib.contextmanager
def replacing(*paths: str | os.PathLike) -> Iterator[list[Path]]:
    """Gives temporary paths, each in the folder of its own, which is made if missing; renamed when the block ends well, else removed.

    Raises:
      InputError: one of `paths` is a folder, which nothing could be renamed to in the end.
      OSError: what the system says, as where the disk is full; none of the files is replaced then.
    """
    paths = [Path(path) for path in paths]
    for path in paths:
        if path.is_dir():
            raise InputError(f"{path} is a folder: name another destination")
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    try:
        yield temporary
        for path in temporary:
            with open(path, "rb+") as file:  # a disk may turn out to be full only now
                os.fsync(file.fileno())
        for path, destination in zip(temporary, paths, strict=True):
            os.replace(path, destination)
    except OSError as error:
        # A full disk is reported without a name.
        error.filename = error.filename or str(paths[0].parent)
        raise
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def write_file(path: str | Path, data: bytes) -> None:
    """Writes a file whole or not at all; its folder is made if missing."""
    path = Path(path)
    write_files(path.parent, {path.name: data})


def write_files(folder: str | Path, files: dict[str, bytes]) -> None:
    """Writes all files of a result, or, if the disk is full or the folder read-only, none of them.

    Raises:
      OSError: what the system says; temporary files are gone then.
    """
    with replacing(*(Path(folder) / name for name in files)) as temporary:
        for path, data in zip(temporary, files.values(), strict=True):
            path.write_bytes(data)


def printable(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8 (of old archives) become question marks in diamonds."""
    return os.fsencode(name).decode(errors="replace")


def check_writable(folder: str | Path) -> None:
    """Finds out before an hour's work that its result cannot be written.

    Raises:
      InputError: the folder, or the one in which it would be made, is not a folder or is read-only.
    """
    folder = Path(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"{existing} is a file: choose another folder for the results")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{existing} is read-only: choose another folder for the results")
