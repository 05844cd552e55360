"""Fine-tunes a published OpenLRM 1.1 on your own objects, on one node.

    python tools/render_objects.py my_objects/ data/mine --protocol openlrm --size 512
    lrm train --config configs/openlrm_finetune.py:base --workdir runs/mine --config.data.root=data/mine

Sizes: small, base, large, each from the weights trained on Objaverse and MVImgNet (`mix`). It trains for 10,000 steps of 32
objects, at a tenth of the learning rate. On one accelerator of 80 GB or less, raise `--config.train.accumulate` until it fits.
Without network access, set `--config.train.init_from` to a folder with model.safetensors and config.json.

Expected: not trained yet. To try things out, `--config configs/openlrm_finetune.py:tiny` trains a tiny model for a few steps.
"""

from configs import openlrm
from configs.common import check_size, finetune, shrink


def get_config(size: str = "small"):
    """The config; `size` is "small", "base", "large" or "tiny"."""
    check_size(size, openlrm.SIZES)
    name = "small" if size == "tiny" else size
    config = openlrm.get_config(name)
    finetune(config, init_from=f"hf:zxhezexin/openlrm-mix-{name}-1.1")
    return shrink(config) if size == "tiny" else config
