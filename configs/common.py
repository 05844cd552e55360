"""What the configs share: the sections, each splatted into one strict signature, so that a misspelt key is an error at start-up."""

from ml_collections import ConfigDict, config_dict


def base() -> ConfigDict:
    """The settings that the references agree on (LRM, https://arxiv.org/abs/2311.04400, section 4.2)."""
    config = ConfigDict()
    config.model = dict(name="triposr", variant="triposr")  # models.build
    config.data = dict(  # training/inputs.py: open_data; from `root` on lrm_jax.data.<name>.make, for "train" and for "val"
        name="objects",  # objects, records, mvimgnet, scenes, or procedural, which needs no files
        mix=(),  # (3, 1): of four batches three of `name` and one procedural
        batch_size=8,  # of all devices and processes together
        num_workers=0,  # processes that read; 0: threads
        prefetch=2,
        source_background=0.5,  # the grey that sources are composited on
        root="data/objects",
        seed=0,
        num_source=1,
        num_target=3,  # views besides the sources, which are supervised too
        source_size=512,
        target_size=512,
        source_elevation=(5.0, 35.0),  # degrees: sources are drawn from the views within
        foreground_ratio=0.85,  # sources are cropped to the object, which fills this share of the side; None: they are not
        normalize="azimuth",  # the world is turned so that the first source is at azimuth 0 (TripoSR); "source": LRM, OpenLRM; "image": nano
        assumed_camera=config_dict.placeholder(tuple),  # (distance, field of view): of "image"
        mirror=False,  # every other object
    )
    config.losses = dict(mse=1.0, mask=0.05)  # losses.terms: weights by name
    config.networks = dict(lpips="", perceptual="")  # files of the losses' frozen networks
    config.schedule = dict(learning_rate=4e-4, warmup_steps=3000)  # optim.make_schedule
    config.optim = dict(  # optim.make_optimizer
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.05,
        clip_norm=1.0,
        skip_norm=config_dict.placeholder(float),  # longer gradients are skipped
        muon=config_dict.placeholder(str),  # regex of matrices that Muon updates
        freeze=config_dict.placeholder(str),  # regex of parameters that stay as they are
        groups=(),  # ((regex, factor of the learning rate), ...)
    )
    config.sharding = dict(data=-1, fsdp=1, tensor=1)  # sharding.make_device_mesh
    config.train = dict(
        steps=100_000,
        seed=0,
        init_from="",  # a model file, a reference's checkpoint, a run, hf:ORG/NAME; empty: from scratch
        patch=128,  # side of the window of each target view
        render_size=(),  # (low, high): side of the whole view that windows are cut from; (): target_size
        antialias=True,  # of that resize; False: windows are points of the sharp target, with gaps between them
        foreground_crops=False,
        recolor=False,  # every other object, its colour channels change places and brightness
        backgrounds=(),  # greys behind the targets; (): any colour
        accumulate=1,  # parts that a batch is processed in, one after the other
        ema_decay=0.999,
        log_every=50,
        save_every=1000,
        keep=2,  # checkpoints; and besides them one every `keep_every` steps
        keep_every=config_dict.placeholder(int),
        eval_every=1000,  # steps; each evaluation comes after a checkpoint
        eval_scenes=32,  # of the held-out ones, from the first on
        eval_batch_size=config_dict.placeholder(
            int
        ),  # scenes that are evaluated at a time; None: one on each device
        tensorboard=True,
        profile_steps=0,  # a trace of so many steps
    )
    return config


def check_size(size: str, sizes: tuple[str, ...] = ("", "tiny")) -> None:
    """Raises ValueError for what a config has no size of."""
    if size not in sizes:
        raise ValueError(f"no size {size!r}: there are {', '.join(filter(None, sizes))}")


def finetune(config: ConfigDict, init_from: str) -> None:
    """A config of training from scratch as one of fine-tuning, on a folder of one's own: a tenth of the rate, 10,000 steps of 32."""
    config.data.update(name="objects", batch_size=32, num_workers=8)
    config.schedule.update(learning_rate=4e-5, warmup_steps=200)
    config.train.update(steps=10_000, init_from=init_from)


def shrink(config: ConfigDict) -> ConfigDict:
    """Any config at the size of a test: a few steps on a CPU."""
    config.model.variant = "tiny"
    config.data.update(
        batch_size=8, source_size=32, target_size=32, num_target=2, num_workers=0, mix=()
    )
    config.schedule.warmup_steps = 1
    config.sharding.update(data=-1, fsdp=1, tensor=1)
    config.losses.update(lpips=0.0, perceptual=0.0)
    config.train.update(
        steps=4, patch=8, render_size=(), accumulate=1, init_from="", log_every=1, save_every=2, eval_every=4, eval_scenes=8
    )  # fmt: skip
    return config
