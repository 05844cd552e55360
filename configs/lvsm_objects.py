"""LVSM on single objects (https://arxiv.org/abs/2410.17242): new views of an object from four, without a 3D representation.

    lrm train --config configs/lvsm_objects.py:decoder-only-256 --workdir runs/lvsm --config.data.root=data/objaverse
    lrm train --config configs/lvsm_objects.py:decoder-only-512 --workdir runs/lvsm-512 --config.data.root=data/objaverse \\
        --config.train.init_from=runs/lvsm

Variants: decoder-only-256 (default), encoder-decoder-256, decoder-only-512 and encoder-decoder-512. The 512 px variants continue
from a 256 px run of the same kind: only the image size changes. The authors released no code, data or weights for objects. From
the paper: 4 source and 8 target views, a weight of 1.0 for the perceptual loss, 256 px and then 512 px. Unpublished or unchecked,
and chosen here: the sources are four of the target views; poses are rotated so that the first source is at azimuth 0; steps,
learning rate and batch size of the 512 px runs; everything else is as for scenes.

`:small` is for one 80 GB GPU and about an hour: 22 M parameters, 128 px, and no perceptual loss, which needs a network file. It
trains on the data of the bundled model: of every four batches, three are rendered objects and one is procedural.
`--config.data.name=procedural --config.data.mix=()` needs no files at all.

`:nano` is for comparison with the TripoSR of 4.6 M parameters in docs/evaluation.md. It has 3.5 M parameters and trains on as
many samples of the same data, with one source view, at 128 px, on two CPU cores. Set the environment variables that
configs/nano.py shows.

Expected: in an hour on two busy cores, `:nano` reaches 15.7 dB on side views of held-out objects, as blurry shapes; that TripoSR
reaches 15.4 dB, and the mean image 13.1 dB. The others are not trained yet, and `:small` has not been timed.
To try things out, `--config configs/lvsm_objects.py:tiny` trains a tiny model for a few steps.
"""

from configs.common import check_size, shrink
from configs.lvsm_scenes import SIZES, start


def get_config(size: str = ""):
    """The config; `size` is a variant of LVSM ("" is "decoder-only-256"), "small", "nano" or "tiny"."""
    check_size(size, (*SIZES, "nano"))
    config, side = start("small" if size == "nano" else size)
    config.data.update(
        name="objects" if size in ("small", "nano") else "records",
        batch_size=512,
        num_workers=16,
        source_background=1.0,
        num_source=4,
        num_target=4,  # eight target views: these and the four sources
        source_size=side,
        target_size=side,
        source_elevation=(-90.0, 90.0),
        foreground_ratio=None,
    )
    config.losses = dict(mse=1.0, perceptual=1.0)
    # LVSM predicts no alpha: it learns the background together with the object.
    config.train.update(steps=80_000, patch=side, backgrounds=(1.0,), keep_every=10_000)
    if side == 512:
        config.data.batch_size = 64
        config.schedule.update(learning_rate=4e-5, warmup_steps=1000)
        config.train.steps = 10_000
    if size == "nano":
        config.model.update(
            width=192, num_heads=3, depth=6, patch=16, image_size=128, dtype="float32", remat="none"
        )
        config.data.update(
            root="data/kaykit", batch_size=8, num_source=1, num_target=1, num_workers=0, source_size=128, target_size=128,
            source_elevation=(5.0, 35.0), mirror=True,
        )  # fmt: skip
        config.losses.perceptual = 0.0
        config.schedule.update(learning_rate=1e-3, warmup_steps=100)
        config.train.update(
            steps=2300, patch=128, ema_decay=0.998, log_every=25, save_every=200, eval_every=200
        )
    if size == "small":
        config.data.update(
            root="data/kaykit", mix=(3, 1), batch_size=32, source_size=128, target_size=128
        )
        config.losses.perceptual = 0.0
        config.schedule.warmup_steps = 500
        config.train.update(steps=8000, patch=128, save_every=500)
    return shrink(config) if size == "tiny" else config
