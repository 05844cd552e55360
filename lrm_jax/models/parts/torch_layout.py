"""Tables that map the names of a PyTorch state dict to our parameters. Each family's `from_torch` and `to_torch` read one table
in opposite directions, so they are exact inverses."""

import dataclasses
import functools
import operator

import numpy as np


@dataclasses.dataclass(frozen=True)
class Entry:
    """One torch tensor and the parameters that it holds.

    Several parameters (q, k, v) are packed along the torch tensor's first axis. If `layer` is given, our parameters are
    stacked over layers, and this tensor holds layer number `layer`.
    """

    torch: str
    ours: tuple[str, ...]  # dotted paths
    axes: tuple[int, ...] | None = None  # ours = transpose(theirs, axes)
    layer: int | None = None


def same(torch: str, ours: str, layer: int | None = None) -> Entry:
    """A tensor that keeps its shape."""
    return Entry(torch, (ours,), None, layer)


def permuted(torch: str, ours: str, axes: tuple[int, ...]) -> Entry:
    """A tensor whose axes are permuted."""
    return Entry(torch, (ours,), axes)


def linear(torch: str, *ours: str, layer: int | None = None, bias: bool = True) -> list[Entry]:
    """torch.nn.Linear, (out, in), to Dense kernels (in, out); several `ours` are packed along out."""
    entries = [Entry(torch + ".weight", tuple(f"{o}.kernel" for o in ours), (1, 0), layer)]
    if bias:
        entries.append(Entry(torch + ".bias", tuple(f"{o}.bias" for o in ours), None, layer))
    return entries


def norm(torch: str, ours: str, layer: int | None = None) -> list[Entry]:
    """torch.nn.LayerNorm or GroupNorm."""
    return [
        same(torch + ".weight", ours + ".scale", layer),
        same(torch + ".bias", ours + ".bias", layer),
    ]


def from_torch(entries: list[Entry], state: dict[str, np.ndarray]) -> dict:
    """Builds the parameter tree of `state`. Raises KeyError for a missing name."""
    flat = {}
    for entry in entries:
        value = state[entry.torch]
        value = value if entry.axes is None else value.transpose(entry.axes)
        parts = np.split(value, len(entry.ours), axis=-1) if len(entry.ours) > 1 else [value]
        for path, part in zip(entry.ours, parts, strict=True):
            if entry.layer is None:
                flat[path] = np.asarray(part, order="C")
            else:
                flat.setdefault(path, {})[entry.layer] = part
    tree = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = (
            np.stack([value[i] for i in range(len(value))]) if isinstance(value, dict) else value
        )
    return tree


def to_torch(entries: list[Entry], params: dict) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`."""
    state = {}
    for entry in entries:
        parts = []
        for path in entry.ours:
            node = functools.reduce(operator.getitem, path.split("."), params)
            parts.append(np.asarray(node) if entry.layer is None else np.asarray(node[entry.layer]))
        value = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        if entry.axes is not None:
            value = value.transpose(np.argsort(entry.axes))
        state[entry.torch] = np.asarray(value, order="C")
    return state


def torch_shapes(entries: list[Entry], params: dict) -> dict[str, tuple[int, ...]]:
    """The names and shapes that `to_torch` would write, from a tree of arrays or of anything with shapes (`jax.eval_shape`)."""
    shapes = {}
    for entry in entries:
        parts = []
        for path in entry.ours:
            node = functools.reduce(operator.getitem, path.split("."), params)
            parts.append(tuple(node.shape) if entry.layer is None else tuple(node.shape[1:]))
        shape = (*parts[0][:-1], sum(part[-1] for part in parts)) if parts[0] else ()
        shapes[entry.torch] = (
            shape if entry.axes is None else tuple(shape[i] for i in np.argsort(entry.axes))
        )
    return shapes


def count(state: dict, prefix: str) -> int:
    """The number of different indices that follow `prefix` in the names: the depth of a stack."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})
