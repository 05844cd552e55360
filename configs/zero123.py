"""Zero123 (https://arxiv.org/abs/2303.11328): an image of an object as another camera sees it, by diffusion.

    python tools/render_objects.py objects/ data/zero123 --protocol zero123
    lrm train --config configs/zero123.py --workdir runs/zero123 --config.data.root=data/zero123 \\
        --config.train.init_from=zero123-xl.ckpt

From the paper and its code: 192 samples on each of eight GPUs, AdamW without a gradient clip, ten times the rate for the projection
of CLIP's vector and the camera's motion, dropouts, a frozen autoencoder and CLIP. The authors started from Stable Diffusion's image
variations, which `init_from` cannot read yet; so this fine-tunes, or needs frozen networks from a Zero123. Chosen here: a cosine
that ends at 0 instead of a constant rate, the number of steps, and a running mean of the projection as well as the U-Net.

`:nano` is for two CPU cores, with no weights from elsewhere: it diffuses the pixels of 64 px images, in blocks of 2 x 2, and trains a
small image tower with them.

    python tools/render_objects.py objects/ data/zero123-64 --protocol zero123 --size 64
    XLA_FLAGS=--xla_force_host_platform_device_count=2 \\
        lrm train --config configs/zero123.py:nano --workdir runs/zero123-nano --config.data.root=data/zero123-64

Expected: not yet trained.
"""

from configs.common import base, check_size, shrink


def get_config(size: str = ""):
    """The config; `size` is "", "nano" or "tiny"."""
    check_size(size, ("", "nano", "tiny"))
    config = base()
    config.model = dict(name="zero123", variant="zero123", dtype="bfloat16", remat="blocks")
    config.data.update(
        batch_size=1536, num_workers=16, source_background=1.0, num_target=1, sources_as_targets=False, source_size=256,
        target_size=256, source_elevation=(-90.0, 90.0), foreground_ratio=None,
    )  # fmt: skip
    config.losses = dict(noise_mse=1.0)
    config.schedule.update(learning_rate=1e-4, warmup_steps=100)
    config.optim.update(
        b2=0.999, weight_decay=0.01, clip_norm=1e9, freeze=r"^(image_tower|encoder|decoder)/", groups=((r"^projection/", 10.0),)
    )  # fmt: skip
    config.train.update(steps=100_000, ema_decay=0.9999, keep_every=10_000, eval_every=5_000)
    if size == "nano":
        config.model.update(variant="nano", dtype="float32", remat="none")
        config.data.update(
            batch_size=16, num_workers=0, num_target=2, source_size=64, target_size=64, mirror=True
        )  # fmt: skip
        config.schedule.update(learning_rate=5e-4)
        config.optim.update(clip_norm=1.0, freeze=None, groups=())
        config.train.update(
            steps=4000, ema_decay=0.999, patch=64, log_every=20, save_every=200, eval_every=2000, eval_scenes=8
        )  # fmt: skip
    if size == "tiny":
        shrink(config).data.update(source_size=16, target_size=16)
    return config
