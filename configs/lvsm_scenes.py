"""LVSM on scenes (https://arxiv.org/abs/2410.17242; https://github.com/Haian-Jin/LVSM at 2fea924, configs/): RealEstate10K.

    lrm train --config configs/lvsm_scenes.py:decoder-only-256 --workdir runs/lvsm-scenes --config.data.root=data/re10k
    lrm train --config configs/lvsm_scenes.py:decoder-only-512 --workdir runs/lvsm-scenes-512 --config.data.root=data/re10k \\
        --config.train.init_from=runs/lvsm-scenes

Variants: decoder-only-256 (default), encoder-decoder-256, decoder-only-512 and encoder-decoder-512. The 512 px variants continue
from a 256 px run of the same kind: only the image size changes. Data: pixelSplat's or LVSM's layout, or folders with
transforms.json or COLMAP's cameras (lrm_jax/data/scenes.py). From the authors' code: 2 source and 6 target views, number of
steps, batch size (64 GPUs with 8 scenes each), optimiser, 3000 warm-up steps (the paper says 2500), losses, and skipping updates
whose gradient norm exceeds 5. Chosen here, not compared with the paper: steps, learning rate and batch size of the 512 px runs.

Expected: not trained yet. `:small` (22 M parameters, 128 px) is meant for one 80 GB GPU and an hour, but has not been timed.
To try things out, `--config configs/lvsm_scenes.py:tiny` trains a tiny model for a few steps.
"""

from ml_collections import ConfigDict

from configs.common import base, check_size, shrink

SIZES = (
    "",
    "decoder-only-256",
    "encoder-decoder-256",
    "decoder-only-512",
    "encoder-decoder-512",
    "small",
    "tiny",
)


def start(size: str) -> tuple[ConfigDict, int]:
    """The settings shared with configs/lvsm_objects.py, and the side of the variant's training images in pixels."""
    check_size(size, SIZES)
    config = base()
    variant = "decoder-only-256" if size in ("", "small", "tiny") else size
    # "products" would take 64 GB for 8 scenes on one H100, "attention" takes 20 GB.
    config.model = dict(name="lvsm", variant=variant, dtype="bfloat16", remat="attention")
    if size == "small":
        config.model.update(width=384, num_heads=6, depth=12, image_size=128)
    config.networks.perceptual = "vgg19.safetensors"
    config.schedule.update(learning_rate=4e-4, warmup_steps=3000)
    config.optim.skip_norm = 5.0
    return config, int(variant.rpartition("-")[2])


def get_config(size: str = ""):
    """The config; `size` is a variant of LVSM ("" is "decoder-only-256"), "small" or "tiny"."""
    config, side = start(size)
    config.data = ConfigDict(
        dict(
            name="scenes",
            mix=(),
            batch_size=512,
            num_workers=16,
            prefetch=2,
            source_background=1.0,  # no effect: scene images are opaque
            root="data/re10k",
            seed=0,
            num_source=2,
            num_target=4,  # six target views (num_source + num_target), drawn from the eight views of a window
            source_size=side,
            target_size=side,
            normalize="all_views",  # as for the published weights; "source_views": by the source views alone
            min_gap=25,  # frames between the first and the second source
            max_gap=192,
        )
    )
    config.losses = dict(mse=1.0, perceptual=0.5)
    config.train.update(steps=100_000, patch=side, backgrounds=(1.0,), keep_every=10_000)
    if side == 512:
        config.data.batch_size = 128
        config.schedule.update(learning_rate=1e-4, warmup_steps=1000)
        config.train.steps = 20_000
    if size == "small":
        config.data.update(batch_size=64, source_size=128, target_size=128)
        config.losses.perceptual = 0.0  # it needs a network file
        config.schedule.warmup_steps = 500
        config.train.update(steps=8000, patch=128)
    return shrink(config) if size == "tiny" else config
