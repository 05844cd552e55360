"""LRM at the paper's size (https://arxiv.org/abs/2311.04400, section 4.2 and appendix): one image and its camera to a triplane.

    lrm train --config configs/lrm.py --workdir runs/lrm --config.data.root=data/objaverse
    python tools/aot.py --topology v4:4x4x4 --config configs/lrm.py     # what a chip of a pod holds, does and sends

Data: folders of `tools/render_objects.py`, 32 views an object in LRM's protocol, made into records by `tools/build_dataset.py`
(`--config.data.name=objects` reads a few hundred of them as they are). LPIPS needs `lpips_vgg16.safetensors`, which
`lrm convert` makes once. The paper: 730k objects of Objaverse and 220k videos of MVImgNet, on 128 A100 of 40 GB for 3 days.

Expected: not yet trained. The paper's own numbers on 100 objects of GSO are 19.6 dB and LPIPS 0.163, with its own alignment of
sizes. `--config configs/lrm.py:tiny` is a few steps of a tiny model, for trying things out.
"""

from configs.common import base, check_size, shrink

OBJECTS = 730_000 + 220_000
EPOCHS = 30


def get_config(size: str = ""):
    """The config; `size` is "" or "tiny"."""
    check_size(size)
    config = base()
    # 512 rays of each scene at a time: with 16 scenes on a chip, a layer of the decoder is 0.13 GB.
    config.model = dict(name="lrm", variant="lrm", dtype="bfloat16", ray_chunk=512)
    config.data.update(
        name="records",
        batch_size=1024,
        num_workers=16,
        num_target=3,  # four views are supervised: the source is one of them
        source_size=512,
        target_size=384,
        source_background=1.0,
        source_elevation=(-90.0, 90.0),
        foreground_ratio=None,
        normalize="source",
    )
    config.losses = dict(mse=1.0, lpips=2.0)
    config.networks.lpips = "lpips_vgg16.safetensors"
    config.schedule.update(learning_rate=4e-4, warmup_steps=3000)
    config.sharding.update(data=1, fsdp=-1)
    config.train.update(
        steps=EPOCHS * OBJECTS // config.data.batch_size,
        patch=128,
        render_size=(128, 384),
        backgrounds=(1.0,),
        save_every=500,
        keep_every=5000,
    )
    return shrink(config) if size == "tiny" else config
