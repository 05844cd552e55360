"""What a command tells and leaves behind: progress on stderr, timings, pictures, films, pages, and files written whole."""

import argparse
import base64
import contextlib
import html
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from lrm_jax.types import InputError


def write_file(path: str | Path, data: bytes) -> None:
    """Writes a file whole or not at all: under a temporary name in its folder, which is made if missing, then renamed."""
    path = Path(path)
    write_files(path.parent, {path.name: data})


def write_files(folder: str | Path, files: dict[str, bytes]) -> None:
    """Writes all files of a result, or, if the disk is full or the folder read-only, none of them.

    Raises:
      OSError: what the system says; temporary files are gone then.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        for name, data in files.items():
            with open(temporary[name], "wb") as file:
                file.write(data)
                # A disk may turn out to be full only now.
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            os.replace(temporary[name], folder / name)
    except OSError as error:
        # A full disk is reported without a name.
        error.filename = error.filename or str(folder)
        raise
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


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


def check_ranges(args: argparse.Namespace, **limits: tuple[float, float]) -> None:
    """Raises InputError for a number of the command line that is outside its (low, high); None is inside."""
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name} {value} is out of range: choose {low} to {high}")


class Stages:
    """The steps of a command: each is named on stderr when it starts, and timed.

    stages = Stages()
    with stages("encode"):
        ...
    stages.seconds  # {"encode": 1.2}; a stage entered twice adds up
    """

    def __init__(self):
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def elapsed(self) -> float:
        """Seconds since the command began."""
        return time.perf_counter() - self._start

    def say(self, message: str) -> None:
        """One line on stderr, with the time since the start before it."""
        print(f"[{self.elapsed():6.1f} s] {message}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def __call__(self, name: str, detail: str = "") -> Iterator[None]:
        self.say(name + detail)
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


def progress(iterable: Iterable, total: int | None = None, label: str = "") -> Iterable:
    """The iterable, with a bar on stderr once it has run for two seconds; the bar goes when it is done."""
    quiet = {} if sys.stderr.isatty() else {"mininterval": 10}  # a log file wants few lines
    return tqdm(iterable, label, total, delay=2, leave=False, file=sys.stderr, **quiet)


def depth_pictures(depth: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Grey pictures of depth, near bright and far dark, on white; one scale for all views.

    Args:
      depth: [V H W] distance along the ray; looked at only where alpha > 0.5.
      alpha: [V H W] in [0, 1].

    Returns:
      uint8 [V H W 3].
    """
    seen = (alpha > 0.5) & np.isfinite(depth)
    if not seen.any():
        return np.full((*depth.shape, 3), 255, np.uint8)
    near, far = np.percentile(depth[seen], [1, 99])
    grey = 0.9 - 0.8 * np.clip((depth - near) / max(far - near, 1e-6), 0, 1)
    return to_uint8(np.where(seen, grey, 1.0)[..., None].repeat(3, -1))


def normal_pictures(
    depth: np.ndarray, alpha: np.ndarray, origins: np.ndarray, dirs: np.ndarray
) -> np.ndarray:
    """Pictures of the surface normal, from finite differences of depth: xyz of the world in [-1, 1] as RGB, on white.

    Args:
      depth: [V H W] distance along the ray; looked at only where alpha > 0.5.
      alpha: [V H W] in [0, 1].
      origins, dirs: [V H W 3] the rays, unit directions.

    Returns:
      uint8 [V H W 3].
    """
    seen = (alpha > 0.5) & np.isfinite(depth)
    points = origins + np.where(seen, depth, np.nan)[..., None] * dirs
    down, right = np.gradient(points, axis=(1, 2))
    # Image rows go down and columns right: right x down would point away from the camera.
    normals = np.cross(down, right)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    valid = np.isfinite(length) & (length > 0)
    unit = np.divide(normals, length, out=np.ones_like(normals), where=valid)
    return to_uint8(np.where(valid, unit * 0.5 + 0.5, 1.0))


def contact_sheet(
    source: np.ndarray, rows: dict[str, np.ndarray], columns: list[str], title: str = ""
) -> bytes:
    """One PNG: the source picture at the left, beside it a labelled row of small pictures for each entry of `rows`.

    Args:
      source: uint8 [H W 3], any size.
      rows: label -> uint8 [V H W 3].
      columns: V labels.
      title: above the source picture.
    """
    height, width = next(iter(rows.values())).shape[1:3]
    margin, text = 8, 22
    left = width + 2 * margin
    sheet = Image.new(
        "RGB",
        (left + len(columns) * (width + margin), text + len(rows) * (height + text) + margin),
        "white",
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    fitted = ImageOps.contain(Image.fromarray(source), (width, height))
    sheet.paste(fitted, (margin + (width - fitted.width) // 2, 2 * text))
    draw.text((margin, text), title[: width // 8], fill="black", font=font)
    for j, label in enumerate(columns):
        draw.text((left + j * (width + margin), 2), label, fill="black", font=font)
    for i, (label, pictures) in enumerate(rows.items()):
        top = text + i * (height + text)
        draw.text((left, top), label, fill="gray", font=font)
        for j, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (left + j * (width + margin), top + text))
    return png(np.asarray(sheet))


def png(picture: np.ndarray) -> bytes:
    """A PNG file of uint8 [H W 3] or [H W 4]."""
    with tempfile.SpooledTemporaryFile(max_size=2**26) as file:
        Image.fromarray(picture).save(file, "png")
        file.seek(0)
        return file.read()


def turntable(frames: np.ndarray, frames_per_second: float = 24.0) -> bytes:
    """An H.264 `.mp4` of uint8 [V H W 3], that every browser plays: even sides (the last row or column is repeated), yuv420p.

    Raises:
      InputError: ffmpeg failed, as on a full temporary folder.
    """
    import imageio_ffmpeg  # 68 MB: needed for nothing else

    frames = np.pad(
        frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)], "edge"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "turntable.mp4"
        form = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{frames.shape[2]}x{frames.shape[1]}"]
        coded = ["-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
        # Not imageio_ffmpeg.write_frames: it forks with a hook, which JAX warns about.
        run = subprocess.run(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *form]
            + ["-r", str(frames_per_second), "-i", "-", *coded, str(path)],
            input=np.ascontiguousarray(frames).tobytes(),
            stderr=subprocess.PIPE,
        )
        if run.returncode:
            cause = " ".join(run.stderr.decode(errors="replace").split())[-200:]
            raise InputError(
                f"ffmpeg could not make the film ({cause}): free some space in {tempfile.gettempdir()}, or do without it"
            )
        return path.read_bytes()


def viewer_html(glb: bytes, title: str, distance: float, fov_y_deg: float) -> bytes:
    """One page that shows a `.glb` and needs no network: drag to turn, wheel to zoom.

    Our own page (assets/viewer.html) and not `trimesh.viewer.notebook.scene_to_html`: that one shows glTF's linear colours as
    if they were sRGB, almost black, and carries 700 kB of three.js.

    Args:
      glb: one primitive with float POSITION, NORMAL, and COLOR_0 or TEXCOORD_0 and an image; uint32 indices.
      title: plain text.
      distance: of the camera from the origin when the page opens, in front of the object: at glTF's +z.
      fov_y_deg: its full vertical field of view.
    """
    values = {
        "TITLE": html.escape(title),
        "DISTANCE": repr(float(distance)),
        "FOV_Y_DEG": repr(float(fov_y_deg)),
        "GLB": base64.b64encode(glb).decode(),
    }
    page = (Path(__file__).parent / "assets" / "viewer.html").read_text(encoding="utf-8")
    return re.sub(r"\$([A-Z_]+)", lambda match: values[match[1]], page).encode()


def to_uint8(picture: np.ndarray) -> np.ndarray:
    """[0, 1] to [0, 255], rounded."""
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
