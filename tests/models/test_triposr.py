"""Tests of TripoSR's own fields."""

import jax
import numpy as np
import pytest

from lrm_jax import models
from lrm_jax.ops import cameras
from lrm_jax.types import Views


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_symmetric_model_gives_the_mirrored_scene_for_a_mirrored_image(symmetric):
    model = models.build("triposr", "tiny", symmetric=symmetric)
    image = jax.random.uniform(jax.random.key(0), (1, 32, 32, 3))
    source = Views(rgb=np.stack([image, image[:, :, ::-1]]), cameras=None)
    # The views have azimuths of 0, 120 and 240 degrees. A mirror swaps the last two.
    rays = cameras.pixel_rays(cameras.orbit(3, 1.9, 15.0, 40.0), 12, 12)
    rays = jax.tree.map(lambda x: np.stack([x, x]), rays)
    params = jax.jit(model.init)(jax.random.key(1), source, rays)
    rgb, mirrored = jax.jit(model.apply)(params, source, rays).rgb
    away = np.abs(mirrored[np.array([0, 2, 1])][:, :, ::-1] - rgb).max()
    assert away < 1e-5 if symmetric else away > 1e-3
    assert np.ptp(rgb) > 0.01
