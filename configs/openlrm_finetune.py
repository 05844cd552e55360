"""Fine-tuning of a published OpenLRM 1.1 on one's own objects, on one node.

    python tools/render_objects.py my_objects/ data/mine --protocol openlrm --size 512
    lrm train --config configs/openlrm_finetune.py:base --workdir runs/mine --config.data.root=data/mine

Sizes: small, base, large; of each the one trained on Objaverse and MVImgNet (`mix`). Starts from a tenth of the learning rate,
over 10,000 steps of 32 objects. With one accelerator of 80 GB or less, raise `--config.train.accumulate` until it fits. On a
machine without network give `--config.train.init_from` the folder with model.safetensors and config.json.

Expected: not yet trained. `--config configs/openlrm_finetune.py:tiny` is a few steps of a tiny model, for trying things out.
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
