"""The level set of a field as triangles: coarse-to-fine sampling and marching cubes."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32

from lrm_jax.types import InputError

BRICK = 4  # points along a side of a brick of stored samples
GROUP = 2**16  # blocks whose indices are held in memory at once
# Grids of up to this many points along an axis are always dense: it takes a fifth of a second, and finds objects of a few cells.
ALWAYS_DENSE = 64
SLAB = 2**22  # points of the dense grid held in memory at once
CORNERS = np.stack(np.indices((2, 2, 2)), -1).reshape(8, 3)  # of a cell
# The points of the coarse grid in a brick: a corner and three face centres, so the coarse grid is face-centred cubic. It has half
# the points of a cubic grid of stride 2, and hardly wider gaps: no place is further than 2 cells from a point, instead of 1.7.
COARSE = np.array([[0, 0, 0], [0, 2, 2], [2, 0, 2], [2, 2, 0]])


def extract(
    field: Callable,
    resolution: int,
    radius: float,
    level: float,
    *,
    dense: bool = False,
    chunk: int = 2**15,
    progress: Callable | None = None,
) -> tuple[Float32[np.ndarray, "N 3"], Int32[np.ndarray, "M 3"]]:
    """The triangles where `field` equals `level`, by marching cubes (https://doi.org/10.1145/37401.37422).

    The grid has `resolution` points along each axis of the cube [-radius, radius]^3, both ends included. Vertices lie on its
    edges, where linear interpolation of the field meets the level. The surface is closed, except where it leaves the cube.

    By default the field is evaluated only near the surface. First, at one grid point in sixteen. Then, at every second point
    along each axis, in those bricks of 4x4x4 cells where the level is as near to some value as the values are to each other.
    There, by a similar rule, at every point. For densities (nowhere negative, level above zero) the rule compares logarithms,
    because densities span orders of magnitude. Last, the surface is followed: wherever it leaves the evaluated region, its
    continuation is evaluated, too. At 256^3 a compact object costs about a tenth of the dense grid. Up to 64^3, grids are dense.

    Guaranteed: each connected piece of the dense surface is returned whole or not at all, and it is returned if it separates
    points of the first, coarse grid. No place is further than two cells from one of these. Not guaranteed: a piece that they all
    miss, such as a speck less than four cells wide, if the field does not change around it either.

    Memory grows with the area of the surface, plus a byte and a half per grid point (512^3: 0.2 GB). `dense` evaluates every grid
    point, in slabs.

    Args:
      field: xyz[Q 3] -> [Q], larger inside. Always called with Q = `chunk`, so a jitted function is compiled once.
      resolution: grid points along an axis, at least 2.
      radius: half the side of the cube.
      level: the field's value at the surface.
      dense: evaluate the whole grid.
      chunk: points in one call of the field. The default suits the caches of a CPU.
      progress: wraps the loops over chunks, `progress(iterable, total, label)`, to show how far they are.

    Returns:
      Vertices in the unit of `radius`, and faces of non-zero area, counter-clockwise seen from outside.

    Raises:
      InputError: the field is NaN somewhere, or nowhere crosses the level.
    """
    if resolution < 2:
        raise InputError(
            f"a grid of {resolution} points along an axis has no cells: make the resolution 2 or more"
        )
    lattice = Lattice(field, resolution, radius, level, chunk, progress)
    dense = dense or resolution <= ALWAYS_DENSE
    pieces = list(_march_slabs(lattice) if dense else _march_blocks(lattice))
    if not pieces:
        raise InputError(
            f"the surface is empty: the field lies in [{lattice.low:.4g}, {lattice.high:.4g}] and does not cross the level "
            f"{level:g}: choose a level in that range{'' if dense else ', or a dense grid if the object is tiny'}"
        )
    keys, fractions, faces = zip(*pieces, strict=True)
    starts = np.cumsum([0, *map(len, keys[:-1])])
    faces = np.concatenate([piece + start for piece, start in zip(faces, starts, strict=True)])
    keys, first, merged = np.unique(np.concatenate(keys), return_index=True, return_inverse=True)
    fractions = np.concatenate(fractions)[first]
    index = np.stack(np.unravel_index(keys // 3, (resolution,) * 3), -1).astype(np.float64)
    index[np.arange(len(index)), keys % 3] += fractions
    return lattice.to_world(index), merged[faces].astype(np.int32)


class Lattice:
    """The grid of `extract`, and the field's known samples on it, in bricks of 4x4x4 points.

    It is padded to whole bricks of cells. The padding repeats the last point: no surface crosses it, no triangle comes from it.
    """

    def __init__(self, field, resolution, radius, level, chunk, progress):
        self.field, self.resolution, self.radius, self.level = field, resolution, radius, level
        self.chunk, self.progress = chunk, progress
        self.low, self.high = np.inf, -np.inf  # range of the evaluated values of the field
        self.num_bricks = -(-(resolution - 1) // BRICK)  # along an axis
        # Each brick's row in the two arrays below. A last layer holds the points at the end of the grid.
        self.slots = np.full((self.num_bricks + 1,) * 3, -1, np.int32)
        self.corners = np.zeros((0, 3), np.int32)
        self.values = np.zeros((0, BRICK**3), np.float32)  # field - level; NaN: not evaluated

    def to_world(
        self, index: Int[np.ndarray, "Q 3"] | Float[np.ndarray, "Q 3"]
    ) -> Float32[np.ndarray, "Q 3"]:
        index = np.minimum(index, self.resolution - 1)
        return ((index / (self.resolution - 1) * 2 - 1) * self.radius).astype(np.float32)

    def evaluate(self, count: int, index_of: Callable, label: str) -> Float32[np.ndarray, " Q"]:
        """field - level at `count` points; `index_of(rows)` returns the grid indices of a slice of them."""
        if count == 0:
            return np.zeros(0, np.float32)
        values = in_chunks(
            self.field,
            count,
            lambda rows: self.to_world(index_of(rows)),
            self.chunk,
            self.progress,
            label,
        )
        if (nans := np.isnan(values)).any():
            row = int(np.argmax(nans))
            x, y, z = self.to_world(index_of(slice(row, row + 1)))[0]
            raise InputError(
                f"the field is NaN at {nans.sum()} of {count} points, first at ({x:.3f}, {y:.3f}, {z:.3f}), so it has no surface: "
                "check the weights and the image"
            )
        self.low, self.high = min(self.low, values.min()), max(self.high, values.max())
        # Densities can overflow to infinity. That is still inside, but cannot be interpolated.
        return np.nan_to_num(values) - np.float32(self.level)

    def coarse(self) -> Float32[np.ndarray, "X Y Z 4"]:
        """field - level at the COARSE points of every brick."""
        shape = (*self.slots.shape, len(COARSE))

        def index_of(rows):
            *brick, point = np.unravel_index(np.arange(rows.start, rows.stop), shape)
            return np.stack(brick, -1) * BRICK + COARSE[point]

        return self.evaluate(4 * self.slots.size, index_of, "surface, coarse").reshape(shape)

    def blocks(
        self, corners: Int[np.ndarray, "K 3"], stride: int, label: str = ""
    ) -> Iterator[tuple[Int[np.ndarray, "k 3"], Float32[np.ndarray, "k 3 3 3"]]]:
        """Evaluates the missing points of blocks of 3x3x3 points, `stride` apart, and yields the blocks in groups."""
        groups = [corners[start : start + GROUP] for start in range(0, len(corners), GROUP)]
        touched = np.zeros(self.slots.shape, bool)
        for group in groups:
            for end in CORNERS * 2 * stride:
                touched[tuple((group + end).T // BRICK)] = True
        new = np.argwhere(touched & (self.slots < 0))
        self.slots[tuple(new.T)] = len(self.corners) + np.arange(len(new))
        self.corners = np.concatenate([self.corners, new.astype(np.int32) * BRICK])
        self.values = np.concatenate(
            [self.values, np.full((len(new), BRICK**3), np.nan, np.float32)]
        )

        wanted = np.zeros(self.values.shape, bool)
        for group in groups:
            wanted.ravel()[self._addresses(group, stride)] = True
        missing = np.flatnonzero(wanted & np.isnan(self.values))

        def index_of(rows):
            slot, local = np.divmod(missing[rows], BRICK**3)
            return self.corners[slot] + np.stack(np.unravel_index(local, (BRICK,) * 3), -1)

        self.values.ravel()[missing] = self.evaluate(len(missing), index_of, label)
        for group in groups:
            yield group, self.values.ravel()[self._addresses(group, stride)]

    def _addresses(
        self, corners: Int[np.ndarray, "K 3"], stride: int
    ) -> Int[np.ndarray, "K 3 3 3"]:
        """Indices of the blocks' points in the flattened `values`."""
        # x, y and z of each block's layers.
        axes = corners[:, None, :] + stride * np.arange(3)[None, :, None]
        x, y, z = axes[:, :, None, None, 0], axes[:, None, :, None, 1], axes[:, None, None, :, 2]
        slot = self.slots[x // BRICK, y // BRICK, z // BRICK].astype(np.int64)
        return slot * BRICK**3 + (x % BRICK * BRICK + y % BRICK) * BRICK + z % BRICK


def _march_blocks(lattice: Lattice) -> Iterator[tuple]:
    """Marching cubes where the surface may be, and wherever it continues from there."""
    coarse = lattice.coarse()
    contrast = _contrast_of(lattice)
    bricks = np.argwhere(_near_level(contrast(coarse)))
    finest = [np.zeros((0, 3), np.int64)]
    for corners, values in lattice.blocks(bricks * BRICK, 2, "surface, refine"):
        children = np.argwhere(_near_level_in_blocks(contrast(values)))
        finest.append(corners[children[:, 0]] + 2 * children[:, 1:])

    seen = np.zeros((2 * lattice.num_bricks,) * 3, bool)
    frontier, label = np.concatenate(finest), "surface, fine"
    frontier = frontier[(frontier < lattice.resolution - 1).all(-1)]
    while len(frontier):
        seen[tuple(frontier.T // 2)] = True
        exits = []
        for corners, values in lattice.blocks(frontier, 1, label):
            inside = values > 0
            crossed = inside.any((1, 2, 3)) & ~inside.all((1, 2, 3))
            corners, values, inside = corners[crossed], values[crossed], inside[crossed]
            if len(corners):
                yield _march_packed(lattice, corners, values)
            for axis in range(3):
                for side in range(2):
                    face = inside.take(2 * side, axis + 1)
                    leaves = face.any((1, 2)) & ~face.all((1, 2))
                    exits.append(corners[leaves] + (4 * side - 2) * np.eye(3, dtype=int)[axis])
        frontier = _unseen(np.concatenate(exits), seen, lattice.resolution)
        label = "surface, follow"


def _unseen(
    exits: Int[np.ndarray, "K 3"], seen: Bool[np.ndarray, "X Y Z"], resolution: int
) -> Int[np.ndarray, "k 3"]:
    """The unseen blocks of all bricks that the surface enters. Taking whole bricks follows the surface in fewer rounds."""

    def new(corners):
        corners = corners[((corners >= 0) & (corners < resolution - 1)).all(-1)]
        return corners[~seen[tuple(corners.T // 2)]]

    bricks = np.zeros(tuple(size // 2 for size in seen.shape), bool)
    bricks[tuple(new(exits).T // BRICK)] = True
    return new((np.argwhere(bricks)[:, None, :] * BRICK + 2 * CORNERS[None]).reshape(-1, 3))


def _contrast_of(lattice: Lattice) -> Callable:
    """Maps field - level to a scale on which the field changes evenly: logarithmic for densities."""
    if lattice.low >= 0 and lattice.level > 0:
        # Below a millionth of the level, a density is practically zero, and its logarithm is noise.
        return lambda values: np.log1p(np.maximum(values / np.float32(lattice.level), 1e-6 - 1))
    return lambda values: values


def _near_level(contrast: Float[np.ndarray, "X Y Z 4"]) -> Bool[np.ndarray, "X-1 Y-1 Z-1"]:
    """The bricks where the level is nearer to some coarse point's value than the field changes within the brick."""

    def over_brick(reduce, values):
        result = _over_corners(reduce, values[..., 0], 0)
        for axis in range(3):
            first = np.moveaxis(values[..., 1 + axis], axis, 0)
            both = np.moveaxis(reduce(first[:-1], first[1:]), 0, axis)
            result = reduce(result, both[tuple(slice(size) for size in result.shape)])
        return result

    change = over_brick(np.maximum, contrast) - over_brick(np.minimum, contrast)
    return over_brick(np.minimum, np.abs(contrast)) <= change


def _near_level_in_blocks(contrast: Float[np.ndarray, "K 3 3 3"]) -> Bool[np.ndarray, "K 2 2 2"]:
    """The cells where the level is nearer to some corner's value than the greatest change between neighbours in the block."""
    slope = np.max([np.abs(np.diff(contrast, axis=axis)).max((1, 2, 3)) for axis in (1, 2, 3)], 0)
    return _over_corners(np.minimum, np.abs(contrast), 1) <= slope[:, None, None, None]


def _over_corners(
    reduce: np.ufunc, values: Float[np.ndarray, "..."], batch_axes: int
) -> Float[np.ndarray, "..."]:
    """Reduces points to cells, over the eight corners of each cell."""
    for axis in range(batch_axes, batch_axes + 3):
        before = (slice(None),) * axis
        values = reduce(values[(*before, slice(0, -1))], values[(*before, slice(1, None))])
    return values


def _march_slabs(lattice: Lattice) -> Iterator[tuple]:
    """Marching cubes in every cell, a slab of layers at a time."""
    size = lattice.resolution
    layers = max(1, SLAB // size**2)
    values = np.zeros((0, size, size), np.float32)
    starts = range(-1, size - 1, layers)
    if lattice.progress:
        starts = lattice.progress(starts, len(starts), "surface, dense")
    for start in starts:
        first, stop = start + 1, min(start + 1 + layers, size)

        def index_of(rows, first=first, stop=stop):
            flat = np.arange(rows.start, rows.stop) + first * size**2
            return np.stack(np.unravel_index(flat, (size,) * 3), -1)

        new = lattice.evaluate((stop - first) * size**2, index_of, "")
        values = np.concatenate([values[-1:], new.reshape(-1, size, size)])
        if len(values) > 1 and values.max() > 0 >= values.min():
            low, axis, fraction, faces = _march(values, None)
            low[:, 0] += stop - len(values)
            yield _keys(low, axis, size), fraction, faces


def _march_packed(
    lattice: Lattice, corners: Int[np.ndarray, "K 3"], values: Float32[np.ndarray, "K 3 3 3"]
) -> tuple:
    """Marching cubes in blocks that are stacked along the first axis. The cells between two blocks are masked."""
    # scikit-image reads its mask at a cell's upper corner.
    upper = corners[:, None, :] + np.arange(3)[None, :, None] < lattice.resolution
    mask = upper[:, :, None, None, 0] & upper[:, None, :, None, 1] & upper[:, None, None, :, 2]
    mask[:, 0] = False
    low, axis, fraction, faces = _march(values.reshape(-1, 3, 3), mask.reshape(-1, 3, 3))
    block, low[:, 0] = np.divmod(low[:, 0], 3)
    return _keys(low + corners[block], axis, lattice.resolution), fraction, faces


def _march(values: Float32[np.ndarray, "X Y Z"], mask: Bool[np.ndarray, "X Y Z"] | None) -> tuple:
    """Marching cubes: the grid edges with a vertex on them (lower end, axis), the vertex's place on its edge, and the faces.

    scikit-image gets only the signs. So its vertices are midpoints, which identify their edges without rounding, and positions
    are interpolated here. Thus blocks that share an edge agree on its vertex to the bit, wherever they are in the array. The
    `lorensen` table is closed for every pattern of signs (each edge is shared by two faces: tested); `lewiner` is not.
    """
    from skimage.measure import marching_cubes  # here: it is slow to import

    signs = np.where(values > 0, np.float32(1), np.float32(-1))
    midpoints, faces, _, _ = marching_cubes(
        signs, 0.0, method="lorensen", gradient_direction="ascent", mask=mask
    )
    doubled = np.rint(midpoints * 2).astype(np.int64)
    axis = np.argmax(doubled & 1, -1)
    low = doubled >> 1
    high = low + np.eye(3, dtype=np.int64)[axis]
    start, end = values[tuple(low.T)].astype(np.float64), values[tuple(high.T)].astype(np.float64)
    # At least a thousandth of a cell from the grid points: vertices on different edges stay apart, and no face is degenerate.
    return low, axis, np.clip(start / (start - end), 1e-3, 1 - 1e-3), faces


def _keys(
    low: Int[np.ndarray, "N 3"], axis: Int[np.ndarray, " N"], size: int
) -> Int[np.ndarray, " N"]:
    """A unique number for each grid edge."""
    return np.ravel_multi_index(tuple(low.T), (size,) * 3) * 3 + axis


def in_chunks(
    function: Callable,
    count: int,
    xyz_of: Callable,
    chunk: int,
    progress: Callable | None,
    label: str,
) -> Float32[np.ndarray, "Q ..."]:
    """function(xyz_of(rows)) for all rows below `count`, `chunk` at a time. Each call starts before the last result is copied."""
    starts, calls = range(0, count, chunk), []
    if progress and label:
        starts = progress(starts, len(starts), label)
    for start in starts:
        xyz = xyz_of(slice(start, min(start + chunk, count)))
        padded = np.zeros((chunk, 3), np.float32)
        padded[: len(xyz)] = xyz
        calls.append(function(padded))
        if len(calls) > 1:
            calls[-2] = np.asarray(calls[-2], np.float32)
    return np.concatenate(
        [np.asarray(call, np.float32) for call in calls] or [np.zeros(0, np.float32)]
    )[:count]
