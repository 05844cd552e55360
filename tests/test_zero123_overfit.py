"""Zero123 learns one object from its views, and draws unseen views of it at over 20 dB. Takes minutes on a CPU."""

import sys
from pathlib import Path

import numpy as np
import pytest
from test_lvsm_overfit import learnt, on_white

from lrm_jax.commands import train

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
    shown, hidden, psnr = learnt(config, "train/noise_mse", NUM_TRAIN)
    source_error = on_white(hidden) - on_white(shown)[:1]
    copied = float(np.mean(-10 * np.log10((source_error**2).mean((1, 2, 3)))))
    print(f"held-out views: {psnr:.1f} dB; the source copied: {copied:.1f} dB", file=sys.stderr)
    assert copied < 18 and psnr > 20
