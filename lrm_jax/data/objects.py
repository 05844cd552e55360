"""Single objects from folders of images with known cameras: OpenLRM's layout (see `folders`).

The first start decodes every image once, at the sizes needed for training, into `root/.cache-<key>` (see `store`).
With `cache=False`, each sample decodes its own images: use this if the images, and so the cache, would be large.
"""

import dataclasses
import functools
import sys
from pathlib import Path

import numpy as np

from lrm_jax.data import Source, elements, folders, pipeline, splits
from lrm_jax.data.store import Settings, Store, get_store
from lrm_jax.types import Batch, InputError


def make(
    root: str | Path,
    *,
    split: str,
    seed: int,
    cache: bool = True,
    **fields,
) -> Source:
    """Opens a folder of rendered objects.

    Args:
      root: the folder.
      split: "train", "val" or "all" (both). "val" has the objects whose group name hashes into the last 8 %. Variants of an
        object share a group name, so they are in the same split.
      seed: seed of the order of the objects and the choice of views.
      cache: decode all images at the first start. Unusable objects are then skipped and reported on stderr; without the cache,
        they are noticed only when they are read.
      fields: fields of `elements.Recipe`.

    Raises:
      InputError: the folder does not exist, has no usable object, or has no object in this split.
    """
    root, recipe = Path(root), elements.make_recipe(split, **fields)
    uids = folders.find(root)
    if cache:
        settings = Settings(
            **{f.name: getattr(recipe, f.name) for f in dataclasses.fields(Settings)}
        )
        store = get_store(root, uids, settings)
        usable = _usable(store, recipe, root)
        chosen = splits.select([store.uids[i] for i in usable], split, str(root))
        load = _Cached(store, usable[chosen], recipe, seed)
        names = tuple(store.uids[i] for i in load.indices)
    else:
        names = tuple(uids[i] for i in splits.select(uids, split, str(root)))
        load = functools.partial(_read, root=root, names=names, recipe=recipe, seed=seed)
    return Source(pipeline.order(len(names), split, seed).map_with_index(load), names=names)


def _usable(store: Store, recipe: elements.Recipe, root: Path) -> np.ndarray:
    """Indices of the usable objects. Reports the others on stderr."""
    usable, skipped = [], dict(store.skipped)
    for index, uid in enumerate(store.uids):
        if uid not in skipped:
            rows = store.source_row[store.start[index] : store.start[index + 1]]
            if cause := elements.lacking(rows >= 0, recipe):
                skipped[uid] = cause
            else:
                usable.append(index)
    total = len(usable) + len(skipped)
    for uid, cause in skipped.items():
        print(f"{root}: skipped {uid}: {cause}", file=sys.stderr)
    if skipped:
        print(f"{root}: skipped {len(skipped)} of {total} objects", file=sys.stderr)
    if not usable:
        uid, cause = next(iter(skipped.items()))
        raise InputError(f"{root}: none of {total} objects can be used: the first, {uid}: {cause}")
    return np.array(usable)


class _Cached:
    """Maps (position, index of an object) to a sample from a store."""

    def __init__(self, store: Store, indices: np.ndarray, recipe: elements.Recipe, seed: int):
        self.store, self.indices, self.recipe, self.seed = store, indices, recipe, seed

    def __call__(self, position: int, index: int) -> Batch:
        try:
            return self._element(position, self.indices[index])
        except InputError as error:
            raise InputError(f"{self.store.uids[self.indices[index]]}: {error}") from None

    def _element(self, position: int, index: int) -> Batch:
        store, first, end = self.store, self.store.start[index], self.store.start[index + 1]
        rows = store.source_row[first:end]
        sources, targets, mirrored = elements.draw(rows >= 0, self.recipe, self.seed, position)
        rows, views = rows[sources], first + targets
        return elements.assemble(
            elements.Images(
                store.source_rgb[rows], store.source_alpha[rows], store.source_fxfycxcy[rows]
            ),
            elements.Images(
                store.target_rgb[views], store.target_alpha[views], store.fxfycxcy[views]
            ),
            store.c2w[first + sources],
            store.c2w[views],
            self.recipe,
            mirrored,
        )


def _read(
    position: int,
    index: int,
    *,
    root: Path,
    names: tuple[str, ...],
    recipe: elements.Recipe,
    seed: int,
) -> Batch:
    """The sample of one object, from its files."""
    try:
        cameras = folders.read_cameras(root / names[index])
        read = functools.partial(folders.read_image, cameras)
        read_source = functools.partial(
            folders.read_prediction, cameras, source_images=recipe.source_images
        )
        return elements.make(
            read,
            cameras.c2w,
            cameras.fxfycxcy,
            recipe,
            seed,
            position,
            read_source=None if recipe.source_images == "rgba" else read_source,
        )
    except InputError as error:
        raise InputError(f"{root}: {names[index]}: {error}") from None
