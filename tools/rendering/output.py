"""Writes the files of an object, in OpenLRM's layout, and those of the folder of all objects."""

import dataclasses
import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image

from lrm_jax.ops import cameras as cameras_lib
from lrm_jax.types import Cameras, InputError
from rendering.protocols import Settings

DEPTH_UNIT = 1e-4  # unit of depth/*.png in world units: 16 bits reach to 6.55


@dataclasses.dataclass
class View:
    """An image. Depth and normal belong to the rays through the pixels' centres, and are 0 in the background."""

    rgba: np.ndarray  # [H W 4] uint8 sRGB, straight alpha
    depth: np.ndarray | None = None  # [H W] float32 world units along the optical axis
    normal: np.ndarray | None = None  # [H W 3] float32 unit, world frame, of the visible side


def save_view(folder: Path, index: int, view: View) -> None:
    """Writes rgba/000.png, and depth/000.png and normal/000.png if the view has them."""
    images = {"rgba": view.rgba}
    if view.depth is not None:
        steps = np.round(view.depth / DEPTH_UNIT).clip(1, 65535)
        images["depth"] = np.where(view.depth > 0, steps, 0).astype(np.uint16)
        seen = view.normal.any(axis=-1, keepdims=True)
        images["normal"] = np.where(seen, np.round(view.normal * 127.5 + 127.5), 0).astype(np.uint8)
    for name, image in images.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name / f"{index:03d}.png", compress_level=3)


def save_cameras(folder: Path, cameras: Cameras, size: int) -> None:
    """Writes pose/000.npy ... and intrinsics.npy for Cameras[V], which share their intrinsics."""
    (folder / "pose").mkdir(parents=True, exist_ok=True)
    poses = np.asarray(cameras_lib.opencv_to_opengl(jnp.asarray(cameras.c2w)))[:, :3]
    for index, pose in enumerate(poses):
        np.save(folder / "pose" / f"{index:03d}.npy", pose)
    intrinsics = np.concatenate([cameras.fxfycxcy[0], [1, 1]]).reshape(3, 2) * size
    np.save(folder / "intrinsics.npy", intrinsics.astype(np.float32))


def unfinished(out: Path, uid: str) -> Path:
    """The folder of an object until it is complete."""
    return out / f".{uid}.unfinished"


def prepare_folder(out: Path, settings: Settings) -> None:
    """Makes OUT and writes its settings. Raises InputError if OUT already has other settings."""
    wanted, path = json.loads(json.dumps(dataclasses.asdict(settings))), out / "render.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        there = json.loads(path.read_text()) if path.exists() else None
        if there is None:
            replace_text(path, json.dumps(wanted, indent=1) + "\n")
    except (OSError, ValueError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise InputError(f"{out}: cannot be used as the output folder ({cause})") from None
    if there is None:
        return
    there = {**json.loads(json.dumps(dataclasses.asdict(Settings()))), **there}
    other = [f"{k} {there[k]} (now {wanted.get(k)})" for k in there if there[k] != wanted.get(k)]
    if other:
        raise InputError(
            f"{out}: was rendered with other settings: {', '.join(other)}: choose another folder, or the same settings"
        )


def write_failures(out: Path, failures: dict[str, str]) -> dict[str, list[str]]:
    """Writes failures.json, cause -> uids with the most frequent cause first, and returns it. `failures` is uid -> cause."""
    causes = {}
    for uid, cause in sorted(failures.items()):
        causes.setdefault(cause, []).append(uid)
    causes = dict(sorted(causes.items(), key=lambda item: -len(item[1])))
    replace_text(out / "failures.json", json.dumps(causes, indent=1) + "\n")
    return causes


def replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
