"""LVSM on single objects (https://arxiv.org/abs/2410.17242): new views of an object from four, without a 3D representation.

    lrm train --config configs/lvsm_objects.py:decoder-only-256 --workdir runs/lvsm --config.data.root=data/objaverse
    lrm train --config configs/lvsm_objects.py:decoder-only-512 --workdir runs/lvsm-512 --config.data.root=data/objaverse \\
        --config.train.init_from=runs/lvsm

Names: decoder-only-256 (the default), encoder-decoder-256, and -512 of both, which go on from a 256 px run: nothing but the picture
size changes. Neither code, data nor weights of this part were released. From the paper: 4 source and 8 target views, the perceptual
loss at 1.0, 256 px and then 512. Not published, or not checked, and chosen here: the sources are four of the target views; poses are
turned so that the first source is at azimuth 0; steps, rate and batch of the 512 px runs; all else as for scenes.

`:small` is for one 80 GB GPU and about an hour (22 M parameters, 128 px, no perceptual loss, for which it would need a network's file), on
the data of the bundled model: of four batches three of rendered objects and one of procedural shapes.
`--config.data.name=procedural --config.data.mix=()` needs no files at all.

Expected: not yet trained, and the time of `:small` not yet measured. `--config configs/lvsm_objects.py:tiny` is a few steps of a
tiny model, for trying things out.
"""

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


def get_config(size: str = ""):
    """The config; `size` is a variant of LVSM ("" is "decoder-only-256"), "small" or "tiny"."""
    check_size(size, SIZES)
    config = base()
    variant = "decoder-only-256" if size in ("", "small", "tiny") else size
    side = int(variant.rpartition("-")[2])
    config.model = dict(name="lvsm", variant=variant, dtype="bfloat16")
    config.data.update(
        batch_size=512,
        num_workers=16,
        source_background=1.0,
        num_source=4,
        num_target=4,  # eight target views: the sources are four of them
        source_size=side,
        target_size=side,
        source_elevation=(-90.0, 90.0),
        foreground_ratio=None,
    )
    config.losses = dict(mse=1.0, perceptual=1.0)
    config.networks.perceptual = "vgg19.safetensors"
    config.schedule.update(learning_rate=4e-4, warmup_steps=3000)
    config.optim.skip_norm = 5.0
    # LVSM has no alpha: it learns the background with the object.
    config.train.update(steps=80_000, patch=side, backgrounds=(1.0,), keep_every=10_000)
    if side == 512:
        config.data.batch_size = 64
        config.schedule.update(learning_rate=4e-5, warmup_steps=1000)
        config.train.steps = 10_000
    if size == "small":
        config.model.update(width=384, num_heads=6, depth=12, image_size=128)
        config.data.update(
            root="data/kaykit", mix=(3, 1), batch_size=32, source_size=128, target_size=128
        )
        config.losses.perceptual = 0.0
        config.schedule.warmup_steps = 500
        config.train.update(steps=8000, patch=128, save_every=500)
    return shrink(config) if size == "tiny" else config
