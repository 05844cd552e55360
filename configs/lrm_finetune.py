"""Fine-tuning of an LRM at the paper's size on one's own objects, on one node.

    python tools/render_objects.py my_objects/ data/mine --protocol lrm --size 512
    lrm train --config configs/lrm_finetune.py --workdir runs/mine --config.data.root=data/mine

No weights of LRM were released: it starts from a run of configs/lrm.py. Published weights to start from are those of
configs/openlrm_finetune.py and configs/triposr_finetune.py. A tenth of the learning rate, over 10,000 steps of 32 objects.

Expected: not yet trained. `--config configs/lrm_finetune.py:tiny` is a few steps of a tiny model, for trying things out.
"""

from configs import lrm
from configs.common import check_size, finetune, shrink


def get_config(size: str = ""):
    """The config; `size` is "" or "tiny"."""
    check_size(size)
    config = lrm.get_config()
    finetune(config, init_from="runs/lrm")
    return shrink(config) if size == "tiny" else config
