"""Kinds of objects as tables of parts, from which `assembly` draws random objects. Only data, and code to pack it into arrays.

An object is a list of parts, each placed on an earlier one. Man-made things are symmetric, so a part has up to four copies,
mirrored in the vertical planes x = 0 and y = 0. A hole is cut out of all parts listed before it. Lengths are half sizes.
Absolute lengths have no unit, since the whole object is scaled at the end.
"""

import dataclasses

import numpy as np

from lrm_jax.data.procedural.shapes import SHAPES

MAX_PARTS = 12
_OPTIONS = (
    12  # lists of options are stretched to this length, evenly for 1, 2, 3, 4, 6 or 12 options
)
FAMILIES = {
    "wood": ("8a5a3b", "a8693d", "6e4229", "b98a5a", "8f4a3f"),
    "stone": ("7d858c", "9aa0a3", "62686f", "a39a8c", "c2bfb6"),
    "leaf": ("5f8f3a", "87942b", "3f7a4a", "d3722e", "d9a633"),
    "metal": ("4c565e", "8d99a3", "38414a", "b9c2c9", "5d6f7d"),
    "roof": ("b5452f", "3d6fb5", "4f9a58", "d79b2e", "7b3f63"),
    "wall": ("e3d8c4", "c9a87c", "d9dde0", "b5a58f", "e6c9a0"),
    "earth": ("7a4f33", "9c6b3f", "5d4a3a", "d9c48f", "e9eef2"),
    "water": ("2f7fc1", "49b3d1", "1f4fa0", "3aa69b", "7a2f3a"),
    "gold": ("e0a526", "c98a1a", "f0cf5a", "b87333", "d8d8d8"),
    "dark": ("2b2f36", "1d2733", "3c2a21", "23364a", "40333a"),
    "vivid": ("d6362b", "2a8f5b", "2d5fd0", "e88a1c", "8e3fb0"),
    "light": ("f2efe6", "ffe3a3", "f7d9d9", "d8f0f7", "ffffff"),
}
PATTERNS = "flat fade bands stripes checks bricks marble cap frame dots".split()


@dataclasses.dataclass(frozen=True)
class Part:
    """One part. A number may be a range (low, high). "a b" lists options, drawn with equal probability.

    shape: names in `shapes.SHAPES`.
    size: half sizes along x, y, z. Along the axes in `relative`, in units of the base's half sizes; otherwise absolute.
    tie: axes with equal sizes, such as "xy"; the size of the first axis applies to all.
    on: index of the part that is the base. If the base is absent, so is this part.
    at, pivot: the point `pivot` of this part is placed at the point `at` of the base. Each is an offset from the centre of its
      part, in units of that part's half sizes.
    copies: "1", "x" (mirrored in x = 0), "y", "xy" (four copies), or "=" (the same as the base).
    axis: the world axis along which the shape's own z axis points.
    turn, tilt: the part is rotated about y by `tilt`, then about z by `turn`, around the pivot; degrees. Copies are mirrored.
    chance: probability that the part exists.
    paint, other: colour families, mixed by the pattern. "=": a lighter or darker shade of `paint`.
    hole: whether the part is cut out.
    relief: height of hills on the top, in half sizes; only for an object's first part.
    """

    shape: str
    size: tuple
    on: int = 0
    at: tuple = (0, 0, 0)
    pivot: tuple = (0, 0, 0)
    relative: str = ""
    tie: str = ""
    copies: str = "="
    axis: str = "z"
    turn: object = 0
    tilt: object = 0
    chance: float = 1.0
    paint: str = "wood"
    other: str = "="
    pattern: str = "flat flat fade"
    hole: bool = False
    relief: object = 0


def _frame(x, y, z, tie="") -> Part:
    """A part without matter, only a size for placing other parts."""
    return Part("none", (x, y, z), tie=tie, copies="1")


def _top(shape, size, on=0, at=(0, 0, 1), **how) -> Part:
    """A part on top of another. It sinks in a little, so that there is no gap."""
    return Part(shape, size, on, at, (0, 0, -0.98), **how)


def _hole(shape, size, on=0, at=(0, 0, 0), pivot=(0, 0, 0), **how) -> Part:
    return Part(shape, size, on, at, pivot, hole=True, **how)


_THING = "box cylinder cup ball die hexagon cone barrel block frustum dome pyramid"
_BODY = "box cylinder hexagon block frustum barrel die hexblock slab cup ball dome"
_ANY = "wood stone metal vivid roof gold"
_LOOKS = "flat fade bands stripes checks marble"
_ITEM = dict(paint="vivid gold light metal", other="light dark", pattern=_LOOKS)
_THIN = (0.02, 0.05)


def _side(side: tuple) -> tuple:
    """The face of the base that a place is on: -1, 0 or 1 for each axis."""
    middles = [np.mean(v) for v in side]
    return tuple(float(np.sign(m)) * (abs(m) >= 0.9) for m in middles)


def _attachment(copies: str, side: tuple, chance: float) -> Part:
    """Something of any shape on a side of the first part."""
    return Part(
        _BODY, ((0.06, 0.4), (0.06, 0.4), (0.06, 0.5)), 0, side, tuple(-v * 0.9 for v in _side(side)),
        copies=copies, turn=(-20, 20), chance=chance, paint=_ANY + " wall light", other="dark light", pattern=_LOOKS,
    )  # fmt: skip


_ASSEMBLY = [
    Part(_BODY, ((0.25, 0.8), (0.25, 0.8), (0.2, 0.8)), copies="1", paint=_ANY + " wall", other="light dark", pattern=_LOOKS),
    Part(_BODY, ((0.1, 0.5), (0.1, 0.5), (0.03, 0.3)), 0, (0, 0, 1), (0, 0, -0.95), copies="1", chance=0.6, paint=_ANY, pattern=_LOOKS),
    _hole("box cylinder hexagon ball", ((0.15, 0.5), (2, 2), (0.15, 0.5)), 0, ((-0.3, 0.3), 0, (-0.5, 0.5)), relative="xyz", axis="y", chance=0.35),
    _hole("box cylinder cup", ((0.4, 0.85), (0.4, 0.85), (0.3, 0.8)), 0, (0, 0, 1.02), (0, 0, 1), relative="xyz", chance=0.3),
    _attachment("x", (1, (-0.6, 0.6), (-0.7, 0.7)), 0.7),
    _attachment("xy", (1, (0.3, 0.8), (-0.9, 0.9)), 0.3),
    _attachment("y", ((-0.5, 0.5), 1, (-0.5, 0.7)), 0.5),
    _attachment("xy", ((0.4, 0.9), (0.4, 0.9), 1), 0.4),
    _attachment("xy", ((0.5, 0.9), (0.5, 0.9), -1), 0.5),
    _attachment("1", ((-0.5, 0.5), (-0.5, 0.5), 1), 0.4),
    Part(_THING, ((0.3, 1.2), (0.3, 1.2), (0.3, 1.5)), 4, (1, 0, 0), (-0.9, 0, 0), relative="xyz", chance=0.5, paint=_ANY, pattern=_LOOKS),
    Part("box cylinder", ((0.015, 0.04), (0.015, 0.04), (0.2, 0.5)), 1, (0, 0, 1), (0, 0, -0.95), chance=0.3, paint="metal wood"),
]  # fmt: skip
KINDS: dict[str, tuple[int, list[Part]]] = {
    "assembly": (6, _ASSEMBLY),
    "table": (2, [
        _frame((0.5, 1), (0.4, 0.9), (0.25, 0.6)),
        Part("box slab die", (1, 1, (0.03, 0.1)), 0, (0, 0, 1), (0, 0, 1), relative="xy", paint="wood wall stone", pattern="flat fade stripes marble"),
        Part("box cylinder frustum", ((0.04, 0.1), 0, 1), 0, ((0.9, 1), (0.9, 1), 0), (1.1, 1.1, 0.05), relative="z", tie="xy", copies="xy", paint="wood metal"),
        Part("box", (0.9, 0.9, _THIN), 0, (0, 0, (-0.7, 0.2)), relative="xy", chance=0.35),
        Part("box", (0.9, 0.9, (0.1, 0.2)), 0, (0, 0, 0.9), (0, 0, 1), relative="xyz", chance=0.4),
        Part("box", (1.06, 0.4, 0.3), 0, (0, 0, 1.02), (0, 0, 0.99), relative="xyz", chance=0.2, paint="vivid roof", other="light", pattern=_LOOKS),
        _top(_THING, ((0.08, 0.25), (0.08, 0.25), (0.08, 0.3)), 1, ((-0.7, -0.2), (-0.6, 0.6), 1), chance=0.5, turn=(0, 90), **_ITEM),
        _top(_THING, ((0.08, 0.2), 0, (0.08, 0.3)), 1, ((0.2, 0.7), (-0.6, 0.6), 1), tie="xy", chance=0.5, **_ITEM),
        _top("box cylinder", ((0.1, 0.3), (0.1, 0.2), (0.02, 0.04)), 1, ((-0.2, 0.2), (-0.5, 0.5), 1), chance=0.3, turn=(-30, 30), **_ITEM),
    ]),
    "chair": (2, [
        _frame((0.3, 0.9), (0.3, 0.4), (0.2, 0.4)),
        Part("box slab die", (1, 1, (0.04, 0.09)), 0, (0, 0, 1), (0, 0, 1), relative="xy", paint="wood vivid metal"),
        Part("box cylinder frustum", ((0.035, 0.07), 0, 1), 0, (1, 1, 0), (1.05, 1.05, 0.05), relative="z", tie="xy", copies="xy", tilt=(-6, 0), paint="wood metal"),
        Part("box cylinder", ((0.03, 0.06), 0, (0.3, 0.5)), 0, (1, 1, 1), (1.05, 1.05, -1), tie="xy", copies="x"),
        Part("box die", (1, 0.05, (0.1, 0.35)), 0, (0, 1, (1.8, 2)), (0, 1.4, 0), relative="x", chance=0.9, paint="wood vivid", pattern="flat fade stripes"),
        Part("box", (0.05, 0.8, 0.03), 0, (1, 0, (1.3, 1.7)), (1, 0, 0), relative="y", copies="x", chance=0.3),
        _top("die", (0.9, 0.9, (0.04, 0.09)), 1, relative="xy", chance=0.3, paint="vivid roof light", other="light", pattern=_LOOKS),
        Part("box", (0.03, 1, 0.03), 0, (0.9, 0, -0.3), relative="y", copies="x", chance=0.4),
    ]),
    "round table or lamp": (1, [
        Part("cylinder frustum dome hexagon slab", ((0.25, 0.5), 0, (0.03, 0.1)), tie="xy", copies="1", paint="wood metal stone"),
        _top("cylinder barrel box frustum", ((0.03, 0.09), 0, (0.3, 0.8)), tie="xy", paint="wood metal gold"),
        _top("cylinder hexagon dome frustum cup bowl", ((0.3, 0.8), 0, (0.04, 0.35)), 1, tie="xy", paint="wood light roof vivid", pattern="flat fade bands dots"),
        Part("ball", ((0.05, 0.12), 0, 0), 1, (0, 0, (-0.5, 0.5)), tie="xyz", chance=0.4, paint="gold metal"),
        _top(_THING, ((0.08, 0.2), 0, (0.08, 0.25)), 2, tie="xy", chance=0.4, **_ITEM),
    ]),
    "house": (4, [
        Part("box slab hexagon", ((0.55, 0.9), (0.5, 0.8), (0.02, 0.1)), copies="1", paint="stone earth leaf", pattern="flat bricks cap"),
        _top("box", ((0.6, 0.9), (0.6, 0.9), (0.25, 0.6)), relative="xy", paint="wall stone wood", other="wood stone", pattern="flat bricks frame stripes"),
        _hole("box", ((0.12, 0.2), (0.5, 0.9), (0.4, 0.6)), 1, ((-0.4, 0.4), -1, -1), (0, -0.9, -0.97), relative="xyz", chance=0.5),
        _hole("box cylinder", ((0.1, 0.18), 2, (0.14, 0.25)), 1, ((0.5, 0.7), 0, (0.1, 0.5)), relative="xyz", axis="y", copies="x", chance=0.4),
        _top("gable hip pyramid", ((1.05, 1.25), (1.05, 1.3), (0.2, 0.5)), 1, relative="xy", paint="roof wood", other="dark", pattern="flat bands bricks fade"),
        _top("box", ((0.05, 0.1), 0, (0.25, 0.4)), 1, ((0.3, 0.7), (0.2, 0.6), 1), tie="xy", chance=0.6, paint="stone roof", pattern="flat bricks"),
        Part("box", ((0.14, 0.2), 0.02, (0.4, 0.55)), 1, ((-0.3, 0.3), -1, -1), (0, -0.2, -1), relative="xz", chance=0.6, paint="wood vivid dark", pattern="flat stripes frame"),
        Part("box", (0.02, (0.12, 0.2), (0.15, 0.25)), 1, (1, (-0.2, 0.5), (0, 0.4)), (0.2, 0, 0), relative="yz", copies="x", chance=0.7, paint="dark water light", other="light", pattern="flat frame"),
        Part("box", ((0.05, 0.09), 0, 1), 1, (1, 1, 0), (0.6, 0.6, 0), relative="z", tie="xy", copies="xy", chance=0.4),
        Part("gable box", ((0.2, 0.4), (0.15, 0.3), 0.08), 1, ((-0.3, 0.3), -1, (0.3, 0.7)), (0, 0.7, 0), relative="x", chance=0.3, paint="roof wood"),
        Part("box cylinder", ((0.15, 0.35), (0.15, 0.3), (0.5, 1)), 1, (1, (-0.4, 0.4), -1), (-0.9, 0, -1), relative="z", chance=0.35, paint="wall stone wood", pattern="flat bricks"),
        _top("pyramid cone gable", (1.2, 1.2, (0.1, 0.35)), 10, relative="xy", paint="roof"),
    ]),
    "tower": (2, [
        Part("cylinder hexagon box hexblock frustum", ((0.3, 0.5), 0, (0.05, 0.2)), tie="xy", copies="1", paint="stone earth", pattern="flat bricks"),
        _top("cylinder hexagon box frustum hexblock block", ((0.7, 0.95), 0, (0.4, 0.9)), relative="xy", tie="xy", paint="stone wall wood", other="dark stone", pattern="flat bricks fade"),
        _top("cylinder hexagon box cup hexcup trough", ((1.1, 1.35), 0, (0.06, 0.2)), 1, relative="xy", tie="xy", paint="stone wood", pattern="flat bricks"),
        _hole("box cylinder", ((0.7, 0.85), 0, 0.7), 2, (0, 0, 1.03), (0, 0, 1), relative="xyz", tie="xy", chance=0.6),
        _hole("box", (0.2, 1.5, (0.15, 0.25)), 1, (0, 0, (0.2, 0.6)), relative="xyz", chance=0.4),
        Part("box", ((0.06, 0.12), 0, 0.07), 2, (0.66, 0.66, 1), (0.5, 0.5, -0.95), tie="xy", copies="xy", chance=0.5, paint="stone"),
        _top("cone spire pyramid dome", ((0.8, 1.2), 0, (0.2, 0.6)), 2, relative="xy", tie="xy", chance=0.6, paint="roof gold", other="dark", pattern="flat bands bricks fade"),
        _top("cylinder", (0.02, 0, (0.15, 0.3)), 6, (0, 0, 0.95), tie="xy", chance=0.5, paint="gold wood"),
        Part("box", (0.12, 0.012, 0.07), 7, (1, 0, 0.6), (-1, 0, 0), paint="vivid", other="light", pattern="flat bands"),
        Part("box", (0.25, 0.06, 0.25), 1, (0, -1, -1), (0, -0.5, -1), relative="xz", chance=0.6, paint="wood dark", pattern="stripes flat"),
        Part("box cylinder", ((0.1, 0.2), 0, (0.3, 0.6)), 1, (1, 0, -1), (-0.3, 0, -0.9), tie="xy", copies="x", chance=0.3, paint="stone wood"),
        _top("cone pyramid", (1.3, 1.3, (0.1, 0.25)), 10, relative="xy", paint="roof"),
    ]),
    "vessel": (4, [
        _frame((0.3, 0.6), (0.3, 0.6), (0.3, 0.8), tie="xy"),
        Part("cylinder hexagon barrel", ((0.4, 0.6), (0.04, 0.1), (0.3, 0.6)), 0, (0.95, 0, (-0.2, 0.3)), (0.2, 0, 0), relative="xz", axis="y", copies="1 x", chance=0.4, paint=_ANY),
        _hole("cylinder hexagon", (0.7, 2, 0.7), 1, relative="xyz", axis="y"),
        Part("cup cylinder barrel frustum hexcup bowl trough box ball hexagon die hexblock", (1, 1, 1), relative="xyz", paint="wood stone vivid metal wall water", other="light dark", pattern=_LOOKS),
        Part("cylinder hexagon barrel", (1.04, 1.04, (0.06, 0.15)), 3, (0, 0, (-0.7, 0.7)), relative="xyz", chance=0.4, paint="metal gold"),
        _hole("cylinder cup frustum hexagon hexcup box", ((0.6, 0.85), 0, (0.3, 0.9)), 3, (0, 0, 1.03), (0, 0, 1), relative="xyz", tie="xy", chance=0.75),
        Part("cylinder", (0.75, 0.75, 0.1), 3, (0, 0, (0.2, 0.6)), relative="xyz", chance=0.3, paint="water leaf earth gold"),
        Part("cylinder frustum", ((0.25, 0.5), 0, (0.2, 0.6)), 3, (0, 0, 0.9), (0, 0, -0.8), relative="xyz", tie="xy", chance=0.3, paint="wood gold light"),
        Part("cylinder ball cone", (0.7, 0.7, (0.1, 0.3)), 7, (0, 0, 1), (0, 0, -0.7), relative="xy", paint="wood gold"),
        Part("box cylinder cone", (0.04, 0.04, (0.6, 1.2)), 3, ((-0.3, 0.3), (-0.3, 0.3), 0.4), (0, 0, -0.6), tilt=(-15, 25), relative="z", chance=0.25, copies="1 x xy", paint="wood metal vivid"),
        Part("frustum cylinder hexagon", ((0.5, 1), 0, (0.04, 0.1)), 3, (0, 0, -1), (0, 0, 0.9), relative="xy", tie="xy", chance=0.3, paint="wood stone metal"),
    ]),
    "barrels and crates": (3, [
        _frame((0.2, 0.5), (0.2, 0.5), (0.2, 0.6)),
        Part("box barrel cylinder hexagon die slab box box", (1, 1, 1), relative="xyz", copies="1 1 x xy", at=((0, 1.1), (0, 1.1), 0), paint="wood wood metal vivid", other="dark metal wood", pattern="frame stripes bands fade flat frame"),
        Part("box", (1.03, 1.03, (0.06, 0.12)), 1, (0, 0, (0.4, 0.8)), relative="xyz", chance=0.4, paint="metal gold"),
        Part("box", (1.03, 1.03, (0.06, 0.12)), 1, (0, 0, (-0.8, -0.4)), relative="xyz", chance=0.4, paint="metal gold"),
        _hole("box hexagon cylinder", (0.7, 2, 0.7), 1, (0, 1, 0), (0, 1.85, 0), relative="xyz", axis="y", copies="y", chance=0.3),
        _hole("box", (0.85, 0.85, 0.8), 1, (0, 0, 1.02), (0, 0, 1), relative="xyz", chance=0.3),
        _top("box cylinder slab", (1.05, 1.05, (0.03, 0.08)), 1, relative="xy", chance=0.4, paint="wood metal"),
        Part("cylinder hexagon", (1, 1, 1), 1, (0, 0, 1), relative="xyz", axis="x", chance=0.25, pattern="bands flat"),
        Part("box", ((0.05, 0.1), 0.04, (0.06, 0.12)), 1, (0, -1, (0.3, 0.8)), chance=0.4, paint="gold metal"),
        _top(_THING, ((0.4, 0.8), (0.4, 0.8), (0.4, 0.9)), 1, relative="xyz", chance=0.4, turn=(-40, 40), pattern="frame stripes flat", paint=_ANY),
        Part("ball die", ((0.1, 0.2), 0, 0), 1, ((0, 0.6), (0, 0.6), 0.5), tie="xyz", copies="xy", chance=0.2, paint="vivid leaf gold"),
    ]),
    "conifer": (1, [
        Part("cylinder hexagon dome box", ((0.25, 0.6), 0, (0.03, 0.12)), tie="xy", copies="1", chance=0.7, paint="leaf earth stone", pattern="cap flat"),
        _top("cylinder frustum hexagon", ((0.05, 0.12), 0, (0.15, 0.4)), tie="xy"),
        Part("cone spire hexblock frustum", ((0.35, 0.6), 0, (0.25, 0.4)), 1, (0, 0, 1), (0, 0, -0.8), tie="xy", paint="leaf", pattern="fade flat cap", turn=(0, 60)),
        Part("cone spire hexblock frustum", ((0.7, 0.85), 0, (0.8, 1)), 2, (0, 0, 1), (0, 0, -0.1), relative="xyz", tie="xy", paint="leaf", pattern="fade flat cap", turn=(0, 60)),
        Part("cone spire", ((0.6, 0.85), 0, (0.8, 1.1)), 3, (0, 0, 1), (0, 0, -0.1), relative="xyz", tie="xy", paint="leaf", pattern="fade flat", turn=(0, 60)),
        _top("ball die hexblock", ((0.08, 0.18), (0.08, 0.18), 0.08), 0, ((0.5, 0.8), (-0.5, 0.5), 1), chance=0.4, paint="stone", turn=(0, 90)),
    ]),
    "tree": (1, [
        Part("cylinder hexagon dome box", ((0.25, 0.6), 0, (0.03, 0.12)), tie="xy", copies="1", chance=0.6, paint="leaf earth", pattern="cap flat"),
        _top("cylinder frustum hexblock", ((0.05, 0.12), 0, (0.2, 0.5)), tie="xy", tilt=(-8, 8)),
        Part("ball die hexagon dome", ((0.3, 0.5), 0, (0.3, 0.5)), 1, (0, 0, 1), (0, 0, -0.7), tie="xy", paint="leaf", pattern="fade flat marble", turn=(0, 60)),
        Part("ball die dome", ((0.15, 0.3), 0, (0.15, 0.3)), 2, ((0.5, 0.8), (0.3, 0.8), (-0.4, 0.3)), tie="xy", copies="xy x 1", paint="leaf", pattern="fade flat", turn=(0, 60)),
        Part("ball die", ((0.15, 0.3), 0, (0.15, 0.3)), 2, ((-0.4, 0.4), (-0.4, 0.4), (0.5, 0.9)), tie="xy", chance=0.6, paint="leaf", pattern="fade flat"),
        Part("cylinder frustum", (0.03, 0.03, 0.25), 1, (0, 0, 0.3), (0, 0, -0.9), tilt=(30, 60), copies="1 x", chance=0.4),
        Part("ball", ((0.03, 0.06), 0, 0), 2, ((0.5, 0.7), (0.4, 0.7), (-0.3, 0.3)), tie="xyz", copies="xy", chance=0.3, paint="vivid gold"),
    ]),
    "mushroom or bush": (1, [
        Part("dome die cylinder", ((0.2, 0.5), (0.2, 0.5), (0.03, 0.15)), copies="1", chance=0.5, paint="leaf earth", pattern="cap"),
        _top("barrel frustum cup cylinder", ((0.08, 0.2), 0, (0.2, 0.5)), tie="xy", paint="light wall leaf", pattern="fade"),
        Part("dome cone frustum ball", ((0.3, 0.6), 0, (0.12, 0.3)), 1, (0, 0, 1), (0, 0, -0.7), tie="xy", paint="vivid roof leaf", other="light", pattern="dots dots fade"),
        Part("dome ball", ((0.1, 0.25), 0, (0.1, 0.3)), 1, ((1.5, 3), (-1, 2), -1), (0, 0, -1), tie="xy", copies="1 x", chance=0.6, paint="vivid leaf roof", other="light", pattern="dots fade"),
    ]),
    "vehicle": (2, [
        _frame((0.6, 1), (0.3, 0.5), (0.1, 0.25)),
        Part("box die slab block", (1, 1, 1), relative="xyz", paint="vivid roof metal gold", other="light dark", pattern="flat bands fade"),
        Part("block slab box die", ((0.3, 0.7), (0.75, 0.95), (0.12, 0.3)), 1, ((-0.3, 0.3), 0, 1), (0, 0, -0.95), relative="xy", paint="vivid light dark water", other="light", pattern="flat frame"),
        Part("cylinder hexagon", ((0.12, 0.22), (0.05, 0.1), 0), 1, ((0.55, 0.7), 1, -1), (0, 0.5, 0), tie="xz", axis="y", copies="xy", paint="dark", pattern="flat"),
        Part("cylinder", (0.5, 1.15, 0.5), 3, relative="xyz", axis="y", paint="metal light gold"),
        Part("box", (0.05, 1.02, 0.4), 1, (1, 0, -0.5), (-0.5, 0, 0), relative="yz", copies="x", chance=0.6, paint="metal dark"),
        Part("box cylinder", (0.03, (0.1, 0.2), (0.12, 0.25)), 1, (1, (0.5, 0.8), (0, 0.5)), (0.3, 0, 0), relative="yz", axis="x", copies="xy", chance=0.7, paint="light gold vivid"),
        _top("box cylinder", ((0.06, 0.15), (0.3, 0.6), (0.03, 0.06)), 2, relative="y", chance=0.4, paint="vivid light gold"),
        Part("box", ((0.5, 0.8), 1.04, (0.5, 0.7)), 2, relative="xyz", at=(0, 0, 0.1), chance=0.6, paint="water dark light"),
        _top("box barrel cylinder", ((0.2, 0.3), (0.7, 0.9), (0.1, 0.3)), 1, ((-0.75, -0.6), 0, 1), relative="xy", chance=0.4, paint="wood metal", pattern="stripes flat frame"),
    ]),
    "figure": (2, [
        _frame((0.18, 0.32), (0.12, 0.22), (0.2, 0.35)),
        Part("box die barrel block trough cylinder", (1, 1, 1), relative="xyz", paint="vivid roof leaf metal", other="light dark", pattern="flat bands stripes fade"),
        Part("box cylinder die", ((0.06, 0.1), 0, (0.12, 0.35)), 1, (0.5, 0, -1), (0, 0, 0.95), tie="xy", copies="x", paint="dark wood water"),
        Part("box die", (1.1, (0.12, 0.2), 0.05), 2, (0, 0, -1), (0, 0.3, 0.5), relative="x", paint="wood dark"),
        Part("box cylinder barrel", ((0.05, 0.09), 0, (0.15, 0.3)), 1, (1, 0, 0.8), (-0.8, 0, 0.9), tie="xy", tilt=(-40, 10), copies="x", paint="vivid wall roof"),
        Part("die ball box cylinder hexagon", ((0.15, 0.3), 0, (0.15, 0.28)), 1, (0, 0, 1), (0, 0, -0.9), tie="xy", paint="wall wood light earth", pattern="flat fade"),
        Part("ball cylinder box", ((0.025, 0.05), 0.03, 0), 5, ((0.3, 0.5), -0.93, (0, 0.3)), tie="xz", axis="y", copies="x", paint="dark", pattern="flat"),
        Part("dome cone cylinder box frustum", ((0.9, 1.2), 0, (0.08, 0.25)), 5, (0, 0, 0.8), (0, 0, -0.7), relative="xy", tie="xy", chance=0.7, paint="roof dark metal gold wood"),
        Part("cone box ball", (0.06, 0.06, (0.08, 0.2)), 5, ((0.6, 0.9), 0, 0.8), (0, 0, -0.6), tilt=(10, 40), copies="x", chance=0.3, paint="light dark"),
        Part("box cylinder block", ((0.12, 0.2), 0.08, (0.15, 0.25)), 1, (0, 1, 0.2), (0, -0.9, 0), chance=0.3, paint="wood metal vivid"),
        Part("box cylinder", (0.025, 0.025, (0.3, 0.6)), 4, (0, -1, -0.9), (0, 0.5, -0.2), copies="1", chance=0.3, paint="wood metal"),
    ]),
    "tool": (1, [
        Part("cylinder hexagon box", ((0.03, 0.07), 0, (0.4, 0.8)), tie="xy", copies="1", paint="wood dark", pattern="bands flat"),
        Part("box cylinder hexagon block die", ((0.15, 0.4), (0.06, 0.16), (0.08, 0.25)), 0, (0, 0, 0.9), paint="metal stone gold", pattern="flat fade"),
        Part("pyramid cone block", ((0.05, 0.1), 0.06, (0.15, 0.3)), 0, (0, 0, 1), (0, 0, -0.9), chance=0.5, paint="metal gold"),
        Part("box block", ((0.1, 0.2), 0.02, (0.15, 0.3)), 1, (1, 0, 0), (-0.7, 0, 0), copies="1 x", chance=0.5, paint="metal"),
        Part("ball die cylinder cone", ((0.05, 0.1), 0, 0), 0, (0, 0, -1), tie="xyz", chance=0.7, paint="gold metal"),
        Part("box cylinder", (1.3, 1.3, 0.06), 0, (0, 0, (-0.5, 0.3)), relative="xyz", chance=0.6, paint="gold metal vivid"),
        Part("box cylinder hexagon", ((0.25, 0.5), 0, (0.03, 0.1)), 0, (0, 0, -1), (0, 0, 0.5), tie="xy", chance=0.4, paint="stone wood"),
    ]),
    "shelf": (2, [
        _frame((0.35, 0.8), (0.15, 0.35), (0.4, 0.9)),
        Part("box", (0.04, 1, 1), 0, (1, 0, 0), (1, 0, 0), relative="yz", copies="x"),
        Part("box", (1, 1, 0.035), 0, (0, 0, -0.95), relative="xy", copies="1"),
        Part("box", (1, 0.97, 0.03), 0, (0, 0, (-0.4, -0.2)), relative="xy", copies="1"),
        Part("box", (1, 0.97, 0.03), 0, (0, 0, (0.25, 0.4)), relative="xy", copies="1"),
        Part("box slab", ((1, 1.1), 1.05, 0.05), 0, (0, 0, 1), relative="xy", copies="1"),
        Part("box", (1, 0.03, 1), 0, (0, 1, 0), (0, 1, 0), relative="xz", copies="1", chance=0.6, pattern="flat stripes", other="dark"),
        _top(_THING, ((0.06, 0.15), (0.08, 0.15), (0.08, 0.2)), 3, ((-0.7, 0.7), -0.1, 1), copies="1 x", **_ITEM),
        _top("box die cylinder", ((0.1, 0.25), (0.08, 0.15), (0.08, 0.18)), 4, ((-0.5, 0.5), -0.1, 1), chance=0.7, **_ITEM),
        _top("box barrel cup", ((0.08, 0.25), (0.08, 0.15), (0.08, 0.2)), 2, ((-0.5, 0.5), -0.1, 1), chance=0.7, **_ITEM),
        _top(_THING, ((0.08, 0.2), (0.08, 0.15), (0.08, 0.2)), 5, ((-0.5, 0.5), 0, 1), chance=0.5, **_ITEM),
    ]),
    "fence or gate": (2, [
        _frame((0.5, 1), (0.05, 0.12), (0.25, 0.7)),
        Part("box cylinder hexagon slab", ((0.06, 0.14), 0, (1, 1.2)), 0, (1, 0, 0), relative="z", tie="xy", copies="x", paint="wood stone metal", pattern="flat bricks fade"),
        _top("pyramid ball slab cone dome", ((1, 1.3), 0, (0.05, 0.12)), 1, relative="xy", tie="xy", chance=0.7, paint="stone gold wood"),
        Part("box cylinder", (1, 0.4, (0.05, 0.1)), 0, (0, 0, (0.4, 0.7)), relative="xyz", axis="x", copies="1", paint="wood metal stone"),
        Part("box cylinder", (1, 0.4, (0.05, 0.1)), 0, (0, 0, (-0.6, -0.1)), relative="xyz", axis="x", copies="1", paint="wood metal stone"),
        Part("box cylinder", ((0.02, 0.06), 0.3, (0.85, 1)), 0, ((0.25, 0.4), 0, -0.1), relative="yz", copies="x", paint="wood metal", chance=0.8),
        Part("box cylinder", ((0.02, 0.06), 0.3, (0.85, 1)), 0, ((0.6, 0.75), 0, -0.1), relative="yz", copies="x", paint="wood metal", chance=0.7),
        Part("box", (0.8, 0.3, (0.5, 0.9)), 0, (0, 0, -0.1), relative="xyz", copies="1", chance=0.25, paint="wood stone", other="dark", pattern="stripes bricks"),
        Part("box gable cylinder", ((1.1, 1.3), 1.6, (0.06, 0.15)), 0, (0, 0, 1.1), relative="xy", copies="1", axis="z", chance=0.35, paint="wood roof stone"),
    ]),
    "wall with an arch": (2, [
        Part("box slab", ((0.6, 1), (0.08, 0.3), (0.4, 0.8)), copies="1", paint="stone wall wood", other="stone dark", pattern="bricks flat fade bands"),
        Part("box", (1.03, 1.15, (0.04, 0.1)), 0, (0, 0, 1), relative="xy", chance=0.6, paint="stone roof wood"),
        Part("box", (1.03, 1.15, (0.04, 0.1)), 0, (0, 0, -1), (0, 0, -1), relative="xy", chance=0.6, paint="stone"),
        Part("box cylinder hexagon", ((0.08, 0.16), (1.2, 1.6), 1.04), 0, (1, 0, 0), (0.3, 0, 0), relative="yz", copies="x", chance=0.6, paint="stone wood"),
        _hole("box", ((0.2, 0.4), 3, (0.4, 0.7)), 0, (0, 0, -1.1), (0, 0, -1), relative="xyz", chance=0.75),
        _hole("cylinder hexagon", (1, 1, 0.5), 4, (0, 0, 1), relative="xyz", axis="y"),
        _hole("cylinder box hexagon", ((0.1, 0.16), 3, (0.12, 0.2)), 0, ((0.55, 0.7), 0, (0, 0.4)), relative="xyz", axis="y", copies="x", chance=0.5),
        Part("box cylinder", (0.02, 0.25, 0.7), 4, ((0.2, 0.45), 0, 0), relative="yz", copies="x", chance=0.4, paint="metal wood"),
        _top("box", ((0.06, 0.12), 1.1, 0.08), 0, ((0.3, 0.45), 0, 1), relative="y", copies="x", chance=0.5, paint="stone"),
        _top("box", ((0.06, 0.12), 1.1, 0.08), 0, ((0.75, 0.9), 0, 1), relative="y", copies="x", chance=0.5, paint="stone"),
    ]),
    "land": (3, [
        Part("box hexagon cylinder hexblock slab box", ((0.7, 1), (0.6, 1), (0.12, 0.4)), copies="1", paint="leaf earth stone", other="earth stone", pattern="cap cap fade marble", relief=(0.3, 1.2)),
        Part("cone spire pyramid hexblock", ((0.1, 0.2), 0, (0.2, 0.4)), 0, ((0.3, 0.6), (-0.6, 0.6), 0.7), (0, 0, -0.6), tie="xy", copies="1 x xy", chance=0.6, paint="leaf stone", pattern="fade flat cap"),
        Part("cylinder", (0.3, 0.3, 0.4), 1, (0, 0, -1), relative="xyz"),
        Part("box", ((0.12, 0.25), (0.12, 0.2), (0.12, 0.25)), 0, ((-0.6, -0.2), (-0.4, 0.4), 0.8), (0, 0, -0.5), chance=0.5, paint="wall stone", pattern="flat bricks"),
        _top("gable pyramid", (1.2, 1.25, (0.1, 0.2)), 3, relative="xy", paint="roof"),
        Part("ball die hexblock pyramid", ((0.06, 0.25), (0.06, 0.25), (0.06, 0.25)), 0, ((-0.8, 0.8), (-0.8, 0.8), 0.6), (0, 0, -0.3), turn=(0, 90), tilt=(-20, 20), chance=0.6, paint="stone earth", pattern="flat fade marble"),
        Part("ball die hexblock", ((0.05, 0.15), (0.05, 0.15), (0.05, 0.12)), 0, ((-0.8, 0.8), (-0.8, 0.8), 0.6), (0, 0, -0.3), turn=(0, 90), copies="1 x", chance=0.5, paint="stone leaf"),
        Part("box", (1.02, (0.15, 0.3), 0.75), 0, (0, (-0.4, 0.4), 0), (0, 0, 0.3), relative="xyz", chance=0.3, paint="water earth wall"),
    ]),
    "well": (1, [
        Part("cylinder hexagon box cup hexcup", ((0.4, 0.6), 0, (0.15, 0.35)), tie="xy", copies="1", paint="stone wall", other="dark", pattern="bricks flat"),
        Part("cylinder hexagon", (1.1, 1.1, 0.04), 0, (0, 0, 1), relative="xy", chance=0.6, paint="stone wood"),
        _hole("cylinder", (0.72, 0.72, 0.8), 0, (0, 0, 1.2), (0, 0, 1), relative="xyz"),
        Part("cylinder", (0.75, 0.75, 0.1), 0, (0, 0, (-0.3, 0.5)), relative="xyz", paint="water leaf"),
        _top("box cylinder", ((0.03, 0.06), 0, (0.3, 0.5)), 0, (0.85, 0, 0.9), tie="xy", copies="x", chance=0.8),
        Part("gable hip pyramid", ((1.1, 1.3), (0.7, 1), (0.1, 0.25)), 0, (0, 0, (3.2, 3.6)), relative="xy", copies="1", chance=0.7, paint="roof wood", pattern="flat bands"),
        Part("cylinder", (0.9, 0.035, 0.035), 0, (0, 0, (2.2, 2.8)), relative="x", axis="x", copies="1", chance=0.6),
        Part("cylinder frustum", (0.05, 0.05, (0.5, 0.9)), 0, (0, 0, 0), (0, 0, -0.6), copies="1", chance=0.3, paint="stone gold"),
    ]),
    "rocket or bottle": (1, [
        Part("barrel cylinder frustum ball hexagon hexblock", ((0.2, 0.4), 0, (0.3, 0.7)), tie="xy", copies="1", paint="light vivid metal water leaf", other="vivid dark", pattern="flat fade bands checks"),
        Part("cone dome frustum spire", ((0.85, 1), 0, (0.15, 0.4)), 0, (0, 0, 0.9), (0, 0, -0.9), relative="xy", tie="xy", paint="vivid gold metal water"),
        Part("cylinder frustum ball", ((0.3, 0.45), 0, (0.1, 0.3)), 1, (0, 0, 0.5), (0, 0, -0.7), relative="xy", tie="xy", chance=0.5, paint="gold wood metal"),
        Part("block box gable", ((0.1, 0.2), 0.03, (0.15, 0.3)), 0, (0.8, 0, -0.6), (-0.7, 0, 0), copies="x", chance=0.7, paint="vivid metal"),
        Part("block box", (0.03, (0.1, 0.2), (0.15, 0.3)), 0, (0, 0.8, -0.6), (0, -0.7, 0), copies="y", chance=0.6, paint="vivid metal"),
        Part("cylinder", (1.03, 1.03, (0.05, 0.12)), 0, (0, 0, (-0.5, 0.5)), relative="xyz", chance=0.5, paint="gold dark light"),
        Part("ball cylinder", ((0.06, 0.12), 0.05, 0), 0, (0, -0.95, (0, 0.5)), tie="xz", axis="y", chance=0.5, paint="water light gold"),
        Part("cup frustum cylinder", ((0.5, 0.9), 0, (0.06, 0.15)), 0, (0, 0, -0.97), (0, 0, 0.8), relative="xy", tie="xy", chance=0.6, paint="dark metal"),
    ]),
    "stack": (2, [
        Part(_BODY, ((0.3, 0.7), (0.3, 0.7), (0.08, 0.3)), copies="1", paint=_ANY, other="light", pattern=_LOOKS),
        _top(_BODY, ((0.5, 1), (0.5, 1), (0.08, 0.3)), 0, ((-0.1, 0.1), (-0.1, 0.1), 1), relative="xy", turn=(-30, 30), paint=_ANY, other="light", pattern=_LOOKS),
        _top(_BODY, ((0.5, 1), (0.5, 1), (0.08, 0.3)), 1, ((-0.1, 0.1), (-0.1, 0.1), 1), relative="xy", turn=(-30, 30), paint=_ANY, other="light", pattern=_LOOKS),
        _top(_BODY, ((0.5, 1.1), (0.5, 1.1), (0.08, 0.3)), 2, ((-0.1, 0.1), (-0.1, 0.1), 1), relative="xy", turn=(-30, 30), chance=0.6, paint=_ANY, other="light", pattern=_LOOKS),
        _top(_THING, ((0.4, 1), (0.4, 1), (0.08, 0.4)), 3, relative="xy", turn=(-30, 30), chance=0.6, paint=_ANY, other="light", pattern=_LOOKS),
        _top(_BODY, ((0.15, 0.4), (0.15, 0.4), (0.08, 0.4)), 0, ((1.4, 1.8), (-0.4, 0.4), -1), turn=(-40, 40), chance=0.4, paint=_ANY, other="light", pattern=_LOOKS),
    ]),
    "pillar": (2, [
        Part("box cylinder hexagon slab hexblock", ((0.3, 0.5), 0, (0.04, 0.12)), tie="xy", copies="1", paint="stone wood metal", pattern="flat bricks fade"),
        _top("box cylinder hexagon block hexblock frustum", ((0.7, 0.9), 0, (0.03, 0.12)), relative="xy", tie="xy", paint="stone wood metal"),
        _top("cylinder hexagon box barrel frustum slab", ((0.5, 0.85), 0, (0.2, 0.7)), 1, relative="xy", tie="xy", paint="stone wall wood", other="dark light", pattern="flat bricks fade bands marble"),
        Part("cylinder hexagon box", (1.1, 1.1, (0.04, 0.1)), 2, (0, 0, (-0.5, 0.6)), relative="xyz", chance=0.4, paint="gold stone vivid"),
        _top("cup hexcup trough box cylinder", ((1.1, 1.5), 0, (0.04, 0.14)), 2, relative="xy", tie="xy", paint="stone wood metal"),
        _top("box hexagon cylinder pyramid", ((1, 1.15), 0, (0.03, 0.1)), 4, relative="xy", tie="xy", chance=0.7, paint="stone wood metal"),
        _top(_THING, ((0.4, 0.8), 0, (0.1, 0.3)), 5, relative="xy", tie="xy", chance=0.6, paint="vivid gold stone light", other="light", pattern=_LOOKS),
        _hole("box cylinder", ((0.3, 0.5), 3, (0.3, 0.6)), 2, relative="xyz", chance=0.2),
    ]),
    "stairs": (1, [
        Part("box", ((0.12, 0.2), (0.3, 0.6), (0.06, 0.12)), copies="1", paint="stone wood", pattern="flat cap fade"),
        Part("box", (1, 1, 2), 0, (1, 0, -1), (-1, 0, -1), relative="xyz", paint="stone wood", pattern="flat cap fade"),
        Part("box", (1, 1, 1.5), 1, (1, 0, -1), (-1, 0, -1), relative="xyz", paint="stone wood", pattern="flat cap fade"),
        Part("box", ((1, 2), 1, 1.3333), 2, (1, 0, -1), (-1, 0, -1), relative="xyz", paint="stone wood", pattern="flat cap fade"),
        Part("box", (1, 1, 1.25), 3, (1, 0, -1), (-1, 0, -1), relative="xyz", chance=0.5, paint="stone wood", pattern="flat cap fade"),
        Part("box slab", ((0.5, 0.6), 0.07, (0.3, 0.5)), 2, (0, 1, -1), (0.3, 0, -1), copies="y", chance=0.5, paint="stone wood", pattern="flat bricks"),
        _hole("box cylinder", (0.1, 3, (0.1, 0.2)), 3, (0, 0, -0.5), relative="y", axis="y", chance=0.4),
        Part("cylinder box", (0.03, 0.03, (0.2, 0.3)), 3, (0.7, 0.9, 1), (0, 0, -1), copies="y", chance=0.5, paint="wood metal"),
        Part("cylinder box", (0.03, 0.03, (0.2, 0.3)), 0, (0, 0.9, 1), (0, 0, -1), copies="y", chance=0.5, paint="wood metal"),
    ]),
    "sign or banner": (1, [
        Part("cylinder box hexagon", ((0.03, 0.06), 0, (0.4, 0.8)), tie="xy", copies="1 1 x", at=((0, 0.5), 0, 0), paint="wood metal"),
        Part("box slab hexagon cylinder", ((0.12, 0.3), 0, (0.03, 0.1)), 0, (0, 0, -1), tie="xy", paint="stone wood metal", chance=0.8),
        Part("box hexagon cylinder box", ((0.25, 0.5), (0.02, 0.05), (0.15, 0.4)), 0, (0, 0, (0.4, 0.8)), (0, 0.5, 0), axis="y", copies="1", paint="vivid roof wood light", other="light dark", pattern="flat frame bands stripes checks dots"),
        Part("cylinder box", (1.05, 0.03, 0.03), 2, (0, 0, 1), relative="x", axis="x", chance=0.5, paint="wood gold"),
        Part("pyramid ball cone", ((0.05, 0.09), 0, (0.06, 0.15)), 0, (0, 0, 1), (0, 0, -0.8), tie="xy", chance=0.7, paint="gold metal"),
        Part("box gable", (1.1, 0.1, 0.06), 2, (0, 0, 1), (0, 0, -0.9), relative="x", chance=0.3, paint="roof wood"),
        Part("cylinder ball box", (0.35, 1.15, 0.35), 2, relative="xyz", axis="y", chance=0.4, paint="gold dark light"),
    ]),
    "sofa or bed": (1, [
        Part("box die slab", ((0.6, 0.9), (0.35, 0.8), (0.08, 0.16)), copies="1", paint="vivid wood roof", pattern="flat"),
        Part("die box", (0.96, 0.92, (0.06, 0.12)), 0, (0, -0.05, 1), (0, 0, -0.8), relative="xy", paint="light vivid roof wall", other="light", pattern="flat stripes checks"),
        Part("box die", (1, (0.05, 0.12), (0.2, 0.45)), 0, (0, 1, 0), (0, 0.5, -0.6), relative="x", paint="wood vivid roof", pattern="flat frame"),
        Part("box die cylinder", ((0.06, 0.12), 1, (0.15, 0.25)), 0, (1, 0, 0.5), (0.2, 0, -0.3), relative="y", copies="x", chance=0.6, paint="wood vivid roof"),
        Part("box cylinder", (0.05, 0.05, (0.08, 0.15)), 0, (0.9, 0.9, -1), (0, 0, 0.9), copies="xy", chance=0.7, paint="wood dark metal"),
        Part("die", ((0.15, 0.3), 0.12, (0.08, 0.16)), 1, (0.5, 0.6, 1), (0, 0, -0.7), copies="x 1", chance=0.7, paint="light vivid wall"),
        Part("box", (1.02, (0.4, 0.6), 1.05), 1, (0, -0.4, 0), relative="xyz", chance=0.4, paint="vivid roof water", other="light", pattern="flat checks stripes"),
    ]),
    "dish": (1, [
        Part("cup bowl cylinder trough box hexcup", ((0.5, 0.9), (0.5, 0.9), (0.05, 0.2)), copies="1", paint="wood stone light wall metal", other="dark", pattern="flat fade bands"),
        _hole("cup cylinder hexcup", (0.85, 0.85, 0.8), 0, (0, 0, 1.05), (0, 0, 1), relative="xyz", chance=0.8),
        Part(_THING, ((0.2, 0.4), (0.2, 0.35), (0.15, 0.3)), 0, ((-0.3, 0.1), (-0.2, 0.2), 0), (0, 0, -0.7), turn=(0, 90), paint="wood vivid earth gold leaf", pattern="flat fade"),
        Part("ball die cylinder", ((0.08, 0.18), 0, (0.08, 0.15)), 0, ((0.35, 0.5), (0.2, 0.5), 0), (0, 0, -0.6), tie="xy", copies="1 y", chance=0.7, paint="vivid leaf gold light"),
        Part("ball die cylinder cone", ((0.06, 0.15), 0, (0.1, 0.3)), 0, ((-0.6, -0.4), (0.1, 0.5), 0), (0, 0, -0.8), tie="xy", copies="1 y", chance=0.5, paint="vivid leaf gold"),
        Part("cylinder barrel box", ((0.15, 0.4), 0.04, 0.04), 0, (1, 0, 0.3), (-0.8, 0, 0), axis="x", copies="1 x", chance=0.4, paint="wood metal"),
    ]),
    "space module": (2, [
        Part("box cylinder hexagon hexblock die block slab dome", ((0.4, 0.8), (0.4, 0.7), (0.15, 0.4)), copies="1", paint="light metal wall", other="vivid dark gold", pattern="flat bands frame stripes"),
        Part("box cylinder", (1.04, 1.04, (0.08, 0.2)), 0, (0, 0, (-0.7, 0.6)), relative="xyz", chance=0.5, paint="dark metal vivid"),
        _top("dome cylinder box hexblock block ball", ((0.3, 0.7), (0.3, 0.7), (0.08, 0.3)), 0, ((-0.2, 0.2), 0, 1), relative="xy", paint="light metal water", pattern="flat frame"),
        Part("cylinder hexagon box", ((0.15, 0.35), (0.15, 0.3), (0.12, 0.25)), 0, (1, 0, (-0.5, 0.1)), (-0.6, 0, 0), axis="x", copies="x", chance=0.6, paint="metal light dark"),
        Part("cylinder box", (0.05, 0.8, 0.8), 3, (1, 0, 0), relative="yz", axis="x", paint="dark water gold"),
        Part("box cylinder frustum", ((0.05, 0.1), 0, (0.1, 0.3)), 0, (0.75, 0.75, -1), (0, 0, 0.7), tie="xy", copies="xy", chance=0.5, tilt=(-20, 0), paint="metal dark"),
        Part("box", ((0.25, 0.5), (0.2, 0.35), 0.02), 2, (1.2, 0, 1), (-0.8, 0, 0), tilt=(-40, 0), copies="x 1", chance=0.35, paint="water dark", other="light", pattern="frame checks"),
        _top("cylinder", (0.015, 0.015, (0.15, 0.4)), 2, ((-0.4, 0.4), 0, 0.7), chance=0.5, paint="metal light"),
        Part("bowl ball cup", ((0.06, 0.15), 0, 0.06), 7, (0, 0, 1), tie="xy", paint="vivid light"),
        _hole("box cylinder hexagon", ((0.15, 0.3), 0.5, (0.3, 0.6)), 0, (0, -1, (-0.5, 0)), (0, 0.4, 0), relative="xyz", axis="y", chance=0.4),
        Part("box", (0.04, 1.03, 1.03), 0, ((0.4, 0.7), 0, 0), relative="yz", copies="x", chance=0.3, paint="dark metal vivid"),
    ]),
    "rocks": (1, [
        Part("hexblock die ball block dome spire", ((0.3, 0.6), (0.3, 0.6), (0.2, 0.6)), copies="1", turn=(0, 90), tilt=(-10, 10), paint="stone earth metal", pattern="fade flat marble cap", other="leaf light", relief=(0, 0.6)),
        Part("hexblock die ball block", ((0.15, 0.4), (0.15, 0.4), (0.15, 0.4)), 0, ((0.6, 1.1), (-0.5, 0.5), -1), (0, 0, -0.9), turn=(0, 90), tilt=(-20, 20), paint="stone earth metal", pattern="fade flat marble"),
        Part("hexblock die ball block", ((0.15, 0.35), (0.15, 0.4), (0.15, 0.3)), 0, ((-1.1, -0.5), (-0.8, 0.5), -1), (0, 0, -0.9), turn=(0, 90), tilt=(-20, 20), chance=0.8, paint="stone earth metal", pattern="fade flat marble"),
        Part("hexblock die spire", ((0.1, 0.25), (0.1, 0.25), (0.1, 0.5)), 0, ((-0.5, 0.5), (0.6, 1.1), -1), (0, 0, -0.9), turn=(0, 90), tilt=(-20, 20), chance=0.6, paint="stone water vivid", pattern="fade flat"),
        Part("hexblock die spire", ((0.1, 0.25), (0.1, 0.25), (0.1, 0.5)), 0, ((-0.5, 0.5), (-1.1, -0.6), -1), (0, 0, -0.9), turn=(0, 90), tilt=(-20, 20), chance=0.5, paint="stone water vivid", pattern="fade flat"),
    ]),
    "pumpkin": (1, [
        Part("ball barrel", ((0.3, 0.4), (0.45, 0.6), (0.35, 0.5)), copies="1", paint="leaf vivid gold", pattern="fade flat"),
        Part("ball barrel", ((0.3, 0.36), 0.9, 0.97), 0, (0.7, 0, 0), relative="yz", copies="x", turn=(50, 60), paint="leaf vivid gold", pattern="fade flat"),
        Part("ball barrel", ((0.3, 0.4), 0.8, 0.97), 0, (0.7, 0, 0), relative="yz", copies="x", turn=(-60, -50), paint="leaf vivid gold", pattern="fade flat"),
        _hole("gable box spire", ((0.1, 0.2), 1, (0.1, 0.2)), 0, (0.5, -1, 0.3), relative="xyz", copies="x", chance=0.4),
        _hole("box gable", ((0.4, 0.8), 0.6, (0.1, 0.2)), 0, (0, -1.1, -0.35), relative="xyz", chance=0.4),
        _top("cylinder frustum hexblock box", ((0.05, 0.1), 0, (0.1, 0.25)), 0, (0, 0, 0.9), tie="xy", tilt=(-20, 20), paint="leaf wood"),
    ]),
}  # fmt: skip


def _range(value) -> tuple[float, float]:
    low, high = value if isinstance(value, tuple) else (value, value)
    return float(low), float(high)


def _options(text: str, names) -> list[int]:
    indices = [list(names).index(word) for word in text.split()]
    return [indices[i * len(indices) // _OPTIONS] for i in range(_OPTIONS)]


_COPIES = ("1", "x", "y", "xy", "=")


def _packed(part: Part, position: int) -> dict[str, np.ndarray]:
    """A part as numbers, in the layout of `tables`."""
    if not 0 <= part.on < max(position, 1):
        raise ValueError(f"part {position}: its base {part.on} must come before it")
    tie = [part.tie[0] if axis in part.tie else axis for axis in "xyz"]
    relief = _range(part.relief)
    ranges = [*map(_range, (*part.size, *part.at, *part.pivot, part.turn, part.tilt)), relief]
    shades = list(FAMILIES)
    return dict(
        range=np.array(ranges, np.float32),
        relative=np.array([axis in part.relative and position > 0 for axis in "xyz"], np.float32),
        tie=np.array(["xyz".index(axis) for axis in tie], np.int32),
        base=np.int32(part.on),
        axis=np.int32("xyz".index(part.axis)),
        chance=np.float32(part.chance),
        is_hole=np.bool_(part.hole),
        shape=np.array(_options(part.shape, SHAPES), np.int32),
        copies=np.array(_options(part.copies, _COPIES), np.int32),
        paint=np.array(_options(part.paint, shades), np.int32),
        other=np.array(_options(part.other, [*shades, "="]), np.int32),
        pattern=np.array(_options(part.pattern, PATTERNS), np.int32),
    )


def tables() -> dict[str, np.ndarray]:
    """All kinds as arrays with leading axes [kinds, MAX_PARTS]; absent parts have a chance of 0.

    range [12 2]: size, at and pivot (3 each), turn, tilt, relief. Lists of options have 12 entries. tickets [kinds]: relative
    frequency of each kind.
    """
    nothing = Part("none", (0, 0, 0), chance=0.0, copies="1")
    kinds = []
    for name, (_, parts) in KINDS.items():
        if len(parts) > MAX_PARTS:
            raise ValueError(f"{name}: {len(parts)} parts, at most {MAX_PARTS}")
        parts = parts + [nothing] * (MAX_PARTS - len(parts))
        kinds.append([_packed(part, i) for i, part in enumerate(parts)])
    packed = {
        key: np.array([[part[key] for part in parts] for parts in kinds]) for key in kinds[0][0]
    }
    return packed | {"tickets": np.array([tickets for tickets, _ in KINDS.values()], np.float32)}


def colours() -> np.ndarray:
    """[families 5 3] sRGB in [0, 1]."""
    channels = [[[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in f] for f in FAMILIES.values()]
    return np.array(channels, np.float32) / 255
