"""What the configs share: the sections, each splatted into one strict signature, so that a misspelt key is an error at start-up."""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """The settings that the references agree on (LRM, https://arxiv.org/abs/2311.04400, section 4.2)."""
    config = ConfigDict()
    config.model = dict(name="triposr", variant="triposr")  # models.build
    config.data = dict(  # lrm_jax.data.<name>.make, for "train" and for "val"
        name="objects",
        root="data/objects",
        seed=0,
        batch_size=8,
        num_source=1,
        num_target=4,  # views besides the source, which is supervised too
        source_size=512,
        target_size=512,
        source_background=0.5,  # the grey that sources are composited on
    )
    config.losses = dict(mse=1.0, mask=0.05)  # losses.terms: weights by name
    config.schedule = dict(learning_rate=4e-4, warmup_steps=3000)  # optim.make_schedule
    config.optim = dict(
        b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, clip_norm=1.0
    )  # optim.make_optimizer
    config.sharding = dict(data=-1, fsdp=1, tensor=1)  # sharding.make_device_mesh
    config.train = dict(
        steps=100_000,
        seed=0,
        patch=128,  # side of the window of each target view
        ema_decay=0.999,
        log_every=50,
        save_every=1000,
        eval_every=1000,
        eval_batches=2,
    )
    return config


def shrink(config: ConfigDict) -> ConfigDict:
    """Any config at the size of a test: a few steps on a CPU."""
    config.model.variant = "tiny"
    config.data.update(batch_size=8, source_size=32, target_size=32, num_target=2)
    config.schedule.warmup_steps = 1
    config.train.update(steps=4, patch=8, log_every=1, save_every=2, eval_every=4, eval_batches=1)
    return config
