import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from three_balls import SIZE, write_object

from lrm_jax.data import held_out
from lrm_jax.metrics import mean_object


def test_the_mean_object_is_that_of_the_others(tmp_path):
    for name in ("a", "b", "c"):
        write_object(tmp_path / name)
    rgba = np.full((SIZE, SIZE, 4), 255, np.uint8)
    for view in range(5):
        Image.fromarray(rgba).save(tmp_path / "c" / "rgba" / f"{view:03d}.png")
    a, b, c = (
        held_out.read(tmp_path / name, 4, SIZE) for name in "abc"
    )  # all views but the source
    mean = mean_object.average([a, c], SIZE)
    of_a, of_b = mean_object.images(mean, a), mean_object.images(mean, b)
    np.testing.assert_allclose(of_a["mean image"], 1, atol=1e-6)
    np.testing.assert_allclose(of_a["mean image by view"], 1, atol=1e-6)
    # b is not in the mean, and is placed like a.
    wanted = (mean_object.premultiplied(a.targets) + 1) / 2
    np.testing.assert_allclose(of_b["mean image by view"], wanted, atol=1e-6)
    np.testing.assert_allclose(of_b["mean image"], wanted.mean(0)[None].repeat(4, 0), atol=1e-6)
    empty = mean_object.images(mean_object.average([], SIZE), a)
    assert all((x == 0).all() for x in empty.values())


def test_the_mean_shapes_have_the_mean_extents_and_uniform_points(tmp_path):
    write_object(tmp_path / "a")
    write_object(tmp_path / "b")
    a, b = (held_out.read(tmp_path / name, 3, SIZE) for name in "ab")
    mean = mean_object.average([a, dataclasses.replace(b, points=10 * b.points)], SIZE)
    # The guess for b does not use b's own extents, and no object is guessed from itself alone.
    shapes = mean_object.shapes(mean, b, 20000, np.random.default_rng(0))
    assert mean_object.shapes(mean_object.average([a], SIZE), a, 9, np.random.default_rng(0)) == {}
    extents = np.ptp(np.load(tmp_path / "a" / "points.npy"), axis=0)
    np.testing.assert_allclose(np.ptp(shapes["mean box"], axis=0), extents, rtol=1e-6)
    assert (np.abs(shapes["mean box"] / extents).max(-1) > 0.5 - 1e-6).all()
    np.testing.assert_allclose(np.linalg.norm(2 * shapes["mean ellipsoid"] / extents, axis=-1), 1)
    # A flat spheroid (1, 1, 0.01) is like two discs: half of its area is closer to the axis than sqrt(1/2).
    extents = {Path("flat"): np.array([2, 2, 0.02])}
    flat = mean_object.MeanObject(frozenset(), None, None, None, extents)
    disc = mean_object.shapes(flat, b, 20000, np.random.default_rng(0))["mean ellipsoid"]
    covered = (np.hypot(disc[:, 0], disc[:, 1]) < np.sqrt(0.5)).mean()
    assert covered == pytest.approx(0.5, abs=0.02)  # five standard deviations
