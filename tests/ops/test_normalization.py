"""Normalisation by all source views: One-2-3-45's, compared with its loader, and the tighter one."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from lrm_jax.ops import cameras, normalization, paths
from lrm_jax.types import InputError

POLARS = (60, 80)


def golden(folder, polar):
    tensors = load_file(folder / "one2345_cameras.safetensors")
    named = {k: v.astype(float) for k, v in tensors.items() if f".polar{polar}." in k}
    return {k.replace(f"polar{polar}.", ""): v for k, v in named.items()}


def rig(polar=60.0):
    views = cameras.one2345_rig(polar)
    return np.asarray(views.c2w, float), np.asarray(views.fxfycxcy, float)


def random_similarity(rng):
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    motion = np.eye(4)
    motion[:3, :3] = 2.5 * rotation * np.sign(np.linalg.det(rotation))
    motion[:3, 3] = rng.normal(size=3)
    return motion


@pytest.mark.parametrize("polar", POLARS)
def test_rig_matches_one2345(goldens, polar):
    given = golden(goldens, polar)
    c2w, fxfycxcy = rig(float(polar))
    np.testing.assert_allclose(c2w, cameras.opengl_to_opencv(given["in.c2ws"]), atol=1e-6)
    pixels = given["in.intrinsics"]
    expected = [pixels[0, 0], pixels[1, 1], pixels[0, 2], pixels[1, 2]]
    np.testing.assert_allclose(fxfycxcy * 256, np.tile(expected, (40, 1)), rtol=1e-6)


@pytest.mark.parametrize("polar", [0.0, 90.0, 170.0])
def test_rig_has_rigid_poses_at_the_poles(polar):
    c2w, _ = rig(polar)
    rotation = c2w[:, :3, :3]
    identity = np.tile(np.eye(3), (40, 1, 1))
    np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1), identity, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(c2w[:, :3, 3], axis=1), 1.2, rtol=1e-6)


@pytest.mark.parametrize("polar", POLARS)
def test_frusta_match_one2345s_loader(goldens, polar):
    """The query camera is pose 0, the sources are poses 8 to 39. 1e-5: the reference computes in float32."""
    given = golden(goldens, polar)
    poses = cameras.opengl_to_opencv(given["in.c2ws"])[[0, *range(8, 40)]]
    fxfycxcy = np.tile([280 / 256, 280 / 256, 0.5, 0.5], (33, 1))
    motion = normalization.views_motion(poses, fxfycxcy, "frusta")
    np.testing.assert_allclose(given["out.trans_mat"], poses[0], atol=1e-6)
    to_data = given["out.trans_mat"] @ given["out.scale_mat"]
    np.testing.assert_allclose(np.linalg.inv(motion), to_data, atol=1e-5)
    scale = np.linalg.norm(motion[:3, 0])
    np.testing.assert_allclose(scale, given["out.scale_factor"][0], rtol=1e-6)

    moved = cameras.move_poses(motion, poses)
    np.testing.assert_allclose(moved[0], given["out.query_c2w"], atol=1e-5)
    np.testing.assert_allclose(moved[1:], given["out.c2ws"], atol=1e-5)
    w2c = np.linalg.inv(moved[1:])
    np.testing.assert_allclose(w2c, given["out.w2cs"], atol=1e-5)
    pixels = np.eye(4)
    pixels[:3, :3] = given["in.intrinsics"]
    # Relative to the focal length of 280 pixels.
    np.testing.assert_allclose((pixels @ w2c) / 280, given["out.affine_mats"] / 280, atol=1e-5)
    # The reference's range of depths; the model clips its start, see `models.one2345`.
    distance = np.linalg.norm(moved[0, :3, 3])
    near_far = 0.95 * (distance - 1), 1.05 * (distance + 1)
    np.testing.assert_allclose(near_far, given["out.query_near_far"], atol=1e-5)


@pytest.mark.parametrize("normalize", normalization.BY_ALL_SOURCES)
def test_result_does_not_depend_on_the_world_of_the_data(normalize):
    c2w, fxfycxcy = rig()
    motion = normalization.views_motion(c2w, fxfycxcy, normalize)
    other = random_similarity(np.random.default_rng(0))
    elsewhere = cameras.move_poses(other, c2w)
    again = normalization.views_motion(elsewhere, fxfycxcy, normalize)
    np.testing.assert_allclose(again @ other, motion, atol=1e-6)


def test_frusta_of_all_cameras_fill_the_cube_to_its_margin():
    c2w, fxfycxcy = rig()
    motion = normalization.views_motion(c2w, fxfycxcy, "frusta")
    corners = []
    for u, v in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for depth in (0.5, 1.8):
            local = np.array([(u - 0.5) / fxfycxcy[0, 0], (v - 0.5) / fxfycxcy[0, 1], 1]) * depth
            corners.append(c2w[:, :3, :3] @ local + c2w[:, :3, 3])
    moved = np.concatenate(corners) @ motion[:3, :3].T + motion[:3, 3]
    low, high = moved.min(0), moved.max(0)
    np.testing.assert_allclose(low + high, 0, atol=1e-6)
    np.testing.assert_allclose((high - low).max(), 2 / 1.1, rtol=1e-6)


def test_common_view_sphere_touches_an_image_border_and_leaves_none():
    c2w, fxfycxcy = rig()
    rng = np.random.default_rng(1)
    c2w[:, :3, 3] += rng.normal(size=(40, 3)) * 0.05  # off-centre views at several distances
    fxfycxcy = fxfycxcy + rng.uniform(-0.1, 0.1, fxfycxcy.shape)
    motion = normalization.views_motion(c2w, fxfycxcy, "common_view")
    sphere = rng.normal(size=(20_000, 3))
    sphere /= 1.1 * np.linalg.norm(sphere, axis=1, keepdims=True)
    moved = cameras.move_poses(motion, c2w)
    local = np.einsum("vji,vqj->vqi", moved[:, :3, :3], sphere - moved[:, None, :3, 3])
    uv = local[..., :2] / local[..., 2:] * fxfycxcy[:, None, :2] + fxfycxcy[:, None, 2:]
    assert (local[..., 2] > 0).all()
    assert uv.min() >= 0 and uv.max() <= 1
    assert min(uv.min(), 1 - uv.max()) < 1e-3  # a larger sphere would cross a border


def test_common_view_has_up_z_and_the_first_camera_at_azimuth_0():
    c2w, fxfycxcy = rig()
    for first in (0, 5, 20):
        order = np.roll(np.arange(40), -first)
        motion = normalization.views_motion(c2w[order], fxfycxcy, "common_view")
        scale = np.linalg.norm(motion[:3, 0])
        np.testing.assert_allclose(motion[:3, 2] / scale, [0, 0, 1], atol=1e-5)
        x, y, z = cameras.move_poses(motion, c2w[order])[0, :3, 3]
        assert x > 0 and abs(y) < 1e-5
        np.testing.assert_allclose(np.hypot(x, z), 1.2 * scale, rtol=1e-5)


def test_common_view_is_defined_for_a_first_camera_straight_above():
    c2w, fxfycxcy = rig(polar=0.0)
    motion = normalization.views_motion(c2w, fxfycxcy, "common_view")
    assert np.isfinite(motion).all()
    assert np.linalg.det(motion[:3, :3]) > 0


def test_common_view_is_tighter_than_frusta():
    c2w, fxfycxcy = rig()
    tight, wide = (
        np.linalg.norm(normalization.views_motion(c2w, fxfycxcy, n)[:3, 0])
        for n in ("common_view", "frusta")
    )
    # Half an image at distance 1.2 spans sin(atan(128 / 280)) * 1.2 = 0.499.
    np.testing.assert_allclose(tight, 1 / (1.1 * 1.2 * np.sin(np.arctan(128 / 280))), rtol=1e-4)
    assert tight > 2 * wide


@pytest.mark.parametrize("normalize", normalization.BY_ALL_SOURCES)
def test_cameras_without_a_common_point_are_refused(normalize):
    c2w, fxfycxcy = rig()
    beside = np.tile(c2w[0], (3, 1, 1))
    beside[:, :3, 3] += np.arange(3)[:, None] * c2w[0, :3, 0]
    with pytest.raises(InputError, match="look in the same direction"):
        normalization.views_motion(beside, fxfycxcy[:3], normalize)
    with pytest.raises(InputError, match="look in the same direction"):
        normalization.views_motion(c2w[:1], fxfycxcy[:1], normalize)
    turned = c2w.copy()
    turned[3, :3, [0, 2]] *= -1
    with pytest.raises(InputError, match="source view 3 looks away"):
        normalization.views_motion(turned, fxfycxcy, normalize)


def test_common_view_refuses_a_camera_that_does_not_show_the_point():
    c2w, fxfycxcy = rig()
    aside = c2w.copy()
    aside[2, :3, 3] += 2 * c2w[2, :3, 0]
    assert paths.focus(aside)[1] > paths.MIN_SPREAD
    with pytest.raises(InputError, match="source view 2 does not show"):
        normalization.views_motion(aside, fxfycxcy, "common_view")
