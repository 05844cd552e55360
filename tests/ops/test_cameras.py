"""Camera functions are consistent with each other, and with OpenLRM's camera normalisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lrm_jax.ops import cameras as cam
from lrm_jax.types import Cameras, Rays


def random_cameras(*batch: int, seed: int = 0) -> Cameras:
    rng = np.random.default_rng(seed)
    eye = jnp.asarray(rng.normal(size=(*batch, 3)), jnp.float32) * 2
    target = jnp.asarray(rng.normal(size=(*batch, 3)), jnp.float32) * 0.3
    intrinsics = jnp.asarray(rng.uniform([0.7, 0.7, 0.4, 0.4], [1.5, 1.5, 0.6, 0.6], (*batch, 4)))
    return Cameras(c2w=cam.look_at(eye, target), fxfycxcy=intrinsics.astype(jnp.float32))


def assert_rigid(c2w):
    rotation = np.asarray(c2w)[..., :3, :3]
    identity = np.broadcast_to(np.eye(3), rotation.shape)
    np.testing.assert_allclose(rotation @ rotation.swapaxes(-1, -2), identity, atol=1e-6)
    np.testing.assert_allclose(
        np.linalg.det(rotation), 1.0, atol=1e-6
    )  # right-handed: flipping only y fails here


def test_opengl_round_trip_is_exact_and_flips_y_and_z():
    c2w = random_cameras(2, 3).c2w
    there = cam.opencv_to_opengl(c2w)
    np.testing.assert_array_equal(cam.opengl_to_opencv(there), c2w)
    np.testing.assert_array_equal(there[..., 1:3], -c2w[..., 1:3])
    np.testing.assert_array_equal(there[..., ::3], c2w[..., ::3])


def test_look_at_puts_the_target_in_the_middle_and_up_upwards():
    eye, target = jnp.array([[2.0, -1.0, 0.5]]), jnp.array([[0.1, 0.2, -0.3]])
    c2w = cam.look_at(eye, target)
    assert_rigid(c2w)
    cameras = Cameras(c2w=c2w, fxfycxcy=cam.field_of_view(40.0)[None])
    above = target + jnp.array([[0.0, 0.0, 0.1]])
    uv, z = cam.project(cameras, jnp.stack([target, above], axis=1))
    np.testing.assert_allclose(uv[0, 0], [0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(z[0, 0], np.linalg.norm(target - eye), rtol=1e-6)
    np.testing.assert_allclose(uv[0, 1, 0], 0.5, atol=1e-6)
    assert uv[0, 1, 1] < 0.5


@pytest.mark.parametrize("up", [(0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (2.0, 0.0, 0.0), (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_looking_along_up_is_well_defined(up, sign):
    c2w = cam.look_at(sign * 2 * jnp.array(up), jnp.zeros(3), jnp.array(up))
    np.testing.assert_array_equal(c2w, cam.look_at(sign * 2 * jnp.array(up), jnp.zeros(3), up))
    assert np.isfinite(c2w).all()
    assert_rigid(c2w)


def test_a_view_straight_down_is_oriented_like_a_map():
    c2w = cam.look_at(jnp.array([0.0, 0.0, 2.0]), jnp.zeros(3))
    np.testing.assert_allclose(c2w[:3, 0], [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(c2w[:3, 1], [0, -1, 0], atol=1e-6)


@pytest.mark.parametrize("elevation", [-90.0, -20.0, 0.0, 35.0, 90.0])
def test_orbit_looks_at_the_origin_from_the_given_distance(elevation):
    cameras = cam.orbit(5, 1.9, elevation, 40.0, azimuth_deg=-90.0)
    assert_rigid(cameras.c2w)
    uv, z = cam.project(cameras, jnp.zeros((5, 1, 3)))
    np.testing.assert_allclose(uv, 0.5, atol=1e-5)
    np.testing.assert_allclose(z, 1.9, rtol=1e-6)
    np.testing.assert_allclose(cameras.c2w[:, 2, 3], 1.9 * np.sin(np.radians(elevation)), atol=1e-6)


def test_orbit_agrees_with_look_at_and_goes_counter_clockwise_from_its_azimuth():
    cameras = cam.orbit(4, 2.0, 20.0, 40.0, azimuth_deg=-90.0)
    eye = cameras.c2w[:, :3, 3]
    np.testing.assert_allclose(cameras.c2w, cam.look_at(eye, jnp.zeros((4, 3))), atol=1e-6)
    flat = 2 * np.cos(np.radians(20)) * np.array([[0, -1], [1, 0], [0, 1], [-1, 0]])
    np.testing.assert_allclose(eye[:, :2], flat, atol=1e-6)


def test_field_of_view_reaches_from_edge_to_edge():
    cameras = Cameras(c2w=jnp.eye(4), fxfycxcy=cam.field_of_view(60.0, aspect=2.0))
    top = np.tan(np.radians(30.0))
    uv, _ = cam.project(cameras, jnp.array([[2 * top, top, 1.0], [-2 * top, -top, 1.0]]))
    np.testing.assert_allclose(uv, [[1, 1], [0, 0]], atol=1e-6)


def test_project_of_a_point_on_a_ray_is_its_pixel_centre():
    cameras = random_cameras(2, 3)
    height, width = 6, 8
    rays = cam.pixel_rays(cameras, height, width)
    assert rays.dirs.shape == (2, 3, 6, 8, 3)
    np.testing.assert_allclose(np.linalg.norm(rays.dirs, axis=-1), 1.0, atol=1e-6)
    points = (rays.origins + 1.7 * rays.dirs).reshape(2, 3, -1, 3)
    uv, z = cam.project(cameras, points)
    rows, cols = np.mgrid[:height, :width]
    expected = np.stack([(cols + 0.5) / width, (rows + 0.5) / height], -1).reshape(-1, 2)
    np.testing.assert_allclose(uv, np.broadcast_to(expected, uv.shape), atol=2e-6)
    assert (z > 0).all()


def test_rays_of_a_crop_are_the_crop_of_the_rays():
    cameras = random_cameras(2)
    whole = cam.pixel_rays(cameras, 10, 20)
    top_left = jnp.array([[2 / 10, 4 / 20], [5 / 10, 0.0]])
    size = jnp.array([[4 / 10, 8 / 20]] * 2)
    crop = cam.pixel_rays(cam.crop_cameras(cameras, top_left, size), 4, 8)
    np.testing.assert_allclose(crop.dirs[0], whole.dirs[0, 2:6, 4:12], atol=1e-6)
    np.testing.assert_allclose(crop.dirs[1], whole.dirs[1, 5:9, 0:8], atol=1e-6)
    np.testing.assert_array_equal(crop.origins[0], whole.origins[0, 2:6, 4:12])


def test_plucker_is_the_same_for_every_origin_on_the_line():
    rays = cam.pixel_rays(random_cameras(3), 4, 4)
    further = Rays(origins=rays.origins + 0.8 * rays.dirs, dirs=rays.dirs)
    np.testing.assert_allclose(cam.plucker(rays), cam.plucker(further), atol=1e-6)
    moment, direction = np.split(cam.plucker(rays), 2, axis=-1)
    np.testing.assert_array_equal(direction, rays.dirs)
    np.testing.assert_allclose((moment * rays.origins).sum(-1), 0.0, atol=1e-6)


@pytest.mark.parametrize("name", ["openlrm_dino_tiny", "openlrm_dinov2_tiny"])
def test_normalization_matches_openlrm(goldens, name):
    golden = load_file(goldens / f"{name}.safetensors")
    raw = golden["in.raw_poses"]
    last = np.broadcast_to(np.array([0, 0, 0, 1], np.float32), (*raw.shape[:2], 1, 4))
    c2w = cam.opengl_to_opencv(jnp.asarray(np.concatenate([raw, last], axis=-2)))
    cameras = Cameras(c2w=c2w, fxfycxcy=jnp.zeros((*raw.shape[:2], 4)))
    ours = cam.opencv_to_opengl(cam.normalize_to_source(cameras).c2w)[..., :3, :]
    np.testing.assert_allclose(ours, golden["out.normalized_poses"], atol=1e-6)  # float32 products


def test_normalization_to_a_given_distance_keeps_relative_poses():
    cameras = random_cameras(2, 3)
    ours = cam.normalize_to_source(cameras, distance=2.0)
    np.testing.assert_allclose(ours.c2w[:, 0, :3, 3], [[0, -2, 0]] * 2, atol=1e-6)
    np.testing.assert_allclose(ours.c2w[:, 0, :3, 2], [[0, 1, 0]] * 2, atol=1e-6)
    relative, expected = (
        np.linalg.inv(c.c2w[:, :1].astype(jnp.float32)) @ c.c2w for c in (ours, cameras)
    )
    np.testing.assert_allclose(relative, expected, atol=2e-6)


def a_crop(azimuth, distance):
    """The camera [4 4], [4] of an off-centre crop, float64."""
    one = cam.orbit(1, distance, 33.0, 30.0, azimuth)
    one = cam.crop_cameras(one, jnp.array([[0.1, 0.3]]), jnp.array([[0.6, 0.6]]))
    return np.asarray(one.c2w[0], np.float64), np.asarray(one.fxfycxcy[0], np.float64)


@pytest.mark.parametrize("elevation", [-30.0, 0.0, 50.0])
def test_an_image_from_the_assumed_camera_does_not_change_the_world(elevation):
    one = cam.orbit(1, 3.0, elevation, 40.0)
    motion = cam.image_motion(one.c2w[0], one.fxfycxcy[0], 3.0, 40.0)
    np.testing.assert_allclose(motion, np.eye(4), atol=1e-6)


@pytest.mark.parametrize(("azimuth", "distance"), [(0.0, 2.0), (130.0, 5.0), (-60.0, 1.7)])
def test_after_the_motion_a_crop_looks_as_if_taken_by_the_assumed_camera(azimuth, distance):
    c2w, fxfycxcy = a_crop(azimuth, distance)
    motion = cam.image_motion(c2w, fxfycxcy, 3.0, 40.0)
    up = motion[:3, :3] @ [0, 0, 1]
    np.testing.assert_allclose(up, [0, 0, np.linalg.norm(up)], atol=1e-9)
    (pose,) = poses = cam.move_poses(motion, c2w[None])
    np.testing.assert_allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3), atol=1e-6)  # float32 poses
    np.testing.assert_allclose(pose[1, 3], 0, atol=1e-6)  # at azimuth 0
    assert pose[0, 3] > 0
    there = Cameras(c2w=jnp.asarray(poses), fxfycxcy=jnp.asarray(fxfycxcy[None]))
    # Points near the origin, in a plane perpendicular to the view, because the two perspectives differ elsewhere.
    x, _, z = pose[:3, 3]
    across = 0.01 * np.array([[0, 0, 0], [0, 1, 0], [-z, 0, x] / np.hypot(x, z)])
    ours, _ = cam.project(there, jnp.asarray(across)[None])
    wanted, _ = cam.project(
        cam.orbit(1, 3.0, float(np.degrees(np.arctan2(z, x))), 40.0), jnp.asarray(across)[None]
    )
    np.testing.assert_allclose(
        ours, wanted, atol=3e-4
    )  # the image plane of the crop is rotated by a few degrees
    np.testing.assert_allclose(ours[0, 0], 0.5, atol=1e-6)


def test_poses_are_moved_with_their_points():
    c2w, fxfycxcy = a_crop(40.0, 2.5)
    motion = cam.image_motion(c2w, fxfycxcy, 1.9, 40.0)
    cameras = random_cameras(3)
    xyz = np.random.default_rng(0).normal(size=(3, 5, 3)) * 0.3
    there = xyz @ motion[:3, :3].T + motion[:3, 3]
    poses = cam.move_poses(motion, np.asarray(cameras.c2w, np.float64))
    uv, z = cam.project(cameras, jnp.asarray(xyz))
    again, far = cam.project(cameras.replace(c2w=jnp.asarray(poses)), jnp.asarray(there))
    np.testing.assert_allclose(again, uv, atol=1e-4)  # float32
    np.testing.assert_allclose(far / z, np.linalg.norm(motion[0, :3]), rtol=1e-4)


def test_everything_compiles():
    cameras = random_cameras(2)
    rays = jax.jit(cam.pixel_rays, static_argnums=(1, 2))(cameras, 3, 3)
    assert np.isfinite(rays.dirs).all()
