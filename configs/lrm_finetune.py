"""Fine-tunes an LRM of the paper's size on your own objects, on one node.

    python tools/render_objects.py my_objects/ data/mine --protocol lrm --size 512
    lrm train --config configs/lrm_finetune.py --workdir runs/mine --config.data.root=data/mine

No weights of LRM were released, so this starts from a run of configs/lrm.py. To start from published weights, use
configs/openlrm_finetune.py or configs/triposr_finetune.py. It trains for 10,000 steps of 32 objects, at a tenth of the learning
rate.

Expected: not trained yet. To try things out, `--config configs/lrm_finetune.py:tiny` trains a tiny model for a few steps.
"""

from configs import lrm
from configs.common import check_size, finetune, shrink


def get_config(size: str = ""):
    """The config; `size` is "" or "tiny"."""
    check_size(size)
    config = lrm.get_config()
    finetune(config, init_from="runs/lrm")
    return shrink(config) if size == "tiny" else config
