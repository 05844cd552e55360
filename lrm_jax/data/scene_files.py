"""Where the frames and cameras of a scene are: four layouts of posed images, read scene by scene.

    root/index.json, 000000.torch ...        pixelSplat's RealEstate10K: {key: chunk}; a chunk is a list of {"key", "cameras"
                                             [V 18], "images": V JPEG files as uint8 tensors}; a row of cameras is
                                             (fx, fy, cx, cy) as fractions, 0, 0, and world to camera [3 4]
    root/metadata/<scene>.json, images/<scene>/00000.png ...
                                             LVSM's: {"frames": [{"image_path" or "file_path", "fxfycxcy", "w2c" [4 4]}]}
    root/<scene>/transforms.json             NeRF, instant-ngp, nerfstudio: camera to world, OpenGL's axes. Blender's scenes of
                                             NeRF have transforms_train.json instead
    root/<scene>/sparse/0, images            COLMAP's

The first two stand in `root/train` and `root/test`, which then are the splits, or in `root`; a scene of the other two may be `root`
itself. Written from the descriptions at https://github.com/dcharatan/pixelsplat and https://github.com/Haian-Jin/LVSM (README), not
from their data, which cannot be fetched here. Not verified for LVSM's: the name of the images' field, so both are taken; the
unit of `fxfycxcy`, so pixels and fractions are told apart; what the paths are relative to, so that only their last three parts count.
"""

import dataclasses
import functools
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from lrm_jax.data import colmap, splits
from lrm_jax.images.cutout import blend
from lrm_jax.images.load import has_alpha, load_image
from lrm_jax.ops.cameras import opengl_to_opencv
from lrm_jax.types import InputError
from lrm_jax.weights import tensor_files

STAGES = {"train": ("train",), "val": ("test",), "all": ("train", "test")}
TRANSFORMS = ("transforms.json", "transforms_train.json")
SPARSE = ("sparse/0", "sparse", "colmap/sparse/0")
# What a mismatch of the sides' ratio may be: rounding of sizes, not an image that lies on its side.
ASPECT_TOLERANCE = 0.03


@dataclasses.dataclass(frozen=True)
class Frames:
    """The posed images of one scene, in their order."""

    images: tuple[Path | np.ndarray, ...]  # V files, or their bytes
    c2w: np.ndarray  # [V 4 4] float64, OpenCV axes, in the scene's own world and unit
    fxfycxcy: np.ndarray  # [V 4] float64, fractions of width, height, width, height
    aspect: np.ndarray | None = None  # [V] width / height that the cameras are for; None: unknown


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a scene is."""

    name: str
    path: Path  # of its chunk, its JSON or its folder
    reader: Callable[[Path, str], Frames]  # from (path, name)

    def read(self) -> Frames:
        """The frames.

        Raises:
          InputError: a file is missing or damaged, or a camera is none. It does not name the scene.
        """
        return _checked(self.reader(self.path, self.name))


def find(root: Path, split: str) -> list[Place]:
    """The scenes of a split, sorted by file and name within each folder.

    Where both `root/train` and `root/test` are there, "train" is the one and "val" the other; otherwise the names decide, as they do
    for objects. "all": both.

    Raises:
      InputError: no such folder or split, or no scene in it.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder: check data.root")
    if split not in STAGES:
        raise InputError(f"split {split!r}: must be train, val or all")
    stages = [root / name for name in STAGES["all"] if _is_set(root / name)]
    if len(stages) == 2:
        places = [place for name in STAGES[split] for place in _list(root / name)]
        chosen = range(len(places))
    else:
        places = _list((stages or [root])[0])
        chosen = splits.select([place.name for place in places], split, str(root)) if places else []
    if not places:
        raise InputError(
            f"{root}: no scene in it: neither index.json with .torch files, metadata/*.json, <scene>/transforms.json"
            " nor <scene>/sparse/0"
        )
    return [places[i] for i in chosen]


def _is_set(folder: Path) -> bool:
    """Whether the scenes of a folder are in pixelSplat's or LVSM's layout."""
    return (folder / "metadata").is_dir() or any(folder.glob("*.torch"))


def _list(folder: Path) -> list[Place]:
    """All scenes of a folder, whichever layout it has."""
    if (folder / "metadata").is_dir():
        files = sorted((folder / "metadata").glob("*.json"))
        return [Place(path.stem, path, _read_frames_json) for path in files]
    if any(folder.glob("*.torch")):
        chunks = _load_json(folder / "index.json", f"{folder}/index.json")
        return [
            Place(key, folder / chunks[key], _read_chunk)
            for key in sorted(chunks, key=lambda key: (chunks[key], key))
        ]
    if is_scene(folder):
        return [Place(folder.resolve().name, folder, _read_folder)]
    scenes = sorted(path for path in folder.iterdir() if path.is_dir() and is_scene(path))
    return [Place(path.name, path, _read_folder) for path in scenes]


def is_scene(folder: Path) -> bool:
    """Whether `read_folder` finds cameras in a folder."""
    return any((folder / name).is_file() for name in TRANSFORMS) or _sparse(folder) is not None


def read_folder(folder: Path) -> Frames:
    """The frames, sorted by name, of a folder with transforms.json or COLMAP's reconstruction (the former, where there are both).

    Raises:
      InputError: neither is there, a file is missing or damaged, a camera is none or far from a pinhole.
    """
    return _checked(_read_folder(folder, folder.name))


def read_image(frames: Frames, view: int) -> np.ndarray:
    """[H W 3] uint8 sRGB; what is transparent is white, as NeRF (https://arxiv.org/abs/2003.08934) has it.

    Raises:
      InputError: the image is missing, damaged or lies on its side.
    """
    image = frames.images[view]
    if isinstance(image, Path):
        rgba = load_image(image)
        # Rounded, and not changed where opaque.
        rgb = (blend(rgba, 1.0) * 255 + 0.5).astype(np.uint8) if has_alpha(rgba) else rgba[..., :3]
        name = image.name
    else:
        name = f"frame {view}"
        try:
            rgb = np.asarray(Image.open(io.BytesIO(image.tobytes())).convert("RGB"))
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error ...
            raise InputError(f"{name} cannot be decoded ({type(error).__name__})") from None
    if frames.aspect is not None:
        ratio = rgb.shape[1] / rgb.shape[0] / frames.aspect[view]
        if abs(ratio - 1) > ASPECT_TOLERANCE:
            raise InputError(
                f"{name} is {rgb.shape[1]}x{rgb.shape[0]}, which has not the proportions of its camera: turned or cropped?"
            )
    return rgb


def is_rotation(matrices: np.ndarray) -> np.ndarray:
    """Which of finite matrices [V 3 3] are rotations, to the precision that files have: bool [V]."""
    off = np.abs(matrices @ matrices.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
    return (off <= 0.01) & (np.linalg.det(matrices) >= 0)


# -- the layouts


@functools.lru_cache(maxsize=4)
def _chunk(path: Path) -> dict[str, dict]:
    content, _ = tensor_files.read(path)
    if not isinstance(content, list) or not all(
        isinstance(x, dict) and "key" in x for x in content
    ):
        raise InputError(f"{path.name}: not a chunk of pixelSplat's: a list of scenes with keys")
    return {scene["key"]: scene for scene in content}


def _read_chunk(path: Path, name: str) -> Frames:
    scene = _chunk(path).get(name)
    if scene is None:
        raise InputError(f"{path.name} lacks it, though index.json says otherwise")
    try:
        cameras, images = np.asarray(scene["cameras"], float), tuple(scene["images"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path.name}: no cameras or images ({error})") from None
    if cameras.shape != (len(images), 18):
        raise InputError(f"{path.name}: cameras {list(cameras.shape)} of {len(images)} images")
    w2c = np.tile(np.eye(4), (len(cameras), 1, 1))
    w2c[:, :3] = cameras[:, 6:].reshape(-1, 3, 4)
    return Frames(images, _inverse(w2c), cameras[:, :4])


def _read_frames_json(path: Path, name: str) -> Frames:
    """One scene of LVSM's layout."""
    stage, content = path.parents[1], _load_json(path, path.name)
    try:
        frames = content["frames"]
        files = [Path(frame.get("image_path") or frame["file_path"]) for frame in frames]
        w2c = np.array([frame["w2c"] for frame in frames], float)
        fxfycxcy = np.array([frame["fxfycxcy"] for frame in frames], float)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path.name} cannot be read ({type(error).__name__}: {error})") from None
    if not files or w2c.shape[1:] != (4, 4) or fxfycxcy.shape[1:] != (4,):
        raise InputError(f"{path.name}: w2c {list(w2c.shape)}, fxfycxcy {list(fxfycxcy.shape)}")
    images = [stage.joinpath(*file.parts[-3:]) for file in files]
    images = tuple(
        here if here.is_file() else stage / file for here, file in zip(images, files, strict=True)
    )
    # A principal point within a pixel of the corner is none: these are fractions.
    if fxfycxcy[:, 2:].max() > 1:
        fxfycxcy /= np.tile(_size(images[0]), 2)
    return Frames(images, _inverse(w2c), fxfycxcy)


def _read_folder(folder: Path, name: str) -> Frames:
    for file in TRANSFORMS:
        if (folder / file).is_file():
            return _read_transforms(folder / file)
    sparse = _sparse(folder)
    if sparse is None:
        raise InputError(f"{folder}: neither {' nor '.join((*TRANSFORMS, *SPARSE))} in it")
    read = colmap.read(sparse)
    order = sorted(range(len(read.names)), key=lambda view: _natural(read.names[view]))
    images = tuple(folder / "images" / read.names[view] for view in order)
    aspect = read.sizes[order, 0] / read.sizes[order, 1]
    return Frames(images, read.c2w[order], read.fxfycxcy[order], aspect)


def _sparse(folder: Path) -> Path | None:
    """The folder of COLMAP's reconstruction."""
    for name in SPARSE:
        if any((folder / name / f"cameras{suffix}").is_file() for suffix in (".bin", ".txt")):
            return folder / name
    return None


def _read_transforms(path: Path) -> Frames:
    """Cameras of NeRF's kind. nerfstudio does not write them in the order of the video."""
    content = _load_json(path, path.name)
    try:
        frames = [{**content, **frame} for frame in content["frames"]]
        frames.sort(key=lambda frame: _natural(frame["file_path"]))
        images = tuple(_with_suffix(path.parent / frame["file_path"]) for frame in frames)
        c2w = np.array([frame["transform_matrix"] for frame in frames], float)
        cameras = [_pinhole(frame, file) for frame, file in zip(frames, images, strict=True)]
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path.name} cannot be read ({type(error).__name__}: {error})") from None
    if not frames or c2w.shape[1:] != (4, 4):
        raise InputError(f"{path.name}: transform_matrix {list(c2w.shape)} of {len(frames)} frames")
    fxfycxcy, aspect = zip(*cameras, strict=True)
    return Frames(images, opengl_to_opencv(c2w), np.array(fxfycxcy), np.array(aspect))


def _pinhole(frame: dict, image: Path) -> tuple[np.ndarray, float]:
    """(fx, fy, cx, cy) as fractions, and width / height, of a frame with the fields that all frames share."""
    if (model := frame.get("camera_model", "OPENCV")) not in (
        "OPENCV",
        "PINHOLE",
        "SIMPLE_PINHOLE",
        "PERSPECTIVE",
    ):
        raise InputError(f"a {model} camera is not a pinhole: undistort the images first")
    w, h = (frame["w"], frame["h"]) if "w" in frame and "h" in frame else _size(image)
    if "fl_x" in frame:
        fx = frame["fl_x"]
    else:
        fx = 0.5 * w / np.tan(frame["camera_angle_x"] / 2)
    focal = (fx, frame.get("fl_y", fx), frame.get("cx", w / 2), frame.get("cy", h / 2))
    lens = [frame.get(name, 0.0) for name in ("k1", "k2", "p1", "p2", "k3", "k4")]
    if any(lens[4:]):
        raise InputError(
            f"a lens with k3={lens[4]}, k4={lens[5]} is not a pinhole: undistort the images first"
        )
    return colmap.pinhole(4, w, h, (*focal, *lens[:4])), w / h  # 4: OPENCV


def _with_suffix(path: Path) -> Path:
    """NeRF's own scenes leave the suffix out."""
    return path if path.is_file() or path.suffix else path.with_name(path.name + ".png")


def _natural(name: str) -> list:
    """To sort names by: numbers as numbers, so that a video's frames are in their order."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _size(image: Path) -> tuple[int, int]:
    """(width, height), without decoding."""
    try:
        with Image.open(image) as opened:
            return opened.size
    except OSError as error:
        raise InputError(f"{image.name} cannot be read ({type(error).__name__})") from None


def _load_json(path: Path, name: str) -> dict:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{name} is missing") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be read ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise InputError(f"{name} is not a JSON object")
    return content


def _inverse(w2c: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.inv(w2c)
    except np.linalg.LinAlgError:
        raise InputError("a pose cannot be inverted") from None


def _checked(frames: Frames) -> Frames:
    """The frames, whose poses are rigid motions and whose intrinsics can be.

    Raises:
      InputError: they are not.
    """
    c2w, fxfycxcy = frames.c2w, frames.fxfycxcy
    if not len(c2w) or not (np.isfinite(c2w).all() and np.isfinite(fxfycxcy).all()):
        raise InputError("it has no frame, or a camera that is not finite")
    if (wrong := ~is_rotation(c2w[:, :3, :3])).any():
        raise InputError(f"the pose of frame {wrong.argmax()} is no rotation and translation")
    if (wrong := (fxfycxcy <= 0).any(1) | (fxfycxcy[:, 2:] >= 1).any(1)).any():
        raise InputError(
            f"frame {wrong.argmax()} has focal lengths and centre {fxfycxcy[wrong.argmax()].round(4).tolist()} "
            "as fractions of its sides: the centre must be in the image"
        )
    return frames
