"""Finds objects, and puts a 3D file on disk with all files that it refers to."""

import contextlib
import json
import os
import re
import struct
import tempfile
import urllib.parse
import zipfile
from collections.abc import Iterator
from pathlib import Path

from lrm_jax.types import InputError

SUFFIXES = (".glb", ".gltf", ".obj", ".ply")


def find_objects(source: Path) -> dict[str, tuple[Path, str | None]]:
    """uid -> (file, member if the file is a .zip), sorted. If several files have the same uid, the first one is used.

    Raises:
      InputError: there are no 3D files.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    files = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    found = {}
    for path in files:
        if path.suffix.lower() == ".zip":
            for member in _members(path):
                name = Path(member).with_suffix("").as_posix()
                found.setdefault(_uid(path.stem, name), (path, member))
        elif path.suffix.lower() in SUFFIXES:
            folder = source if source.is_dir() else path.parent.absolute()
            name = (
                path.relative_to(folder).with_suffix("").as_posix()
                if source.is_dir()
                else path.stem
            )
            found.setdefault(_uid(Path(os.path.abspath(folder)).name, name), (path, None))
    if not found:
        raise InputError(f"{source}: no {', '.join(SUFFIXES)} or .zip with such files in it")
    return dict(sorted(found.items()))


def _uid(*parts: str) -> str:
    """A name without leading dots, because readers treat folders with a leading dot as hidden."""
    return "-".join(parts).replace("/", "-").lstrip(".")


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(archive.namelist())
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(
            f"{path}: cannot be read as a .zip ({type(error).__name__}: {error}): remove it or download it again"
        ) from None
    hidden = ("__MACOSX/", "/.", "/._")
    return [
        n
        for n in names
        if Path(n).suffix.lower() in SUFFIXES and not any(h in f"/{n}" for h in hidden)
    ]


@contextlib.contextmanager
def opened(path: Path, member: str | None) -> Iterator[Path]:
    """Yields the path of the 3D file, checked by `check_complete`. It is valid only inside the `with`."""
    if member is None:
        check_complete(path)
        yield path
        return
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        file = Path(archive.extract(member, folder))
        if any(not other.exists() for other in referenced_files(file)):
            archive.extractall(folder)
        check_complete(file)
        yield file


def check_complete(path: Path) -> None:
    """Raises InputError if the file is empty or refers to a missing file. Readers would continue without textures."""
    if not path.stat().st_size:
        raise InputError("the file is empty (0 bytes): copy it again")
    for other in referenced_files(path):
        if not other.exists():
            kind = "material file" if other.suffix.lower() == ".mtl" else "texture or buffer"
            raise InputError(
                f"{kind} {other.name} is missing: put it where {path.name} refers to it"
            )


def referenced_files(path: Path) -> list[Path]:
    """The other files that a 3D file needs: buffers, images, material files and their images."""
    suffix = path.suffix.lower()
    if suffix in (".glb", ".gltf"):
        header = _gltf_header(path)
        parts = [*header.get("buffers", ()), *header.get("images", ())]
        names = [part["uri"] for part in parts if not part.get("uri", "data:").startswith("data:")]
        return [locate(path.parent, name) for name in names]
    if suffix == ".obj":
        materials = [locate(path.parent, name) for name in _values(path, r"mtllib\s+(.+)")]
        names = [name for p in materials if p.exists() for name in _values(p, r"map_Kd\s+(.+)")]
        return materials + [locate(path.parent, name) for name in names]
    with open(path, "rb") as file:
        head = file.read(4096).split(b"end_header")[0].decode("latin-1")
    return [locate(path.parent, name) for name in re.findall(r"(?i)texturefile (.+)", head)]


def locate(folder: Path, name: str) -> Path:
    """The file that a 3D file in `folder` calls `name`, or the most likely place if there is none.

    Names can have percent-encoding (as glTF requires), backslashes, or texture options in front (.mtl: `-s 1 1 1 wood.png`). They can also
    have the folders of the author's computer, while the file is beside the 3D file.
    """
    name = re.sub(r"^(-\w+(\s+([-+.\d]+|on|off|[rgbmlz]))+\s+)+", "", name.strip())
    plain = name.replace("\\", "/")
    decoded = urllib.parse.unquote(plain)
    places = [folder / n for n in (name, plain, decoded, Path(plain).name, Path(decoded).name)]
    return next((place for place in places if place.is_file()), folder / decoded)


def _values(path: Path, pattern: str) -> list[str]:
    """What `pattern` captures at the start of the lines of a text file."""
    found = set()
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.lstrip()[:1] == "m" and (match := re.match(pattern, line.strip())):
                found.add(match[1])
    return sorted(found)


def _gltf_header(path: Path) -> dict:
    """The JSON of a .glb (https://registry.khronos.org/glTF/specs/2.0/glTF-2.0.html#binary-gltf-layout) or .gltf.

    Empty if it cannot be read, because the reader of the whole file has a better message for that.
    """
    try:
        with open(path, "rb") as file:
            if path.suffix.lower() == ".gltf":
                return json.load(file)
            _, _, _, length, _ = struct.unpack("<5I", file.read(20))
            return json.loads(file.read(length))
    except (struct.error, ValueError):
        return {}
