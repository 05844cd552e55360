"""Cameras of a known scene, written in one convention and read in another."""

import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax.ops import cameras, conventions

PAIRS = [(a, b) for a in conventions.MEANINGS for b in conventions.MEANINGS if a != b]


def hand_held(centre=(0.0, 0.0, 0.0), seed: int = 0) -> np.ndarray:
    """Cameras around a scene at different heights and distances, which look roughly at its middle."""
    rng = np.random.default_rng(seed)
    azimuth, height = np.linspace(0, 4, 12), rng.uniform(0.2, 1.2, 12)
    eye = np.stack([2 * np.cos(azimuth), 2 * np.sin(azimuth), height], axis=1)
    c2w = cameras.look_at(jnp.float32(eye), jnp.float32(rng.normal(scale=0.15, size=(12, 3))))
    c2w = np.array(c2w, np.float64)
    c2w[:, :3, 3] += centre
    return c2w


@pytest.mark.parametrize("convention", conventions.MEANINGS)
def test_reading_undoes_writing(convention):
    c2w = hand_held((1.0, 2.0, 3.0))
    written = conventions.write(c2w, convention)
    np.testing.assert_allclose(conventions.read(written, convention), c2w, atol=1e-12)


def test_the_conventions_are_what_their_names_say():
    c2w = hand_held()[:1]
    point = np.array([0.1, 0.2, 0.3, 1.0])
    seen = np.linalg.inv(c2w[0]) @ point  # x right, y down, z forward
    for name, expected in (("opencv-w2c", seen), ("opengl-w2c", seen * [1, -1, -1, 1])):
        np.testing.assert_allclose(conventions.write(c2w, name)[0] @ point, expected, atol=1e-12)
        written = conventions.write(c2w, name.replace("w2c", "c2w"))
        np.testing.assert_allclose(written[0] @ expected, point, atol=1e-12)


@pytest.mark.parametrize("centre", [(0, 0, 0), (5, -3, 1)])
@pytest.mark.parametrize("written,read", PAIRS)
def test_every_wrong_convention_is_noticed_and_the_right_one_named(written, read, centre):
    matrices = conventions.write(hand_held(centre), written)
    problem, other = conventions.doubt(conventions.read(matrices, read), read)
    assert other == written
    assert f"poses in {read} were expected" in problem and f"read as {written}" in problem


@pytest.mark.parametrize("convention", conventions.MEANINGS)
@pytest.mark.parametrize("seed", range(3))
def test_cameras_around_a_scene_are_not_doubted(convention, seed):
    assert conventions.doubt(hand_held((5, -3, 1), seed), convention) is None


def test_a_walk_ahead_that_looks_a_little_around_is_not_doubted():
    rng = np.random.default_rng(0)
    eye = np.stack([np.linspace(0, 5, 20), *rng.normal(scale=0.1, size=(2, 20))], axis=1)
    ahead = eye + [4.0, 0, 0] + rng.normal(scale=0.3, size=(20, 3))
    c2w = np.array(cameras.look_at(jnp.float32(eye), jnp.float32(ahead)), np.float64)
    for convention in conventions.MEANINGS:
        assert conventions.doubt(c2w, convention) is None


def test_one_camera_or_equal_cameras_are_not_doubted():
    for count in (1, 4):
        assert conventions.doubt(hand_held()[:1].repeat(count, 0), "opengl-c2w") is None


def test_cameras_that_look_outwards_are_doubted_on_a_circle_but_not_if_hand_held():
    rng = np.random.default_rng(0)
    c2w = hand_held() @ np.diag([1.0, -1, -1, 1])
    by_hand = c2w.copy()
    by_hand[:, :3, 3] = rng.normal(scale=0.3, size=(12, 3))
    assert conventions.doubt(by_hand, "opencv-c2w") is None
    # The module's docstring says that this case cannot be told apart.
    assert conventions.doubt(c2w, "opencv-c2w")[1] == "opengl-c2w"
