"""The bundled model: a TripoSR (https://arxiv.org/abs/2403.02151) that trains on two CPU cores or one GPU in about an hour.

    python tools/render_objects.py kaykit/ data/kaykit --views 32 --size 256
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 XLA_FLAGS=--xla_force_host_platform_device_count=2 \\
        lrm train --config configs/nano.py --workdir runs/nano

The two environment variables are for CPUs: huge pages avoid page faults, and two devices keep both cores busy (6 to 7 samples/s).
Of every eight batches, seven are rendered objects and one is procedural. `--config.data.name=procedural --config.data.mix=()`
needs no files at all. To try things out, `--config configs/nano.py:tiny` trains a tiny model for a few steps.

`:fine` continues with patches of 8 pixels instead of 16, and 3 x 12 x 12 tokens instead of 3 x 8 x 8 (8 to 10 samples/s on cores
with AVX-512):

    python tools/finer_tokens.py runs/nano runs/start.safetensors --variant nano-fine
    ... lrm train --config configs/nano.py:fine --workdir runs/fine --config.train.init_from=runs/start.safetensors

`tools/average_weights.py` then averages the weights of several such runs into a model that also sees the mirrored image. With
`--config.data.mix="(1,1)"` (half of the batches procedural), `:fine` did better on an asset pack of a different kind.

Expected: the 32,000 samples take 90 minutes on two cores; the 59,200 samples of `:fine` took two hours on two faster cores. The
bundled model was trained on 272,000 samples in all. It reaches 18.1 dB and F@0.2 0.90 on side views of an asset pack that it
never saw; the mean object reaches 13.7 dB and 0.49. docs/model_card.md explains how it was trained.
"""

from configs.common import base, check_size, shrink


def get_config(size: str = ""):
    """The config; `size` is "", "fine" or "tiny"."""
    check_size(size, ("", "fine", "tiny"))
    config = base()
    config.model.variant = "nano"
    config.data.update(
        root="data/kaykit", batch_size=16, mix=(7, 1), num_target=3, source_size=128, target_size=96, mirror=True,
        normalize="image", assumed_camera=(3.0, 40.0),  # those of the variant
    )  # fmt: skip
    config.losses.update(mask=0.2)
    config.optim.update(muon=r"(blocks/.*|proj_in|proj_out)/kernel$")
    config.schedule.update(learning_rate=2e-3, warmup_steps=50)
    config.train.update(
        steps=2000, patch=20, render_size=(20, 40), antialias=False, recolor=True, ema_decay=0.995, log_every=25, save_every=100, eval_every=200
    )  # fmt: skip
    if size == "fine":
        config.model.variant = "nano-fine"
        config.data.batch_size = 32
        config.schedule.warmup_steps = 20
        config.train.update(steps=1850, log_every=10, save_every=50, eval_every=100)
    if size == "tiny":
        shrink(config).data.assumed_camera = (1.9, 40.0)
    return config
