"""Counts what one device does in a compiled program, from its HLO text: matrix products, memory traffic, lookups, collectives.

XLA's own cost analysis counts the body of a loop only once. Here the layers and the chunks of rays are loops. So this module reads the
text, and counts the body of a loop as often as it runs. It counts work, not time: tools/chips.py turns the counts into times.
"""

import collections
import dataclasses
import fractions
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from hlo_text import (
    Body,
    Instruction,
    array_bytes,
    arrays,
    branches,
    called,
    dimensions,
    dtype,
    elements,
    group,
    memory_bytes,
    numbers,
    parameter_number,
    parse,
    target,
    trip_count,
    window_bytes,
)

from lrm_jax.training import flops

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that move no data: names for parts of buffers, and control flow, whose bodies are counted on their own.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota", "after-all",
    "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done", "domain", "add-dependency",
    "fusion-done",
}  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding")
# Custom calls of kernels that the compiler did not make: Pallas kernels on TPUs, and through Triton and Mosaic on GPUs.
_KERNELS = re.compile(r"tpu_custom_call|__gpu\$xla\.gpu\.triton|triton_kernel_call|mosaic_gpu.*")


class UnknownCost(Exception):
    """The cost of a kernel is unknown. It would count as nothing."""


class Lookup(NamedTuple):
    """A kind of window that gathers read or scatters write, at places that the indices give."""

    kind: (
        str  # "gather"; "scatter-add" for any combining function; "scatter" if nothing is combined
    )
    dtype: str
    window: float  # bytes
    touched: float  # bytes of the tiles that the window touches; the same as `window` if arrays have no tiles


@dataclasses.dataclass
class Traffic:
    """Totals over all executions of one kind of collective."""

    count: float = 0.0
    payload: float = 0.0  # bytes of the results (for a reduce-scatter, of the operands)
    sent: float = 0.0  # bytes that leave the device in a ring, such as 2 (n - 1) / n of the payload for an all-reduce of n
    exposed_count: float = 0.0  # collectives without a product beside them, see `Program`
    exposed_sent: float = 0.0


@dataclasses.dataclass
class Calls:
    """One kind of call or scatter."""

    written: int = 0  # occurrences in the program
    count: float = 0.0  # executions in a run


@dataclasses.dataclass
class Costs:
    """Costs for one device in one run of the program."""

    products: collections.Counter[flops.Product] = dataclasses.field(
        default_factory=collections.Counter
    )  # including convolutions, as products of patches
    noted_flops: float = 0.0  # from the cost estimates of kernels whose products are unknown
    memory_bytes: float = 0.0  # read from and written to main memory, as far as the text shows
    lookups: collections.Counter[Lookup] = dataclasses.field(default_factory=collections.Counter)
    calls: dict[str, Calls] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(Calls)
    )  # cuDNN's calls by kind, Pallas kernels by name, and scatters that combine by dtype
    collectives: dict[str, Traffic] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(Traffic)
    )
    links: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    """Bytes sent, by the number of a group's devices on one host; 0: the whole group is on one host."""
    loops_of_unknown_length: int = 0  # their bodies are counted once

    @property
    def flops(self) -> float:
        """Operations of matrix products and convolutions: 2 per multiplication."""
        return flops.total(self.products) + self.noted_flops

    def add(self, other: "Costs", times: float = 1.0, hidden: bool = False) -> None:
        """Adds `times` runs of a part. If `hidden`, its collectives run beside products."""
        for counts, others in (
            (self.products, other.products),
            (self.lookups, other.lookups),
            (self.links, other.links),
        ):
            for key, count in others.items():
                counts[key] += times * count
        self.noted_flops += times * other.noted_flops
        self.memory_bytes += times * other.memory_bytes
        self.loops_of_unknown_length += other.loops_of_unknown_length
        for kind, calls in other.calls.items():
            self.calls[kind].written += calls.written
            self.calls[kind].count += times * calls.count
        for kind, traffic in other.collectives.items():
            total = self.collectives[kind]
            total.count += times * traffic.count
            total.payload += times * traffic.payload
            total.sent += times * traffic.sent
            if not hidden:
                total.exposed_count += times * traffic.exposed_count
                total.exposed_sent += times * traffic.exposed_sent


def count(
    text: str,
    kernels: Mapping[flops.Shapes, Mapping[flops.Product, float]] | None = None,
    hosts: Sequence[int] = (),
) -> Costs:
    """Counts the costs of a module, given as `compiled.as_text()`.

    Args:
      kernels: products of Pallas kernels, from `flops.kernels`.
      hosts: the host of each device of the program; empty: all devices are on one host.

    Raises:
      UnknownCost: a kernel has neither a cost estimate nor known products.
    """
    entry, computations = parse(text)
    return Program(computations, kernels or {}, hosts).computation(entry)


class Program:
    """The computations of a program, each counted once.

    A collective is hidden if, in the order of the schedule, a matrix product runs between its start and the first use of its result,
    however short the product is. It is exposed if it is synchronous, or if no product runs beside it.
    """

    def __init__(self, computations: dict[str, Body], kernels: Mapping, hosts: Sequence[int]):
        self.computations, self.kernels, self.hosts = computations, kernels, hosts
        self.computation = functools.cache(self._computation)
        self.fused = functools.cache(self._fused)

    def _computation(self, name: str) -> Costs:
        """Costs of a computation whose instructions run one after another."""
        total, body = Costs(), self.computations[name]
        parts = {i.name: self._instruction(i, body) for i in body.values()}
        for i in body.values():
            hidden = bool(parts[i.name].collectives) and self._is_hidden(i, body, parts)
            total.add(parts[i.name], hidden=hidden)
        return total

    def _fused(self, name: str) -> Costs:
        """Costs of what runs as one kernel, without the memory traffic, which follows from the fusion's operands and results."""
        total, body = Costs(), self.computations[name]
        for i in body.values():
            total.add(self._work(i, body))
            for inner in called(i, "calls"):
                total.add(self.fused(inner))
        return total

    def _instruction(self, i: Instruction, body: Body) -> Costs:
        total = Costs()
        if i.opcode in ("fusion", "fusion-start"):
            (inner,) = called(i, "calls")
            total.add(self.fused(inner))
            total.memory_bytes += _fusion_bytes(i, body, self.computations[inner])
        elif i.opcode == "while":
            (loop,), (condition,) = called(i, "body"), called(i, "condition")
            length = trip_count(i, self.computations, condition)
            total.add(self.computation(loop), 1.0 if length is None else length)
            total.loops_of_unknown_length += length is None
        elif i.opcode == "conditional":
            costs = map(self.computation, branches(i))
            total.add(max(costs, key=lambda x: (x.flops, x.memory_bytes)))
        elif i.opcode in ("call", "async-start"):
            for inner in called(i, "to_apply") + called(i, "calls"):
                total.add(self.computation(inner))
        else:
            total.add(self._work(i, body))
            total.memory_bytes += max(_plain_bytes(i, body), _noted(i, "bytes_accessed"))
        return total

    def _work(self, i: Instruction, body: Body) -> Costs:
        """Products, lookups and collectives of a single instruction."""
        total = Costs(products=collections.Counter(instruction_products(i, body)))
        if i.opcode in ("gather", "scatter"):
            total.lookups, combining = self._lookups(i, body)
            for name in combining:
                total.calls[f"scatter-add of {name}"] = Calls(1, 1.0)
        elif i.opcode == "custom-call":
            name = target(i)
            if name.startswith("__cudnn$"):
                total.calls[_cudnn_kind(name)] = Calls(1, 1.0)
            if _KERNELS.fullmatch(name):
                self._add_kernel(total, i, body)
                if named := re.search(r'op_name="[^"]*?(\w+)/pallas_call', i.attributes):
                    total.calls[f"kernel {named[1]}"] = Calls(1, 1.0)
        elif i.opcode.removesuffix("-start") in COLLECTIVES:
            self._add_collective(total, i, body)
        return total

    def _add_kernel(self, total: Costs, i: Instruction, body: Body) -> None:
        inputs = [dimensions(body[name].shape) for name in i.operands]
        shapes = (*inputs, *(dimensions(x) for x in arrays(i.shape)))
        if products := self.kernels.get(shapes):
            total.products.update(products)
        elif '"cost_estimate"' in i.attributes:
            total.noted_flops += _noted(i, "flops")
        else:
            traced = re.search(r'op_name="([^"]*)"', i.attributes)
            raise UnknownCost(
                f"{target(i)} of the kernel {i.name} ({traced[1] if traced else 'nameless'}): it has neither a cost estimate "
                "nor known matrix products, and would count as nothing: pass a cost_estimate to pallas_call"
            )

    def _lookups(self, i: Instruction, body: Body) -> tuple[collections.Counter, list[str]]:
        """Windows of a gather or scatter, and the dtypes that it combines one write after another."""
        found = collections.Counter()
        operand = body[i.operands[0]].shape
        if i.opcode == "gather":
            sizes = numbers(i, "slice_sizes")
            out, window = dimensions(i.shape), numbers(i, "offset_dims")
            rows = math.prod(size for axis, size in enumerate(out) if axis not in window)
            found[_lookup("gather", operand, sizes)] += rows
            return found, []
        arrays_written = len(i.operands) // 2
        (combine,) = called(i, "to_apply")
        roots = [x.opcode for x in self.computations[combine].values() if x.is_root]
        alone = "unique_indices=true" in i.attributes or roots == ["parameter"]
        for number in range(arrays_written):
            operand = body[i.operands[number]].shape
            updates = dimensions(body[i.operands[arrays_written + 1 + number]].shape)
            window = numbers(i, "update_window_dims")
            rows = math.prod(size for axis, size in enumerate(updates) if axis not in window)
            kept = set(numbers(i, "inserted_window_dims") + numbers(i, "input_batching_dims"))
            taken = iter(updates[axis] for axis in window)
            sizes = tuple(1 if axis in kept else next(taken) for axis in range(len(dimensions(operand))))  # fmt: skip
            found[_lookup("scatter" if alone else "scatter-add", operand, sizes)] += rows
        written = [dtype(body[name].shape) for name in i.operands[:arrays_written]]
        return found, [] if alone else written

    def _add_collective(self, total: Costs, i: Instruction, body: Body) -> None:
        kind = i.opcode.removesuffix("-start")
        members = group(i.attributes)
        n = max(2, len(members))
        operand_bytes = sum(array_bytes(body[name].shape) for name in i.operands)
        if kind == "all-reduce" and _is_sliced(i, body):
            kind = "reduce-scatter"
        gathered = operand_bytes * n if kind == "all-gather" else operand_bytes
        factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
        sent = gathered * factor
        total.collectives[kind] = Traffic(1.0, gathered, sent, 1.0, sent)
        of_hosts = collections.Counter(self.hosts[x] for x in members) if self.hosts else {}
        total.links[min(of_hosts.values()) if len(of_hosts) > 1 else 0] += sent

    def _is_hidden(self, i: Instruction, body: Body, parts: dict[str, Costs]) -> bool:
        if not (i.opcode.endswith("-start") or self._has(i, "-start")):
            return False
        following = list(body.values())[list(body).index(i.name) + 1 :]
        names, busy = {i.name}, False
        for later in following:
            if not names.intersection(later.operands):
                busy |= parts[later.name].flops > 0
            elif later.opcode in _FREE and not later.opcode.endswith("-done"):
                names.add(later.name)
            elif later.opcode == "fusion" and not self._has(later, "-done"):
                busy |= parts[later.name].flops > 0  # a product that also passes the transfer on
                names.add(later.name)
            else:
                break
        return busy

    def _has(self, i: Instruction, suffix: str) -> bool:
        """Whether a fusion starts or ends a collective."""
        return i.opcode == "fusion" and any(
            part.opcode.endswith(suffix) and part.opcode.removesuffix(suffix) in COLLECTIVES
            for inner in called(i, "calls")
            for part in self.computations[inner].values()
        )


# -- one instruction


def instruction_products(i: Instruction, body: Body) -> dict[flops.Product, float]:
    """Products of a dot, a convolution (TPUs write products as convolutions), or a call of cuDNN or cuBLAS."""
    name = target(i)
    if i.opcode == "dot":
        return _dot_products(i, body, "lhs_{}_dims", "rhs_{}_dims")
    if name.startswith("__cublas"):
        return _dot_products(i, body, "lhs_{}_dimensions", "rhs_{}_dimensions")
    if name.startswith("__cudnn$fmha"):
        batch, heads, queries, keys = (
            int(x) for x in re.findall(r"\d+", re.search(r'"intermediate_tensor_shape": ?\{.*?"dimensions": ?\[([^\]]*)', i.attributes)[1])
        )  # fmt: skip
        width, value_width = (dimensions(body[i.operands[x]].shape)[-1] for x in (0, 2))
        kind = "backward" if "Backward" in name else "forward"
        return flops.attention_products(kind, batch, heads, queries, keys, width, value_width)
    if i.opcode == "convolution" or name.startswith("__cudnn$conv"):
        result, (first, second) = (
            dimensions(i.shape),
            (dimensions(body[x].shape) for x in i.operands[:2]),
        )
        if "BackwardInput" in name:
            return _convolution_products(i, result, second, first)
        if "BackwardFilter" in name:
            return _convolution_products(i, first, result, second)
        return _convolution_products(i, first, second, result)
    return {}


def _dot_products(i: Instruction, body: Body, left_name: str, right_name: str) -> dict:
    left, right = (dimensions(body[name].shape) for name in i.operands[:2])
    batch = numbers(i, left_name.format("batch"))
    depth = math.prod(left[axis] for axis in numbers(i, left_name.format("contracting")))
    times = math.prod(left[axis] for axis in batch)
    rows, columns = (math.prod(x) // max(1, depth * times) for x in (left, right))
    return {(rows, columns, depth): times}


def _convolution_products(i: Instruction, input_shape, kernel_shape, out_shape) -> dict:
    """A convolution as products of patches.

    On a TPU, spatial axes can stand for axes of a product. An axis on which each place has its own tap is a batch axis, or a column axis
    if all places read the same input. An axis without taps is a row axis. An axis with many taps and one place is summed over.
    """
    left, right, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes).groups()
    sizes, inputs, kernel = (
        dict(zip(labels, shape, strict=True))
        for labels, shape in ((out, out_shape), (left, input_shape), (right, kernel_shape))
    )
    rows, columns, depth, times = sizes["b"], sizes["f"], kernel["i"], 1
    for axis, window in enumerate(_window(i.attributes)):
        key = str(axis)
        taps = _valid_taps(sizes[key], inputs[key], kernel[key], *window)
        if kernel[key] > 1 and taps == sizes[key] and inputs[key] == 1:
            columns *= taps
        elif kernel[key] > 1 and taps == sizes[key]:
            times *= taps
        else:
            rows *= sizes[key]
            depth *= fractions.Fraction(taps, sizes[key])
    return {(rows, columns, depth): times}


@functools.cache
def _valid_taps(out, size, kernel, stride, pad_low, left_dilation, right_dilation) -> int:
    """Counts the pairs of an output place and a kernel place that hit an element of the input, along one axis."""
    places = np.arange(out)[:, None] * stride - pad_low + np.arange(kernel)[None] * right_dilation
    inside = (places >= 0) & (places <= (size - 1) * left_dilation) & (places % left_dilation == 0)
    return int(inside.sum())


def _window(attributes: str) -> list[tuple[int, int, int, int]]:
    """(stride, low padding, input dilation, kernel dilation) of each spatial axis of a convolution."""
    match = re.search(r"window=\{([^}]*)\}", attributes)
    if match is None:
        return []
    fields = dict(field.split("=") for field in match[1].split())
    rank = len(fields["size"].split("x"))
    columns = [
        [int(x.split("_")[0]) for x in fields.get(name, "x".join([default] * rank)).split("x")]
        for name, default in (
            ("stride", "1"),
            ("pad", "0_0"),
            ("lhs_dilate", "1"),
            ("rhs_dilate", "1"),
        )  # fmt: skip
    ]
    return list(zip(*columns, strict=True))


def _noted(i: Instruction, what: str) -> float:
    """A value of a kernel's cost estimate, or 0 without one."""
    match = re.search(rf'"cost_estimate":\{{[^}}]*"{what}":"?(\d+)', i.attributes)
    return float(match[1]) if match else 0.0


def _cudnn_kind(name: str) -> str:
    direction = "backward" if "Backward" in name else "forward"
    return f"cuDNN {'attention' if 'fmha' in name else 'convolution'} {direction}"


def _lookup(kind: str, operand: str, sizes: tuple[int, ...]) -> Lookup:
    window = array_bytes(f"{dtype(operand)}[{','.join(map(str, sizes))}]")
    return Lookup(kind, dtype(operand), window, window_bytes(operand, sizes))


def _is_sliced(i: Instruction, body: Body) -> bool:
    """Whether each device keeps only its part of a reduction. The TPU compiler writes a reduce-scatter in this way in a fusion."""
    users = [x for x in body.values() if i.name in x.operands]
    return bool(users) and all(
        x.opcode == "dynamic-slice" and any(y.opcode == "partition-id" for y in body.values())
        for x in users
    )


# -- memory


def _plain_bytes(i: Instruction, body: Body) -> float:
    if i.opcode in _FREE or any(f'"{name}"' in i.attributes for name in _FREE_CALLS):
        return 0.0
    operands = [body[name].shape for name in i.operands]
    if i.opcode == "slice-start":  # ((operand), result, context)
        in_memory = memory_bytes(operands[0], True) > 0
        return memory_bytes(re.sub(r"S\(\d+\)", "", elements(i.shape)[1])) if in_memory else 0.0
    if i.opcode in ("slice", "dynamic-slice"):
        return (memory_bytes(operands[0], True) > 0) * memory_bytes(i.shape) + memory_bytes(
            i.shape, True
        )
    if i.opcode == "dynamic-update-slice":
        return 2 * memory_bytes(operands[1], True)
    if i.opcode == "gather":  # its reads are counted as lookups, and so are a scatter's writes
        return memory_bytes(i.shape, True)
    if i.opcode == "scatter":
        return sum(memory_bytes(x, True) for x in operands[len(operands) // 2 :])
    read = 0.0 if i.opcode.endswith("-done") else sum(memory_bytes(x, True) for x in operands)
    return read + (0.0 if i.opcode.endswith("-start") else memory_bytes(i.shape, True))


def _fusion_bytes(i: Instruction, body: Body, inner: Body) -> float:
    """Bytes that a fusion reads and writes. From an operand that it only slices, it reads the slice. In an in-place update, it writes the
    update.

    Gathers and scatters inside the fusion count as lookups, not as memory traffic.
    """
    total, users = 0.0, collections.defaultdict(list)
    parameters = sorted((x for x in inner.values() if x.opcode == "parameter"), key=parameter_number)  # fmt: skip
    for part in inner.values():
        for position, operand in enumerate(part.operands):
            users[operand].append((part, position))
    for operand, parameter in zip(i.operands, parameters, strict=True):
        shape = body[operand].shape
        if memory_bytes(shape, True) == 0:
            continue
        uses = _uses(parameter.name, users)
        if uses and all(
            part.opcode in ("dynamic-slice", "slice", "gather", "dynamic-update-slice", "scatter")
            and position == 0
            for part, position in uses
        ):
            taken = sum(memory_bytes(part.shape) for part, _ in uses if part.opcode in ("dynamic-slice", "slice"))  # fmt: skip
            total += min(taken, memory_bytes(shape))
        else:
            total += memory_bytes(shape, True)
    in_place = {
        array_bytes(part.shape): memory_bytes(inner[part.operands[1]].shape) if part.opcode == "dynamic-update-slice" else 0.0
        for part in inner.values()
        if part.opcode in ("dynamic-update-slice", "scatter")
    }  # fmt: skip
    result = elements(i.shape)[1] if i.opcode == "fusion-start" else i.shape
    for array in arrays(result, True):
        total += in_place.get(array_bytes(array), memory_bytes(array))
    return total


def _uses(name: str, users: dict) -> list[tuple[Instruction, int]]:
    """The users of a value, also through bitcasts."""
    found = []
    for part, position in users[name]:
        found += _uses(part.name, users) if part.opcode == "bitcast" else [(part, position)]
    return found
