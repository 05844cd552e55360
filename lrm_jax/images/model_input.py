"""From a capture to the source views of a model: cut out, cropped, and moved to the world in which the model was trained."""

import dataclasses

import jax
import numpy as np

from lrm_jax.images import captures, cutout
from lrm_jax.images.captures import Capture
from lrm_jax.ops import cameras, normalization
from lrm_jax.types import Cameras, InputError, Views

MIN_VIEWS = 3  # of an object whose mesh is wanted: two leave most of it unseen
MAX_VIEWS = 32  # used by default for a mesh: as many as One-2-3-45 makes from one image


def cut_out(capture: Capture, remove_background: bool = False) -> Capture:
    """The capture with a transparent background in every image: see `cutout.cut_out`.

    Raises:
      InputError: there are fewer than MIN_VIEWS images, or an object cannot be told from its background.
    """
    if (count := len(capture.images)) < MIN_VIEWS:
        raise InputError(
            f"{count} source view{'s' * (count > 1)}: give {MIN_VIEWS} or more, from all sides of the object"
        )
    named = zip(capture.images, capture.names, strict=True)
    images = [cutout.cut_out(image, name, remove_background) for image, name in named]
    return dataclasses.replace(capture, images=images)


def crop_images(capture: Capture, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The middle squares of the images on white, uint8 [V size size 3], and their boxes [V 4]: see `captures.crop`."""
    cropped = [captures.crop(captures.on_white(image), size) for image in capture.images]
    images, boxes = zip(*cropped, strict=True)
    return np.stack(images), np.stack(boxes)


def source_views(capture: Capture, size: int, normalize: str | None) -> tuple[Views, np.ndarray]:
    """The model's input, NumPy [1 V size size 3] in [0, 1], and the similarity [4 4] from the capture's world to the model's.

    Args:
      size: side of the middle square of each image, in pixels.
      normalize: the rule for the model's world, a family's `normalize` or the `data.normalize` of its training.

    Raises:
      InputError: the cameras do not determine the world.
    """
    images, boxes = crop_images(capture, size)
    fxfycxcy = cameras.crop_intrinsics(capture.fxfycxcy, boxes)
    to_model, _ = world(capture, fxfycxcy, normalize)
    c2w = cameras.move_poses(to_model, capture.c2w).astype(np.float32)
    views = Views(rgb=images.astype(np.float32) / 255, cameras=Cameras(c2w=c2w, fxfycxcy=fxfycxcy))
    return jax.tree.map(lambda x: x[None], views), to_model


def world(capture: Capture, fxfycxcy: np.ndarray, normalize: str | None) -> tuple[np.ndarray, str]:
    """The similarity [4 4], float64, from the capture's world to the model's, and the latter in words.

    Args:
      fxfycxcy: [V 4] of the images that the model gets.
      normalize: as for `source_views`.

    Raises:
      InputError: the cameras do not determine it.
    """
    c2w, count = capture.c2w, len(capture.c2w)
    if normalize not in ("all_views", "source_views"):
        by_all = normalize in normalization.BY_ALL_SOURCES
        whose = (
            "the cube that the source cameras look at"
            if by_all
            else "the poses' own, moved as in training"
        )
        motion = normalization.sources_motion(c2w, fxfycxcy, normalize)
        return motion, f"{whose} (data.normalize={normalize})"
    if count < 2:
        raise InputError(
            f"{capture.names[0]} is the only source view: give two or more, because their distance sets the unit of length"
        )
    # Not "all_views": a frame would then depend on the other frames.
    motion, scale = normalization.scene_motion(c2w, count, "source_views")
    return np.diag([scale, scale, scale, 1.0]) @ motion, "that of the mean source camera"
