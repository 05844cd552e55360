"""Files that are written whole or not at all, whatever else runs or fails."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lrm_jax.types import InputError


@contextlib.contextmanager
def replacing(*paths: str | os.PathLike) -> Iterator[list[Path]]:
    """Yields a temporary path for each of `paths`, in the same folder, which is created if missing.

    If the block succeeds, the temporary files are renamed to `paths`; otherwise they are removed.

    Raises:
      InputError: one of `paths` is a folder, which a file cannot replace.
      OSError: from the system, for example because the disk is full. No file is replaced then.
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
            with open(path, "rb+") as file:  # a full disk may show only now
                os.fsync(file.fileno())
        for path, destination in zip(temporary, paths, strict=True):
            os.replace(path, destination)
    except OSError as error:
        # A full disk is reported without a file name.
        error.filename = error.filename or str(paths[0].parent)
        raise
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def write_file(path: str | Path, data: bytes) -> None:
    """Writes a file whole or not at all; its folder is created if missing."""
    path = Path(path)
    write_files(path.parent, {path.name: data})


def write_files(folder: str | Path, files: dict[str, bytes]) -> None:
    """Writes all files of a result, or none of them if the disk is full or the folder is read-only.

    Raises:
      OSError: from the system. Temporary files are removed then.
    """
    with replacing(*(Path(folder) / name for name in files)) as temporary:
        for path, data in zip(temporary, files.values(), strict=True):
            path.write_bytes(data)


def printable(name: str) -> str:
    """A file name as text. Bytes that are not UTF-8 (from old archives) become U+FFFD, a question mark in a diamond."""
    return os.fsencode(name).decode(errors="replace")


def check_writable(folder: str | Path) -> None:
    """Checks before an hour's work that its results can be written.

    Raises:
      InputError: the folder, or the existing folder that it would be created in, is read-only or is a file.
    """
    folder = Path(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"{existing} is a file: choose another folder for the results")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{existing} is read-only: choose another folder for the results")
