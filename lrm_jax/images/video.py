"""From frames to a video."""

import subprocess
import tempfile
from pathlib import Path

import numpy as np

from lrm_jax.types import InputError


def turntable(frames: np.ndarray, frames_per_second: float = 24.0) -> bytes:
    """An H.264 `.mp4` of uint8 [V H W 3] that every browser plays: yuv420p, sides made even by repeating the last row or column.

    Raises:
      InputError: ffmpeg failed, for example because the temporary folder is full.
    """
    import imageio_ffmpeg  # 68 MB: needed for nothing else

    frames = np.pad(
        frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)], "edge"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "turntable.mp4"
        form = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{frames.shape[2]}x{frames.shape[1]}"]
        coded = ["-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
        # Not imageio_ffmpeg.write_frames: it forks with a hook, and JAX warns about that.
        run = subprocess.run(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *form]
            + ["-r", str(frames_per_second), "-i", "-", *coded, str(path)],
            input=np.ascontiguousarray(frames).tobytes(),
            stderr=subprocess.PIPE,
        )
        if run.returncode:
            cause = " ".join(run.stderr.decode(errors="replace").split())[-200:]
            raise InputError(
                f"ffmpeg could not make the video ({cause}): free some space in {tempfile.gettempdir()}, or leave the video out"
            )
        return path.read_bytes()
