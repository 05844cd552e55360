"""The sections that all configs share. Most are keyword arguments of one function, so a misspelt key fails at start-up."""

from ml_collections import ConfigDict, config_dict


def base() -> ConfigDict:
    """The settings that the reference implementations agree on (LRM, https://arxiv.org/abs/2311.04400, section 4.2)."""
    config = ConfigDict()
    config.model = dict(name="triposr", variant="triposr")  # arguments of models.build
    config.data = dict(  # arguments of training.inputs.open_data; those from `root` on go to lrm_jax.data.<name>.make
        name="objects",  # objects, records, mvimgnet, scenes or procedural (needs no files)
        mix=(),  # (3, 1): of every four batches, three are from `name` and one is procedural
        batch_size=8,  # total over all devices and processes
        num_workers=0,  # reader processes; 0: use threads
        prefetch=2,
        source_background=0.5,  # grey level behind the source images
        root="data/objects",
        seed=0,
        num_source=1,
        num_target=3,  # views besides the sources; the sources are supervised too
        source_size=512,
        target_size=512,
        source_elevation=(5.0, 35.0),  # degrees; sources are drawn from the views in this range
        foreground_ratio=0.85,  # sources are cropped so that the object fills this share of the side; None: no crop
        normalize="azimuth",  # first source at azimuth 0 (TripoSR); "source": LRM, OpenLRM; "image": nano
        assumed_camera=config_dict.placeholder(tuple),  # (distance, field of view), for "image"
        mirror=False,  # half of the objects, at random
    )
    config.losses = dict(mse=1.0, mask=0.05)  # weights of losses.terms
    config.networks = dict(
        lpips="", perceptual=""
    )  # files of the frozen networks that these losses use
    config.schedule = dict(
        learning_rate=4e-4, warmup_steps=3000
    )  # arguments of optim.make_schedule
    config.optim = dict(  # arguments of optim.make_optimizer
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.05,
        clip_norm=1.0,
        skip_norm=config_dict.placeholder(float),  # updates with a longer gradient are skipped
        muon=config_dict.placeholder(str),  # regex: matrices that Muon updates
        freeze=config_dict.placeholder(str),  # regex: parameters that are not trained
        groups=(),  # ((regex, learning-rate factor), ...)
    )
    config.sharding = dict(data=-1, fsdp=1, tensor=1)  # arguments of sharding.make_device_mesh
    config.train = dict(
        steps=100_000,
        seed=0,
        init_from="",  # model file, reference checkpoint, training run or hf:ORG/NAME; empty: train from scratch
        patch=128,  # side of the window cut from each target view, pixels
        render_size=(),  # (low, high): targets are resized to a side in this range before windows are cut; (): target_size
        antialias=True,  # antialias that resize; False: windows sample the sharp target at points, with gaps between them
        foreground_crops=False,
        recolor=False,  # permute and darken the colour channels of half of the objects, at random
        backgrounds=(),  # greys to draw the background of a target from; (): any colour
        accumulate=1,  # number of parts that a batch is split into and processed one after the other
        ema_decay=0.999,
        log_every=50,
        save_every=1000,
        keep=2,  # the last checkpoints to keep, besides one every `keep_every` steps
        keep_every=config_dict.placeholder(int),
        eval_every=1000,  # steps; a checkpoint is saved before each evaluation
        eval_scenes=32,  # number of held-out scenes to evaluate, from the first one on
        eval_batch_size=config_dict.placeholder(
            int
        ),  # scenes evaluated at a time; None: one on each device
        tensorboard=True,
        profile_steps=0,  # number of steps to trace
    )
    return config


def check_size(size: str, sizes: tuple[str, ...] = ("", "tiny")) -> None:
    """Raises ValueError if a config has no such size."""
    if size not in sizes:
        raise ValueError(f"no size {size!r}: choose one of {', '.join(filter(None, sizes))}")


def finetune(config: ConfigDict, init_from: str) -> None:
    """Turns a config for training from scratch into one for fine-tuning on your own folder.

    10,000 steps of 32 objects, at a tenth of the learning rate.
    """
    config.data.update(name="objects", batch_size=32, num_workers=8)
    config.schedule.update(learning_rate=4e-5, warmup_steps=200)
    config.train.update(steps=10_000, init_from=init_from)


def shrink(config: ConfigDict) -> ConfigDict:
    """Shrinks any config to the size of a test: a few steps on a CPU."""
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
