"""Decides which objects are held out of training, by a hash of the name, so that all tools and versions agree."""

import hashlib
import re
from collections.abc import Sequence

from lrm_jax.types import InputError

VALIDATION_SHARE = 0.08
_COLORS = "black|blue|brown|gold|gr[ae]y|green|orange|pink|purple|red|silver|white|yellow"
_VARIANT = re.compile(rf"_(?:{_COLORS}|[A-Z]|\d+)(?=_|$)|(?<=[a-z])(?:[A-Z]|\d+)(?=_|$)")


def group(uid: str) -> str:
    """The uid without the parts that name a variant: `_blue`, `_A`, `_2`, and a capital letter or digits at the end of a word."""
    return _VARIANT.sub("", uid)


def in_validation(uid: str) -> bool:
    """Whether an object is held out of training. Depends only on the name of its group."""
    digest = hashlib.sha256(group(uid).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 >= 1 - VALIDATION_SHARE


def select(uids: Sequence[str], split: str, where: str) -> list[int]:
    """Indices of the uids in a split: "train", "val", or "all" for both.

    Raises:
      InputError: the split is empty, or there is no such split.
    """
    if split not in ("train", "val", "all"):
        raise InputError(f"split {split!r}: must be train, val or all")
    chosen = [
        i for i, uid in enumerate(uids) if split == "all" or in_validation(uid) == (split == "val")
    ]
    if not chosen:
        raise InputError(
            f"{where}: none of its {len(uids)} objects falls into the {split} split: render more objects"
        )
    return chosen
