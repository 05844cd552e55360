"""Fine-tuning of the published TripoSR on one's own objects, on one node.

    python tools/render_objects.py my_objects/ data/mine --protocol triposr
    lrm train --config configs/triposr_finetune.py --workdir runs/mine --config.data.root=data/mine

Starts from a tenth of the learning rate, over 10,000 steps of 32 objects. With one accelerator of 80 GB or less, raise
`--config.train.accumulate` until it fits. On a machine without network give `--config.train.init_from` the file model.ckpt.

Expected: not yet trained. `--config configs/triposr_finetune.py:tiny` is a few steps of a tiny model, for trying things out.
"""

from configs import triposr
from configs.common import check_size, finetune, shrink


def get_config(size: str = ""):
    """The config; `size` is "" or "tiny"."""
    check_size(size)
    config = triposr.get_config()
    finetune(config, init_from="hf:stabilityai/TripoSR")
    return shrink(config) if size == "tiny" else config
