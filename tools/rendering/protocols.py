"""How an object is photographed: the numbers of the published systems, and from them the cameras and the light.

| | default | lrm | openlrm | triposr |
|---|---|---|---|---|
| views | 32 | 32 | 32 | *32* |
| image | 256 | 1024 | 1024 | 512 |
| the object fills | sphere of radius 1 | box [-1, 1]^3 | box [-1, 1]^3 | *box [-0.5, 0.5]^3* |
| distance of the cameras | 3 | U[1.5, 3] | U[1.9, 2.6] | 1.9 |
| their heights | elevations, see `choose_cameras` | U[-0.75, 1.6] | U[-0.75, 1.6] | *elevations as default* |
| full field of view | 40 | 50 | 67.38 (lens 24, sensor 32) | 40 |
| shading normals (embree) | the triangles' own | the file's | the file's | the file's |
| first view | like the others | *like the others* | from the front, height 0 | *like the others* |
| light | fixed | *varied* | *varied* | *varied* |
| Cycles samples a pixel | 32 | *128* | 128 | *128* |

Sources: LRM, https://arxiv.org/abs/2311.04400, appendix on data; OpenLRM,
https://github.com/3DTopia/OpenLRM/blob/3108b69/scripts/data/objaverse/blender_script.py; TripoSR, https://arxiv.org/abs/2403.02151
(512-pixel images) and its released inference code (distance, field of view, and the half side 0.87 of the model's box).

*Slanted* is what the references do not state, chosen here. TripoSR published no recipe of its data: a unit cube is what touches a
sphere of radius 0.87 with its corners, so it stays in the model's box at every turn. "Light" is nowhere given in numbers: TripoSR's
paper says only that renderings were varied to resemble photographs. With [-1, 1]^3 and LRM's distances a camera can stand inside the
box of an object, and parts of it fall outside the image: so they do in the references.
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
    """What decides the images: a folder is only ever continued with the same ones.

    The defaults of the fields are the default protocol's, which a `render.json` from before a field existed stands for.
    """

    views: int = 32
    size: int = 256  # pixels
    distance: tuple[float, float] = (3.0, 3.0)  # of the cameras from the origin, world units
    elevation: tuple[float, float] | None = (-30.0, 75.0)  # degrees; None: `height` decides
    fov: float = 40.0  # degrees, full
    seed: int = 0
    height: tuple[float, float] | None = None  # z of the cameras, world units
    front_first: bool = False  # view 0 stands on the -y axis, which glTF's front faces
    # longest side of the object's box; None: its bounding sphere has radius 1
    box: float | None = None
    # Cycles always shades with the file's normals; embree by default with the triangles' own, flat, because the images that
    # the bundled model has learnt from are so.
    file_normals: bool = False
    lighting: str = "fixed"  # or "varied": one light an object
    geometry: bool = False  # depth and normals as well
    backend: str = "embree"
    samples: int = 32  # a pixel, of Cycles; embree takes 1, and 4 where there is detail


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
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Lighting:
    """A sky that is brighter above, and a sun: a white matt surface with unit normal n reflects, in linear light,
    `sky + above * n_z + sun * max(n . direction, 0)`."""

    direction: np.ndarray = dataclasses.field(default_factory=lambda: SUN)  # [3] unit, towards it
    sun: float = 0.50
    sky: float = 0.50
    above: float = 0.15


def rng_of(uid: str, *numbers: int) -> np.random.Generator:
    """Random numbers of an object: of its name and the numbers alone, so that resuming changes nothing."""
    return np.random.default_rng([*numbers, *hashlib.sha256(uid.encode()).digest()])


def choose_lighting(settings: Settings, uid: str) -> Lighting:
    """The light of an object, the same in all its views: only then do the source and the target images agree.

    "varied" (our own ranges): the sun anywhere 15 to 80 degrees high, between a fifth and seven tenths of the light, and
    what faces the sun reflects 0.75 to 1.1 of it ("fixed" has 1.1, of which the brightest channels clip).
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

    By elevation: the views with even numbers have one in PHOTO_ELEVATION, as photographs have, the odd ones in
    `settings.elevation`, both spread evenly around. By height: directions are uniform on the part of the sphere between the
    two heights (on a sphere, equal heights have equal areas: Archimedes).
    """
    rng = rng_of(uid, settings.seed)
    eye = (
        _eyes_by_elevation(settings, rng)
        if settings.height is None
        else _eyes_by_height(settings, rng)
    )
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


def _outward(azimuth, elevation) -> np.ndarray:
    """[... 3] unit vectors, from radians."""
    flat = np.cos(elevation)
    return np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], axis=-1)
