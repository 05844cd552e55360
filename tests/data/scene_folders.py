"""Small scenes of noise, written in each layout that `lrm_jax.data.scene_files` reads."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from lrm_jax.data import scene_files
from lrm_jax.weights import tensor_files

NUM_FRAMES, WIDTH, HEIGHT = 14, 48, 32
FOCAL, CENTRE = (40.0, 44.0), (25.0, 15.0)


def trajectory(seed: int = 0, count: int = NUM_FRAMES) -> np.ndarray:
    """[V 4 4] poses, OpenCV axes, of a camera that moves forward, sways and turns a little."""
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (count, 1, 1))
    start = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    start *= np.sign(np.linalg.det(start))
    for i, pose in enumerate(poses):
        a = 0.05 * i
        turn = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
        pose[:3, :3] = start @ turn
        pose[:3, 3] = start @ [0.2 * i, 0.1 * np.sin(i), 0.5 * i] + [3, -1, 7]
    return poses


def image(seed: int, frame: int) -> Image.Image:
    """A smooth image, so that JPEG preserves it. The blue channel tells the frame number."""
    x, y = np.meshgrid(np.linspace(0, 1, WIDTH), np.linspace(0, 1, HEIGHT))
    rgb = np.stack([80 + 100 * x, 80 + 100 * y, np.full_like(x, 10 * frame + 40 + seed)], -1)
    return Image.fromarray(rgb.astype(np.uint8))


def fractions() -> list[float]:
    return [FOCAL[0] / WIDTH, FOCAL[1] / HEIGHT, CENTRE[0] / WIDTH, CENTRE[1] / HEIGHT]


def write_frames(folder: Path, seed: int, count: int) -> list[str]:
    folder.mkdir(parents=True)
    names = [
        f"frame_{frame}.png" for frame in range(count)
    ]  # not padded with zeros, but 10 must come after 9
    for frame, name in enumerate(names):
        image(seed, frame).save(folder / name)
    return names


def write_nerfstudio(root: Path, name: str, seed: int, count: int = NUM_FRAMES) -> None:
    names = write_frames(root / name / "images", seed, count)
    opengl = trajectory(seed, count) * [1, -1, -1, 1]  # y up, z backward: two columns change signs
    frames = [
        dict(file_path=f"images/{file}", transform_matrix=pose.tolist())
        for file, pose in zip(names, opengl, strict=True)
    ][::-1]
    content = dict(
        w=WIDTH, h=HEIGHT, fl_x=FOCAL[0], fl_y=FOCAL[1], cx=CENTRE[0], cy=CENTRE[1], frames=frames
    )
    (root / name / "transforms.json").write_text(json.dumps(content))


def write_lvsm(root: Path, name: str, seed: int, count: int = NUM_FRAMES) -> None:
    """Writes LVSM's layout. `root` is a stage. The paths are those of the machine that wrote them."""
    names = write_frames(root / "images" / name, seed, count)
    frames = [
        dict(
            image_path=f"/elsewhere/re10k/test/images/{name}/{file}",
            fxfycxcy=[*FOCAL, *CENTRE],
            w2c=np.linalg.inv(pose).tolist(),
        )
        for file, pose in zip(names, trajectory(seed, count), strict=True)
    ]
    (root / "metadata").mkdir(exist_ok=True)
    content = dict(scene_name=name, frames=frames)
    (root / "metadata" / f"{name}.json").write_text(json.dumps(content))


def write_chunk(root: Path, file: str, scene_seeds: dict[str, int], count=NUM_FRAMES) -> None:
    """Writes one chunk in pixelSplat's layout, and adds it to the index."""
    root.mkdir(parents=True, exist_ok=True)
    content = []
    for name, seed in scene_seeds.items():
        images = []
        for frame in range(count):
            path = root / "frame.jpg"
            image(seed, frame).save(path, quality=100, subsampling=0)
            images.append(np.frombuffer(path.read_bytes(), np.uint8))
            path.unlink()
        w2c = np.linalg.inv(trajectory(seed, count))[:, :3].reshape(count, 12)
        intrinsics = np.tile([*fractions(), 0, 0], (count, 1))
        cameras = np.concatenate([intrinsics, w2c], axis=1).astype(np.float32)
        timestamps = np.arange(count, dtype=np.int64)
        content.append(
            dict(url="", timestamps=timestamps, cameras=cameras, images=images, key=name)
        )
    tensor_files.write_torch(root / file, content)
    index = root / "index.json"
    known = json.loads(index.read_text()) if index.exists() else {}
    index.write_text(json.dumps(known | dict.fromkeys(scene_seeds, file)))
    scene_files._chunk.cache_clear()


def write_colmap(root: Path, name: str, seed: int, count: int = NUM_FRAMES) -> None:
    names = write_frames(root / name / "images", seed, count)
    sparse = root / name / "sparse" / "0"
    sparse.mkdir(parents=True)
    (sparse / "cameras.txt").write_text(
        f"1 PINHOLE {WIDTH} {HEIGHT} {FOCAL[0]} {FOCAL[1]} {CENTRE[0]} {CENTRE[1]}\n"
    )
    lines = []
    for pose in trajectory(seed, count):
        w2c = np.linalg.inv(pose)
        r = w2c[:3, :3]
        # The quaternion is the eigenvector of Bar-Itzhack's matrix for its largest eigenvalue.
        k = np.zeros((4, 4))
        k[0] = [np.trace(r), r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]]
        k[:, 0] = k[0]
        k[1:, 1:] = r + r.T - np.trace(r) * np.eye(3)
        quaternion = np.linalg.eigh(k)[1][:, -1]
        lines += [" ".join(map(repr, map(float, [*quaternion, *w2c[:3, 3]])))]
    text = "".join(f"{i} {line} 1 {names[i]}\n\n" for i, line in enumerate(lines))
    (sparse / "images.txt").write_text(text)


def write_pixelsplat(root: Path, name: str, seed: int, count: int = NUM_FRAMES) -> None:
    write_chunk(root, f"{name}.torch", {name: seed}, count)


LAYOUTS = dict(
    nerfstudio=write_nerfstudio, lvsm=write_lvsm, pixelsplat=write_pixelsplat, colmap=write_colmap
)
