"""Zero123 learns one object from its views, and draws unseen views of it at over 20 dB. Takes minutes on a CPU."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_lvsm_overfit import band, on_white

from lrm_jax.commands import train
from lrm_jax.data.procedural import source as procedural
from lrm_jax.parallel import sharding
from lrm_jax.training import setup
from lrm_jax.types import Batch

SIZE, NUM_TRAIN, NUM_TARGET, STEPS = 16, 400, 16, 2500


@pytest.mark.slow
def test_one_object_is_drawn_at_20_db_from_views_that_were_not_shown():
    root = Path(__file__).parents[1]
    config, *_ = train.parse(["--config", f"{root}/configs/zero123.py:nano", "--workdir", "unused"])
    with config.unlocked():
        config.model.update(image_size=SIZE, channels=64, multiples=(1, 2), attention_levels=(1,))
        config.model.update(tower=dict(side=16, patch=8, width=64, depth=1, num_heads=1, out=64))
    config.data.update(
        batch_size=1, num_target=NUM_TARGET, source_size=SIZE, target_size=SIZE, mirror=False
    )
    config.train.update(steps=STEPS, patch=SIZE, ema_decay=0.99)
    config.schedule.update(learning_rate=1e-3)
    config.sharding.update(data=1)
    device_mesh = sharding.make_device_mesh(**config.sharding, devices=jax.devices()[:1])
    run = setup.make_run(config, device_mesh)

    def views(some):
        seen = procedural.scene_views(6, some, SIZE, split="train", seed=1)
        return jax.tree.map(np.asarray, seen)

    shown, hidden = views(band(NUM_TRAIN, 0.0)), views(band(24, 0.5))
    source = jax.tree.map(lambda x: x[:1][None], shown)
    rng = np.random.default_rng(0)
    with jax.set_mesh(device_mesh):
        state = run.init(None)
        for step in range(STEPS):
            some = rng.choice(NUM_TRAIN, NUM_TARGET, replace=False)
            batch = Batch(source=source, target=jax.tree.map(lambda x, i=some: x[i][None], shown))
            state, scalars = run.step(state, batch, {})
            if step % 100 == 99:
                print(step + 1, float(scalars["train/noise_mse"]), file=sys.stderr, flush=True)
        batch = Batch(source=source, target=jax.tree.map(lambda x: x[None], hidden))
        scores, _ = run.evaluate(state.ema_params, batch)
    psnr = float(np.mean(scores["psnr"]))
    source_error = on_white(hidden) - on_white(shown)[:1]
    copied = float(np.mean(-10 * np.log10((source_error**2).mean((1, 2, 3)))))
    print(f"held-out views: {psnr:.1f} dB; the source copied: {copied:.1f} dB", file=sys.stderr)
    assert copied < 18 and psnr > 20
