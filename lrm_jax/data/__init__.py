"""Sources of training data. All follow one contract, and `pipeline.open_batches` turns any of them into batches.

A source is a module of this package with

    make(*, split: "train" | "val" | "all", seed: int, **fields) -> Source

where `fields` comes from `config.data`. Every element is a pure function of (fields, seed, position): it is the same in
every process, in any reading order, and after a resume. "train" is endless and is reshuffled in every epoch. "val" and
"all" are finite and in a fixed order; the position alone determines their views.

    objects    folders of rendered images in OpenLRM's layout, decoded once into a memory-mapped cache, or on the fly
    records    the same objects as ArrayRecord shards, written by `tools/build_dataset.py`
    mvimgnet   MVImgNet's photographs, with COLMAP's cameras
    scenes     video frames and photographs of whole scenes: RealEstate10K, NeRF's and COLMAP's folders
    procedural random objects, ray-traced on the device; needs no files

To write your own source: `pipeline.order` shuffles the positions, and `elements.make` makes an element from an object's
images and cameras. Elements are made in worker processes, so use only NumPy: JAX would allocate the accelerator.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import grain

from lrm_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Source:
    """The scenes of a split, by position.

    elements: element i is one scene: a Batch without the B axis, with uint8 images in straight colour (the training
      step converts them to float), or any input of `finish`. Reading a bad element raises InputError with its name and
      the cause; `open_batches` then replaces it with the next one.
    finish: jittable function from stacked elements [B ...] to a Batch, for work that belongs on the device. None: the
      elements are Batches already.
    names: names of the objects; for "val" and "all", names[i] belongs to element i. None: they have no names.
    """

    elements: grain.MapDataset
    finish: Callable[[Any], Batch] | None = None
    names: tuple[str, ...] | None = None
