"""LRM at the paper's size (https://arxiv.org/abs/2311.04400, section 4.2 and appendix): one image and its camera to a triplane.

    lrm train --config configs/lrm.py --workdir runs/lrm --config.data.root=data/objaverse
    python tools/aot.py --topology v4:4x4x4 --config configs/lrm.py     # memory, operations and traffic of one chip

Data: render 32 views of each object with `tools/render_objects.py --protocol lrm`, then pack them with `tools/build_dataset.py`.
For a few hundred objects, `--config.data.name=objects` reads the rendered folders directly. The LPIPS loss needs
`lpips_vgg16.safetensors`: make it once with `lrm convert`. The paper trained on 730k objects of Objaverse and 220k videos of
MVImgNet, with 128 A100 (40 GB) for 3 days.

Expected: not trained yet. The paper reports 19.6 dB and LPIPS 0.163 on 100 objects of GSO, with its own alignment of sizes.
To try things out, `--config configs/lrm.py:tiny` trains a tiny model for a few steps.
"""

from configs.common import base, check_size, shrink

OBJECTS = 730_000 + 220_000
EPOCHS = 30


def get_config(size: str = ""):
    """The config; `size` is "" or "tiny"."""
    check_size(size)
    config = base()
    config.model = dict(name="lrm", variant="lrm", dtype="bfloat16", remat="attention")
    config.data.update(
        name="records",
        batch_size=1024,
        num_workers=16,
        num_target=3,  # four supervised views: these and the source
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
