"""Parses the text of a compiled program: computations, instructions and shapes."""

import dataclasses
import math
import re

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0, "tuple": 0, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shape: str  # shape and layout of the result, such as "bf16[8,128]{1,0:T(8,128)S(1)}", or a tuple of shapes
    operands: tuple[str, ...]
    attributes: str  # the rest of the line
    is_root: bool


# The instructions of a computation by name, in the order of the text, which is the order of the schedule.
Body = dict[str, Instruction]


def parse(text: str) -> tuple[str, dict[str, Body]]:
    """The name of the entry computation, and the instructions of each computation by name."""
    entry, computations, body = "", {}, {}
    for line in _joined(text):
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


def _joined(text: str) -> list[str]:
    """Lines with one instruction each. In the text, the metadata of a kernel can span several lines."""
    lines = []
    for line in text.splitlines():
        begins = _COMPUTATION.match(line) or _INSTRUCTION.match(line) or line in ("", "}")
        if begins or not lines or not _INSTRUCTION.match(lines[-1]):
            lines.append(line)
        else:
            lines[-1] += line
    return lines


def trip_count(loop: Instruction, computations: dict[str, Body], condition: str) -> int | None:
    """How often the body of a loop runs, from XLA's annotation or from the constant in the loop's condition.

    The constant is right for loops that count from 0 in steps of 1, as `lax.scan`, `map` and `fori_loop` do.
    """
    if known := re.search(r'known_trip_count"?:?=?\{"?n"?[:=]"?(\d+)', loop.attributes):
        return int(known[1])
    inside = [
        condition,
        *(x for i in computations[condition].values() for x in called(i, "calls")),
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


# -- attributes


def called(i: Instruction, attribute: str) -> list[str]:
    """Names of the computations that an attribute names: "calls", "body", "to_apply", ..."""
    return re.findall(rf"\b{attribute}=%?([\w.\-]+)", i.attributes)


def branches(i: Instruction) -> list[str]:
    """The computations from which a conditional runs one."""
    if listed := re.search(r"branch_computations=\{([^}]*)\}", i.attributes):
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return called(i, "true_computation") + called(i, "false_computation")


def numbers(i: Instruction, attribute: str) -> tuple[int, ...]:
    """A list of numbers, as in `offset_dims={1,2}` or cuBLAS's `"lhs_contracting_dimensions":["1"]`. Empty if the attribute is missing."""
    match = re.search(rf'\b{attribute}"?[=:] ?[{{\[]([^}}\]]*)[}}\]]', i.attributes)
    return tuple(int(x) for x in re.findall(r"\d+", match[1])) if match else ()


def target(i: Instruction) -> str:
    """The target of a custom call."""
    match = re.search(r'custom_call_target="([^"]*)"', i.attributes)
    return match[1] if match else ""


def parameter_number(i: Instruction) -> int:
    """The number of a parameter in its computation, or -1 for other instructions."""
    return int(re.match(r"\d+", i.attributes)[0]) if i.opcode == "parameter" else -1


def group(attributes: str) -> list[int]:
    """The devices in the first group of a collective, in any of the three notations of HLO."""
    if meshed := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}",
        attributes,
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", meshed[1])}
        taking_part = re.findall(r"\w+", meshed[4])
        devices = _in_order(meshed[2] or str(math.prod(sizes.values())), meshed[3])
        devices = devices.reshape(tuple(sizes.values()))
        return devices[tuple(slice(None) if x in taking_part else 0 for x in sizes)].flatten().tolist()  # fmt: skip
    if iota := re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        return _in_order(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))[0].tolist()
    if listed := re.search(
        r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", attributes
    ):  # a collective-permute has pairs
        return [int(x) for x in listed[1].split(",") if x]
    return []


def _in_order(sizes: str, order: str | None) -> np.ndarray:
    """The numbers of all devices as an array of sizes "2,4", with its axes in an order such as "1,0"."""
    sizes = [int(x) for x in sizes.split(",")]
    order = [int(x) for x in order.split(",")] if order else range(len(sizes))
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(order)


# -- shapes


def arrays(shape: str, main_memory_only: bool = False) -> list[str]:
    """The arrays in a shape or tuple; on request without those that stay on the chip (with a memory space above 0)."""
    found = [match[0] for match in _ARRAY.finditer(shape)]
    return [x for x in found if not (main_memory_only and re.search(r"S\([1-9]", x))]


def elements(shape: str) -> list[str]:
    """The elements of a tuple's shape, which may be tuples themselves."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, start = [], 0, 1
    for place, letter in enumerate(shape):
        depth += (letter in "({[") - (letter in ")}]")
        if depth == 0 or (depth == 1 and letter == ","):
            parts.append(shape[start:place].strip())
            start = place + 1
    return parts


def dimensions(shape: str) -> tuple[int, ...]:
    """The dimensions of an array, or of the first array of a tuple."""
    return tuple(int(x) for x in _ARRAY.search(shape)[2].split(",") if x)


def dtype(shape: str) -> str:
    """The dtype of an array."""
    return _ARRAY.search(shape)[1]


def item_bytes(shape: str) -> float:
    """The size of one element of an array."""
    name = dtype(shape)
    return (_BITS.get(name) or int((re.search(r"\d+", name) or ["0"])[0])) / 8


def array_bytes(shape: str, main_memory_only: bool = False) -> float:
    """Bytes of all elements of an array, or of all arrays of a tuple."""
    return sum(math.prod(dimensions(x)) * item_bytes(x) for x in arrays(shape, main_memory_only))


def memory_bytes(shape: str, main_memory_only: bool = False) -> float:
    """Bytes that the arrays take in memory. TPUs store whole tiles, so that 64 channels take as much as 128."""
    return sum(window_bytes(x, dimensions(x)) for x in arrays(shape, main_memory_only))


def window_bytes(shape: str, sizes: tuple[int, ...]) -> float:
    """Bytes of the array's tiles that a window of these sizes touches. Without tiles, bytes of the window."""
    layout = re.search(r"\{([\d,]*)(?::T\(([\d,]+)\))?", shape)
    order = [int(x) for x in layout[1].split(",") if x] if layout else []
    tile = [int(x) for x in layout[2].split(",")] if layout and layout[2] else []
    sizes = [sizes[axis] for axis in order] if len(order) == len(sizes) else list(sizes)[::-1]
    tile = tile[::-1]
    sizes += [1] * (len(tile) - len(sizes))
    padded = [-(-size // unit) * unit for size, unit in zip(sizes, tile, strict=False)]
    return math.prod(padded) * math.prod(sizes[len(padded) :]) * item_bytes(shape)


# -- lines


def _split_shape(text: str) -> tuple[str, str]:
    """The shape at the start of a line, and the rest of the line."""
    end = _closing(text[1:]) + 2 if text.startswith("(") else text.index(" ")
    return text[:end], text[end:].lstrip()


def _closing(text: str) -> int:
    """The position at which the parenthesis that was opened just before `text` closes."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)
