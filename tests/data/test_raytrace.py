"""Rays hit solids at the points given by closed forms and by a slow march along the rays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax.data.procedural import raytrace
from lrm_jax.ops import cameras as cameras_lib

ABSENT = (1.0, 0, -1, 0, 9, 0)
ROUND = (1.0, 0, 9, 0, 9, 0)
BOX = (0.0, 1, 1, 0, 1, 0)
PYRAMID = (0.0, 1, 0.5, 0.5, 0.5, 0.5)
HEXAGON = (0.5, np.sqrt(3) / 2, np.sqrt(3) / 2, 0, np.sqrt(3) / 2, 0)
NO_QUADRIC = (0.0, 0, 1, 0)
SPHERE, CYLINDER = (1.0, 1, 1, 0), (1.0, 0, 1, 0)
CONE = (1.0, 0, 0.5, 0.5)
DOME = (1.0, 1 / 3, np.sqrt(0.75), 0.5 / np.sqrt(3))
KINDS = {
    "box": (BOX, NO_QUADRIC),
    "pyramid": (PYRAMID, NO_QUADRIC),
    "hexagon": (HEXAGON, NO_QUADRIC),
    "sphere": (ROUND, SPHERE),
    "cylinder": (ROUND, CYLINDER),
    "cone": (ROUND, CONE),
    "frustum": (ROUND, (1.0, 0, 0.8, 0.2)),
    "dome": (ROUND, DOME),
    "barrel": (ROUND, (1.0, 0.4, 1, 0)),
    "die": (BOX, (1.0, 1, 1.3, 0)),
}


def solids(*parts) -> raytrace.Solids:
    """Solids from parts (kind or None, centre, half sizes)."""
    affine, sides, quadrics = [], [], []
    for kind, centre, half in parts:
        side, quadric = KINDS[kind] if kind else (ABSENT, NO_QUADRIC)
        scale = np.diag(1 / np.asarray(half, float))
        affine.append(np.concatenate([scale, -scale @ np.reshape(centre, (3, 1))], axis=1))
        sides.append(side)
        quadrics.append(quadric)
    return raytrace.Solids(
        *(jnp.asarray(np.array(a), jnp.float32) for a in (affine, sides, quadrics))
    )


def geometry(parts, holes=(), cuts=None, relief=((0, 0, 0, 0),)) -> raytrace.Geometry:
    holes = holes or [(None, (0, 0, 0), (1, 1, 1))]
    cuts = np.ones((len(parts), len(holes)), bool) if cuts is None else np.array(cuts)
    return raytrace.Geometry(
        solids(*parts), solids(*holes), jnp.asarray(cuts), jnp.asarray(relief, jnp.float32)
    )


def camera(azimuth: float, elevation: float, distance: float = 3.0) -> jax.Array:
    return cameras_lib.orbit(1, distance, float(elevation), 40.0, float(azimuth)).c2w[0]


def grid(size: int, half_width: float = 0.4) -> tuple[jax.Array, jax.Array]:
    line = (jnp.arange(size) + 0.5) / size * 2 * half_width - half_width
    return jnp.meshgrid(line, line)


first_hits = jax.jit(raytrace.first_hits)


@jax.jit
def normals(scene, hits, xyz) -> jax.Array:
    return raytrace.normals(scene, hits, raytrace.faces(scene, hits, xyz), xyz)


def points(c2w, x, y, hits) -> np.ndarray:
    return np.asarray(raytrace.points(c2w, x, y, hits), float)


def test_a_sphere_has_the_silhouette_depth_and_normals_of_the_closed_form():
    centre, radius = np.array([0.2, -0.1, 0.3]), 0.6
    scene = geometry([("sphere", centre, [radius] * 3)])
    c2w, (x, y) = camera(40, 20), grid(64)
    hits = first_hits(scene, c2w, x, y)
    eye = np.asarray(c2w, float)[:3, 3]
    dirs = np.stack([x, y, np.ones_like(x)], -1).astype(float) @ np.asarray(c2w, float)[:3, :3].T
    a = (dirs**2).sum(-1)
    b = dirs @ (eye - centre)
    square = b * b - a * ((eye - centre) @ (eye - centre) - radius**2)
    hit = np.asarray(hits.inverse_depth) > 0
    clear = np.abs(square) > 1e-4  # rounding decides on the silhouette itself
    np.testing.assert_array_equal(hit[clear], square[clear] > 0)
    assert hit.mean() > 0.1
    surely = hit & clear
    depth = (-b - np.sqrt(np.maximum(square, 0))) / a
    # float32: the square root of a difference whose terms lose 1e-7.
    np.testing.assert_allclose(1 / hits.inverse_depth[surely], depth[surely], atol=2e-5)
    xyz = points(c2w, x, y, hits)
    found = normals(scene, hits, jnp.asarray(xyz, jnp.float32))
    np.testing.assert_allclose(found[surely], ((xyz - centre) / radius)[surely], atol=1e-4)


@pytest.mark.parametrize("elevation", [-30, 5, 35, 80])
@pytest.mark.parametrize("kind", KINDS)
def test_depths_are_those_of_a_march_through_the_matter(kind, elevation):
    scene = geometry(
        [(kind, (0.1, 0, -0.2), (0.6, 0.5, 0.4)), ("box", (-0.3, 0.2, 0.4), (0.2, 0.2, 0.3))],
        [("cylinder", (0.1, 0.1, 0), (0.2, 0.25, 0.7))],
        cuts=[[True], [False]],
    )
    assert_as_marched(scene, camera(25, elevation))


def test_relief_is_that_of_a_march_through_the_matter():
    waves = [(0.3, 0.7, 0.2, 0.1), (0.2, -0.3, 0.8, 0.5), (0.1, 1.1, 1.2, 0.7)]
    scene = geometry(
        [("cylinder", (0, 0, 0), (0.8, 0.8, 0.3)), ("cone", (0, 0, 0.3), (0.2, 0.2, 0.3))],
        relief=waves,
    )
    # Twelve steps may miss a hill that a grazing ray only touches.
    assert_as_marched(scene, camera(25, 20), share=0.95)


def assert_as_marched(scene, c2w, share: float = 0.99, steps: int = 1200):
    x, y = (v.reshape(-1) for v in grid(24))
    hits = first_hits(scene, c2w, x, y)
    depth = np.linspace(1.8, 4.2, steps)
    local = np.stack([x, y, np.ones_like(x)], -1)[:, None] * depth[:, None]
    world = local @ np.asarray(c2w)[:3, :3].T + np.asarray(c2w)[:3, 3]
    inside = jax.jit(raytrace.contains)(scene, jnp.asarray(world.reshape(-1, 3), jnp.float32))
    inside = np.asarray(inside).reshape(-1, steps)
    marched = np.where(inside.any(1), depth[inside.argmax(1)], 0)
    found = np.asarray(hits.inverse_depth)
    found = np.where(found > 0, 1 / np.maximum(found, 1e-9), 0)
    assert (found > 0).mean() > 0.05
    # Along edges, the march misses everything thinner than its step of 0.002.
    assert (np.abs(found - marched) < 0.003).mean() >= share


@pytest.mark.parametrize("kind", KINDS)
def test_normals_are_those_of_the_depths_neighbours(kind):
    scene = geometry([(kind, (0, 0, 0), (0.7, 0.5, 0.6))])
    c2w, (x, y) = camera(25, 20), grid(48)
    moved = []
    for dx, dy in ((0, 0), (1e-3, 0), (0, 1e-3)):
        hits = first_hits(scene, c2w, x + dx, y + dy)
        moved.append(points(c2w, x + dx, y + dy, hits))
        first = hits if (dx, dy) == (0, 0) else first
    steps = moved[1] - moved[0], moved[2] - moved[0]
    near = np.linalg.norm(steps, axis=-1).max(0) < 0.02  # not across a silhouette
    cross = np.cross(steps[1], steps[0])
    cross /= np.linalg.norm(cross, axis=-1, keepdims=True) + 1e-12
    found = np.asarray(normals(scene, first, jnp.asarray(moved[0], jnp.float32)))
    hit = (np.asarray(first.inverse_depth) > 0) & near
    assert hit.mean() > 0.1
    agree = np.abs((found * cross).sum(-1))[hit] > 0.98  # float32 depths over 1e-3, round faces
    assert agree.mean() > 0.9  # the others have an edge between the three points
    towards = ((np.asarray(c2w)[:3, 3] - moved[0]) * found).sum(-1)
    assert (towards[hit] > -1e-3).all()


def test_rays_pass_through_a_hole_and_see_its_walls():
    scene = geometry([("box", (0, 0, 0), (0.5, 0.5, 0.5))], [("box", (0, 0, 0), (0.2, 0.9, 0.2))])
    c2w = camera(-90, 0)  # at -y: u runs along +x
    x = jnp.array([0.0, 0.1, 0.065])
    hits = first_hits(scene, c2w, x, jnp.zeros(3))
    np.testing.assert_array_equal(hits.inverse_depth > 0, [False, True, True])
    np.testing.assert_array_equal(hits.hole[1:], [-1, 0])
    # The third ray enters at x = 0.1625 and hits the wall x = 0.2 at y = 3 - 0.2 / 0.065.
    np.testing.assert_allclose(1 / hits.inverse_depth[2], 0.2 / 0.065, rtol=1e-5)
    xyz = jnp.asarray(points(c2w, x, jnp.zeros(3), hits), jnp.float32)
    found = normals(scene, hits, xyz)
    np.testing.assert_allclose(found[1], [0, -1, 0], atol=1e-6)
    np.testing.assert_allclose(found[2], [-1, 0, 0], atol=1e-6)


def test_a_hole_changes_only_the_parts_that_it_cuts():
    parts = [("box", (0, 0, 0), (0.5, 0.1, 0.5)), ("sphere", (0, 0.5, 0), (0.3, 0.3, 0.3))]
    hole = [("box", (0, 0, 0), (0.2, 2, 0.2))]
    zero = jnp.zeros(1)
    for cuts, solid in (([[True], [False]], 1), ([[False], [True]], 0)):
        hits = first_hits(geometry(parts, hole, cuts), camera(-90, 0), zero, zero)
        assert hits.solid[0] == solid and hits.inverse_depth[0] > 0
    hits = first_hits(geometry(parts, hole), camera(-90, 0), zero, zero)
    assert hits.inverse_depth[0] == 0


def test_windows_open_into_a_hollow_from_both_sides():
    hollow = ("box", (0, 0, 0), (0.4, 0.4, 0.4))
    windows = [("box", (0, y, 0), (0.2, 0.2, 0.2)) for y in (-0.5, 0.5)]
    scene = geometry([("box", (0, 0, 0), (0.5, 0.5, 0.5))], [hollow, *windows])
    for azimuth in (-90, 90):
        hits = first_hits(scene, camera(azimuth, 0), jnp.zeros(1), jnp.zeros(1))
        assert hits.inverse_depth[0] == 0
    hits = first_hits(scene, camera(0, 0), jnp.zeros(1), jnp.zeros(1))
    np.testing.assert_allclose(1 / hits.inverse_depth[0], 2.5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_outlines_are_on_the_surface_and_reach_its_extremes(kind):
    half = np.array([0.7, 0.5, 0.6])
    found = raytrace.outlines(solids((kind, (0.1, 0.2, 0.3), half)), jnp.zeros((1, 4)))[0]
    local = (np.asarray(found, float) - [0.1, 0.2, 0.3]) / half
    side, quadric = (np.array(v) for v in KINDS[kind])
    terms = raytrace._side_values(
        raytrace.Solids(jnp.eye(3, 4), jnp.asarray(side), jnp.asarray(quadric)),
        *map(jnp.asarray, local.T),
    )
    e, a, p, q = quadric
    value = e * (local[:, :2] ** 2).sum(1) + a * local[:, 2] ** 2 - (p - q * local[:, 2]) ** 2
    value = np.maximum(np.max(terms, axis=0), value / 2)
    value = np.maximum(value, local[:, 2] - 1)
    np.testing.assert_allclose(value, 0, atol=1e-5)
    extent = {"hexagon": [np.sqrt(3) / 2, 1, 1], "sphere": [1, 1, 1]}.get(kind, [1, 1, 1])
    if kind != "die":  # the edges of a die are cut away
        np.testing.assert_allclose(np.abs(local).max(0), extent, atol=1e-5)


def test_absent_solids_and_holes_change_nothing():
    parts = [("box", (0, 0, 0), (0.5, 0.4, 0.3)), ("cone", (0, 0, 0.6), (0.3, 0.3, 0.3))]
    absent = (None, (0, 0, 0), (1, 1, 1))
    c2w, (x, y) = camera(30, 20), grid(16)
    few = first_hits(geometry(parts), c2w, x, y)
    many = first_hits(geometry([*parts, absent, absent], [absent, absent]), c2w, x, y)
    # The numbers of more solids take more of the last bits.
    np.testing.assert_allclose(few.inverse_depth, many.inverse_depth, rtol=1e-6)
    np.testing.assert_array_equal(few.solid, many.solid)
    np.testing.assert_array_equal(many.hole, -1)
    assert (few.solid == 1).any()
