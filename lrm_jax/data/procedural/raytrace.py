"""Exact ray tracing of convex solids with holes, without marching along the ray: constructive solid geometry on intervals.

A camera ray is p(t) = eye + t R (x, y, 1), where t is the depth along the optical axis. All computations use the inverse depth s
= 1 / t; large s is near. The ray crosses the plane n.p = h at s = -(n.R (x, y, 1)) / (n.eye - h). This is linear in (x, y), so a
plane is three numbers for a given camera, and each ray costs two multiplications and no division. For a quadric, s involves the
square root of a polynomial in (x, y). A ray meets a convex solid in one interval of s, and a hole removes another interval from
it (Roth, Ray casting for modeling solids, https://doi.org/10.1016/0146-664X(82)90169-1).

There is a single kind of solid. In its own frame, it is the intersection of the slab |z| <= 1, three pairs of planes that may
lean inwards, and a quadric of revolution. Ten numbers make it a box, a prism, a pyramid, a cylinder, a cone, an ellipsoid, a
barrel ...
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

MIN_INVERSE_DEPTH = 1e-3  # nothing is seen beyond a depth of 1000
_INFINITE = 1e6  # inverse depth nearer than any surface
_RELIEF_STEPS = 12
_NUM_FACES = 9  # 8 planes, beginning with the top, and the quadric
_OUTLINE_Z = np.array([-1, -0.92, -0.71, -0.38, 0, 0.38, 0.71, 0.92, 1], np.float32)
_OUTLINE_ANGLE = np.arange(24, dtype=np.float32) * np.float32(np.pi / 12)  # includes the corners


@flax.struct.dataclass
class Solids:
    """Convex solids: the points of their own frame where all of these hold.

    |z| <= 1,  |x| <= hx - kx z,  |x cos + y sin| <= hs - ks z,  |x cos - y sin| <= hs - ks z,  e (x^2 + y^2) + a z^2 <= (p - q
    z)^2
    """

    to_local: jax.Array  # [*B K 3 4] world to the solid's own frame, affine
    sides: jax.Array  # [*B K 6] cos, sin, hx, kx, hs, ks; hx < 0: the solid is absent
    quadric: jax.Array  # [*B K 4] e, a, p, q


@flax.struct.dataclass
class Geometry:
    """Solids, and the holes cut out of them. The top of the first solid has hills."""

    solids: Solids  # [*B K]
    holes: Solids  # [*B H]
    cuts: (
        jax.Array
    )  # [*B C H] bool, whether a hole cuts a solid; solids from index C on have no holes
    # [*B N 4] amplitude, two wave numbers (along the solid's own x and y) and phase: the top is at z = 1 - sum of the waves.
    relief: jax.Array


@flax.struct.dataclass
class Hits:
    """Where rays first meet matter."""

    inverse_depth: jax.Array  # [*R] 1 / depth along the optical axis; 0: the ray misses
    solid: jax.Array  # [*R] int32, index of the solid; 0 if the ray misses
    # [*R] int32, index of the hole whose wall is hit, or -1: the solid's own surface
    hole: jax.Array


@flax.struct.dataclass
class _Pencil:
    """Solids for one camera: the coefficients of the ends of the rays' intervals."""

    slopes: jax.Array  # [*B K 8 3] inverse depth of a plane, linear in (x, y, 1)
    is_front: jax.Array  # [*B K 8] bool, whether the camera is on the outer side of the plane
    middle: jax.Array  # [*B K 3] mean of the quadric's two inverse depths, linear in (x, y, 1)
    spread: jax.Array  # [*B K 6] (half their difference)^2: coefficients of xx, xy, yy, x, y, 1
    ends: jax.Array  # [*B K 4] (low, high) = middle + ends[0, 2] * half difference + ends[1, 3]


def first_hits(
    geometry: Geometry, c2w: Float[Array, "4 4"], x: Float[Array, "*R"], y: Float[Array, "*R"]
) -> Hits:
    """What a camera sees along rays with the camera-frame directions (x, y, 1).

    The camera must be outside all solids. If holes of one solid open into each other, rays are followed through all of them in
    order of index, in two rounds.
    """
    num_cut, num_holes = geometry.cuts.shape
    num_solids = len(geometry.solids.sides)
    # The index of the solid replaces the last bits of the inverse depth (relative change: 4e-6 for 32 solids). This stores one
    # array instead of two; with two, XLA would compute the intervals twice.
    last_bits = (1 << (num_solids - 1).bit_length()) - 1

    def coded(s, number):
        return jax.lax.bitcast_convert_type(s, jnp.int32) & ~last_bits | number

    def nearer(best, low, high, s, number):
        return jnp.maximum(best, jnp.where((high > low) & (s > low), coded(s, number), 0))

    def visit_cut(best, part):
        pencil, number, cuts = part
        low, high = _spans(pencil, x, y)
        return nearer(best, low, high, _cut(high, cuts, openings), number), None

    def visit_whole(best, part):
        pencil, number = part
        low, high = _spans(pencil, x, y)
        return nearer(best, low, high, high, number), None

    pencils = _pencils(_both(geometry), c2w)
    solids, holes = _select(pencils, slice(num_solids)), _select(pencils, slice(num_solids, None))
    openings = jax.vmap(_spans, (0, None, None))(holes, x, y)
    numbered = solids, jnp.arange(num_solids, dtype=jnp.int32)
    low, high = _spans(_select(solids, 0), x, y)
    high = _climb(geometry, c2w, x, y, low, high)
    best = nearer(
        jnp.zeros(x.shape, jnp.int32), low, high, _cut(high, geometry.cuts[0], openings), 0
    )
    cut = (*_select(numbered, slice(1, num_cut)), geometry.cuts[1:])
    best, _ = jax.lax.scan(visit_cut, best, cut)
    best, _ = jax.lax.scan(visit_whole, best, _select(numbered, slice(num_cut, None)))
    # If the far end of a hole is visible, its inverse depth equals `best` exactly, apart from the last bits.
    hole = jnp.full(x.shape, -1, jnp.int32)
    for number in range(num_holes):
        hole = jnp.where(coded(openings[0][number], best & last_bits) == best, number, hole)
    return Hits(
        jax.lax.bitcast_convert_type(best & ~last_bits, jnp.float32),
        best & last_bits,
        jnp.where(best > 0, hole, -1),
    )


def points(
    c2w: Float[Array, "4 4"], x: Float[Array, "*R"], y: Float[Array, "*R"], hits: Hits
) -> Float[Array, "*R 3"]:
    """World points where a camera's rays (x, y, 1) hit. Rays that miss get the point at depth 1."""
    depth = jnp.where(hits.inverse_depth > 0, 1 / jnp.maximum(hits.inverse_depth, 1e-6), 1.0)
    components = [a + depth * (b * x + c * y + d) for b, c, d, a in c2w[:3]]
    return jnp.stack(components, axis=-1)


def faces(geometry: Geometry, hits: Hits, xyz: Float[Array, "*R 3"]) -> Int[Array, "*R"]:
    """The face on which each hit at xyz lies: the one whose equation holds there.

    Faces are numbered consecutively over all solids, then all holes, with 9 faces each.
    """
    row = _row(geometry, hits)
    own = rows(_both(geometry), row)
    x, y, z = to_local(own.to_local, xyz)
    top = jnp.where(row == 0, _relief(geometry.relief, x, y)[0], 1)
    # Up to rounding, the largest value is 0 and the others are negative.
    best, face = z - top, jnp.zeros(z.shape, jnp.int32)
    values = (*_side_values(own, x, y, z), _quadric_value(own.quadric, x, y, z))
    for number, value in enumerate(values, start=1):
        face = jnp.where(value > best, number, face)
        best = jnp.maximum(value, best)
    return row * _NUM_FACES + face


def normals(
    geometry: Geometry, hits: Hits, face: Int[Array, "*R"], xyz: Float[Array, "*R 3"]
) -> Float[Array, "*R 3"]:
    """Unit outward normals, in the world, of hits at xyz. `face` comes from `faces`."""
    own = rows(_gradients(_both(geometry)).reshape(-1, 12), face)
    first = geometry.solids.to_local[0]
    x, y, _ = to_local(first, xyz)
    # On face 0 of solid 0, the top with the relief, correct the normal of the slab by the slopes.
    slopes = [jnp.where(face == 0, slope, 0) for slope in _relief(geometry.relief, x, y)[1:]]
    sides = jnp.where(hits.hole >= 0, -1.0, 1.0)
    normal = []
    for i in range(3):
        gradient = sum(own[..., 4 * i + j] * xyz[..., j] for j in range(3)) + own[..., 4 * i + 3]
        normal.append(gradient - slopes[0] * first[0, i] - slopes[1] * first[1, i])
    scale = sides / jnp.sqrt(sum(n * n for n in normal) + 1e-20)
    return jnp.stack([n * scale for n in normal], axis=-1)


def contains(geometry: Geometry, xyz: Float[Array, "Q 3"]) -> Bool[Array, "Q"]:
    """Whether world points are inside matter."""

    def within(solids, number, relief):
        own = _select(solids, number)
        x, y, z = to_local(own.to_local, xyz)
        terms = (*_side_values(own, x, y, z), _quadric_value(own.quadric, x, y, z))
        inside = z <= _relief(relief, x, y)[0]
        for value in terms:
            inside &= value <= 0
        return inside

    flat = jnp.zeros_like(geometry.relief)
    in_hole = [within(geometry.holes, i, flat) for i in range(geometry.cuts.shape[1])]
    matter = jnp.zeros(xyz.shape[:1], bool)
    for k in range(len(geometry.solids.sides)):
        inside = within(geometry.solids, k, geometry.relief if k == 0 else flat)
        for i, hole in enumerate(in_hole if k < len(geometry.cuts) else []):
            inside &= ~(hole & geometry.cuts[k, i])
        matter |= inside
    return matter


def outlines(solids: Solids, relief: Float[Array, "N 4"]) -> Float[Array, "K M 3"]:
    """World points on the surface of each solid, including its corners; round solids have 24 per circle. Relief: see Geometry."""
    z, angle = (a.ravel() for a in np.meshgrid(_OUTLINE_Z, _OUTLINE_ANGLE, indexing="ij"))
    x, y = np.cos(angle), np.sin(angle)
    cos, sin, hx, kx, hs, ks = jnp.moveaxis(solids.sides, -1, 0)[..., None]
    e, a, p, q = jnp.moveaxis(solids.quadric, -1, 0)[..., None]
    z, x, y = (jnp.asarray(v)[None] for v in (z, x, y))
    limits = [
        (hx - kx * z) / jnp.maximum(jnp.abs(x), 1e-4),
        (hs - ks * z) / jnp.maximum(jnp.abs(x * cos + y * sin), 1e-4),
        (hs - ks * z) / jnp.maximum(jnp.abs(x * cos - y * sin), 1e-4),
        jnp.sqrt(jnp.maximum((p - q * z) ** 2 - a * z**2, 0) / jnp.maximum(e, 1e-8)),
    ]
    radius = jnp.maximum(jnp.stack(limits).min(0), 0)
    x, y, z = x * radius, y * radius, jnp.broadcast_to(z, radius.shape)
    z = z.at[0].set(jnp.minimum(z[0], _relief(relief, x[0], y[0])[0]))
    offset = jnp.stack([x, y, z], axis=-1) - solids.to_local[:, None, :, 3]
    return jnp.einsum(
        "kij,kmj->kmi", _inverse(solids.to_local[..., :3]), offset, precision="highest"
    )


def rows(tables, which: Int[Array, "*R"]):
    """Looks up rows of tables [K ...] for all rays: [*R ...]."""
    return jax.tree.map(lambda a: a.at[which].get(mode="promise_in_bounds"), tables)


def to_local(
    affine: Float[Array, "*#R 3 4"], xyz: Float[Array, "*R 3"]
) -> tuple[Float[Array, "*R"], Float[Array, "*R"], Float[Array, "*R"]]:
    """x, y and z of world points in the frames of solids, or of one solid. Uses sums: matrix products may round to bfloat16."""
    return tuple(
        sum(affine[..., i, j] * xyz[..., j] for j in range(3)) + affine[..., i, 3] for i in range(3)
    )


def _both(geometry: Geometry) -> Solids:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), geometry.solids, geometry.holes)


def _row(geometry: Geometry, hits: Hits) -> Array:
    """The row in `_both` of the solid, or of the hole whose wall is hit."""
    return jnp.where(hits.hole >= 0, hits.hole + len(geometry.solids.sides), hits.solid)


def _planes(sides: Array) -> Array:
    """Planes [*B 8 4] from sides [*B 6]: outward normal and distance, in the own frame, of top, bottom and the three pairs."""
    cos, sin, hx, kx, hs, ks = jnp.moveaxis(sides, -1, 0)
    zero, one = jnp.zeros_like(cos), jnp.ones_like(cos)
    planes = (
        (zero, zero, one, one), (zero, zero, -one, one),
        (one, zero, kx, hx), (-one, zero, kx, hx),
        (cos, sin, ks, hs), (-cos, -sin, ks, hs),
        (cos, -sin, ks, hs), (-cos, sin, ks, hs),
    )  # fmt: skip
    return jnp.stack([jnp.stack(plane, axis=-1) for plane in planes], axis=-2)


def _side_values(solid: Solids, x: Array, y: Array, z: Array) -> list[Array]:
    """The equations of all planes except the top, positive outside, in the order of `_planes`."""
    cos, sin, hx, kx, hs, ks = (solid.sides[..., i] for i in range(6))
    across, one, other = x, cos * x + sin * y, cos * x - sin * y
    limit_x, limit_s = hx - kx * z, hs - ks * z
    values = [-z - 1, across - limit_x, -across - limit_x]
    return values + [one - limit_s, -one - limit_s, other - limit_s, -other - limit_s]


def _quadric_value(quadric: Array, x: Array, y: Array, z: Array) -> Array:
    """Half of e (x^2 + y^2) + a z^2 - (p - q z)^2."""
    e, a, p, q = (quadric[..., i] for i in range(4))
    w = p - q * z
    return 0.5 * (e * (x * x + y * y) + a * z * z - w * w)


def _gradients(solids: Solids) -> Array:
    """World gradients of the equations of all faces [K 9 3 4]: affine functions of the point."""
    linear, offset = solids.to_local[..., :3], solids.to_local[..., 3]
    flat = jnp.einsum("kij,kpi->kpj", linear, _planes(solids.sides)[..., :3], precision="highest")
    flat = jnp.concatenate([jnp.zeros((*flat.shape, 3)), flat[..., None]], axis=-1)
    e, a, p, q = jnp.moveaxis(solids.quadric, -1, 0)
    second = jnp.stack([e, e, a - q * q], axis=-1)
    constant = second * offset + jnp.stack([0 * e, 0 * e, p * q], axis=-1)
    inner = jnp.concatenate([second[..., None] * linear, constant[..., None]], axis=-1)
    curved = jnp.einsum("kij,kil->kjl", linear, inner, precision="highest")
    return jnp.concatenate([flat, curved[:, None]], axis=1)


def _pencils(solids: Solids, c2w: Float[Array, "4 4"]) -> _Pencil:
    affine = solids.to_local
    # The camera's position [K 3] and axes [K 3 3] in the frames of the solids.
    eye = jnp.einsum("kij,j->ki", affine, c2w[:, 3], precision="highest")
    axes = jnp.einsum("kij,jl->kil", affine[..., :3], c2w[:3, :3], precision="highest")
    planes_K84 = _planes(solids.sides)
    outside = jnp.einsum("kpi,ki->kp", planes_K84[..., :3], eye, precision="highest")
    outside = _away_from_0(outside - planes_K84[..., 3])
    slopes = -jnp.einsum("kpi,kij->kpj", planes_K84[..., :3], axes, precision="highest")

    # On the ray, the quadric is c + 2 b t + a t^2. With s = 1 / t, the inside is c s^2 + 2 b s + a <= 0.
    e, a, p, q = (v[:, None] for v in jnp.moveaxis(solids.quadric, -1, 0))
    w = p - q * eye[:, 2:]
    diagonal = jnp.concatenate([e, e, a], axis=-1)
    c = _away_from_0((diagonal * eye**2).sum(-1, keepdims=True) - w * w)
    b = jnp.einsum("ki,kij->kj", diagonal * eye, axes, precision="highest")
    b = b + w * q * axes[:, 2]
    spacelike = jnp.concatenate([e, e, a - q * q], axis=-1)
    a_K33 = jnp.einsum("kil,ki,kim->klm", axes, spacelike, axes, precision="highest")
    spread = (b[:, :, None] * b[:, None] - c[..., None] * a_K33) / (c * c)[..., None]
    pairs = ((0, 0, 1.0), (0, 1, 2.0), (1, 1, 1.0), (0, 2, 2.0), (1, 2, 2.0), (2, 2, 1.0))
    # Camera outside the quadric: s is between the two roots. Inside it: s is above the larger root, up to the camera. In the
    # other half of a cone: s is below the smaller root.
    is_other_half = (a < q * q) & (w < 0)
    ends = jnp.where(
        c > 0,
        jnp.array([[-1.0, 0.0, 1.0, 0.0]]),
        jnp.where(
            is_other_half,
            jnp.array([[0.0, -_INFINITE, -1.0, 0.0]]),
            jnp.array([[1.0, 0.0, 0.0, _INFINITE]]),
        ),
    )
    return _Pencil(
        slopes=slopes / outside[..., None],
        is_front=outside > 0,
        middle=-b / c,
        spread=jnp.stack([factor * spread[:, i, j] for i, j, factor in pairs], axis=-1),
        ends=ends,
    )


def _select(tree, index):
    return jax.tree.map(lambda a: a[index], tree)


def _away_from_0(value: Array) -> Array:
    """Avoids division by 0: a camera in the plane of a face sees it edge-on, so either side will do."""
    return jnp.where(
        value < 0, jnp.minimum(value, -1e-6), jnp.where(value > 0, jnp.maximum(value, 1e-6), 1e-6)
    )


def _spans(pencil: _Pencil, x: Array, y: Array) -> tuple[Array, Array]:
    """The inverse depths (low, high) between which rays are inside one solid. If low >= high, the ray misses."""
    low, high = jnp.full_like(x, MIN_INVERSE_DEPTH), jnp.full_like(x, _INFINITE)
    for plane in range(8):
        slope, is_front = pencil.slopes[plane], pencil.is_front[plane]
        s = slope[0] * x + slope[1] * y + slope[2]
        high = jnp.minimum(high, jnp.where(is_front, s, _INFINITE))
        low = jnp.maximum(low, jnp.where(is_front, -_INFINITE, s))
    m, f, end = pencil.middle, pencil.spread, pencil.ends
    middle = m[0] * x + m[1] * y + m[2]
    square = (f[0] * x + f[1] * y + f[3]) * x + (f[2] * y + f[4]) * y + f[5]
    half = jnp.sqrt(jnp.maximum(square, 0))
    # If a ray misses, both ends are `middle`, and rounding could make low < high.
    missed = (square < 0) & (end[0] < 0)
    low = jnp.maximum(low, jnp.where(missed, _INFINITE, middle + end[0] * half + end[1]))
    return low, jnp.minimum(high, middle + end[2] * half + end[3])


def _cut(s: Array, cuts: Array, openings: tuple[Array, Array]) -> Array:
    """The inverse depth at which a ray, starting at s, has left all holes [H *R] that cut the solid."""
    for _ in range(2):
        for i, (low, high) in enumerate(zip(*openings, strict=True)):
            s = jnp.where((s <= high) & (s > low) & cuts[i], low, s)
    return s


def _relief(relief: Array, x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Height of the top at (x, y) in the own frame, and its slopes. A wave is 16 u^2 (1 - u)^2, where u is its phase modulo 1."""
    height, slope_x, slope_y = jnp.ones_like(x), jnp.zeros_like(x), jnp.zeros_like(x)
    for i in range(relief.shape[-2]):
        amplitude, wave_x, wave_y, phase = (relief[..., i, j] for j in range(4))
        u = wave_x * x + wave_y * y + phase
        u = u - jnp.floor(u)
        rest = u * (1 - u)
        height -= amplitude * 16 * rest * rest
        steep = -32 * amplitude * rest * (1 - 2 * u)
        slope_x, slope_y = slope_x + wave_x * steep, slope_y + wave_y * steep
    return height, slope_x, slope_y


def _climb(geometry: Geometry, c2w: Array, x: Array, y: Array, low: Array, high: Array) -> Array:
    """The inverse depth where rays between `low` and `high` cross the relief of solid 0: equal steps, then a secant step."""
    affine = geometry.solids.to_local[0]
    eye = jnp.einsum("ij,j->i", affine, c2w[:, 3], precision="highest")
    axes = jnp.einsum("ij,jl->il", affine[:, :3], c2w[:3, :3], precision="highest")
    dirs = [axes[i, 0] * x + axes[i, 1] * y + axes[i, 2] for i in range(3)]
    near = 1 / jnp.clip(high, MIN_INVERSE_DEPTH, _INFINITE)
    far = 1 / jnp.maximum(low, MIN_INVERSE_DEPTH)
    step = jnp.maximum(far - near, 0) / _RELIEF_STEPS

    def gap(t):
        px, py, pz = (eye[i] + t * dirs[i] for i in range(3))
        return pz - _relief(geometry.relief, px, py)[0]

    after = gap(near)
    found = jnp.where(
        after <= 1e-5, high, 0
    )  # the ray enters through a side wall, or there are no hills
    for i in range(1, _RELIEF_STEPS + 1):
        t, before = near + step * i, after
        after = gap(t)
        crossing = t - step * after / jnp.minimum(after - before, -1e-9)
        is_first = (after <= 0) & (before > 0) & (found == 0)
        found = jnp.where(is_first, 1 / crossing, found)
    return found


def _inverse(matrix: Float[Array, "K 3 3"]) -> Float[Array, "K 3 3"]:
    """Inverse by Cramer's rule: jnp.linalg.inv of many small matrices is slow on accelerators."""
    a, b, c = matrix[:, 0], matrix[:, 1], matrix[:, 2]
    columns = jnp.stack([jnp.cross(b, c), jnp.cross(c, a), jnp.cross(a, b)], axis=-1)
    return columns / (a * columns[..., 0]).sum(-1)[:, None, None]
