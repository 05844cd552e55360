"""TripoSR (https://arxiv.org/abs/2403.02151, table 1 and section 2.3): one image to a triplane, without its camera.

    lrm train --config configs/triposr.py --workdir runs/triposr --config.data.root=data/objaverse

The authors released no training code. From their report: learning rate, warm-up, weights of the LPIPS and mask losses, windows of
128 px out of 512 px that favour the foreground. Unpublished, and chosen here: the batch size (LRM's), the number of steps, how
strongly windows favour the foreground, the backgrounds.

Expected: not trained yet. The authors trained on 22 nodes of 8 A100 (40 GB) for 5 days and report an F-score@0.2 of 0.871 on GSO.
To try things out, `--config configs/triposr.py:tiny` trains a tiny model for a few steps.
"""

from configs.common import base, check_size, shrink


def get_config(size: str = ""):
    """The config; `size` is "" or "tiny"."""
    check_size(size)
    config = base()
    config.model = dict(name="triposr", variant="triposr", dtype="bfloat16", remat="attention")
    config.data.update(name="records", batch_size=1024, num_workers=16, num_target=3)
    config.losses = dict(mse=1.0, lpips=2.0, mask=0.05)
    config.networks.lpips = "lpips_vgg16.safetensors"
    config.schedule.update(learning_rate=4e-4, warmup_steps=2000)
    config.sharding.update(data=1, fsdp=-1)
    config.train.update(steps=100_000, patch=128, foreground_crops=True, keep_every=10_000)
    return shrink(config) if size == "tiny" else config
