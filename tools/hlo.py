"""What one device does in a compiled program, counted in its HLO text: matrix products, memory traffic, collectives.

XLA's own cost analysis counts the body of a loop once, whatever its length, and here the layers and the chunks of rays are
loops. So the text is read instead, and every loop's body counts as often as it runs.
"""

import collections
import dataclasses
import functools
import math
import re

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that move nothing: names for parts of buffers, and control flow, whose bodies are counted themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota", "after-all",
    "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done", "domain", "add-dependency",
}  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding")
_BITS = {"pred": 8, "token": 0, "opaque": 0, "tuple": 0, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shape: str  # of the result, with layout: "bf16[8,128]{1,0:T(8,128)S(1)}", or a tuple of such
    operands: tuple[str, ...]
    attributes: str  # the rest of the line
    is_root: bool


@dataclasses.dataclass
class Traffic:
    """All executions of one kind of collective."""

    count: float = 0.0
    payload: float = 0.0  # bytes of the results (of the operands of a reduce-scatter)
    sent: float = 0.0  # bytes that leave the device in a ring: 2 (n - 1) / n of the payload for an all-reduce of n, ...


@dataclasses.dataclass
class Costs:
    """Of one device, in one run of the program."""

    flops: float = 0.0  # of matrix products and convolutions, 2 a multiplication
    memory_bytes: float = 0.0  # read from and written to main memory, as far as the text tells
    collectives: dict[str, Traffic] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(Traffic)
    )
    loops_of_unknown_length: int = 0  # their bodies counted once

    def add(self, other: "Costs", times: float = 1.0) -> None:
        """Adds `times` runs of a part."""
        self.flops += times * other.flops
        self.memory_bytes += times * other.memory_bytes
        self.loops_of_unknown_length += other.loops_of_unknown_length
        for kind, traffic in other.collectives.items():
            total = self.collectives[kind]
            total.count += times * traffic.count
            total.payload += times * traffic.payload
            total.sent += times * traffic.sent


def count(text: str) -> Costs:
    """Counts a module: `compiled.as_text()`."""
    entry, computations = parse(text)
    parameter_order = {
        name: [i.name for i in sorted(body.values(), key=_parameter_number) if i.opcode == "parameter"]
        for name, body in computations.items()
    }  # fmt: skip

    @functools.cache
    def products(name: str) -> float:
        body = computations[name]
        inner = sum(products(called) for i in body.values() for called in _called(i, "calls"))
        return inner + sum(product_flops(i, body) for i in body.values())

    @functools.cache
    def costs(name: str) -> Costs:
        total, body = Costs(), computations[name]
        for i in body.values():
            total.flops += product_flops(i, body)
            if i.opcode == "fusion":
                (inner,) = _called(i, "calls")
                total.flops += products(inner)
                total.memory_bytes += _fusion_bytes(
                    i, body, computations[inner], parameter_order[inner]
                )
            elif i.opcode == "while":
                (loop,), (condition,) = _called(i, "body"), _called(i, "condition")
                length = trip_count(i, computations, condition)
                total.add(costs(loop), 1.0 if length is None else length)
                total.loops_of_unknown_length += length is None
            elif i.opcode == "conditional":
                total.add(max(map(costs, _branches(i)), key=lambda x: (x.flops, x.memory_bytes)))
            elif i.opcode in ("call", "async-start"):
                for called in _called(i, "to_apply") + _called(i, "calls"):
                    total.add(costs(called))
            else:
                total.memory_bytes += _plain_bytes(i, body)
            _add_collective(total, i, body)
        return total

    return costs(entry)


def parse(text: str) -> tuple[str, dict[str, dict[str, Instruction]]]:
    """The name of the entry computation, and the instructions of each computation by name."""
    entry, computations, body = "", {}, {}
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            body = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            shape, rest = _split_shape(match[3])
            opcode, _, rest = rest.partition("(")
            end = _closing(rest)
            operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
            attributes = rest[end + 1 :] if operands or opcode != "parameter" else rest
            if opcode == "constant":
                attributes = rest
            body[match[2]] = Instruction(
                match[2], opcode, shape, operands, attributes, bool(match[1])
            )
    return entry, computations


def trip_count(loop: Instruction, computations: dict, condition: str) -> int | None:
    """How often a loop's body runs, from what XLA notes or from the constant that its condition compares with.

    The second holds for loops that count from 0 by 1, as those of `lax.scan`, `map` and `fori_loop` do.
    """
    if known := re.search(r'known_trip_count"?:?=?\{"?n"?[:=]"?(\d+)', loop.attributes):
        return int(known[1])
    inside = [
        condition,
        *(x for i in computations[condition].values() for x in _called(i, "calls")),
    ]
    limits = [
        int(value[1])
        for name in inside
        for i in computations[name].values()
        if i.opcode == "constant"
        and re.match(r"[su]\d+\[\]", i.shape)
        and (value := re.match(r"(\d+)\)", i.attributes))
    ]
    return limits[0] if len(limits) == 1 else None


# -- one instruction


def product_flops(i: Instruction, body: dict[str, Instruction]) -> float:
    """Operations of a dot or a convolution (TPUs write products as convolutions), or what a kernel says of itself."""
    if i.opcode == "custom-call":
        noted = re.search(r'"cost_estimate":\{"flops":"?(\d+)', i.attributes)
        return float(noted[1]) if noted else 0.0
    if i.opcode == "dot":
        left = dimensions(body[i.operands[0]].shape)
        contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)[1]
        return 2.0 * math.prod(dimensions(i.shape)) * math.prod(left[int(d)] for d in contracting.split(",") if d)  # fmt: skip
    if i.opcode != "convolution":
        return 0.0
    left, right, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes).groups()
    sizes = dict(zip(out, dimensions(i.shape), strict=True))
    inputs = dict(zip(left, dimensions(body[i.operands[0]].shape), strict=True))
    kernel = dict(zip(right, dimensions(body[i.operands[1]].shape), strict=True))
    taps = 1.0
    for axis, window in enumerate(_window(i.attributes)):
        key = str(axis)
        taps *= _valid_taps(sizes[key], inputs[key], kernel[key], *window)
    return 2.0 * sizes["b"] * sizes["f"] * kernel["i"] * taps


@functools.cache
def _valid_taps(out, size, kernel, stride, pad_low, left_dilation, right_dilation) -> int:
    """Pairs of an output place and a kernel place that meet an element of the input, along one axis."""
    places = np.arange(out)[:, None] * stride - pad_low + np.arange(kernel)[None] * right_dilation
    inside = (places >= 0) & (places <= (size - 1) * left_dilation) & (places % left_dilation == 0)
    return int(inside.sum())


def _window(attributes: str) -> list[tuple[int, int, int, int]]:
    """(stride, low padding, dilation of the input, dilation of the kernel) of each spatial axis of a convolution."""
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


def _add_collective(total: Costs, i: Instruction, body: dict[str, Instruction]) -> None:
    kind = i.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return
    n = group_size(i.attributes)
    given = sum(array_bytes(body[name].shape) for name in i.operands)
    gathered = given * n if kind == "all-gather" else given
    share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
    traffic = total.collectives[kind]
    traffic.count += 1
    traffic.payload += gathered
    traffic.sent += gathered * share


def group_size(attributes: str) -> int:
    """Devices that take part in one collective, from any of the three ways that HLO writes them."""
    if meshed := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'?(\w+)'?=(\d+)", meshed[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"\w+", meshed[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return listed[1].count(",") + 1
    return 2  # collective-permute: pairs


# -- memory


def array_bytes(shape: str, main_memory_only: bool = False) -> float:
    """Bytes of a shape or of all arrays of a tuple; without those that stay on the chip (a memory space above 0), where asked."""
    total = 0.0
    for dtype, sizes, layout in _ARRAY.findall(shape):
        if main_memory_only and re.search(r"S\([1-9]", layout or ""):
            continue
        bits = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or ["0"])[0])
        total += math.prod(int(x) for x in sizes.split(",") if x) * bits / 8
    return total


def dimensions(shape: str) -> tuple[int, ...]:
    """Of an array's shape."""
    return tuple(int(x) for x in _ARRAY.match(shape)[2].split(",") if x)


def _plain_bytes(i: Instruction, body: dict[str, Instruction]) -> float:
    if i.opcode in _FREE or any(f'"{name}"' in i.attributes for name in _FREE_CALLS):
        return 0.0
    operands = [body[name].shape for name in i.operands]
    if i.opcode == "slice-start":  # ((operand), result, context)
        result = _ARRAY.findall(i.shape)[1]
        in_memory = array_bytes(operands[0], True) > 0
        return array_bytes(f"{result[0]}[{result[1]}]") if in_memory else 0.0
    if i.opcode in ("slice", "dynamic-slice", "gather"):
        return (array_bytes(operands[0], True) > 0) * array_bytes(i.shape) + array_bytes(
            i.shape, True
        )
    if i.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * array_bytes(operands[-1 if i.opcode == "scatter" else 1], True)
    read = 0.0 if i.opcode.endswith("-done") else sum(array_bytes(x, True) for x in operands)
    return read + (0.0 if i.opcode.endswith("-start") else array_bytes(i.shape, True))


def _fusion_bytes(i: Instruction, body: dict, inner: dict, parameters: list[str]) -> float:
    """What a fusion reads and writes: of an operand that it only slices or looks up, what it takes; of an update in place, the
    update."""
    total, users = 0.0, collections.defaultdict(list)
    for part in inner.values():
        for position, operand in enumerate(part.operands):
            users[operand].append((part, position))
    for operand, parameter in zip(i.operands, parameters, strict=True):
        shape = body[operand].shape
        if array_bytes(shape, True) == 0:
            continue
        uses = _uses(parameter, users)
        if uses and all(
            part.opcode in ("dynamic-slice", "slice", "gather", "dynamic-update-slice")
            and position == 0
            for part, position in uses
        ):
            taken = sum(array_bytes(part.shape) for part, _ in uses if part.opcode != "dynamic-update-slice")  # fmt: skip
            total += min(taken, array_bytes(shape))
        else:
            total += array_bytes(shape, True)
    updates = [part for part in inner.values() if part.opcode == "dynamic-update-slice"]
    in_place = {array_bytes(part.shape): array_bytes(inner[part.operands[1]].shape) for part in updates}  # fmt: skip
    for dtype, sizes, layout in _ARRAY.findall(i.shape):
        array = f"{dtype}[{sizes}]{layout}"
        if array_bytes(array, True):
            total += in_place.get(array_bytes(array), array_bytes(array))
    return total


def _uses(name: str, users: dict) -> list[tuple[Instruction, int]]:
    """Who uses a value, through bitcasts."""
    found = []
    for part, position in users[name]:
        found += _uses(part.name, users) if part.opcode == "bitcast" else [(part, position)]
    return found


# -- text


def _called(i: Instruction, attribute: str) -> list[str]:
    return re.findall(rf"\b{attribute}=%?([\w.\-]+)", i.attributes)


def _branches(i: Instruction) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", i.attributes):
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return _called(i, "true_computation") + _called(i, "false_computation")


def _parameter_number(i: Instruction) -> int:
    return int(re.match(r"\d+", i.attributes)[0]) if i.opcode == "parameter" else -1


def _split_shape(text: str) -> tuple[str, str]:
    """The shape that a line starts with, and the rest of it."""
    end = _closing(text[1:]) + 2 if text.startswith("(") else text.index(" ")
    return text[:end], text[end:].lstrip()


def _closing(text: str) -> int:
    """Where the parenthesis closes that was opened just before `text`."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)
