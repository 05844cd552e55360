"""Tiny objects in OpenLRM's layout, with a red dot whose place in every image is known."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE, VIEWS, FOCAL = 32, 8, 40.0
POINT = np.array([0.5, 0.3, 0.2])  # a red dot; the object is a faint ball around the origin
FIELDS = dict(seed=3, num_target=3, source_size=16, target_size=32)


def pose_at(azimuth: float, elevation: float, distance: float = 3.0) -> np.ndarray:
    """[3 4] Blender camera that looks at the origin, z up."""
    a, e = np.radians([azimuth, elevation])
    back = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
    right = np.array([-np.sin(a), np.cos(a), 0])
    return np.stack([right, np.cross(back, right), back, distance * back], axis=1)


def pixel_of(point: np.ndarray, pose: np.ndarray) -> tuple[float, float]:
    """(column, row), by Blender's definition: x right, y up, z backward."""
    x, y, z = (point - pose[:, 3]) @ pose[:, :3]
    return SIZE / 2 + FOCAL * x / -z, SIZE / 2 - FOCAL * y / -z


def image(pose: np.ndarray, shade: int) -> np.ndarray:
    rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
    rows, columns = np.indices((SIZE, SIZE)) + 0.5
    ball = np.hypot(rows - SIZE / 2, columns - SIZE / 2) < 11
    rgba[ball] = [0, shade, 60, 255]
    column, row = pixel_of(POINT, pose)
    rgba[(np.abs(rows - row) < 1.5) & (np.abs(columns - column) < 1.5)] = [255, 0, 0, 255]
    return rgba


def write_object(folder: Path, shade: int = 30) -> None:
    """Even views at elevation 10 to 30, odd ones at 50."""
    (folder / "rgba").mkdir(parents=True)
    (folder / "pose").mkdir()
    np.save(folder / "intrinsics.npy", np.float32([[FOCAL] * 2, [SIZE / 2] * 2, [SIZE] * 2]))
    for view in range(VIEWS):
        pose = pose_at(360 * view / VIEWS + 11, 50 if view % 2 else 10 + 3 * view)
        np.save(folder / "pose" / f"{view:03d}.npy", pose.astype(np.float32))
        Image.fromarray(image(pose, shade)).save(folder / "rgba" / f"{view:03d}.png")
