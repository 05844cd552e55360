"""LVSM learns one object from its views alone, and renders unseen views at over 30 dB. Takes minutes on a CPU."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lrm_jax.commands import train
from lrm_jax.data.procedural import source as procedural
from lrm_jax.ops import cameras
from lrm_jax.parallel import sharding
from lrm_jax.training import setup
from lrm_jax.types import Batch, Cameras

SIZE, PATCH, NUM_TRAIN, NUM_TARGET, STEPS = 16, 4, 400, 16, 3500


def band(count: int, offset: float) -> Cameras:
    """Cameras around the object at elevations of 5 to 35 degrees, placed by the golden angle, so that no two are equal."""
    place = (np.arange(count) + offset) / count
    azimuth = np.degrees(2.399963) * (np.arange(count) + offset)
    ring = [cameras.orbit(1, 3.0, 5 + 30 * x, 40.0, a) for x, a in zip(place, azimuth, strict=True)]
    return jax.tree.map(lambda *x: np.concatenate(x), *ring)


def on_white(views) -> np.ndarray:
    alpha = views.alpha[..., None] / 255
    return views.rgb / 255 * alpha + 1 - alpha


def learnt(config, reported: str, num_train: int):
    """Trains on views of one object. Returns the views, 24 held-out ones, and the mean PSNR of these in dB.

    Args:
      reported: the scalar to print every 100 steps.
    """
    device_mesh = sharding.make_device_mesh(**config.sharding, devices=jax.devices()[:1])
    run = setup.make_run(config, device_mesh)
    data, steps = config.data, config.train.steps
    num_targets = setup.abstract_batch(config, device_mesh, 1).target.rgb.shape[1]

    def views(some):
        seen = procedural.scene_views(6, some, data.target_size, split="train", seed=1)
        return jax.tree.map(np.asarray, seen)

    shown, hidden = views(band(num_train, 0.0)), views(band(24, 0.5))
    source = jax.tree.map(lambda x: x[:1][None], shown)
    rng = np.random.default_rng(0)
    with jax.set_mesh(device_mesh):
        state = run.init(None)
        for step in range(steps):
            some = rng.choice(num_train, num_targets, replace=False)
            batch = Batch(source=source, target=jax.tree.map(lambda x, i=some: x[i][None], shown))
            state, scalars = run.step(state, batch, {})
            if step % 100 == 99:
                print(step + 1, float(scalars[reported]), file=sys.stderr, flush=True)
        batch = Batch(source=source, target=jax.tree.map(lambda x: x[None], hidden))
        scores, _ = run.evaluate(state.ema_params, batch)
    return shown, hidden, float(np.mean(scores["psnr"]))


@pytest.mark.slow
def test_one_object_is_learnt_to_30_db_on_views_that_were_not_shown():
    root = Path(__file__).parents[1]
    config, *_ = train.parse(
        ["--config", f"{root}/configs/lvsm_objects.py:tiny", "--workdir", "unused"]
    )
    with config.unlocked():
        config.model.update(
            width=128,
            num_heads=2,
            depth=3,
            remat="none",
            patch=PATCH,
            image_size=SIZE,
            dtype="float32",
        )
    config.data.update(
        batch_size=1, num_source=1, num_target=NUM_TARGET - 1, source_size=SIZE, target_size=SIZE
    )
    config.train.update(steps=STEPS, patch=SIZE, ema_decay=0.99)
    config.schedule.update(learning_rate=2e-3, warmup_steps=200)
    config.sharding.update(data=1)
    shown, hidden, psnr = learnt(config, "train/psnr", NUM_TRAIN)
    error = on_white(hidden) - on_white(shown).mean(0)
    mean_image = float(np.mean(-10 * np.log10((error**2).mean((1, 2, 3)))))
    print(f"held-out views: {psnr:.1f} dB; the mean image: {mean_image:.1f} dB", file=sys.stderr)
    assert mean_image < 21 and psnr > 30
