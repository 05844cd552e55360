"""OpenLRM 1.1 (https://github.com/3DTopia/OpenLRM at 3108b69, configs/train-sample.yaml and model_card.md): LRM in the open.

    lrm train --config configs/openlrm.py:small --workdir runs/openlrm-small --config.data.root=data/objaverse

Sizes: small, base, large. Only the training config of the small one is published, as a sample (8 GPUs with 16 objects each, 60
epochs, "replace this"). Base and large take their image sizes from the model card, and their smallest render size in the same
proportion. OpenLRM differs from LRM in: DINOv2, 48 to 64 samples per ray and as many importance samples, an LPIPS weight of 1.0,
total variation of the planes, random backgrounds.

Expected: not trained yet. OpenLRM publishes no quality metrics. Training its 1.0 releases took 1.5 days (small, 32 A100 of
80 GB), 2 days (base, 32) and 5 days (large, 64). To try things out, `--config configs/openlrm.py:tiny` trains a tiny model for a
few steps.
"""

from configs.common import base, check_size, shrink

# Pixels: side of the source image; smallest and largest side of a target view; side of the window cut from it.
IMAGES = {"small": (224, (64, 192), 64), "base": (336, (96, 288), 96), "large": (448, (128, 384), 128)}  # fmt: skip
OBJECTS = 730_000  # of Objaverse, as counted in the LRM paper
EPOCHS = 60

SIZES = ("small", "base", "large", "tiny")


def get_config(size: str = "small"):
    """The config; `size` is "small", "base", "large" or "tiny"."""
    check_size(size, SIZES)
    config = base()
    name = "small" if size == "tiny" else size
    source_size, render_size, patch = IMAGES[name]
    # "products" takes 24 GB (base) and 45 GB (large) for 16 scenes on one H100.
    variant = f"openlrm-{name}-1.1"
    config.model = dict(name="lrm", variant=variant, dtype="bfloat16", remat="products")
    config.data.update(
        name="records",
        batch_size=128,
        num_workers=16,
        num_target=3,  # four supervised views: these and the source
        source_size=source_size,
        target_size=render_size[1],
        source_background=1.0,
        source_elevation=(-90.0, 90.0),
        foreground_ratio=None,
        normalize="source",
    )
    config.losses = dict(mse=1.0, lpips=1.0, tv=5e-4)
    config.networks.lpips = "lpips_vgg16.safetensors"
    config.schedule.update(learning_rate=4e-4, warmup_steps=3000)
    config.sharding.update(data=1, fsdp=-1)
    config.train.update(
        steps=EPOCHS * OBJECTS // config.data.batch_size,
        patch=patch,
        render_size=render_size,
        backgrounds=(0.0, 0.5, 1.0),
        keep_every=50_000,
    )
    return shrink(config) if size == "tiny" else config
