"""The optimiser: AdamW, or Muon for matrices, with weight decay, warm-up and cosine, clipping, and skipping of bad updates.

A parameter's name is its path ("backbone/blocks/fc1/kernel"), and `re.search` on the name selects parameters. Layers stacked by
`nn.scan` are a single parameter, so they can only be frozen or trained together.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from lrm_jax.types import InputError

# Norms and biases are not decayed (OpenLRM, runners/train/lrm.py:50-85 at 3108b69; LVSM: every 1-D parameter). The rank alone is
# not enough: in layers stacked by `nn.scan`, biases have rank 2.
NO_DECAY = r"(bias(_\d+)?|scale\d?)$|norm"


def make_schedule(learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to `learning_rate` over `warmup_steps`, then half a cosine that reaches 0 at `steps`."""
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
    skip_norm: float | None = None,
    muon: str | None = None,
    freeze: str | None = None,
    groups: Mapping[str, float] | Iterable[tuple[str, float]] = (),
) -> optax.GradientTransformation:
    """AdamW as in LRM (https://arxiv.org/abs/2311.04400, section 4.2), after clipping by the global norm.

    The learning rate is `schedule` at the number of updates, including skipped ones. As in LVSM, it advances on a skipped update,
    so it always matches the step in the log. The moments and their bias correction do not advance.

    Args:
      clip_norm: a gradient with a larger global norm is scaled down to this norm.
      skip_norm: an update is skipped if its gradient norm before clipping exceeds this (LVSM: 5.0). None: no limit. An update
        with a gradient that is not finite is always skipped.
      muon: pattern of matrices, or stacks of matrices, that are updated with Muon (https://arxiv.org/abs/2502.16982, including
        its factor that makes updates as large as AdamW's). Meant for the transformer's hidden layers. None: use AdamW for all.
      freeze: pattern of parameters that are not trained. They have no moments and do not count in the gradient's norm, so the
        compiler drops their gradients too.
      groups: (pattern, learning-rate factor) pairs. The first match applies; other parameters have factor 1. As in PyTorch, the
        factor also multiplies weight decay. In a config, use pairs, not a dict: ConfigDict sorts keys and allows no dots in them.

    Raises:
      InputError: a number is out of range; or, from `init`, a pattern matches no parameter.
    """
    groups = tuple(dict(groups).items())
    check_numbers(clip_norm=clip_norm, skip_norm=math.inf if skip_norm is None else skip_norm)
    check_numbers(**{f"groups[{pattern!r}]": factor for pattern, factor in groups})
    adamw = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        scale_by_adam_or_muon(b1, b2, eps, muon),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        scale_by_group(groups),
    )
    guarded = skip_updates(adamw, skip_norm)
    optimizer = optax.chain(guarded, optax.scale_by_learning_rate(schedule))
    if freeze is not None:
        optimizer = optax.chain(
            optax.masked(optimizer, lambda params: matches(params, freeze, False)),
            optax.masked(optax.set_to_zero(), lambda params: matches(params, freeze, True)),
        )

    def init(params):
        check_patterns(params, freeze, groups, muon)
        return optimizer.init(params)

    return optax.GradientTransformation(init, optimizer.update)


def decay_mask(params: Any) -> Any:
    """A tree of bools: whether weight decay applies to each parameter."""

    def one(path, leaf):
        return leaf.ndim > 1 and not re.search(NO_DECAY, name_of(path))

    return jax.tree_util.tree_map_with_path(one, params)


def scale_by_adam_or_muon(
    b1: float, b2: float, eps: float, muon: str | None
) -> optax.GradientTransformation:
    """Updates in Adam's direction, or in Muon's for parameters that match the pattern."""
    adam = optax.scale_by_adam(b1, b2, eps)
    if muon is None:
        return adam

    def matrices(tree):
        return jax.tree.map(lambda x: MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), tree)

    def as_long_as_adams(updates, _):
        return jax.tree.map(lambda x: 0.2 * math.sqrt(max(x.shape[-2:])) * x, updates)

    orthogonal = optax.chain(
        scale_by_muon(weight_dimension_numbers=matrices), optax.stateless(as_long_as_adams)
    )
    return optax.partition({True: orthogonal, False: adam}, lambda params: matches(params, muon))


# -- the guard


class GuardState(NamedTuple):
    """The state of `skip_updates`."""

    skipped: jax.Array  # [] int32, updates skipped since the start of the run
    grad_norm: jax.Array  # [] float32, global norm of the last gradient, before clipping
    inner: optax.OptState


def skip_updates(
    inner: optax.GradientTransformation, max_norm: float | None = None
) -> optax.GradientTransformation:
    """Wraps `inner` to skip and count updates whose gradient is not finite or has a norm above `max_norm`.

    These are LVSM's guards (https://github.com/Haian-Jin/LVSM, train.py:152-202), except for NaN. LVSM replaces NaN by 0 and
    makes the update; this skips it, which is what the guards intend.

    Both outcomes are computed, and `where` selects one. This fuses into AdamW's elementwise pass and keeps the collectives of
    clipping out of branches. It costs no memory: the compiled step of a sharded stack of layers takes the same number of bytes
    with `where`, with `lax.cond` and without a guard (on 8 CPU devices and a v5e 2x4: 96 MiB for 96 MiB of donated parameters and
    moments).
    """
    limit = math.inf if max_norm is None else max_norm

    def init(params):
        return GuardState(jnp.int32(0), jnp.float32(0), inner.init(params))

    def update(grads, state, params=None):
        norm = optax.tree.norm(grads).astype(jnp.float32)
        accepted = jnp.isfinite(norm) & (norm <= limit)
        updates, new = inner.update(grads, state.inner, params)
        updates = jax.tree.map(lambda x: jnp.where(accepted, x, 0), updates)
        kept = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, state.inner)
        return updates, GuardState(state.skipped + ~accepted, norm, kept)

    return optax.GradientTransformation(init, update)


def num_skipped(opt_state: optax.OptState) -> jax.Array:
    """The number of updates skipped since the start of the run, [] int32."""
    return _guard(opt_state).skipped


def grad_norm(opt_state: optax.OptState) -> jax.Array:
    """The global norm of the last gradient of trained parameters, before clipping, [] float32. If not finite, it was skipped."""
    return _guard(opt_state).grad_norm


def _guard(opt_state):
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, GuardState))
    return next(node for node in leaves if isinstance(node, GuardState))


# -- parameters by name


def name_of(path: tuple) -> str:
    """A parameter's name from its key path: "backbone/blocks/fc1/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def matches(params: Any, pattern: str, wanted: bool = True) -> Any:
    """A tree of bools: whether each parameter's name matches `pattern`. If not `wanted`, the opposite."""

    def one(path, leaf):
        return (re.search(pattern, name_of(path)) is not None) == wanted

    return jax.tree_util.tree_map_with_path(one, params)


def scale_by_group(groups: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """Multiplies each update by the factor of the first pattern that its parameter's name matches, or by 1."""

    def one(path, update):
        name = name_of(path)
        return update * next((factor for pattern, factor in groups if re.search(pattern, name)), 1)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(one, updates))


def check_patterns(
    params: Any,
    freeze: str | None,
    groups: Iterable[tuple[str, float]] = (),
    muon: str | None = None,
) -> None:
    """Checks the patterns against a tree of parameters, or of their shapes.

    Raises:
      InputError: a pattern is not a regular expression or matches no parameter, `freeze` matches all parameters, or `muon`
        matches one that is not a matrix.
    """
    patterns = [(key, x) for key, x in (("freeze", freeze), ("muon", muon)) if x is not None]
    patterns += [("groups", pattern) for pattern, _ in groups]
    for key, pattern in patterns:
        try:
            found = jax.tree.leaves(matches(params, pattern))
        except re.error as error:
            raise InputError(
                f"optim.{key}: {pattern!r} is not a regular expression ({error}): correct it"
            ) from None
        if not any(found):
            raise InputError(
                f"optim.{key}: {pattern!r} matches no parameter: use names such as {examples(params)}"
            )
        if key == "muon" and (
            wrong := [
                name
                for name, x in named(params)
                if re.search(pattern, name) and (x.ndim < 2 or re.search(NO_DECAY, name))
            ]
        ):
            raise InputError(
                f"optim.muon: {pattern!r} matches {wrong[0]}, which is not a matrix: end the pattern with /kernel$"
            )
        if key == "freeze" and all(found):
            raise InputError(
                f"optim.freeze: {pattern!r} matches all parameters, so none would be trained: narrow it"
            )


def named(params: Any) -> list[tuple[str, Any]]:
    """(name, leaf) of every parameter."""
    return [(name_of(path), x) for path, x in jax.tree_util.tree_leaves_with_path(params)]


def examples(params: Any, count: int = 3) -> str:
    """Names of `count` parameters, spread over the tree."""
    names = [name for name, _ in named(params)]
    return ", ".join(names[:: -(-len(names) // count)])


def check_numbers(**numbers: float) -> None:
    """Raises InputError for a number that is not positive, NaN included."""
    for name, number in numbers.items():
        if not number > 0:
            raise InputError(f"optim.{name}={number} must be greater than 0")
