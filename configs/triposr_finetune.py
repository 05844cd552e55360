"""Fine-tunes the published TripoSR on your own objects, on one node.

    python tools/render_objects.py my_objects/ data/mine --protocol triposr
    lrm train --config configs/triposr_finetune.py --workdir runs/mine --config.data.root=data/mine

It trains for 10,000 steps of 32 objects, at a tenth of the learning rate. On one accelerator of 80 GB or less, raise
`--config.train.accumulate` until it fits. Without network access, set `--config.train.init_from` to the file model.ckpt.

Expected: not trained yet. To try things out, `--config configs/triposr_finetune.py:tiny` trains a tiny model for a few steps.
"""

from configs import triposr
from configs.common import check_size, finetune, shrink


def get_config(size: str = ""):
    """The config; `size` is "" or "tiny"."""
    check_size(size)
    config = triposr.get_config()
    finetune(config, init_from="hf:stabilityai/TripoSR")
    return shrink(config) if size == "tiny" else config
