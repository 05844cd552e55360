"""Cameras and rays in one convention: OpenCV axes (OpenGL poses are converted here), camera to world, intrinsics as fractions.

    world (right-handed, z up)            camera (OpenCV)              image (u, v are fractions)

          z                                    z forward                  (0,0) ----> u (1,0)
          |                                   /                             |
          |    the object fills              /                              v
          o------ y   a box around          o------ x right               (0,1)      (1,1)
         /            the origin            |
        /                                   |                          pixel (row, col) of H x W has its centre at
       x                                    y down                     u = (col + 0.5) / W,  v = (row + 0.5) / H

A point `p` in the camera frame is `c2w @ [p, 1]` in the world, and projects to `u = cx + fx x / z`, `v = cy + fy y / z`.
OpenGL and Blender cameras have x right, y up, z backward. Only `opengl_to_opencv` and `opencv_to_opengl` deal with them.
Azimuths are measured from +x towards +y, elevations from the xy plane towards +z, both in degrees.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lrm_jax.types import Cameras, Rays


def opengl_to_opencv(
    c2w: Float[Array | np.ndarray, "*B 4 4"],
) -> Float[Array | np.ndarray, "*B 4 4"]:
    """Converts the axes of an OpenGL (or Blender) camera to OpenCV's: y and z change sign. Its own inverse.

    A NumPy array gives a NumPy array, so that data loader processes never initialise JAX.
    """
    xp = c2w.__array_namespace__()
    return c2w * xp.broadcast_to(xp.asarray([1.0, -1.0, -1.0, 1.0], dtype=c2w.dtype), c2w.shape)


opencv_to_opengl = opengl_to_opencv


def look_at(
    eye: Float[Array, "*B 3"],
    target: Float[Array, "*B 3"],
    up: Float[Array, "3"] | tuple[float, float, float] = (0.0, 0.0, 1.0),
) -> Float[Array, "*B 4 4"]:
    """The pose of a camera at `eye` with `target` in the middle of its image and `up` pointing upwards in it.

    A camera that looks along `up` itself gets a fixed image-up direction at right angles to it: +y if `up` is z, as on a
    map. `orbit` has no such jump at a pole.

    Args:
      eye: world position of the camera; must differ from `target`.
      target: world point on the optical axis.
      up: world direction, of any length.
    """
    forward = _unit(target - eye)
    up = _unit(jnp.asarray(up, forward.dtype))
    x, y, z = up
    # Always at right angles to `up`.
    spare = jnp.where(y**2 + z**2 > 0, jnp.stack([0 * x, z, -y]), jnp.stack([0 * x, x, 0 * x]))
    right, fallback = (
        jnp.cross(forward, jnp.broadcast_to(axis, forward.shape)) for axis in (up, spare)
    )
    # At 1e-4 rad from the pole, `right` still has three good digits in float32.
    degenerate = jnp.linalg.norm(right, axis=-1, keepdims=True) < 1e-4
    return _pose(eye, _unit(jnp.where(degenerate, fallback, right)), forward)


def orbit(
    num_views: int,
    distance: float,
    elevation_deg: float,
    fov_y_deg: float,
    azimuth_deg: float = 0.0,
    aspect: float = 1.0,
) -> Cameras:
    """Cameras evenly spaced on a circle around the z axis, all looking at the origin.

    Args:
      num_views: V. View V, after a full turn, would be view 0 again.
      distance: from the origin, world units.
      elevation_deg: of every camera, in [-90, 90]; well defined at both ends.
      fov_y_deg: full vertical field of view.
      azimuth_deg: of the first camera. The others follow counter-clockwise, seen from above.
      aspect: width / height of the images.

    Returns:
      Cameras[V].
    """
    azimuth = np.radians(azimuth_deg + 360.0 * np.arange(num_views) / num_views)
    elevation = np.radians(elevation_deg)
    cos, sin = np.cos(azimuth), np.sin(azimuth)
    outward = np.stack(
        [np.cos(elevation) * cos, np.cos(elevation) * sin, np.full(num_views, np.sin(elevation))],
        axis=-1,
    )
    right = np.stack([-sin, cos, np.zeros(num_views)], axis=-1)
    eye, right, forward = (
        jnp.asarray(a, jnp.float32) for a in (distance * outward, right, -outward)
    )
    intrinsics = jnp.tile(field_of_view(fov_y_deg, aspect)[None], (num_views, 1))
    return Cameras(c2w=_pose(eye, right, forward), fxfycxcy=intrinsics)


def orbit_of(camera: Cameras) -> dict[str, float]:
    """The arguments of an `orbit` whose first camera stands where `camera` (Cameras[]) stands; all but the number of views."""
    x, y, z = np.asarray(camera.c2w)[:3, 3].tolist()
    distance = float(np.linalg.norm([x, y, z]))
    return {
        "distance": distance,
        "elevation_deg": float(np.degrees(np.arcsin(z / distance))),
        "azimuth_deg": float(np.degrees(np.arctan2(y, x))),
        "fov_y_deg": float(np.degrees(2 * np.arctan(0.5 / float(camera.fxfycxcy[1])))),
    }


def one2345_rig(polar_deg: float) -> Cameras:
    """The 40 views of One-2-3-45 (https://arxiv.org/abs/2306.16928, sec. 3.2): NumPy Cameras[40], all looking at the origin.

    View 0 is the input. Views 1 to 3 follow it in steps of 90 degrees, counter-clockwise seen from above. Views 4 to 7 are 30
    degrees farther than these and 30 degrees lower, or higher if that would be more than 15 degrees below the horizon. Views 8
    to 39 are four neighbours of each: 10 degrees above, below, at the smaller and at the larger azimuth. View 0 is at azimuth
    -60, which the reference calls 30. All are at distance 1.2, with a focal length of 280 / 256 image sides.

    Args:
      polar_deg: of view 0, from +z downwards: 90 minus its elevation.
    """
    lower = polar_deg + (30 if polar_deg <= 75 else -30)
    quarters = -60.0 + 90 * np.arange(4)
    polar = np.repeat([polar_deg, lower], 4)
    azimuth = np.concatenate([quarters, quarters + 30])
    steps = np.array([[-10, 0], [10, 0], [0, -10], [0, 10]])
    polar = np.radians(np.concatenate([polar, (polar[:, None] + steps[:, 0]).ravel()]))
    azimuth = np.radians(np.concatenate([azimuth, (azimuth[:, None] + steps[:, 1]).ravel()]))
    flat = np.sin(polar)
    outward = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.cos(polar)], axis=-1)
    eye = jnp.asarray(1.2 * outward, jnp.float32)
    intrinsics = np.tile(np.float32([280 / 256, 280 / 256, 0.5, 0.5]), (len(outward), 1))
    return Cameras(c2w=np.asarray(look_at(eye, jnp.zeros_like(eye))), fxfycxcy=intrinsics)


def field_of_view(fov_y_deg: float, aspect: float = 1.0) -> Float[Array, "4"]:
    """Intrinsics of a centred camera: full vertical field of view `fov_y_deg`, width / height = `aspect`."""
    focal = 0.5 / np.tan(np.radians(fov_y_deg) / 2)
    return jnp.array([focal / aspect, focal, 0.5, 0.5], jnp.float32)


def pixel_rays(cameras: Cameras, height: int, width: int) -> Rays:
    """The rays through all pixel centres of Cameras[*B]: Rays[*B H W]."""
    u = (jnp.arange(width, dtype=jnp.float32) + 0.5) / width
    v = (jnp.arange(height, dtype=jnp.float32) + 0.5) / height
    uv = jnp.stack(jnp.meshgrid(u, v), axis=-1)
    focal, centre = jnp.split(cameras.fxfycxcy[..., None, None, :], 2, axis=-1)
    batch = cameras.c2w.shape[:-2]
    uv = jnp.broadcast_to(uv, (*batch, height, width, 2))
    xy = (uv - centre) / focal
    directions = jnp.concatenate([xy, jnp.ones_like(xy[..., :1])], axis=-1)
    directions = _product("...ij,...hwj->...hwi", cameras.c2w[..., :3, :3], directions)
    origins = jnp.broadcast_to(cameras.c2w[..., None, None, :3, 3], directions.shape)
    return Rays(origins=origins, dirs=_unit(directions))


def project(
    cameras: Cameras, xyz: Float[Array, "*B Q 3"]
) -> tuple[Float[Array, "*B Q 2"], Float[Array, "*B Q"]]:
    """Projects world points into Cameras[*B].

    Returns:
      (u, v) as fractions of width and height, outside [0, 1] for points outside the image; and z, the distance along
      the optical axis in world units. If z <= 0, the point is behind the camera and u, v are meaningless.
    """
    offset = xyz - cameras.c2w[..., None, :3, 3]
    local = _product("...ji,...qj->...qi", cameras.c2w[..., :3, :3], offset)
    focal, centre = jnp.split(cameras.fxfycxcy[..., None, :], 2, axis=-1)
    z = local[..., 2]
    return local[..., :2] / z[..., None] * focal + centre, z


def crop_cameras(
    cameras: Cameras, top_left: Float[Array, "*B 2"], size: Float[Array, "*B 2"]
) -> Cameras:
    """The cameras of crops. A crop is itself an image, from a camera with another principal point and focal length.

    Args:
      cameras: Cameras[*B].
      top_left: (row, column) of the crop's corner, as fractions of height and width.
      size: (height, width) of the crop, as fractions of the whole.
    """
    focal, centre = jnp.split(cameras.fxfycxcy, 2, axis=-1)
    corner, extent = top_left[..., ::-1], size[..., ::-1]
    intrinsics = jnp.concatenate([focal / extent, (centre - corner) / extent], axis=-1)
    return Cameras(c2w=cameras.c2w, fxfycxcy=intrinsics)


def crop_intrinsics(fxfycxcy: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """`crop_cameras` for NumPy intrinsics [V 4] and boxes [V 4]: (top, left, height, width) as fractions of the whole."""
    corner, extent = boxes[:, 1::-1], boxes[:, :1:-1]
    focal, centre = fxfycxcy[:, :2], fxfycxcy[:, 2:]
    return np.concatenate([focal / extent, (centre - corner) / extent], axis=1).astype(np.float32)


def plucker(rays: Rays) -> Float[Array, "*B 6"]:
    """Plücker coordinates (o x d, d) of Rays[*B], moment first as in LVSM (https://arxiv.org/abs/2410.17242, sec. 3.1)."""
    return jnp.concatenate([jnp.cross(rays.origins, rays.dirs), rays.dirs], axis=-1)


def normalize_to_source(cameras: Cameras, distance: float | None = None) -> Cameras:
    """Moves the world of Cameras[*B V] so that view 0 stands at (0, -d, 0) and looks along +y, with z up.

    The camera normalisation of LRM (https://arxiv.org/abs/2311.04400, sec. 3.4), as OpenLRM implements it
    (https://github.com/3DTopia/OpenLRM/blob/3108b69/openlrm/datasets/cam_utils.py#L64-L87).

    Args:
      cameras: the V cameras of each scene.
      distance: d in world units. None keeps view 0's distance from the origin.
    """
    with jax.default_matmul_precision("highest"):
        motion = source_motion(cameras.c2w[..., 0, :, :], distance)
        return cameras.replace(c2w=jnp.matmul(motion[..., None, :, :], cameras.c2w))


def source_motion(
    c2w: Float[Array | np.ndarray, "*B 4 4"], distance: float | None = None
) -> Float[Array | np.ndarray, "*B 4 4"]:
    """The motion of `normalize_to_source`, from the pose of view 0. NumPy arrays give a NumPy array."""
    xp = c2w.__array_namespace__()
    # Right becomes x, forward y and up z.
    canonical = xp.asarray([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]], dtype=c2w.dtype)
    turn = xp.matmul(canonical, xp.matrix_transpose(c2w[..., :3, :3]))
    eye = c2w[..., :3, 3:]
    if distance is None:
        distance = xp.linalg.vector_norm(eye, axis=-2, keepdims=True)
    x, y, z = (-xp.matmul(turn, eye)[..., i : i + 1, :] for i in range(3))
    offset = xp.concat([x, y - distance, z], axis=-2)
    return xp.concat([xp.concat([turn, offset], axis=-1), c2w[..., 3:, :]], axis=-2)


def azimuth_motion(c2w: Float[Array | np.ndarray, "4 4"]) -> Float[Array | np.ndarray, "4 4"]:
    """The rotation about z that moves a camera to azimuth 0. NumPy arrays give a NumPy array."""
    xp = c2w.__array_namespace__()
    azimuth = xp.atan2(c2w[1, 3], c2w[0, 3])
    cos, sin, zero, one = xp.cos(azimuth), xp.sin(azimuth), xp.zeros(()), xp.ones(())
    rows = [
        cos,
        sin,
        zero,
        zero,
        -sin,
        cos,
        zero,
        zero,
        zero,
        zero,
        one,
        zero,
        zero,
        zero,
        zero,
        one,
    ]
    return xp.stack(rows).reshape(4, 4)


def z_rotation(degrees: float) -> Float[np.ndarray, "4 4"]:
    """The rotation about the world's z axis, counter-clockwise seen from above."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    motion = np.eye(4)
    motion[:2, :2] = [[cos, -sin], [sin, cos]]
    return motion


def image_motion(
    c2w: Float[Array | np.ndarray, "4 4"],
    fxfycxcy: Float[Array | np.ndarray, "4"],
    distance: float,
    fov_y_deg: float,
) -> Float[Array | np.ndarray, "4 4"]:
    """The similarity that makes an image look as if taken from azimuth 0, at `distance`, with field of view `fov_y_deg`.

    The world is rotated about z. The point nearest to the origin on the ray through the image's centre becomes the origin.
    The scale is such that whatever is there has the size in the image that the assumed camera would give it. This removes
    all that a model cannot know from the image alone, except the elevation: it stays, so that up remains up. If the
    camera's field of view is not `fov_y_deg`, the camera ends up at another distance than `distance`. NumPy arrays give a
    NumPy array.

    Args:
      c2w, fxfycxcy: the true camera of the image; for a crop, the crop's camera.
      distance, fov_y_deg: of the assumed camera.
    """
    xp = c2w.__array_namespace__()
    eye, focal, centre = c2w[:3, 3], fxfycxcy[:2], fxfycxcy[2:]
    forward = c2w[:3, :3] @ xp.concat([(0.5 - centre) / focal, xp.ones(1)])
    forward = forward / xp.linalg.vector_norm(forward)
    depth = -(eye @ forward)
    azimuth = xp.atan2(-forward[1], -forward[0])
    cos, sin, zero, one = xp.cos(azimuth), xp.sin(azimuth), xp.zeros(()), xp.ones(())
    turn = xp.stack([cos, sin, zero, -sin, cos, zero, zero, zero, one]).reshape(3, 3)
    scale = focal[1] / depth * distance * 2 * np.tan(np.radians(fov_y_deg) / 2)
    offset = -scale * turn @ (eye + depth * forward)
    top = xp.concat([scale * turn, offset[:, None]], axis=1)
    return xp.concat([top, xp.asarray([[0.0, 0.0, 0.0, 1.0]])], axis=0)


def move_poses(
    motion: Float[Array | np.ndarray, "4 4"], c2w: Float[Array | np.ndarray, "*B 4 4"]
) -> Float[Array | np.ndarray, "*B 4 4"]:
    """Moves poses by a similarity; they stay rigid. NumPy arrays give a NumPy array."""
    xp = c2w.__array_namespace__()
    scale = xp.linalg.vector_norm(motion[:3, 0])
    poses = xp.matmul(motion, c2w)
    rotation, rest = poses[..., :3, :3] / scale, poses[..., :3, 3:]
    return xp.concat([xp.concat([rotation, rest], axis=-1), poses[..., 3:, :]], axis=-2)


def _product(subscripts: str, *arrays: Float[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
    """An einsum in float32 on every device. By default TPUs round the factors to bfloat16, which moves a ray by a pixel."""
    return jnp.einsum(subscripts, *arrays, precision="highest")


def _unit(vector: Float[Array, "*B 3"]) -> Float[Array, "*B 3"]:
    return vector / jnp.linalg.norm(vector, axis=-1, keepdims=True)


def _pose(
    eye: Float[Array, "*B 3"], right: Float[Array, "*B 3"], forward: Float[Array, "*B 3"]
) -> Float[Array, "*B 4 4"]:
    top = jnp.stack([right, jnp.cross(forward, right), forward, eye], axis=-1)
    bottom = jnp.broadcast_to(jnp.array([0.0, 0.0, 0.0, 1.0], top.dtype), (*top.shape[:-2], 1, 4))
    return jnp.concatenate([top, bottom], axis=-2)
