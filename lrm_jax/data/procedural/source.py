"""Objects that need no files: drawn at random and ray-traced on the device, in practically unlimited number.

Reconstruction models can learn from such objects alone: LRM-Zero (https://arxiv.org/abs/2406.09371), MegaSynth
(https://arxiv.org/abs/2410.14166). These objects look like toys and game assets. They have the same light and cameras as the
images of `tools/render_objects.py`, so that the two can be mixed. An object is a function of the seed, the split and its index.
"""

import functools

import grain
import jax
import jax.numpy as jnp
import numpy as np

from lrm_jax.data import Source
from lrm_jax.data.elements import make_recipe
from lrm_jax.data.procedural import assembly, blueprints, raytrace
from lrm_jax.images.png import to_uint8
from lrm_jax.ops import cameras as cameras_lib
from lrm_jax.ops import normalization, srgb
from lrm_jax.types import Batch, Cameras, InputError, Views

SPLITS = ("train", "val")
NUM_VALIDATION = 64
# The same light as in tools/render_objects.py.
SUN = np.array([0.45, -0.55, 0.70], np.float32) / np.float32(np.linalg.norm([0.45, -0.55, 0.70]))
_SAMPLES = 2  # along each side of a pixel
_CHUNK = 2**12  # rays of each view at a time: their data fits in a CPU's cache


def make(
    *,
    split: str,
    seed: int,
    num_target: int,
    source_size: int,
    target_size: int,
    num_source: int = 1,
    source_elevation: tuple[float, float] = (5.0, 35.0),
    foreground_ratio: float | None = 0.85,
    normalize: str | None = "azimuth",
    assumed_camera: tuple[float, float] | None = None,
    sources_as_targets: bool = True,
    num_primitives: int = 16,
    num_holes: int = 4,
    distance: tuple[float, float] = (3.0, 3.0),
    elevation: tuple[float, float] = (-30.0, 75.0),
    fov: float = 40.0,
) -> Source:
    """Random objects. The fields are those of `elements.Recipe`, and the following.

    Args:
      split: "train": 2^32 objects, repeated endlessly; "val": 64 others.
      seed: seed of everything random.
      num_primitives: largest number of convex solids in an object.
      num_holes: largest number of holes in an object.
      distance: (low, high), distance of the cameras from the origin; the object's radius is 1.
      elevation: (low, high), degrees, for half of the views besides the sources, at random. The other half has
        `source_elevation`, like photographs.
      fov: full vertical field of view of the target views, degrees.

    Raises:
      InputError: a field is out of range.
    """
    make_recipe(
        split,
        num_target=num_target,
        source_size=source_size,
        target_size=target_size,
        num_source=num_source,
        source_elevation=source_elevation,
        foreground_ratio=foreground_ratio,
        normalize=normalize,
        assumed_camera=assumed_camera,
        sources_as_targets=sources_as_targets,
    )
    _check(split, seed, num_primitives, num_holes, source_elevation, elevation, distance, fov)
    if normalize in normalization.BY_ALL_SOURCES:
        raise InputError(
            f"data.normalize={normalize}: not for procedural objects: leave out data.mix"
        )

    def finish(elements: dict[str, jax.Array]) -> Batch:
        return jax.vmap(one)(elements["index"])

    def one(index: jax.Array) -> Batch:
        of_object, of_cameras = _keys(seed, split, index)
        scene = assembly.draw_scene(of_object, num_primitives, num_holes)
        cameras = _draw_cameras(
            of_cameras, num_source, num_target, source_elevation, elevation, distance, fov
        )
        sources = jax.tree.map(lambda a: a[:num_source], cameras)
        if foreground_ratio is not None:
            sources = _crop(sources, scene.outline, foreground_ratio)
        source = _views(scene, sources, source_size)
        poses = _normalized_poses(cameras, sources, normalize, assumed_camera)
        first = 0 if sources_as_targets else num_source
        target = _views(scene, jax.tree.map(lambda a: a[first:], cameras), target_size)
        return Batch(
            source=_moved(source, poses[:num_source]), target=_moved(target, poses[first:])
        )

    count = NUM_VALIDATION if split == "val" else 2**32
    elements = grain.MapDataset.range(count).map(_element)
    if split == "train":
        return Source(elements=elements.repeat(), finish=finish)
    return Source(
        elements=elements, finish=finish, names=tuple(f"procedural-{i:02d}" for i in range(count))
    )


def scene_views(
    index: int | jax.Array,
    cameras: Cameras,
    size: int,
    *,
    split: str,
    seed: int,
    num_primitives: int = 16,
    num_holes: int = 4,
) -> Views:
    """Square views of the object at an index, from Cameras[V] outside the unit sphere: Views without the B axis.

    The object is in its own frame, as in `make` with `normalize=None`.
    """
    how = dict(split=split, seed=seed, num_primitives=num_primitives, num_holes=num_holes)
    return render(scene_at(index, **how), cameras, size)


@functools.partial(jax.jit, static_argnames=("split", "num_primitives", "num_holes"))
def scene_at(
    index: int | jax.Array, *, split: str, seed: int, num_primitives: int = 16, num_holes: int = 4
) -> assembly.Scene:
    """The object at an index. `raytrace.contains(scene.geometry, xyz)` tells which points are inside it."""
    return assembly.draw_scene(_keys(seed, split, index)[0], num_primitives, num_holes)


@functools.partial(jax.jit, static_argnames="size")
def render(scene: assembly.Scene, cameras: Cameras, size: int) -> Views:
    """Square images of a scene from Cameras[V]: Views without the B axis."""
    return _views(scene, cameras, size)


def _check(split, seed, num_primitives, num_holes, source_elevation, elevation, distance, fov):
    if source_elevation is None:
        raise InputError("data.source_elevation=None: procedural objects need (low, high), degrees")
    if split not in SPLITS:
        raise InputError(f"data.split={split!r}: must be train or val")
    if not 0 <= seed < 2**32:
        raise InputError(f"data.seed={seed}: must be from 0 to 2**32 - 1")
    if num_primitives < 1 or num_holes < 0:
        raise InputError(
            f"data.num_primitives={num_primitives}, data.num_holes={num_holes}: must be at least 1 and 0"
        )
    if not -90 <= elevation[0] <= elevation[1] <= 90:
        raise InputError(f"data.elevation={elevation}: needs -90 <= low <= high <= 90")
    if not 1 < distance[0] <= distance[1]:
        raise InputError(f"data.distance={distance}: needs 1 < low <= high; the radius is 1")
    if not 0 < fov < 170:
        raise InputError(f"data.fov={fov}: must be between 0 and 170 degrees")


def _element(index: int) -> dict[str, np.ndarray]:
    return {"index": np.uint32(index)}


def _keys(seed: int | jax.Array, split: str, index: jax.Array) -> jax.Array:
    """Two keys [2], for an object and for its cameras. Different splits never share keys."""
    key = jax.random.key(jnp.asarray(seed, jnp.uint32))
    key = jax.random.fold_in(key, SPLITS.index(split))
    return jax.random.split(jax.random.fold_in(key, index))


# -- cameras


def _draw_cameras(
    key, num_source, num_target, source_elevation, elevation, distance, fov
) -> Cameras:
    """Cameras[V] that look at the origin, the sources first."""
    count = num_source + num_target
    azimuth, height, far, coin = jax.random.uniform(key, (4, count))
    bands = np.radians(np.array([source_elevation, elevation], np.float32))
    is_photo = (jnp.arange(count) < num_source) | (coin < 0.5)
    low, high = (jnp.where(is_photo, bands[0, i], bands[1, i]) for i in (0, 1))
    azimuth, tilt = 2 * np.pi * azimuth, low + height * (high - low)
    outward = jnp.stack(
        [jnp.cos(tilt) * jnp.cos(azimuth), jnp.cos(tilt) * jnp.sin(azimuth), jnp.sin(tilt)], axis=-1
    )
    eye = (distance[0] + far * (distance[1] - distance[0]))[:, None] * outward
    return Cameras(
        c2w=cameras_lib.look_at(eye, jnp.zeros_like(eye)),
        fxfycxcy=jnp.tile(cameras_lib.field_of_view(fov)[None], (count, 1)),
    )


def _crop(cameras: Cameras, outline: jax.Array, ratio: float) -> Cameras:
    """The cameras of square crops around the object. Its longer side fills `ratio`, as in `images.recentre`."""
    points = jnp.broadcast_to(outline.reshape(1, -1, 3), (len(cameras.c2w), outline.size // 3, 3))
    uv, _ = cameras_lib.project(cameras, points)
    low, high = uv.min(1), uv.max(1)
    side = (high - low).max(-1, keepdims=True) / ratio
    corner = 0.5 * (low + high - side)
    return cameras_lib.crop_cameras(cameras, corner[:, ::-1], jnp.tile(side, (1, 2)))


def _normalized_poses(cameras: Cameras, sources: Cameras, normalize: str | None, assumed_camera):
    """The poses [V 4 4] after the motion of `normalization.object_motion`. `cameras` begin with the sources, uncropped."""
    if normalize is None:
        return cameras.c2w
    c2w = sources.c2w[0]
    with jax.default_matmul_precision("highest"):
        if normalize == "image":
            motion = cameras_lib.image_motion(c2w, sources.fxfycxcy[0], *assumed_camera)
        else:
            motions = {"source": cameras_lib.source_motion, "azimuth": cameras_lib.azimuth_motion}
            motion = motions[normalize](c2w)
        return cameras_lib.move_poses(motion, cameras.c2w)


def _moved(views: Views, c2w: jax.Array) -> Views:
    return views.replace(cameras=views.cameras.replace(c2w=c2w))


# -- images


def _views(scene: assembly.Scene, cameras: Cameras, size: int) -> Views:
    rgb, alpha = jax.vmap(lambda camera: _image(scene, camera, size))(cameras)
    return Views(rgb=rgb, cameras=cameras, alpha=alpha)


def _image(scene: assembly.Scene, camera: Cameras, size: int) -> tuple[jax.Array, jax.Array]:
    """uint8 straight sRGB [size size 3] and alpha [size size], averaged over 2 x 2 samples per pixel.

    This loops over strips of the image several times, although one loop would do. The results of a loop are stored. In one fused
    expression, XLA for CPUs would recompute each value for each of its uses, which takes ten times as long.
    """
    fine, geometry = size * _SAMPLES, scene.geometry
    fits = [r for r in range(1, size + 1) if size % r == 0 and r * _SAMPLES * fine <= _CHUNK]
    rows = max(fits, default=1)
    fx, fy, cx, cy = camera.fxfycxcy

    def rays(first_row):
        u = (jnp.arange(fine) + 0.5) / fine
        v = (first_row * _SAMPLES + jnp.arange(rows * _SAMPLES) + 0.5) / fine
        return jnp.meshgrid((u - cx) / fx, (v - cy) / fy)

    def trace(first_row):
        return raytrace.first_hits(geometry, camera.c2w, *rays(first_row))

    def find_face(strip):
        first_row, hits = strip
        xyz = raytrace.points(camera.c2w, *rays(first_row), hits)
        return raytrace.faces(geometry, hits, xyz)

    def shade(strip):
        first_row, hits, face = strip
        xyz = raytrace.points(camera.c2w, *rays(first_row), hits)
        normal = raytrace.normals(geometry, hits, face, xyz)
        return _light(hits, normal), _second_fraction(scene, hits, xyz, normal[..., 2])

    def average(strip):
        supersampled = rows, _SAMPLES, size, _SAMPLES
        hits, light, fraction = jax.tree.map(lambda a: a.reshape(supersampled), strip)
        first, second = jnp.moveaxis(raytrace.rows(scene.paint.colours, hits.solid), -2, 0)
        rgb = (first + (second - first) * fraction[..., None]) * light[..., None]
        return rgb.mean((1, 3)), (hits.inverse_depth > 0).mean((1, 3), dtype=jnp.float32)

    starts = jnp.arange(0, size, rows)
    hits = jax.lax.map(trace, starts)
    face = jax.lax.map(find_face, (starts, hits))
    light, fraction = jax.lax.map(shade, (starts, hits, face))
    rgb, alpha = jax.lax.map(average, (hits, light, fraction))
    rgb, alpha = rgb.reshape(size, size, 3), alpha.reshape(size, size)
    straight = jnp.clip(rgb / jnp.maximum(alpha, 1e-6)[..., None], 0, 1)
    colour = srgb.from_linear(straight)
    return to_uint8(colour), to_uint8(alpha)


def _light(hits: raytrace.Hits, normal: jax.Array) -> jax.Array:
    """The light [*R] that a white surface sends to the camera; 0 if the ray misses."""
    sun = jnp.maximum(sum(normal[..., i] * SUN[i] for i in range(3)), 0)
    # The inside of a hole gets less light from the sky.
    light = (0.50 + 0.15 * normal[..., 2] + 0.50 * sun) * jnp.where(hits.hole >= 0, 0.8, 1.0)
    return jnp.where(hits.inverse_depth > 0, light, 0)


def _second_fraction(
    scene: assembly.Scene, hits: raytrace.Hits, xyz: jax.Array, up: jax.Array
) -> jax.Array:
    """The share [*R] of the second colour, in [0, 1], at surface points xyz whose normals have the z component `up`."""
    tables = scene.geometry.solids.to_local, scene.paint.replace(colours=None)
    own, paint = raytrace.rows(tables, hits.solid)
    p = raytrace.to_local(own, xyz)
    x, y, z = (paint.scale[..., i] * p[i] + paint.shift[..., i] for i in range(3))
    row = jnp.floor(2 * z)
    along = x + y + 0.5 * row
    # The second largest coordinate (absolute) is near 1 along the edges of a box.
    ax, ay, az = (jnp.abs(v) for v in p)
    second = jnp.maximum(jnp.minimum(ax, ay), jnp.minimum(jnp.maximum(ax, ay), az))
    swirl = _wave(0.6 * x + 0.4 * y) + _wave(0.5 * z + 0.3 * x)
    centre = sum((v - jnp.floor(v) - 0.5) ** 2 for v in (x, y, z))
    fraction = dict(
        flat=jnp.zeros_like(z),
        fade=0.5 + 0.5 * p[2],
        bands=_fraction(z) < 0.5,
        stripes=_fraction(x + y) < 0.5,
        checks=jnp.mod(jnp.floor(x) + jnp.floor(y) + jnp.floor(z), 2),
        bricks=(_fraction(2 * z) < 0.12) | (_fraction(along) < 0.08),
        marble=_wave(0.7 * x + 0.3 * y + 0.5 * z + 0.5 * swirl),
        cap=up > 0.6,
        frame=second > 0.8,
        dots=centre < 0.1,
    )
    result = jnp.zeros_like(z)
    for number, name in enumerate(blueprints.PATTERNS):
        result = jnp.where(paint.pattern == number, fraction[name].astype(z.dtype), result)
    return result


def _fraction(x: jax.Array) -> jax.Array:
    return x - jnp.floor(x)


def _wave(x: jax.Array) -> jax.Array:
    """A smooth wave with period 1 and values in [0, 1]."""
    u = _fraction(x)
    return 16 * (u * (1 - u)) ** 2
