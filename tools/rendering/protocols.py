"""Rendering protocols: the numbers of the published systems, and the cameras and the light made from them.

| | default | lrm | openlrm | triposr | one2345 | zero123 |
|---|---|---|---|---|---|---|
| views | 32 | 32 | 32 | *32* | 40: 8, and 4 neighbours of each | 12 |
| image | 256 | 1024 | 1024 | 512 | 256 | *256* (512) |
| the object fills | sphere of radius 1 | box [-1, 1]^3 | box [-1, 1]^3 | *box [-0.5, 0.5]^3* | box [-0.4, 0.4]^3 | box [-0.5, 0.5]^3 |
| distance of the cameras | 3 | U[1.5, 3] | U[1.9, 2.6] | 1.9 | 1.2 | U[1.5, 2.2] |
| heights of the cameras | elevations, see `choose_cameras` | U[-0.75, 1.6] | U[-0.75, 1.6] | *elevations as default* | `one2345_rig` | those of uniform points in a cube, normalised |
| full field of view | 40 | 50 | 67.38 (lens 24, sensor 32) | 40 | 49.13 (lens 35, sensor 32) | 49.13 (lens 35, sensor 32) |
| shading normals (embree) | the triangles' own | the file's | the file's | the file's | *the file's* | *the file's* |
| first view | like the others | *like the others* | from the front, height 0 | *like the others* | elevation 30, azimuth -60 | like the others |
| light | fixed | *varied* | *varied* | *varied* | *varied* | *varied* |
| Cycles samples per pixel | 32 | *128* | 128 | *128* | *32* | 128 |
| depth and normals | no | no | no | no | yes | no |

Sources: LRM, https://arxiv.org/abs/2311.04400, appendix on data; OpenLRM,
https://github.com/3DTopia/OpenLRM/blob/3108b69/scripts/data/objaverse/blender_script.py; TripoSR, https://arxiv.org/abs/2403.02151
(512-pixel images) and its released inference code (distance, field of view, and the half side 0.87 of the model's box); One-2-3-45,
https://arxiv.org/abs/2306.16928, and the poses that its code writes; Zero123, https://arxiv.org/abs/2303.11328, and the numbers of its
published rendering setup.

Values in *asterisks* are not stated by the references, and were chosen here. TripoSR published no recipe for its data. The corners of a
unit cube touch a sphere of radius 0.87, so the object stays in the model's box in any orientation. Of the light, only Zero123 gives
numbers: one lamp above the object, so wide that it is a sky, which leaves the side below black; our varied light shows all sides.
TripoSR's paper says only that renderings were varied to resemble photographs. Zero123 rendered 512 pixels, but its model sees 256. With [-1, 1]^3 and LRM's distances, a camera can
be inside the box of an object, and parts of the object can be outside the image. Zero123's nearer cameras cut off corners, too. This also happens in the references. One-2-3-45 did not
release how its training views were rendered: the size of the object, the lens and the 32 samples are those of its evaluation data. There,
the first view is at 30 or 0 degrees; `--elevation LO HI` draws another for each object.
"""

import dataclasses
import hashlib

import jax.numpy as jnp
import numpy as np

from lrm_jax.ops import cameras as cameras_lib
from lrm_jax.types import Cameras

PHOTO_ELEVATION = (5.0, 35.0)
SUN = np.array([0.45, -0.55, 0.70], np.float32) / np.linalg.norm([0.45, -0.55, 0.70])


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that determine the images. A folder can only be continued with the same settings.

    The defaults of the fields are those of the default protocol. A `render.json` that lacks a newer field stands for its default.
    """

    views: int = 32
    size: int = 256  # pixels
    distance: tuple[float, float] = (3.0, 3.0)  # from the cameras to the origin, world units
    elevation: tuple[float, float] | None = (-30.0, 75.0)  # degrees; None: `height` or `cube`
    fov: float = 40.0  # full, in degrees
    seed: int = 0
    height: tuple[float, float] | None = None  # z of the cameras, world units
    front_first: bool = False  # view 0 is on the -y axis, which the front faces in glTF
    # longest side of the object's box; None: its bounding sphere has radius 1
    box: float | None = None
    # Cycles always shades with the file's normals. embree by default uses the triangles' own, flat normals, because the bundled model
    # was trained on such images.
    file_normals: bool = False
    rig: bool = False  # the views are `ops.cameras.one2345_rig`; `elevation` is that of view 0
    lighting: str = "fixed"  # or "varied": a different light for each object
    geometry: bool = False  # also depth and normals
    cube: bool = False  # the cameras' directions are those of uniform points in a cube
    backend: str = "embree"
    samples: int = 32  # per pixel, for Cycles; embree takes 1, or 4 in pixels with detail


PROTOCOLS = {
    "default": Settings(),
    "lrm": Settings(
        size=1024, distance=(1.5, 3.0), elevation=None, height=(-0.75, 1.6), fov=50.0, box=2.0, file_normals=True, lighting="varied", samples=128
    ),
    "openlrm": Settings(
        size=1024, distance=(1.9, 2.6), elevation=None, height=(-0.75, 1.6), fov=float(np.degrees(2 * np.arctan(16 / 24))),
        front_first=True, box=2.0, file_normals=True, lighting="varied", samples=128,
    ),
    "triposr": Settings(size=512, distance=(1.9, 1.9), box=1.0, file_normals=True, lighting="varied", samples=128),
    "one2345": Settings(
        views=40, distance=(1.2, 1.2), elevation=(30.0, 30.0), fov=float(np.degrees(2 * np.arctan(128 / 280))), box=0.8, rig=True,
        file_normals=True, lighting="varied", geometry=True,
    ),
    "zero123": Settings(
        views=12, distance=(1.5, 2.2), elevation=None, fov=float(np.degrees(2 * np.arctan(16 / 35))), box=1.0, cube=True,
        file_normals=True, lighting="varied", samples=128,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Lighting:
    """A sun, and a sky that is brighter above. A white matt surface with unit normal n reflects, in linear light,
    `sky + above * n_z + sun * max(n . direction, 0)`."""

    direction: np.ndarray = dataclasses.field(
        default_factory=lambda: SUN
    )  # [3] unit, towards the sun
    sun: float = 0.50
    sky: float = 0.50
    above: float = 0.15


def rng_of(uid: str, *numbers: int) -> np.random.Generator:
    """Random numbers for an object. They depend only on its name and the numbers, so that resuming changes nothing."""
    return np.random.default_rng([*numbers, *hashlib.sha256(uid.encode()).digest()])


def choose_lighting(settings: Settings, uid: str) -> Lighting:
    """The light of an object. It is the same in all views, so that the source and the target images agree.

    "varied" uses our own ranges: the sun is 15 to 80 degrees high and gives between a fifth and seven tenths of the light. A surface that
    faces the sun reflects 0.75 to 1.1 in total ("fixed" has 1.1, which clips the brightest channels).
    """
    if settings.lighting == "fixed":
        return Lighting()
    rng = rng_of(uid, settings.seed, 1)
    azimuth, elevation = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(15, 80))
    total, directed = rng.uniform(0.75, 1.1), rng.uniform(0.2, 0.7)
    sky = total * (1 - directed)
    above = sky * rng.uniform(0, 0.3)
    direction = _outward(azimuth, elevation).astype(np.float32)
    return Lighting(
        direction, float(total * directed), float(sky - above * direction[2]), float(above)
    )


def choose_cameras(settings: Settings, uid: str) -> Cameras:
    """The cameras of an object, NumPy Cameras[V], all looking at the origin.

    By elevation: views with even numbers have an elevation in PHOTO_ELEVATION, like photographs, and views with odd numbers in
    `settings.elevation`. Both are spread evenly around the object. By height: directions are uniform on the part of the sphere between
    the two heights (on a sphere, equal heights have equal areas: Archimedes). By a cube: directions are denser towards its corners than
    on a sphere, and more than a quarter of them are over 30 degrees below the horizon. One-2-3-45's rig: only the elevation of view 0 is drawn.
    """
    rng = rng_of(uid, settings.seed)
    if settings.rig:
        return cameras_lib.one2345_rig(90 - rng.uniform(*settings.elevation))
    if settings.cube:
        eyes_of = _eyes_by_cube
    else:
        eyes_of = _eyes_by_elevation if settings.height is None else _eyes_by_height
    eye = eyes_of(settings, rng)
    if settings.front_first:
        eye[0] = [0, -np.linalg.norm(eye[0]), 0]
    eye = jnp.asarray(eye, jnp.float32)
    intrinsics = np.tile(np.asarray(cameras_lib.field_of_view(settings.fov)), (settings.views, 1))
    return Cameras(
        c2w=np.asarray(cameras_lib.look_at(eye, jnp.zeros_like(eye))), fxfycxcy=intrinsics
    )


def _eyes_by_elevation(settings: Settings, rng: np.random.Generator) -> np.ndarray:
    azimuth, elevation = np.zeros(settings.views), np.zeros(settings.views)
    for half, band in (
        (slice(0, None, 2), PHOTO_ELEVATION),
        (slice(1, None, 2), settings.elevation),
    ):
        count = len(azimuth[half])
        azimuth[half] = (np.arange(count) + rng.uniform(size=count)) / max(count, 1) * 2 * np.pi
        elevation[half] = np.radians(rng.uniform(*band, count))
    return rng.uniform(*settings.distance, settings.views)[:, None] * _outward(azimuth, elevation)


def _eyes_by_height(settings: Settings, rng: np.random.Generator) -> np.ndarray:
    distance = rng.uniform(*settings.distance, settings.views)
    low, high = np.maximum(settings.height[0], -distance), np.minimum(settings.height[1], distance)
    azimuth = rng.uniform(0, 2 * np.pi, settings.views)
    elevation = np.arcsin(rng.uniform(low, high) / distance)
    return distance[:, None] * _outward(azimuth, elevation)


def _eyes_by_cube(settings: Settings, rng: np.random.Generator) -> np.ndarray:
    distance = rng.uniform(*settings.distance, settings.views)
    point = rng.uniform(-1, 1, (settings.views, 3))
    return (distance / np.linalg.norm(point, axis=-1))[:, None] * point


def _outward(azimuth, elevation) -> np.ndarray:
    """[... 3] unit vectors, from angles in radians."""
    flat = np.cos(elevation)
    return np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], axis=-1)
