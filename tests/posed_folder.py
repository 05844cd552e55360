"""A folder of posed images in NeRF's layout, shared by tests of captures and of families that take posed views."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lrm_jax.data import folders
from lrm_jax.ops import cameras, conventions


def ring(num_views: int = 4, share: float = 0.4, centre=(2.0, 1.0, 0.0)) -> np.ndarray:
    """Poses around a point, on part of a circle."""
    c2w = np.array(cameras.orbit(round(num_views / share), 2.0, 20.0, 40.0).c2w[:num_views])
    c2w[:, :3, 3] += centre
    return c2w.astype(np.float64)


def image(view: int, width: int = 24, height: int = 18) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    channels = [x * 10, y * 12, np.full_like(x, 40 * view)]
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


def write_transforms(
    folder: str, c2w: np.ndarray, convention: str = "opengl-c2w", **fields
) -> None:
    """Writes a scene in NeRF's layout."""
    Path(folder, "images").mkdir(parents=True, exist_ok=True)
    for v in range(len(c2w)):
        Image.fromarray(image(v)).save(Path(folder, "images", f"{v}.png"))
    frames = [
        {"file_path": f"images/{v}.png", "transform_matrix": x.tolist()}
        for v, x in enumerate(conventions.write(c2w, convention))
    ]
    content = {
        "fl_x": 30.0,
        "fl_y": 30.0,
        "cx": 12.0,
        "cy": 9.0,
        "w": 24,
        "h": 18,
        "frames": frames,
    }
    Path(folder, "transforms.json").write_text(json.dumps(content | fields))


def write_capture(folder: Path, rendered: Path, views: Sequence[int]) -> None:
    """Writes views of an object in OpenLRM's layout as a capture. Its world is that of the object's points.npy."""
    seen_by = folders.read_cameras(rendered)
    (folder / "images").mkdir(parents=True)
    frames = []
    for v, pose in zip(views, conventions.write(seen_by.c2w[views], "opengl-c2w"), strict=True):
        shutil.copy(seen_by.images[v], folder / "images" / f"{v:03d}.png")
        frames.append({"file_path": f"images/{v:03d}.png", "transform_matrix": pose.tolist()})
    width, height = seen_by.size
    fl_x, fl_y, cx, cy = seen_by.fxfycxcy[0] * [width, height, width, height]
    camera = dict(fl_x=fl_x, fl_y=fl_y, cx=cx, cy=cy, w=width, h=height)
    (folder / "transforms.json").write_text(json.dumps(camera | {"frames": frames}))
