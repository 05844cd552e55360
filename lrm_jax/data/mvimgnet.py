"""MVImgNet: photographs of real objects, with masks and COLMAP's cameras (https://arxiv.org/abs/2303.06042).

    root/<class>/<uid>/images/001.jpg ...       photographs, about 30 along a half circle
    root/<class>/<uid>/sparse/0/                 cameras.bin, images.bin
    masks/<class>/<uid>/001.jpg.png ...          white where the object is; 001.png also works

This follows the description at https://github.com/GAP-LAB-CUHK-SZ/MVImgNet. The data is available only on request, so two
assumptions are not verified: the names of the mask files, and that no photograph has an EXIF orientation (it would be applied,
and the image would no longer fit its camera).

LRM and OpenLRM train on this data (LRM, https://arxiv.org/abs/2311.04400, section 4.1), but neither published how. Here the world
is derived from the cameras and the masks. The object's centre is the point closest to the rays through the centres of the masks;
its outline is scaled into the unit sphere; up is the common upward direction of the images. Each photograph is warped, by a
homography, to the square image of an upright camera at the same place that looks at the object's centre, as in rendered data.
Pixels outside the photograph are transparent.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
from PIL import Image

from lrm_jax.data import Source, elements, pipeline, splits
from lrm_jax.images import colmap
from lrm_jax.images.load import load_image
from lrm_jax.ops import paths
from lrm_jax.types import Batch, InputError

NUM_OUTLINES = 8  # masks that determine the object's place and size
MARGIN = 1.1  # side of the images / diameter of the unit sphere in them


def make(
    root: str | Path,
    *,
    split: str,
    seed: int,
    masks: str | Path | None = None,
    source_elevation: tuple[float, float] | None = None,
    **fields,
) -> Source:
    """Opens a copy of MVImgNet.

    Args:
      root: folder with one folder per class.
      split: "train", "val" or "all"; objects are split as in `objects`.
      seed: seed of the order of the objects and the choice of views.
      masks: folder with the masks, one folder per class. None: root/masks.
      source_elevation: as in `elements.Recipe`. The default is None: people hold cameras at any elevation.
      fields: other fields of `elements.Recipe`; `source_images` must be "rgba".

    Raises:
      InputError: the folder does not exist, or there is no object in it or in this split. An unusable object is noticed only
        when it is read.
    """
    root = Path(root)
    recipe = elements.make_recipe(split, source_elevation=source_elevation, **fields)
    elements.check_source_images(recipe, "mvimgnet")
    uids = _find(root)
    names = tuple(uids[i] for i in splits.select(uids, split, str(root)))
    load = functools.partial(
        _load,
        root=root,
        masks=root / "masks" if masks is None else Path(masks),
        names=names,
        recipe=recipe,
        seed=seed,
    )
    return Source(pipeline.order(len(names), split, seed).map_with_index(load), names=names)


def _find(root: Path) -> list[str]:
    """All <class>/<uid>."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder: check data.root")
    classes = sorted(folder for folder in root.iterdir() if folder.is_dir())
    uids = [
        f"{folder.name}/{uid.name}"
        for folder in classes
        for uid in sorted(folder.iterdir())
        if (uid / "sparse").is_dir()
    ]
    if not uids:
        raise InputError(
            f"{root}: no object (<class>/<uid>/images, sparse/0) in this folder: check data.root"
        )
    return uids


@dataclasses.dataclass(frozen=True)
class _Object:
    """The views of one object. In its world, the object is around the origin, within the unit sphere, with z up."""

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    sizes: np.ndarray  # [V 2] (width, height) of the photographs, pixels
    c2w: np.ndarray  # [V 4 4] float64, OpenCV axes, of cameras that look at the origin
    fxfycxcy: np.ndarray  # [V 4] of these cameras
    sides: np.ndarray  # [V] of the images of these cameras, pixels
    homographies: np.ndarray  # [V 3 3] from pixels of these images to pixels of the photographs


def _load(
    position: int,
    index: int,
    *,
    root: Path,
    masks: Path,
    names: tuple[str, ...],
    recipe: elements.Recipe,
    seed: int,
) -> Batch:
    try:
        item = _read_object(root / names[index], masks / names[index])
        read = functools.partial(_read_crop, item)
        return elements.make(read, item.c2w, item.fxfycxcy, recipe, seed, position)
    except InputError as error:
        raise InputError(f"{root}: {names[index]}: {error}") from None


@functools.lru_cache(
    maxsize=10_000
)  # masks are slow to decode, and objects are read again in every epoch
def _read_object(folder: Path, masks: Path) -> _Object:
    cameras = colmap.read(folder / "sparse" / "0")
    images = tuple(folder / "images" / name for name in cameras.names)
    for path in images:
        if not path.is_file():
            raise InputError(f"images/{path.name} is missing")
    mask_files = tuple(_mask_of(masks, path) for path in images)
    some = np.unique(np.linspace(0, len(images) - 1, NUM_OUTLINES).astype(int))
    outlines = [_outline(mask_files[v], cameras.fxfycxcy[v]) for v in some]
    c2w = _normalize(cameras.c2w, some, outlines)
    focal = cameras.fxfycxcy * np.tile(cameras.sizes, 2)
    return _Object(images, mask_files, cameras.sizes, *_look_at_origin(c2w, focal))


def _mask_of(masks: Path, image: Path) -> Path:
    for path in (masks / f"{image.name}.png", masks / f"{image.stem}.png"):
        if path.is_file():
            return path
    raise InputError(f"{image.name} has no mask in {masks}")


def _outline(mask: Path, fxfycxcy: np.ndarray) -> np.ndarray:
    """[N 2] foreground points (x, y) in the camera's plane z = 1, on a coarse grid."""
    alpha = Image.fromarray(_read_mask(mask)).resize((128, 128), Image.Resampling.BOX)
    rows, columns = np.nonzero(np.asarray(alpha) > 127)
    if not len(rows):
        raise InputError(f"the mask {mask.name} is empty")
    uv = (np.stack([columns, rows], axis=1) + 0.5) / 128
    return (uv - fxfycxcy[2:]) / fxfycxcy[:2]


def _normalize(c2w: np.ndarray, views: np.ndarray, outlines: list[np.ndarray]) -> np.ndarray:
    """The poses [V 4 4] in the object's world, derived from the outlines of some views.

    Raises:
      InputError: the rays towards the object do not meet in front of the cameras.
    """
    middles = np.stack([(points.min(0) + points.max(0)) / 2 for points in outlines])
    dirs = np.concatenate([middles, np.ones((len(middles), 1))], axis=1)
    dirs = np.einsum("vij,vj->vi", c2w[views, :3, :3], dirs)
    dirs /= np.linalg.norm(dirs, axis=1, keepdims=True)
    eyes = c2w[views, :3, 3]
    centre, system = paths.nearest_point(eyes, dirs)
    if len(views) < 2 or np.linalg.cond(system) > 1e6:
        raise InputError("the cameras look in parallel: the object's place cannot be found")
    depth = np.einsum("vj,vj->v", centre - eyes, c2w[views, :3, 2])
    if (depth <= 0).any():
        raise InputError("the cameras do not look at one object")
    radii = []
    for view, points in zip(views, outlines, strict=True):
        rays = np.concatenate([points, np.ones((len(points), 1))], axis=1) @ c2w[view, :3, :3].T
        rays /= np.linalg.norm(rays, axis=1, keepdims=True)
        # The sphere around the centre that touches the outermost ray.
        radii.append(np.linalg.norm(np.cross(rays, centre - c2w[view, :3, 3]), axis=1).max())
    # Not the largest: a single mask that is too large would shrink the object.
    radius = np.quantile(radii, 0.9)
    up = paths.up(c2w)
    ahead = (c2w[:, :3, 3] - centre).sum(0)  # towards the cameras: +x
    ahead -= (ahead @ up) * up
    if np.linalg.norm(ahead) < 1e-6 * radius:  # the cameras stand on a full circle
        ahead = np.cross(up, np.eye(3)[np.abs(up).argmin()])
    ahead /= np.linalg.norm(ahead)
    axes = np.stack([ahead, np.cross(up, ahead), up])
    normalized = c2w.copy()
    normalized[:, :3, :3] = axes @ c2w[:, :3, :3]
    normalized[:, :3, 3] = (c2w[:, :3, 3] - centre) @ axes.T / radius
    return normalized


def _look_at_origin(
    c2w: np.ndarray, pixels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`c2w`, `fxfycxcy`, `sides`, `homographies` of an `_Object`, from the poses and pixel intrinsics [V 4] of photographs."""
    eye = c2w[:, :3, 3]
    distance = np.linalg.norm(eye, axis=1)
    forward = -eye / distance[:, None]
    if (distance <= 1).any() or (np.einsum("vi,vi->v", forward, c2w[:, :3, 2]) <= 0).any():
        raise InputError("a camera is inside the object's sphere or looks away from it")
    right = np.cross(forward, [0, 0, 1])
    overhead = np.linalg.norm(right, axis=1, keepdims=True) < 0.05
    right = np.where(overhead, c2w[:, :3, 0], right)
    right -= np.einsum("vi,vi->v", right, forward)[:, None] * forward
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    looking = c2w.copy()
    looking[:, :3, :3] = np.stack([right, np.cross(forward, right), forward], axis=-1)
    # The angular radius of the unit sphere is asin(1 / distance).
    focal = np.sqrt(distance**2 - 1) / (2 * MARGIN)  # as a fraction of the side
    sides = np.ceil(pixels[:, :2].max(1) / focal).astype(
        int
    )  # keeps the pixel size of the photographs
    zero, one = np.zeros_like(focal), np.ones_like(focal)
    from_pixels = np.stack(
        [1 / focal / sides, zero, -0.5 / focal, zero, 1 / focal / sides, -0.5 / focal, zero, zero, one], 1
    ).reshape(-1, 3, 3)  # fmt: skip
    fx, fy, cx, cy = pixels.T
    to_pixels = np.stack([fx, zero, cx, zero, fy, cy, zero, zero, one], 1).reshape(-1, 3, 3)
    turn = c2w[:, :3, :3].transpose(0, 2, 1) @ looking[:, :3, :3]
    homographies = to_pixels @ turn @ from_pixels
    fxfycxcy = np.stack([focal, focal, one / 2, one / 2], axis=1)
    return looking, fxfycxcy, sides, homographies / homographies[:, 2:, 2:]


def _read_crop(item: _Object, view: int) -> np.ndarray:
    """[S S 4] uint8: the object, cut out by its mask, as seen by the camera that looks at the origin."""
    rgba, (width, height) = load_image(item.images[view]), item.sizes[view]
    if rgba.shape[:2] != (height, width):
        raise InputError(
            f"images/{item.images[view].name} is {rgba.shape[1]}x{rgba.shape[0]}, "
            f"its camera says {width}x{height}"
        )
    mask = Image.fromarray(_read_mask(item.masks[view]))
    rgba[..., 3] = np.asarray(mask.resize((width, height), Image.Resampling.BILINEAR))
    # Pillow maps pixel centres, at +0.5 like ours, and interpolates premultiplied colour.
    image = Image.fromarray(rgba).transform(
        (int(item.sides[view]),) * 2,
        Image.Transform.PERSPECTIVE,
        item.homographies[view].ravel()[:8].tolist(),
        Image.Resampling.BILINEAR,
    )
    return np.asarray(image)


def _read_mask(path: Path) -> np.ndarray:
    """[H W] uint8."""
    return load_image(path)[..., 0]
