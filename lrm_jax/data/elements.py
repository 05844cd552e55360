"""Makes the element of one object: chooses source and target views, crops and resizes them, and normalizes the world.

This is all NumPy: it runs in the loader's processes, where JAX would allocate the accelerator.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np
from PIL import Image

from lrm_jax.images.recentre import foreground_square
from lrm_jax.ops import cameras, normalization
from lrm_jax.types import Batch, Cameras, InputError, Views


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to make an element from an object's views: fields of `make` that all sources of objects share.

    num_target: number of views besides the sources. The target views are the sources (uncropped; not if `sources_as_targets` is
      False), then these.
    source_size, target_size: sides of the square images, pixels.
    num_source: number of views that the model is given.
    source_elevation: (low, high), degrees: the sources are drawn from the views in this range. None: from all views.
    source_views: (first, end): the sources are drawn from the views with these numbers, first <= number < end. None: from all.
      The views of `num_target` are drawn from all that are not given.
    source_images: "rgba", or the name of a folder beside it that has another model's predictions of the source views, in files of
      the same names. The targets are always from "rgba". Only folders of objects can have it.
    sources_as_targets: whether the sources are targets too.
    foreground_ratio: the sources are cropped so that the object fills this share of the square (TripoSR: 0.85), and their
      cameras are adjusted to the crops. None: the images stay whole.
    normalize: how the world is moved. "azimuth": it is rotated about z until the first source camera is at azimuth 0, above or
      below the +x axis; elevation and distance stay the same (TripoSR). "source": all poses are multiplied from the left so that
      the first source camera is at (0, -d, 0), where d is its distance, and looks along +y with z up (LRM, OpenLRM). "image": it
      is rotated about z, moved and scaled until the first source looks as if taken by `assumed_camera`
      (`ops.cameras.image_motion`). "frusta" (One-2-3-45) and "common_view" go by all source cameras, of which there must be two
      or more: see `ops.normalization.views_motion`. None: it stays as it is.
    assumed_camera: (distance, vertical field of view in degrees) of the camera that the model assumes for an image; only for
      "image".
    mirror: half of the elements, at random, are mirrored in the vertical plane through the first source camera.
    """

    num_target: int
    source_size: int
    target_size: int
    num_source: int = 1
    source_elevation: tuple[float, float] | None = (5.0, 35.0)
    foreground_ratio: float | None = 0.85
    normalize: str | None = "azimuth"
    assumed_camera: tuple[float, float] | None = None
    mirror: bool = False
    source_views: tuple[int, int] | None = None
    source_images: str = "rgba"
    sources_as_targets: bool = True


def make_recipe(split: str, **fields) -> Recipe:
    """The recipe for a split. Only "train" is ever mirrored.

    Raises:
      InputError: a field does not exist, or is out of range.
    """
    try:
        recipe = Recipe(**fields)
    except TypeError as error:
        raise InputError(f"config.data: {error}: check its name") from None
    check_normalize(recipe.normalize, recipe.assumed_camera)
    band, camera, views = recipe.source_elevation, recipe.assumed_camera, recipe.source_views
    least = {"num_source": 1, "num_target": 0, "source_size": 1, "target_size": 1}
    for name, low in least.items():
        if getattr(recipe, name) < low:
            raise InputError(f"data.{name}={getattr(recipe, name)}: must be at least {low}")
    if recipe.normalize in normalization.BY_ALL_SOURCES and recipe.num_source < 2:
        raise InputError(f"data.normalize={recipe.normalize}: needs data.num_source of at least 2")
    if recipe.num_target < 1 and not recipe.sources_as_targets:
        raise InputError("data.sources_as_targets=False: needs data.num_target of at least 1")
    if band is not None and not (len(band) == 2 and -90 <= band[0] <= band[1] <= 90):
        raise InputError(f"data.source_elevation={band}: needs -90 <= low <= high <= 90")
    if views is not None and not (len(views) == 2 and 0 <= views[0] < views[1]):
        raise InputError(f"data.source_views={views}: needs 0 <= first < end, or None")
    if not re.fullmatch(r"\w[\w.-]*", recipe.source_images):
        raise InputError(
            f"data.source_images={recipe.source_images!r}: must be the name of a folder beside rgba"
        )
    ratio = recipe.foreground_ratio
    if ratio is not None and not 0 < ratio <= 1:
        raise InputError(f"data.foreground_ratio={ratio}: must be in (0, 1], or None")
    return dataclasses.replace(
        recipe,
        mirror=recipe.mirror and split == "train",
        source_elevation=None if band is None else tuple(band),
        assumed_camera=None if camera is None else tuple(camera),
        source_views=None if views is None else tuple(views),
    )


def check_source_images(recipe: Recipe, name: str) -> None:
    """Raises InputError if the recipe wants predicted source images from a kind of data that has none."""
    if recipe.source_images != "rgba":
        raise InputError(
            f"data.source_images={recipe.source_images}: data.name={name} has only the images themselves: use objects"
        )


def check_normalize(normalize: str | None, assumed_camera) -> None:
    """Raises InputError if these are not valid fields of a Recipe."""
    if normalize not in ("azimuth", "source", "image", *normalization.BY_ALL_SOURCES, None):
        raise InputError(
            f"normalize {normalize!r}: must be azimuth, source, image, frusta, common_view or None"
        )
    if normalize == "image" and (assumed_camera is None or len(assumed_camera) != 2):
        raise InputError(
            f"assumed_camera {assumed_camera}: normalize 'image' takes (distance, field of view)"
        )


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of some views, and the intrinsics of cameras that see exactly these images."""

    rgb: np.ndarray  # [V H W 3] uint8, straight
    alpha: np.ndarray  # [V H W] uint8
    fxfycxcy: np.ndarray  # [V 4]


def in_band(c2w: np.ndarray, elevation: tuple[float, float] | None) -> np.ndarray:
    """Whether the elevation of each camera c2w [V 4 4] is in a range, in degrees: bool [V]."""
    if elevation is None:
        return np.ones(len(c2w), bool)
    eye = c2w[:, :3, 3]
    degrees = np.degrees(np.arctan2(eye[:, 2], np.hypot(eye[:, 0], eye[:, 1])))
    return (elevation[0] <= degrees) & (degrees <= elevation[1])


def is_source(
    c2w: np.ndarray, elevation: tuple[float, float] | None, views: tuple[int, int] | None
) -> np.ndarray:
    """Whether each view of an object, with poses [V 4 4], may be a source: bool [V]. See `Recipe`."""
    numbers = np.arange(len(c2w))
    in_range = True if views is None else (views[0] <= numbers) & (numbers < views[1])
    return in_band(c2w, elevation) & in_range


def lacking(may_be_source: np.ndarray, recipe: Recipe) -> str | None:
    """Why an object has too few views, or None if it has enough. bool [V]: see `is_source`."""
    num_sources, num_views = int(may_be_source.sum()), len(may_be_source)
    if num_sources < recipe.num_source:
        numbers = "" if recipe.source_views is None else f" and a number in {recipe.source_views}"
        return (
            f"{num_sources} views with an elevation in {recipe.source_elevation}{numbers} "
            f"are too few for num_source={recipe.num_source}"
        )
    if num_views < recipe.num_source + recipe.num_target:
        return (
            f"{num_views} views are too few for num_source={recipe.num_source} and "
            f"num_target={recipe.num_target}"
        )
    return None


def draw(
    may_be_source: np.ndarray, recipe: Recipe, seed: int, position: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Draws (source views, target views, whether to mirror) for a position. bool [V]: see `is_source`.

    Raises:
      InputError: the object has too few views.
    """
    if cause := lacking(may_be_source, recipe):
        raise InputError(cause)
    rng, num_views = np.random.default_rng((seed, position, 1)), len(may_be_source)
    sources = rng.choice(np.flatnonzero(may_be_source), recipe.num_source, replace=False)
    others = rng.choice(np.delete(np.arange(num_views), sources), recipe.num_target, replace=False)
    targets = np.concatenate([sources, others]) if recipe.sources_as_targets else others
    return sources, targets, recipe.mirror and rng.random() < 0.5


def assemble(
    source: Images,
    target: Images,
    source_c2w: np.ndarray,
    target_c2w: np.ndarray,
    recipe: Recipe,
    mirrored: bool,
) -> Batch:
    """The element with these images and their poses [V 4 4], without the B axis.

    Raises:
      InputError: the source cameras do not fit `recipe.normalize`.
    """
    motion = normalization.sources_motion(
        source_c2w, source.fxfycxcy, recipe.normalize, recipe.assumed_camera
    ).astype(np.float32)
    source_c2w, target_c2w = (cameras.move_poses(motion, c2w) for c2w in (source_c2w, target_c2w))
    if mirrored:
        # The mirror image of "frusta" has the axes of the mirrored first camera, which has x to the right too.
        x, y = source_c2w[0, :2, 3] if recipe.normalize != "frusta" else (0.0, 1.0)
        source_c2w, target_c2w = (_mirror(c2w, x, y) for c2w in (source_c2w, target_c2w))
    return Batch(
        source=_views(source, source_c2w, mirrored), target=_views(target, target_c2w, mirrored)
    )


def make(
    read: Callable[[int], np.ndarray],
    c2w: np.ndarray,
    fxfycxcy: np.ndarray,
    recipe: Recipe,
    seed: int,
    position: int,
    read_source: Callable[[int], np.ndarray] | None = None,
) -> Batch:
    """The element at a position. Decodes only the images that it needs.

    Args:
      read: view -> [H W 4] uint8 with straight alpha.
      read_source: the same for the source images, if they are others.
      c2w, fxfycxcy: [V 4 4], [V 4] of all views of the object.

    Raises:
      InputError: there are too few views, or an image cannot be read or is empty.
    """
    may_be_source = is_source(c2w, recipe.source_elevation, recipe.source_views)
    sources, targets, mirrored = draw(may_be_source, recipe, seed, position)
    c2w, fxfycxcy = c2w.astype(np.float32), fxfycxcy.astype(np.float32)
    read = functools.cache(read)  # a source that is a target too is decoded once
    crops, boxes = zip(
        *(
            source_crop((read_source or read)(view), recipe.source_size, recipe.foreground_ratio, f"view {view}")
            for view in sources.tolist()
        ),
        strict=True,
    )  # fmt: skip
    crops = np.stack(crops)
    shrunk = np.stack([shrink(read(view), recipe.target_size) for view in targets.tolist()])
    cropped = cameras.crop_intrinsics(fxfycxcy[sources], np.stack(boxes))
    return assemble(
        Images(crops[..., :3], crops[..., 3], cropped),
        Images(shrunk[..., :3], shrunk[..., 3], fxfycxcy[targets]),
        c2w[sources],
        c2w[targets],
        recipe,
        mirrored,
    )


def shrink(rgba: np.ndarray, size: int) -> np.ndarray:
    """A target image [size size 4]: the area average of premultiplied colour, which is how Pillow resizes RGBA."""
    return np.asarray(Image.fromarray(rgba).resize((size, size), Image.Resampling.BOX))


def source_crop(
    rgba: np.ndarray, size: int, foreground_ratio: float | None, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """A source image [size size 4], and its (top, left, height, width) as fractions of the whole image.

    Raises:
      InputError: as in `recentered`.
    """
    crop, box = recentered(rgba, foreground_ratio, name)
    image = Image.fromarray(crop).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image), box


def recentered(
    rgba: np.ndarray, foreground_ratio: float | None, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """An image cropped or padded to a square around its foreground, and the square's place, in the form of `source_crop`.

    Raises:
      InputError: the image has no foreground to crop to. The message starts with `name`.
    """
    if foreground_ratio is None:
        return rgba, np.array([0.0, 0.0, 1.0, 1.0])
    if not rgba[..., 3].any():
        raise InputError(f"{name} is transparent everywhere")
    try:
        square, corner = foreground_square(rgba, foreground_ratio)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return square, np.array([*corner, *square.shape[:2]]) / np.tile(rgba.shape[:2], 2)


def _mirror(c2w: np.ndarray, x: float, y: float) -> np.ndarray:
    """The poses [V 4 4] after mirroring the world in the plane through the z axis and (x, y). The images are flipped.

    Let M = 1 - 2 n n^T be the reflection. In the camera M c2w diag(-1, 1, 1, 1), the point M p has the coordinates that p
    has in c2w, but with x negated: the image is flipped left to right.
    """
    normal = np.array([-y, x, 0, 0]) / np.hypot(x, y) if x or y else np.eye(4)[1]
    reflection = np.eye(4) - 2 * np.outer(normal, normal)
    return (reflection @ c2w @ np.diag([-1, 1, 1, 1])).astype(np.float32)


def _views(images: Images, c2w: np.ndarray, mirrored: bool) -> Views:
    rgb, alpha, fxfycxcy = images.rgb, images.alpha, images.fxfycxcy
    if mirrored:
        rgb, alpha = rgb[:, :, ::-1], alpha[:, :, ::-1]
        fxfycxcy = fxfycxcy * np.float32([1, 1, -1, 1]) + np.float32([0, 0, 1, 0])
    return Views(rgb=rgb, alpha=alpha, cameras=Cameras(c2w=c2w, fxfycxcy=fxfycxcy))
