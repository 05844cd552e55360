"""Batches of procedural objects have the right geometry, depend only on seed and index, and look like objects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax.data import pipeline
from lrm_jax.data.procedural import assembly, blueprints, raytrace
from lrm_jax.data.procedural import source as procedural
from lrm_jax.ops import cameras as cameras_lib
from lrm_jax.ops import normalization
from lrm_jax.types import InputError

FIELDS = dict(seed=3, num_target=2, source_size=48, target_size=24)
COUNT = 12


def make(split: str = "train", **fields):
    return procedural.make(split=split, **{**FIELDS, **fields})


def indices(*values: int) -> dict[str, np.ndarray]:
    return {"index": np.array(values, np.uint32)}


_finish = jax.jit(make().finish)


@pytest.fixture(scope="module")
def batch():
    return jax.tree.map(np.asarray, _finish(indices(*range(COUNT))))


@pytest.fixture(scope="module")
def scenes():
    draw = jax.vmap(lambda index: procedural.scene_at(index, split="train", seed=3))
    return draw(jnp.arange(200, dtype=jnp.uint32))


def scene_of(scenes, index: int) -> assembly.Scene:
    return jax.tree.map(lambda a: a[index], scenes)


def test_batches_have_the_shapes_and_types_of_the_contract(batch):
    assert batch.source.rgb.shape == (COUNT, 1, 48, 48, 3) and batch.source.rgb.dtype == np.uint8
    assert batch.target.rgb.shape == (COUNT, 3, 24, 24, 3) and batch.target.rgb.dtype == np.uint8
    assert batch.target.alpha.shape == (COUNT, 3, 24, 24) and batch.target.alpha.dtype == np.uint8
    assert batch.source.cameras.c2w.shape == (COUNT, 1, 4, 4)
    assert batch.target.cameras.fxfycxcy.shape == (COUNT, 3, 4)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(batch))


def test_every_view_shows_an_object_that_leaves_room_around_it(batch):
    for views in (batch.source, batch.target):
        coverage = (views.alpha / 255).mean((2, 3))
        assert (coverage > 0.02).all() and (coverage < 0.8).all()
        assert 0.15 < coverage.mean() < 0.6
    seen = batch.source.rgb[batch.source.alpha == 255]
    assert seen.std(0).min() > 25  # of 255, so not all one colour


def test_an_object_depends_on_seed_split_and_index_only(batch):
    again = jax.tree.map(np.asarray, _finish(indices(7, 2, *range(40, 50))))
    for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a[7], b[0])
        np.testing.assert_array_equal(a[2], b[1])
    base = procedural.scene_at(5, split="train", seed=3).outline
    for index, split, seed in ((6, "train", 3), (5, "val", 3), (5, "train", 4)):
        other = procedural.scene_at(index, split=split, seed=seed).outline
        assert np.abs(np.asarray(base) - other).max() > 0.01


def test_train_is_endless_and_val_has_names():
    train, val = make().elements, make("val")
    assert len(train) > 2**40 and train[5]["index"] == 5
    assert train[2**32 + 5]["index"] == 5
    assert len(val.elements) == len(val.names) == procedural.NUM_VALIDATION
    batches = pipeline.open_batches(make(), 4, process_index=1, process_count=2)
    next(batches)
    _, elements = next(batches)
    batches.close()
    np.testing.assert_array_equal(elements["index"], [6, 7])


def test_the_first_target_is_the_source_uncropped(batch):
    np.testing.assert_array_equal(batch.target.cameras.c2w[:, :1], batch.source.cameras.c2w)
    # A point has the same colour in both views: the source at a target's pixels, if the object is plain and opaque there.
    source, target = batch.source, batch.target
    f, c = np.split(target.cameras.fxfycxcy[:, 0], 2, axis=-1)
    g, d = np.split(source.cameras.fxfycxcy[:, 0], 2, axis=-1)
    differences = []
    for b in range(COUNT):
        rows, columns = np.nonzero(target.alpha[b, 0] == 255)
        uv = (np.stack([columns, rows], -1) + 0.5) / 24
        at = ((uv - c[b]) / f[b] * g[b] + d[b]) * 48
        column, row = np.floor(at.clip(0, 47)).astype(int).T
        assert (source.alpha[b, 0, row, column] > 0).mean() > 0.98
        difference = source.rgb[b, 0, row, column].astype(int) - target.rgb[b, 0, rows, columns]
        differences.append(np.median(np.abs(difference)))
    # A target's pixel is the mean over several of the source.
    assert np.median(differences) < 12


def test_the_foreground_fills_its_share_of_the_source(batch):
    for alpha in batch.source.alpha[:, 0]:
        rows, columns = (np.flatnonzero(alpha.any(axis)) for axis in (1, 0))
        longer = max(np.ptp(rows), np.ptp(columns)) + 1
        # One of 48 pixels on either side. Round shapes are measured by 24 points per circle.
        assert abs(longer - 0.85 * 48) <= 2.5
        for ends in (rows, columns):
            assert abs(ends[0] + ends[-1] - 47) <= 3


def test_cameras_are_where_the_fields_put_them():
    @jax.jit
    @jax.vmap
    def draw(key):
        return procedural._draw_cameras(key, 2, 3, (5.0, 35.0), (-30.0, 75.0), (2.5, 3.5), 40.0)

    cameras = jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(0), 64)))
    eye = np.asarray(cameras.c2w[..., :3, 3], float)
    distance = np.linalg.norm(eye, axis=-1)
    assert distance.min() >= 2.5 - 1e-4 and distance.max() <= 3.5 + 1e-4 and np.ptp(distance) > 0.8
    elevation = np.degrees(np.arcsin(eye[..., 2] / distance))
    assert elevation[:, :2].min() >= 5 - 1e-3 and elevation[:, :2].max() <= 35 + 1e-3
    others = elevation[:, 2:]
    assert others.min() >= -30 - 1e-3 and others.max() <= 75 + 1e-3
    assert (others < 5).any() and (others > 35).any()
    within = ((others >= 5) & (others <= 35)).mean()
    assert 0.5 < within < 0.8  # half of the views, and 30 / 105 of the other half
    azimuth = np.arctan2(eye[..., 1], eye[..., 0])
    assert azimuth.min() < -2.5 and azimuth.max() > 2.5
    focal = 0.5 / np.tan(np.radians(20))
    expected = np.broadcast_to([focal, focal, 0.5, 0.5], cameras.fxfycxcy.shape)
    np.testing.assert_allclose(cameras.fxfycxcy, expected, rtol=1e-6)


def test_the_first_source_is_at_azimuth_0(batch):
    eye = batch.source.cameras.c2w[:, 0, :3, 3]
    np.testing.assert_allclose(eye[:, 1], 0, atol=1e-5)
    assert (eye[:, 0] > 0).all()
    np.testing.assert_allclose(np.linalg.norm(eye, axis=-1), 3, rtol=1e-5)


def test_normalizing_moves_the_world_and_nothing_else():
    args = 1, 3, (5.0, 35.0), (-30.0, 75.0), (3.0, 3.0), 40.0
    names = "azimuth", "source", None

    @jax.jit
    def move(key):
        cameras = procedural._draw_cameras(key, *args)
        return cameras, [procedural._normalized_poses(cameras, cameras, n, None) for n in names]

    cameras, poses = move(jax.random.key(1))
    moved = {n: np.asarray(c2w, float) for n, c2w in zip(names, poses, strict=True)}
    np.testing.assert_array_equal(moved[None], cameras.c2w)
    relative = {n: np.linalg.inv(c2w[:1]) @ c2w for n, c2w in moved.items()}
    for normalize in ("azimuth", "source"):
        np.testing.assert_allclose(relative[normalize], relative[None], atol=1e-5)
    np.testing.assert_allclose(moved["source"][0, :3, 3], [0, -3, 0], atol=1e-5)
    np.testing.assert_allclose(moved["source"][0, :3, 2], [0, 1, 0], atol=1e-5)
    turn = moved["azimuth"][0] @ np.linalg.inv(moved[None][0])
    np.testing.assert_allclose(turn[2], [0, 0, 1, 0], atol=1e-6)


def test_images_give_the_same_world_as_for_objects_from_files():
    assumed = (3.0, 40.0)
    made = make(normalize="image", assumed_camera=assumed), make(normalize=None)

    def cameras_of(finish):
        """Cameras of source and target. XLA then leaves out the images."""

        def both(elements):
            batch = finish(elements)
            return batch.source.cameras, batch.target.cameras

        return jax.tree.map(np.asarray, jax.jit(both)(indices(1, 5)))

    (_, there), (source, target) = (cameras_of(x.finish) for x in made)
    for i in range(2):
        motion = normalization.object_motion(
            source.c2w[i, 0], source.fxfycxcy[i, 0], "image", assumed
        )
        wanted = cameras_lib.move_poses(motion, target.c2w[i])
        np.testing.assert_allclose(there.c2w[i], wanted, atol=1e-4)  # float32


def test_views_of_a_scene_are_those_of_the_batch(batch):
    cameras = jax.tree.map(lambda a: a[4], batch.target.cameras)

    @jax.jit
    def draw():
        drawn = procedural._draw_cameras(
            procedural._keys(3, "train", 4)[1], 1, 2, (5.0, 35.0), (-30.0, 75.0), (3.0, 3.0), 40.0
        )
        return drawn, procedural._normalized_poses(drawn, drawn, "azimuth", None)

    original, turned = draw()
    np.testing.assert_allclose(turned, cameras.c2w, atol=1e-5)
    views = procedural.scene_views(4, original, 24, split="train", seed=3)
    difference = np.abs(np.asarray(views.rgb, int) - batch.target.rgb[4])
    # Another program may round a ray at an edge to the other side.
    assert (difference > 2).mean() < 0.005
    assert views.alpha.shape == (3, 24, 24)


def test_objects_fill_the_unit_sphere(scenes):
    outline = np.asarray(scenes.outline).reshape(200, -1, 3)
    np.testing.assert_allclose(np.linalg.norm(outline, axis=-1).max(1), 1, atol=1e-5)
    np.testing.assert_allclose(outline.max(1) + outline.min(1), 0, atol=1e-5)
    # No matter is outside, except for what 24 points per circle miss.
    rng = np.random.default_rng(0)
    shell = rng.normal(size=(4000, 3))
    shell *= 1.02 / np.linalg.norm(shell, axis=1, keepdims=True)
    inside = jax.jit(jax.vmap(raytrace.contains, (0, None)))(
        jax.tree.map(lambda a: a[:40], scenes.geometry), jnp.asarray(shell, jnp.float32)
    )
    assert not np.asarray(inside).any()


def test_objects_are_of_many_parts_many_have_holes_and_most_are_symmetric(scenes):
    solids = (np.asarray(scenes.geometry.solids.sides)[..., 2] > 0).sum(1)
    holes = (np.asarray(scenes.geometry.holes.sides)[..., 2] > 0).sum(1)
    assert solids.min() >= 1 and 5 <= np.median(solids) and solids.max() == 16
    assert 0.15 < (holes > 0).mean() < 0.7
    relief = np.asarray(scenes.geometry.relief)[..., 0].sum(1)
    assert 0.02 < (relief > 0).mean() < 0.3
    xyz = np.random.default_rng(1).uniform(-0.9, 0.9, (3000, 3)).astype(np.float32)
    contains = jax.jit(jax.vmap(raytrace.contains, (0, None)))
    few = jax.tree.map(lambda a: a[:60], scenes.geometry)
    inside = np.asarray(contains(few, jnp.asarray(xyz)))
    overlaps = []
    for mirror in ([-1, 1, 1], [1, -1, 1]):
        mirrored = np.asarray(contains(few, jnp.asarray(xyz * np.float32(mirror))))
        overlaps.append((inside & mirrored).sum(1) / np.maximum((inside | mirrored).sum(1), 1))
    assert (np.max(overlaps, axis=0) > 0.9).mean() > 0.4


@pytest.mark.parametrize("num_primitives, num_holes", [(1, 0), (40, 5)])
def test_any_number_of_primitives_makes_images(num_primitives, num_holes):
    views = procedural.scene_views(
        1, cameras_lib.orbit(2, 3.0, 20.0, 40.0), 8,
        split="train", seed=3, num_primitives=num_primitives, num_holes=num_holes,
    )  # fmt: skip
    assert (np.asarray(views.alpha).max((1, 2)) > 0).all()


def test_finish_is_abstractly_evaluable():
    shapes = jax.eval_shape(make().finish, {"index": jax.ShapeDtypeStruct((5,), jnp.uint32)})
    assert shapes.source.rgb.shape == (5, 1, 48, 48, 3)


def test_the_light_is_that_of_rendered_objects():
    # A white box from the side of the sun: 0.5 + 0.15 up + 0.5 cos(sun angle), then sRGB.
    identity = jnp.asarray(2 * np.eye(3, 4, dtype=np.float32)[None])
    sides, absent = (jnp.asarray([[0.0, 1, half, 0, 1, 0]]) for half in (1, -1))
    square = raytrace.Solids(identity, sides, jnp.asarray([[0.0, 0, 1, 0]]))
    cuts, relief = (jnp.asarray(np.zeros(s)) for s in ((1, 1), (1, 4)))
    geometry = raytrace.Geometry(square, square.replace(sides=absent), cuts != 0, relief)
    one, none = jnp.asarray(np.ones((1, 3))), jnp.asarray(np.zeros((1, 3)))
    grey = jnp.asarray(np.full((1, 2, 3), 0.5))
    paint = assembly.Paint(grey, jnp.asarray(np.zeros(1, int)), one, none)
    scene = assembly.Scene(geometry, paint, jax.jit(raytrace.outlines)(square, relief))
    views = procedural.render(scene, cameras_lib.orbit(1, 3.0, 90.0, 40.0), 8)
    linear = 0.5 * (0.5 + 0.15 + 0.5 * 0.70 / np.linalg.norm([0.45, -0.55, 0.70]))
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(views.rgb[0, 3:5, 3:5], expected, atol=0.6)  # 8 bits
    assert views.alpha[0, 4, 4] == 255 and views.alpha[0, 0, 0] == 0


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(split="test"), "split"),
        (dict(seed=-1), "seed"),
        (dict(num_primitives=0), "num_primitives"),
        (dict(num_holes=-1), "num_holes"),
        (dict(num_source=0), "num_source"),
        (dict(distance=(0.9, 3.0)), "distance"),
        (dict(elevation=(50.0, 10.0)), "elevation"),
        (dict(fov=180.0), "fov"),
        (dict(foreground_ratio=1.5), "foreground_ratio"),
        (dict(normalize="origin"), "normalize"),
    ],
)
def test_fields_out_of_range_are_named(fields, named):
    with pytest.raises(InputError, match=named):
        make(**fields)


def test_blueprints_are_sound():
    tables = blueprints.tables()
    count = len(blueprints.KINDS)
    assert all(len(table) == count for table in tables.values())
    assert (tables["range"][..., 0] <= tables["range"][..., 1]).all()
    assert (tables["base"] <= np.arange(blueprints.MAX_PARTS)).all()
    first_copies = tables["copies"][:, 0]
    assert (first_copies < 4).all()  # the first part has no base to copy
    relief = tables["range"][:, :, 11]
    assert (relief[:, 1:] == 0).all() and (relief[:, 0] > 0).any()
