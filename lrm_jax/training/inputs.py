"""The batches of a run: opens sources by name, mixes them, and finishes batches on the device."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lrm_jax.data import Source, pipeline
from lrm_jax.types import Batch, InputError

# Modules of lrm_jax.data, by their name in a config.
SOURCES = {
    "objects": "objects",
    "records": "records",
    "mvimgnet": "mvimgnet",
    "scenes": "scenes",
    "procedural": "procedural.source",
}
# Fields of `config.data` that the procedural source takes too.
SHARED = (
    "seed", "num_source", "num_target", "source_size", "target_size", "source_elevation", "foreground_ratio", "normalize",
    "assumed_camera", "sources_as_targets",
)  # fmt: skip


class Data(NamedTuple):
    """The batches of a run."""

    train: pipeline.Batches
    val: Callable[
        [int], pipeline.Batches
    ]  # from a batch size to batches of held-out scenes, from the first one on
    num_val: int  # number of held-out scenes
    finish: list[Callable[[Any], Batch]]  # for each source: see `Source.finish`


def open_data(
    process_index: int,
    process_count: int,
    *,
    name: str,
    mix: tuple[int, int],
    batch_size: int,
    num_workers: int,
    prefetch: int,
    source_background: float,
    **fields,
) -> Data:
    """This process's part of the batches of `lrm_jax.data.<name>`.

    If `mix` is given, mix[1] of every mix[0] + mix[1] training batches are procedural.
    """

    def make(name: str, split: str) -> Source:
        module = importlib.import_module(f"lrm_jax.data.{SOURCES[name]}")
        kept = {k: v for k, v in fields.items() if k in SHARED} if name == "procedural" else fields
        try:
            inspect.signature(module.make).bind(split=split, **kept)
        except TypeError as error:
            raise InputError(
                f"config.data does not fit data.name={name} ({error}): use a config for this kind of data"
            ) from None
        return module.make(split=split, **kept)

    if name not in SOURCES:
        raise InputError(f"data.name={name!r}: must be one of {', '.join(SOURCES)}")
    if len(mix) not in (0, 2):
        raise InputError(f"data.mix={tuple(mix)}: must be (), or two numbers such as (3, 1)")
    sources, weights = [make(name, "train")], [1]
    if mix:
        sources, weights = [*sources, make("procedural", "train")], list(mix)
    val = make(name, "val")
    own_slice = dict(process_index=process_index, process_count=process_count)
    train = pipeline.open_batches(
        list(zip(sources, weights, strict=True)), batch_size, num_workers=num_workers, prefetch=prefetch, **own_slice
    )  # fmt: skip
    return Data(
        train=train,
        val=lambda size: pipeline.open_batches(val, size, prefetch=0, **own_slice),
        num_val=len(val.elements),
        finish=[jax.jit(source.finish) if source.finish else lambda batch: batch for source in sources],
    )  # fmt: skip
