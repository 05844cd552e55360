"""Where batches come from: one contract for all sources; `pipeline.open_batches` turns any of them into batches.

A source is a module of this package with

    make(*, split: "train" | "val" | "all", seed: int, **fields) -> Source

whose fields are `config.data` without `name`. What it returns is a pure function of (fields, seed, position): the
element at a position is the same in every process, in any order of reading, today and after a resume. "train" is
endless and shuffled anew in every epoch; "val" and "all" end, in a fixed order, with views that the position decides.

    objects    folders of rendered images, OpenLRM's layout, decoded once into a memory-mapped cache or on the fly
    records    the same objects as ArrayRecord shards, which `tools/build_dataset.py` writes
    mvimgnet   MVImgNet's photographs with COLMAP's cameras
    scenes     frames of videos and photographs of whole scenes: RealEstate10K, NeRF's and COLMAP's folders
    procedural random shapes, ray-traced on the device; no files

To write another: `pipeline.order` gives the shuffled positions, `elements.make` makes the element of one object from
its images and cameras. Elements are made in worker processes: NumPy only, since jax there would take the accelerator.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import grain

from lrm_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Source:
    """Scenes by position.

    elements: element i is one scene: a Batch without the B axis, images as uint8 with straight colour (the training
      step makes floats of them), or whatever `finish` takes. Reading a bad one raises InputError with its name and the
      cause; `open_batches` then puts the next one into its place.
    finish: jittable, from stacked elements [B ...] to a Batch: what is better done on the device. None: they are
      Batches already.
    names: of the objects; for "val" and "all" names[i] is that of element i. None: they have no names.
    """

    elements: grain.MapDataset
    finish: Callable[[Any], Batch] | None = None
    names: tuple[str, ...] | None = None
