"""The shapes of parts, as numbers of `raytrace.Solids`. Only data, and code to pack it into arrays."""

import numpy as np

_WIDE = (1.0, 0, 9, 0, 9, 0)
_APOTHEM = 3**0.5 / 2
_FLAT, _ROUND = (0.0, 0, 1, 0), (1.0, 0, 1, 0)
_SLANT = (0.0, 0, -0.5, 0.5, -0.5, 0.5)  # all sides lean inwards
_GABLE = (0.0, 0, 0, 0, -0.5, 0.5)  # only the +y and -y sides do
_HEX_SLANT = (0.0, 0, -_APOTHEM / 2, _APOTHEM / 2, -_APOTHEM / 2, _APOTHEM / 2)
_CONE = (0.0, 0, -0.5, 0.5)
_SQUARE = (0.0, 1, 1, 0, 1, 0)
_HEX = (0.5, _APOTHEM, _APOTHEM, 0, _APOTHEM, 0)
_NO = ((0.0,) * 6, (0.0,) * 4)
# name: sides, quadric, what a taper of 1 adds to each, range of the taper, whether the shape is upside down
SHAPES = {
    "none": ((1.0, 0, -1, 0, 9, 0), _FLAT, *_NO, (0, 0), False),
    "box": (_SQUARE, _FLAT, *_NO, (0, 0), False),
    "slab": (_SQUARE, _FLAT, _SLANT, _NO[1], (0.03, 0.15), False),  # a box with slightly sloping sides
    "block": (_SQUARE, _FLAT, _SLANT, _NO[1], (0.2, 0.6), False),
    "trough": (_SQUARE, _FLAT, _SLANT, _NO[1], (0.15, 0.5), True),
    "pyramid": (_SQUARE, _FLAT, _SLANT, _NO[1], (1, 1), False),
    "gable": (_SQUARE, _FLAT, _GABLE, _NO[1], (1, 1), False),
    "hip": (_SQUARE, _FLAT, tuple(np.add(_GABLE, _SLANT) * 0.6), _NO[1], (0.7, 0.83), False),
    "hexagon": (_HEX, _FLAT, *_NO, (0, 0), False),
    "hexblock": (_HEX, _FLAT, _HEX_SLANT, _NO[1], (0.15, 0.6), False),
    "hexcup": (_HEX, _FLAT, _HEX_SLANT, _NO[1], (0.15, 0.5), True),
    "spire": (_HEX, _FLAT, _HEX_SLANT, _NO[1], (1, 1), False),
    "cylinder": (_WIDE, _ROUND, *_NO, (0, 0), False),
    "frustum": (_WIDE, _ROUND, _NO[0], _CONE, (0.15, 0.6), False),
    "cup": (_WIDE, _ROUND, _NO[0], _CONE, (0.15, 0.5), True),
    "cone": (_WIDE, _ROUND, _NO[0], _CONE, (1, 1), False),
    "ball": (_WIDE, (1.0, 1, 1, 0), *_NO, (0, 0), False),
    "dome": (_WIDE, (1.0, 1 / 3, 0.75**0.5, 0.5 / 3**0.5), *_NO, (0, 0), False),
    "bowl": (_WIDE, (1.0, 1 / 3, 0.75**0.5, 0.5 / 3**0.5), *_NO, (0, 0), True),
    "barrel": (_WIDE, _ROUND, _NO[0], (0.0, 1, 0, 0), (0.2, 0.6), False),
    "die": (_SQUARE, (1.0, 1, 1.6, 0), _NO[0], (0.0, 0, -1, 0), (0.1, 0.35), False),
}  # fmt: skip


def shape_tables() -> dict[str, np.ndarray]:
    """The shapes as arrays [shapes ...]: sides, quadric, what a taper of 1 adds to each, the taper's range, is_upended."""
    names = ("sides", "quadric", "sides_taper", "quadric_taper", "taper", "is_upended")
    columns = zip(*SHAPES.values(), strict=True)
    return {name: np.array(column, np.float32) for name, column in zip(names, columns, strict=True)}
