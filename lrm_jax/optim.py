"""The optimiser: AdamW with decay where the references decay, warm-up and cosine, clipping by the global norm."""

import re

import jax
import optax

from lrm_jax.types import InputError

# Norms and biases are not decayed (OpenLRM, runners/train/lrm.py:50-85 at 3108b69; LVSM: every 1-D parameter). Names, not only
# ranks, decide: layers stacked by `nn.scan` have biases of rank 2.
NO_DECAY = r"(bias(_\d+)?|scale\d?)$|norm"


def decay_mask(params):
    """A tree of bools: whether weight decay acts on each parameter."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf.ndim > 1 and not re.search(NO_DECAY, name)

    return jax.tree_util.tree_map_with_path(one, params)


def make_schedule(learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear from 0 over `warmup_steps` to `learning_rate`, then half a cosine that reaches 0 at `steps`."""
    if not 0 <= warmup_steps < steps:
        raise InputError(
            f"schedule.warmup_steps={warmup_steps} must be less than train.steps={steps}"
        )
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, steps)


def make_optimizer(
    schedule: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """AdamW as LRM trains with it (https://arxiv.org/abs/2311.04400, section 4.2), after clipping by the global norm."""
    adamw = optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay, mask=decay_mask)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw)
