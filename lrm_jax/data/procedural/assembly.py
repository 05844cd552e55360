"""Draws random objects from the tables of `blueprints`: a random key becomes solids, holes and paint.

Arrays have fixed shapes, so that this works under jit and vmap.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lrm_jax.data.procedural import blueprints, raytrace, shapes
from lrm_jax.ops import srgb

_MIRRORS = np.array([[1, 1, 1], [-1, 1, 1], [1, -1, 1], [-1, -1, 1]], np.float32)
# Which of the four mirrored copies exist, indexed by blueprints.Part.copies.
_COPIES = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]], bool)
_AXES = np.array(
    [[1, 2, 0], [2, 0, 1], [0, 1, 2]]
)  # world axes of a shape's x, y and z, by Part.axis
_RANDOM_SHAPE = 0.06  # probability that a part gets any shape instead of those listed
_RANDOM_PAINT = 0.3  # probability that an object's materials exchange their colours
_DRAWS = 64  # uniform random numbers for the object, and for each part
_MAX_CUT = 8  # solids with holes, at most
_WAVES = 3  # of the relief


@flax.struct.dataclass
class Paint:
    """The surface of each solid."""

    colours: jax.Array  # [*B K 2 3] linear light; the pattern mixes the two
    pattern: jax.Array  # [*B K] int32, index in blueprints.PATTERNS
    scale: jax.Array  # [*B K 3] from own coordinates to pattern coordinates, whose period is 1
    shift: jax.Array  # [*B K 3] of the pattern


@flax.struct.dataclass
class Scene:
    """One object. Its bounding box is centred on the origin; its farthest point is at distance 1."""

    geometry: raytrace.Geometry
    paint: Paint
    # [*B K M 3] world points on the surfaces of the solids; absent solids repeat those of solid 0
    outline: jax.Array


def draw_scene(key: jax.Array, num_solids: int, num_holes: int) -> Scene:
    """A random object of at most `num_solids` solids and `num_holes` holes. Any more in a blueprint are left out."""
    # Draw all numbers at once: XLA takes a second to compile each call of the generator.
    uniform = jax.random.uniform(key, (blueprints.MAX_PARTS + 1, _DRAWS))
    own, uniform = uniform[0], uniform[1:]
    tables = jax.tree.map(jnp.asarray, blueprints.tables())
    tickets = jnp.cumsum(tables.pop("tickets"))
    kind = jnp.sum(own[0] * tickets[-1] >= tickets)
    parts = jax.tree.map(lambda a: a[kind], tables)
    copies, placed = _place(parts, uniform)
    sides, quadric, affine = _shape(placed, uniform)

    # Repeats each part for its four copies: [4 x parts].
    def spread(a):
        return jnp.repeat(a, 4, axis=0)

    mirrors = jnp.tile(_MIRRORS, (blueprints.MAX_PARTS, 1))
    affine = spread(affine) * jnp.concatenate([mirrors, jnp.ones_like(mirrors[:, :1])], 1)[:, None]
    owner = jnp.repeat(jnp.arange(blueprints.MAX_PARTS), 4)
    candidates = raytrace.Solids(affine, spread(sides), spread(quadric))
    exists, is_hole = copies.reshape(-1), spread(parts["is_hole"])
    holes, hole_order = _first(candidates, exists & is_hole, num_holes)
    is_cut = owner < jnp.max(jnp.where(exists & is_hole, owner, -1))
    # Solid 0 stays first, because it may have the relief. Solids with holes come next.
    rank = jnp.where(jnp.arange(len(owner)) == 0, 0, jnp.where(is_cut, 1, 2))
    solids, solid_order = _first(candidates, exists & ~is_hole, num_solids, rank)
    num_cut = min(num_solids, _MAX_CUT)
    cuts = owner[hole_order][None] > owner[solid_order[:num_cut]][:, None]
    relief = _draw_relief(own[1:10].reshape(3, _WAVES), placed["relief"][0])
    paint = _draw_paint(own[10:60], parts, placed, uniform)
    paint = jax.tree.map(lambda a: a[owner[solid_order]], paint)
    geometry = raytrace.Geometry(solids, holes, cuts, relief)
    return _normalized(geometry, paint, own[60:63])


def _place(parts: dict, uniform: jax.Array) -> tuple[jax.Array, dict]:
    """Returns which copies exist [parts 4], and the size, place and other drawn values of each part."""
    low, high = parts["range"][..., 0], parts["range"][..., 1]
    values = low + uniform[:, :12] * (high - low)
    size, at, pivot = values[:, :3], values[:, 3:6], values[:, 6:9]
    option = (uniform[:, 12] * 12).astype(jnp.int32)
    rotation = _rotation(jnp.radians(values[:, 9]), jnp.radians(values[:, 10]))
    copies = _pick(parts["copies"], (uniform[:, 13] * 12).astype(jnp.int32))
    shape = _pick(parts["shape"], option)
    num_shapes = len(shapes.shape_tables()["taper"])
    any_shape = 1 + (uniform[:, 12] * (num_shapes - 1)).astype(jnp.int32)
    shape = jnp.where((uniform[:, 14] < _RANDOM_SHAPE) & (shape > 0), any_shape, shape)

    def place(state, part):
        """Places one part; parts are placed in order, since each needs its base."""
        centres, halves, masks = state
        base = part["base"]
        half = jnp.where(part["relative"] > 0, part["size"] * halves[base], part["size"])
        half = jnp.maximum(half[part["tie"]], 0.012)
        spot = centres[base] + part["at"] * halves[base]
        centre = spot - jnp.sum(part["rotation"] * (part["pivot"] * half)[None], axis=-1)
        inherited = part["copies"] == len(_COPIES)
        mask = jnp.where(
            inherited, masks[base], jnp.asarray(_COPIES)[jnp.minimum(part["copies"], 3)]
        )
        is_first = part["index"] == 0
        mask &= part["there"] & (masks[base].any() | is_first)
        index = part["index"]
        state = (
            centres.at[index].set(centre), halves.at[index].set(half), masks.at[index].set(mask)
        )  # fmt: skip
        return state, None

    count = blueprints.MAX_PARTS
    start = (jnp.zeros((count, 3)), jnp.ones((count, 3)), jnp.zeros((count, 4), bool))
    # The first part is a base of others, so it is always placed; its chance only decides whether it has matter.
    is_first = jnp.arange(count) == 0
    there = uniform[:, 15] < parts["chance"]
    steps = dict(
        size=size, at=at, pivot=pivot, rotation=rotation, copies=copies, base=parts["base"],
        relative=parts["relative"], tie=parts["tie"], index=jnp.arange(count), there=there | is_first,
    )  # fmt: skip
    (centre, half, mask), _ = jax.lax.scan(place, start, steps)
    mask &= ((shape > 0) & there)[:, None]
    axis = jnp.asarray(_AXES)[parts["axis"]]
    return mask, dict(
        centre=centre, half=half, rotation=rotation, shape=shape, axis=axis, relief=values[:, 11]
    )


def _shape(placed: dict, uniform: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[parts ...] sides, quadric and to_local of raytrace.Solids, for the unmirrored copies."""
    kinds = {name: jnp.asarray(a)[placed["shape"]] for name, a in shapes.shape_tables().items()}
    low, high = kinds["taper"][:, 0], kinds["taper"][:, 1]
    taper = (low + uniform[:, 16] * (high - low))[:, None]
    sides = kinds["sides"] + taper * kinds["sides_taper"]
    quadric = kinds["quadric"] + taper * kinds["quadric_taper"]
    inverse = jnp.swapaxes(placed["rotation"], 1, 2) / placed["half"][:, :, None]
    linear = jnp.take_along_axis(inverse, placed["axis"][:, :, None], axis=1)
    upended = jnp.where(kinds["is_upended"] > 0, -1.0, 1.0)
    linear = linear.at[:, 2].multiply(upended[:, None])
    offset = -jnp.sum(linear * placed["centre"][:, None], axis=-1, keepdims=True)
    return sides, quadric, jnp.concatenate([linear, offset], axis=-1)


def _rotation(turn: jax.Array, tilt: jax.Array) -> jax.Array:
    """Rotations [N 3 3] about y by `tilt`, then about z by `turn`, in radians [N]."""
    (ct, st), (cu, su) = ((jnp.cos(a), jnp.sin(a)) for a in (turn, tilt))
    zero = jnp.zeros_like(ct)
    rows = ((ct * cu, -st, ct * su), (st * cu, ct, st * su), (-su, zero, cu))
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def _pick(options: jax.Array, which: jax.Array) -> jax.Array:
    return jnp.take_along_axis(options, which[:, None], axis=1)[:, 0]


def _first(
    solids: raytrace.Solids, exists: jax.Array, count: int, rank: jax.Array | int = 0
) -> tuple[raytrace.Solids, jax.Array]:
    """The first `count` solids that exist, in order of rank, then absent ones; and the index where each was."""
    order = jnp.argsort(jnp.where(exists, rank, 9), stable=True)
    order = jnp.concatenate([order, jnp.zeros(count, order.dtype)])[:count]
    is_there = jnp.arange(count) < exists.sum()
    chosen = jax.tree.map(lambda a: a[order], solids)
    absent = jnp.array([[1.0, 0.0, -1.0, 0.0, 9.0, 0.0]])
    return chosen.replace(sides=jnp.where(is_there[:, None], chosen.sides, absent)), order


def _draw_relief(uniform: jax.Array, height: jax.Array) -> jax.Array:
    """The relief [waves 4] of raytrace.Geometry. Each wave is finer and lower than the one before."""
    angle, length, phase = uniform
    angle = (angle + jnp.arange(_WAVES)) * np.float32(np.pi / _WAVES)
    number = (0.35 + 0.35 * length) * jnp.arange(1, _WAVES + 1)
    amplitude = height * jnp.array([0.5, 0.3, 0.2])
    return jnp.stack([amplitude, number * jnp.cos(angle), number * jnp.sin(angle), phase], axis=-1)


def _draw_paint(own: jax.Array, parts: dict, placed: dict, uniform: jax.Array) -> Paint:
    """The paint of all parts [parts ...]. Within an object, each material has one colour. `own`: uniform [50]."""
    table = jnp.asarray(blueprints.colours())
    families, choices = table.shape[:2]
    palette = table[jnp.arange(families), (own[:families] * choices).astype(jnp.int32)]
    mixed = jnp.argsort(own[families : 2 * families])
    palette = jnp.where(own[-1] < _RANDOM_PAINT, palette[mixed], palette)
    tint = own[2 * families : 4 * families].reshape(families, 2) - 0.5
    palette = palette + 0.14 * jnp.stack([tint[:, 0], tint.mean(1), tint[:, 1]], axis=1)
    option = (uniform[:, 17] * 12).astype(jnp.int32)
    first = _pick(parts["paint"], option)
    second = _pick(parts["other"], (uniform[:, 18] * 12).astype(jnp.int32))
    colour = palette[first] * (0.9 + 0.2 * uniform[:, 19:20])
    shade = colour * jnp.where(uniform[:, 20:21] < 0.6, 0.65, 1.25)
    other = jnp.where(
        (second == families)[:, None], shade, palette[jnp.minimum(second, families - 1)]
    )
    colours = jnp.clip(jnp.stack([colour, other], axis=1), 0.01, 1)
    linear = srgb.to_linear(colours)
    frequency = 2.0 + 3.5 * uniform[:, 21:22]  # periods per unit length, about half an object
    half = jnp.take_along_axis(placed["half"], placed["axis"], axis=1)
    return Paint(
        colours=linear,
        pattern=_pick(parts["pattern"], (uniform[:, 22] * 12).astype(jnp.int32)),
        scale=half * frequency,
        shift=uniform[:, 23:26],
    )


def _normalized(geometry: raytrace.Geometry, paint: Paint, uniform: jax.Array) -> Scene:
    """Stretches the object a little along its axes, then moves and scales it into the unit sphere."""
    outline = raytrace.outlines(geometry.solids, geometry.relief)
    is_there = geometry.solids.sides[:, 2] > 0
    # Solid 0 always exists.
    outline = jnp.where(is_there[:, None, None], outline, outline[:1])
    stretch = jnp.exp((uniform - 0.5) * jnp.array([0.0, 0.25, 0.5]))
    points = outline * stretch[None, None]
    centre = 0.5 * (points.min((0, 1)) + points.max((0, 1)))
    points = points - centre[None, None]
    radius = jnp.sqrt((points**2).sum(-1).max())

    def shifted(solids: raytrace.Solids) -> raytrace.Solids:
        # The point p' of the new world is (radius p' + centre) / stretch in the unstretched one.
        linear, offset = solids.to_local[..., :3], solids.to_local[..., 3]
        offset = offset + (linear * (centre / stretch)[None, None]).sum(-1)
        linear = linear * (radius / stretch)[None, None]
        return solids.replace(to_local=jnp.concatenate([linear, offset[..., None]], axis=-1))

    geometry = geometry.replace(solids=shifted(geometry.solids), holes=shifted(geometry.holes))
    return Scene(geometry, paint, points / radius)
