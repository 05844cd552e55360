"""Renders views with Cycles, Blender's path tracer: shadows, reflections and the file's whole material. The cameras, the normalised
world and the light are the same as for embree.

Blender's Python module needs NumPy 1 and a certain Python. So it runs in another environment, in a process that runs
`blender_script.py`. Each object has its own process, so a file that crashes Blender fails alone.
"""

import collections
import dataclasses
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image

from lrm_jax.ops import cameras as cameras_lib
from lrm_jax.types import Cameras, InputError
from rendering.output import View
from rendering.protocols import Lighting, Settings
from rendering.surfaces import Triangles

SCRIPT = Path(__file__).with_name("blender_script.py")
INSTALL = "python3.11 -m venv bpyenv && bpyenv/bin/pip install 'bpy==4.5.*'"
PROBE = "import bpy"
NORMAL, DEPTH = ("Normal.X", "Normal.Y", "Normal.Z"), "Depth.Z"  # Blender's channel names
NOTHING = 1e9  # smaller depths are surfaces: the background has 1e10


@dataclasses.dataclass(frozen=True)
class Blender:
    python: str  # a Python that can `import bpy`
    threads: int  # per process


def find_blender(python: str | None, threads: int) -> Blender:
    """Checks that `python` has bpy. If not, raises InputError with the command that installs it."""
    if python is None:
        raise InputError(
            f"Cycles needs --blender PYTHON, a Python that has bpy: {INSTALL}; then --blender bpyenv/bin/python"
        )
    try:
        found = subprocess.run([python, "-I", "-c", PROBE], capture_output=True, text=True)
        cause = (found.stderr.strip().splitlines() or ["no message"])[-1]
    except OSError as error:
        found, cause = None, error.strerror
    if found is None or found.returncode:
        raise InputError(
            f"--blender {python}: this Python has no bpy ({cause}): {INSTALL}; then --blender bpyenv/bin/python"
        )
    return Blender(python, threads)


def render(
    file: Path,
    triangles: Triangles,
    cameras: Cameras,
    lighting: Lighting,
    settings: Settings,
    blender: Blender,
    folder: Path,
) -> Iterator[View]:
    """Yields the views of a 3D file from Cameras[V], as Blender finishes them.

    Args:
      file: file that Blender imports.
      triangles: the same object, with its place in the normalised world.
      cameras, lighting, settings: as for embree.
      blender: the Blender to run.
      folder: a new folder for the files that pass between the processes.

    Raises:
      InputError: Blender ended before its work was done.
    """
    folder.mkdir(parents=True)
    path = folder / "job.json"
    path.write_text(json.dumps(_job(file, triangles, cameras, lighting, settings, blender, folder)))
    # -I hides the modules beside the script and on PYTHONPATH. Some have the same names as Blender's own modules (cycles).
    command = [blender.python, "-I", str(SCRIPT), str(path)]
    finished, last = 0, collections.deque(maxlen=20)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            for line in process.stdout:
                if line.startswith("finished view "):
                    yield _read_view(folder / f"{finished:03d}", settings.geometry)
                    finished += 1
                elif line.strip():
                    last.append(line.strip())
        except BaseException:
            process.kill()
            raise
    # The exit code does not count, because Blender can crash during cleanup after all views are done.
    if finished < len(cameras.c2w):
        said = next((line for line in reversed(last) if "Error" in line), last[-1] if last else "")
        raise InputError(
            f"Blender ended with code {process.returncode} after {finished} views: {said[:160]}"
        )


def _job(file, triangles, cameras, lighting, settings, blender, folder) -> dict:
    """The job for blender_script.py, which documents it."""
    return {
        "file": str(file.absolute()),
        "centre": triangles.centre.tolist(),
        "scale": triangles.scale,
        "c2w": np.asarray(cameras_lib.opencv_to_opengl(jnp.asarray(cameras.c2w))).tolist(),
        "focal": float(cameras.fxfycxcy[0, 0]),
        "size": settings.size,
        "samples": settings.samples,
        "geometry": settings.geometry,
        "light": {
            "direction": lighting.direction.tolist(),
            "sun": lighting.sun,
            "sky": lighting.sky,
            "above": lighting.above,
        },
        "threads": blender.threads,
        "out": str(folder.absolute()),
    }


def _read_view(stem: Path, geometry: bool) -> View:
    """Reads the files of a view and deletes them, because 1000 x 1000 pixels take 20 MB."""
    image, channels = stem.with_suffix(".png"), stem.with_suffix(".exr")
    view = View(rgba=np.asarray(Image.open(image).convert("RGBA")))
    image.unlink()
    if geometry:
        found = read_exr(channels.read_bytes())
        channels.unlink()
        short = {name.split(".", 1)[1]: values for name, values in found.items()}
        seen = short[DEPTH] < NOTHING
        view.depth = np.where(seen, short[DEPTH], 0).astype(np.float32)
        normal = np.stack([short[name] for name in NORMAL], axis=-1)
        view.normal = np.where(seen[..., None], normal, 0).astype(np.float32)
    return view


def read_exr(data: bytes) -> dict[str, np.ndarray]:
    """Channel -> float32[H W] of an uncompressed OpenEXR file with 32-bit channels in scan lines. Blender is told to write this kind.
    A package for the whole format would not be worth its size here.

    Format: https://openexr.com/en/latest/OpenEXRFileLayout.html.

    Raises:
      InputError: the OpenEXR file is of another kind.
    """
    position, header = 8, {}
    while data[position]:
        name, kind, rest = data[position : position + 512].split(b"\0", 2)
        start = position + len(name) + len(kind) + 6
        length = int.from_bytes(data[start - 4 : start], "little")
        header[name.decode()] = data[start : start + length]
        position = start + length
    if header["compression"] != b"\0" or data[5] & 0b1010:
        raise InputError(
            "the OpenEXR file is compressed, tiled or in several parts: Blender was told to write another kind"
        )
    names, channels = [], header["channels"]
    while channels[0]:
        name, rest = channels.split(b"\0", 1)
        if rest[:4] != (2).to_bytes(4, "little"):
            raise InputError(f"OpenEXR channel {name.decode()} is not 32-bit float")
        names.append(name.decode())
        channels = rest[16:]
    left, top, right, bottom = np.frombuffer(header["dataWindow"], "<i4")
    width, height = right - left + 1, bottom - top + 1
    # A table of offsets comes first. Then each line has its number, its size in bytes, and its channels one after another.
    line = np.dtype([("place", "<i4", 2), ("values", "<f4", (len(names), width))])
    lines = np.frombuffer(data, line, height, position + 1 + 8 * height)
    return {name: lines["values"][:, i] for i, name in enumerate(names)}
