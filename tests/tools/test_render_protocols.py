"""The cameras and lights of the protocols have the published numbers, and depend only on the seed and the uid."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from rendering.protocols import PROTOCOLS, Settings, choose_cameras, choose_lighting  # noqa: E402

from lrm_jax.ops.cameras import one2345_rig  # noqa: E402

SETTINGS = Settings(views=6, distance=(2.6, 3.4))


def eyes(settings: Settings, uid: str = "a") -> np.ndarray:
    return choose_cameras(settings, uid).c2w[:, :3, 3]


def test_cameras_depend_on_seed_and_uid_and_half_are_photo_like():
    cameras = choose_cameras(SETTINGS, "a")
    np.testing.assert_array_equal(cameras.c2w, choose_cameras(SETTINGS, "a").c2w)
    assert np.abs(cameras.c2w - choose_cameras(SETTINGS, "b").c2w).max() > 0.1
    eye = cameras.c2w[:, :3, 3]
    distance = np.linalg.norm(eye, axis=-1)
    elevation = np.degrees(np.arcsin(eye[:, 2] / distance))
    assert ((5 <= elevation[::2]) & (elevation[::2] <= 35)).all()
    assert ((-30 <= elevation) & (elevation <= 75)).all()
    assert ((2.6 <= distance) & (distance <= 3.4)).all()
    sector = np.degrees(np.arctan2(eye[:, 1], eye[:, 0])) % 360 // 120
    assert list(sector[::2]) == list(sector[1::2]) == [0, 1, 2]


@pytest.mark.parametrize(
    "name, distance, fov", [("lrm", (1.5, 3.0), 50), ("openlrm", (1.9, 2.6), 67.3801)]
)
def test_lrm_and_openlrm_cameras_have_the_published_ranges(name, distance, fov):
    settings = PROTOCOLS[name]
    assert (settings.views, settings.size, settings.box) == (32, 1024, 2.0)
    cameras = choose_cameras(dataclasses.replace(settings, views=2000), "a")
    eye = cameras.c2w[:, :3, 3]
    radius = np.linalg.norm(eye, axis=-1)
    # 2000 uniform draws come within 1 % of both ends. 1e-5 is for float32.
    np.testing.assert_allclose([radius.min(), radius.max()], distance, atol=0.01)
    np.testing.assert_allclose([eye[:, 2].min(), eye[:, 2].max()], [-0.75, 1.6], atol=0.03)
    np.testing.assert_allclose(
        2 * np.degrees(np.arctan(0.5 / cameras.fxfycxcy[:, :2])), fov, atol=1e-3
    )
    # All look at the origin.
    np.testing.assert_allclose(cameras.c2w[:, :3, 2], -eye / radius[:, None], atol=1e-5)
    # Uniform in azimuth and in height: each tenth of the range has 2000 * 0.1 views, within 4 standard deviations of 13.4.
    around = np.histogram(np.arctan2(eye[1:, 1], eye[1:, 0]), 10, (-np.pi, np.pi))[0]
    assert (np.abs(around - 200) < 54).all()


def test_only_openlrm_starts_in_front():
    eye = eyes(PROTOCOLS["openlrm"])
    np.testing.assert_allclose(eye[0, [0, 2]], 0, atol=1e-7)
    assert -2.6 <= eye[0, 1] <= -1.9 and np.abs(eye[1, [0, 2]]).min() > 1e-3
    assert np.abs(eyes(PROTOCOLS["lrm"])[0, 0]) > 1e-3


def test_openlrm_focal_length_is_its_lens():
    fxfycxcy = choose_cameras(PROTOCOLS["openlrm"], "a").fxfycxcy[0]
    np.testing.assert_allclose(fxfycxcy, [0.75, 0.75, 0.5, 0.5], atol=1e-6)  # 24 mm / 32 mm


def test_triposr_cameras_are_those_of_its_code():
    settings = PROTOCOLS["triposr"]
    assert (settings.size, settings.fov, settings.box) == (512, 40.0, 1.0)
    np.testing.assert_allclose(np.linalg.norm(eyes(settings), axis=-1), 1.9, atol=1e-5)  # float32


def test_one2345_views_are_its_rig():
    settings = PROTOCOLS["one2345"]
    assert (settings.views, settings.size, settings.box) == (40, 256, 0.8)
    for uid in "ab":  # the published elevation is the same for all objects
        cameras = choose_cameras(settings, uid)
        np.testing.assert_array_equal(cameras.c2w, one2345_rig(60.0).c2w)
        # embree makes its rays from the field of view.
        fov = np.degrees(2 * np.arctan(0.5 / cameras.fxfycxcy[:, :2]))
        np.testing.assert_allclose(fov, settings.fov, rtol=1e-6)
    np.testing.assert_allclose(cameras.fxfycxcy[0] * 256, [280, 280, 128, 128], rtol=1e-6)


def test_one2345_draws_the_elevation_of_its_input_view_for_each_object():
    settings = dataclasses.replace(PROTOCOLS["one2345"], elevation=(10.0, 45.0))
    directions = np.stack([eyes(settings, f"object {i}") / 1.2 for i in range(200)])
    elevation = np.degrees(np.arcsin(directions[..., 2]))
    np.testing.assert_allclose(elevation[:, :4] - elevation[:, :1], 0, atol=1e-3)
    assert 10 <= elevation[:, 0].min() < 11 and 44 < elevation[:, 0].max() <= 45 + 1e-4
    # The other four are 30 degrees lower, but at most 15 degrees below the horizon.
    step = np.where(elevation[:, 0] >= 15, -30, 30)
    np.testing.assert_allclose(elevation[:, 4] - elevation[:, 0], step, atol=1e-3)
    neighbours = elevation[:, 8:].reshape(-1, 8, 4) - elevation[:, :8, None]
    np.testing.assert_allclose(neighbours[..., 0], 10, atol=1e-3)
    np.testing.assert_allclose(neighbours[..., 1], -10, atol=1e-3)
    np.testing.assert_allclose(neighbours[..., 2:], 0, atol=1e-3)
    again = choose_cameras(settings, "object 0").c2w[:, :3, 3]
    np.testing.assert_array_equal(again / 1.2, directions[0])


def test_zero123_cameras_are_in_the_directions_of_a_cube():
    settings = PROTOCOLS["zero123"]
    assert (settings.views, settings.size, settings.box) == (12, 256, 1.0)
    cameras = choose_cameras(dataclasses.replace(settings, views=20000), "a")
    eye = cameras.c2w[:, :3, 3]
    radius = np.linalg.norm(eye, axis=-1)
    np.testing.assert_allclose([radius.min(), radius.max()], (1.5, 2.2), atol=0.001)  # 20000 draws
    np.testing.assert_allclose(np.mean(radius), 1.85, atol=0.006)  # 4 standard deviations
    np.testing.assert_allclose(cameras.c2w[:, :3, 2], -eye / radius[:, None], atol=1e-5)  # float32
    np.testing.assert_allclose(cameras.fxfycxcy * 256, [[280, 280, 128, 128]] * 20000, rtol=1e-6)
    # Directions are uniform on the faces of the cube, unlike those that are uniform on a sphere.
    size = np.abs(eye)
    faces = np.bincount(size.argmax(1) * 2 + (np.take_along_axis(eye, size.argmax(1)[:, None], 1)[:, 0] > 0))  # fmt: skip
    assert (np.abs(faces - 20000 / 6) < 211).all()  # 4 standard deviations
    ratio = np.sort(size, axis=1)[:, :2] / size.max(1, keepdims=True)
    tenths = np.histogram(ratio, 10, (0, 1))[0]
    assert (np.abs(tenths - 4000) < 240).all()  # 4 standard deviations of independent draws


def test_zero123_cameras_depend_on_seed_and_uid():
    settings = PROTOCOLS["zero123"]
    first, again = eyes(settings), eyes(settings)
    np.testing.assert_array_equal(first, again)
    for other in (eyes(settings, "b"), eyes(dataclasses.replace(settings, seed=1))):
        assert np.abs(other - first).max() > 0.1


def test_the_default_protocol_is_what_old_folders_were_rendered_with():
    assert dataclasses.asdict(PROTOCOLS["default"]) == dataclasses.asdict(Settings())
    settings = PROTOCOLS["default"]
    assert (settings.views, settings.size, settings.fov, settings.box) == (32, 256, 40.0, None)
    assert (settings.lighting, settings.geometry, settings.file_normals) == ("fixed", False, False)


def test_varied_light_depends_on_the_object_and_is_within_its_ranges():
    settings = PROTOCOLS["triposr"]
    lights = [choose_lighting(settings, f"object {i}") for i in range(200)]
    again = choose_lighting(settings, "object 0")
    np.testing.assert_array_equal(lights[0].direction, again.direction)
    assert lights[0].sun == again.sun
    assert choose_lighting(dataclasses.replace(settings, seed=1), "object 0").sun != again.sun
    direction = np.stack([light.direction for light in lights])
    sun, sky, above = np.array([(a.sun, a.sky, a.above) for a in lights]).T
    np.testing.assert_allclose(np.linalg.norm(direction, axis=-1), 1, atol=1e-6)  # float32
    height = np.degrees(np.arcsin(direction[:, 2]))
    assert 15 <= height.min() < 20 and 75 < height.max() <= 80
    brightest = sun + sky + above * direction[:, 2]
    assert 0.75 <= brightest.min() < 0.8 and 1.05 < brightest.max() <= 1.1 + 1e-6
    assert 0.2 <= (sun / brightest).min() < 0.25 and 0.65 < (sun / brightest).max() <= 0.7 + 1e-6
    assert (sky > 1.5 * above).all()  # the sky of Cycles is nowhere negative
    fixed = [choose_lighting(Settings(), uid) for uid in "ab"]
    assert fixed[0].sun == fixed[1].sun == 0.5 and (fixed[0].direction == fixed[1].direction).all()
