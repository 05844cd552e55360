"""The training step of every family: crop -> rays -> model -> losses -> gradient -> optimiser -> running mean. Pure functions.

A family's own `objective` takes the place of rendering, or adds to it: the loss is the sum of all terms with a weight.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from lrm_jax import models
from lrm_jax.ops import cameras as ops_cameras
from lrm_jax.ops import image_metrics
from lrm_jax.ops.compositing import as_float, blend, on_background, premultiplied
from lrm_jax.parallel import batch_axes, sharding
from lrm_jax.training import flops, losses, optim
from lrm_jax.types import Batch, Cameras, Rays, Rendering, TrainState, Views


def train_step(
    state: TrainState,
    batch: Batch,
    networks: dict[str, Any],
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    loss_weights: dict[str, float],
    source_background: float,
    patch: int,
    render_size: tuple[int, int],
    antialias: bool,
    foreground_crops: bool,
    recolor: bool,
    backgrounds: tuple[float, ...],
    accumulate: int,
    ema_decay: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. Compares a random window of each target view with its rendering, both on a random background.

    If only terms of the family's own `objective` have weights, nothing is rendered here.

    Args:
      state: the caller donates its buffers.
      batch: images with straight colour and alpha, or opaque images; uint8, or floats in [0, 1].
      networks: parameters of the frozen networks of losses, see `losses.terms`.
      source_background: grey level behind the source views.
      patch, render_size, antialias, foreground_crops: see `random_crops`.
      recolor: change the colours of half of the scenes, at random: see `recolored`.
      backgrounds: grey levels; each target view gets one at random (OpenLRM: 0, 0.5, 1). Empty: any colour.
      accumulate: number of equal parts that the batch is split into. They are processed in turn; the gradient is their mean.
      ema_decay: decay of the running mean of the parameters. It is reached after about 10 / (1 - ema_decay) steps.

    Returns:
      The new state, and scalars by name: the losses and the PSNR of the mean error over all windows, as `train/...`; the
      gradient norm before clipping, the number of updates skipped so far, and the learning rate.
    """

    loss = partial(
        total_loss, step=state.step, model=model, weights=loss_weights, source_background=source_background, patch=patch,
        render_size=render_size, antialias=antialias, foreground_crops=foreground_crops, recolor=recolor, backgrounds=backgrounds,
    )  # fmt: skip

    def gradient(params, networks, part_and_keys):
        inputs = batch_axes.constrain_batch(part_and_keys)
        return jax.grad(loss, has_aux=True)(params, networks, *inputs)

    # A scene's draws follow from its place in the whole batch, however that is split.
    keys_B = jax.random.split(jax.random.fold_in(state.key, state.step), batch.source.rgb.shape[0])
    if accumulate == 1:
        grads, (scalars, statistics) = gradient(state.params, networks, (batch, keys_B))
    else:
        grads, (scalars, statistics) = _accumulated(
            gradient, state.params, networks, (batch, keys_B), accumulate
        )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = with_statistics(optax.apply_updates(state.params, updates), statistics)
    ema_params = running_mean(state.ema_params, params, state.step, ema_decay)
    scalars = _named(scalars, opt_state, schedule(state.step))
    state = state.replace(
        step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state
    )
    return state, scalars


def total_loss(
    params, networks, part: Batch, keys_B, *, step, model, weights, source_background, **windows
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
    """The sum of all terms that have a weight; and the scalars of a report, and new running statistics: see `objective`."""
    terms, scalars, statistics = {}, {}, {}
    own = {k: v for k, v in weights.items() if k in models.objective_terms(model)}
    of_renderings = {k: v for k, v in weights.items() if k not in own}
    if any(of_renderings.values()):
        terms, scalars["square_error"] = rendering_terms(
            params, networks, part, keys_B, model=model, weights=of_renderings, source_background=source_background, **windows
        )  # fmt: skip
    if any(own.values()):
        found, statistics = objective(model, params, part, keys_B, step, source_background)
        terms |= {name: found[name] for name, weight in own.items() if weight}
    total = sum(weights[name] * value for name, value in terms.items())
    return total, ({"loss": total, **terms, **scalars}, statistics)


def rendering_terms(
    params,
    networks,
    part: Batch,
    keys_B,
    *,
    model,
    weights,
    source_background,
    patch,
    render_size,
    antialias,
    foreground_crops,
    recolor,
    backgrounds,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The terms of `losses` for random windows of the target views, and the mean square error."""
    keys_4B = jax.vmap(lambda key: jax.random.split(key, 4), out_axes=1)(keys_B)
    crop_keys, background_keys, render_keys, color_keys = keys_4B
    source = part.source
    windows = partial(
        random_crops, patch=patch, render_size=render_size, antialias=antialias, foreground=foreground_crops
    )  # fmt: skip
    target, cameras = by_scene(windows, crop_keys, part.target)
    if recolor:
        source, target = by_scene(recolored, color_keys, source, target)
    source = on_background(source, source_background)
    rays = ops_cameras.pixel_rays(cameras, patch, patch)
    greys = partial(random_backgrounds, shape=(1, target.alpha.shape[1]), greys=backgrounds)
    background = by_scene(greys, background_keys)
    wanted = blend(target, background)
    scene, rendering = nn.apply(_encode_and_render, model)(
        {"params": params}, source, rays, render_keys
    )
    seen = blend(rendering, background)
    terms = losses.terms(seen, wanted, weights, scene=scene, networks=networks, dtype=model.dtype)
    return terms, losses.mse(seen, wanted)


def objective(
    model: nn.Module, params, part: Batch, keys_B: jax.Array, step: jax.Array, background: float
) -> tuple[dict[str, jax.Array], Any]:
    """The terms of the family's own loss, and the new running statistics of its norms, in a tree like part of `params`.

    Its views are on a grey background; the target keeps its alpha.
    """
    source = on_background(part.source, background)
    target = on_background(part.target, background).replace(alpha=premultiplied(part.target).alpha)
    terms, kept = model.apply(
        {"params": params}, source, target, keys_B, step, method="objective", mutable=["statistics"]
    )
    return terms, kept.get("statistics", {})


def with_statistics(params, statistics):
    """The parameters with the running statistics that a step found. One that is not finite keeps its old value."""
    if not isinstance(statistics, Mapping):
        return jnp.where(jnp.isfinite(statistics), statistics, params)
    changed = {name: with_statistics(params[name], value) for name, value in statistics.items()}
    return {**params, **changed}


def _named(scalars, opt_state, learning_rate):
    """The scalars of a step under the names of a report."""
    terms = dict(scalars)
    if "square_error" in terms:
        # PSNR of the mean error: empty windows, which soon become perfect, would dominate a mean of PSNRs.
        terms["psnr"] = image_metrics.decibels(terms.pop("square_error"))
    return {f"train/{name}": value for name, value in terms.items()} | {
        "grad_norm": optim.grad_norm(opt_state),
        "skipped": optim.num_skipped(opt_state),
        "learning_rate": learning_rate,
    }


def running_mean(ema_params, params, step, decay: float):
    """The running mean of the parameters after a step. Its decay grows to `decay` over about 10 / (1 - decay) steps."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema_params, params)


def eval_step(
    params, batch: Batch, *, model: nn.Module, source_background: float
) -> tuple[dict[str, jax.Array], Rendering]:
    """Renders and scores whole target views on white, without randomness.

    Returns:
      Scores [B V] by name: "psnr" in dB; "iou" of the foreground, if the family renders alpha; "is_source", whether the model
      was given this view. And the renderings [B V H W], with colour on white.
    """
    batch = batch_axes.constrain_batch(batch)
    target = premultiplied(batch.target)
    rays = ops_cameras.pixel_rays(batch.target.cameras, *target.rgb.shape[2:4])
    rendering = model.apply(
        {"params": params}, on_background(batch.source, source_background), rays
    )
    white = jnp.ones((1, 1, 1, 1, 3))
    seen = blend(rendering, white)
    scores = {
        "psnr": image_metrics.psnr(seen.rgb, blend(target, white).rgb),
        "is_source": is_source(batch),
    }
    if rendering.alpha is not None:
        scores["iou"] = image_metrics.iou(rendering.alpha, target.alpha)
    return scores, rendering.replace(rgb=seen.rgb)


def is_source(batch: Batch) -> jax.Array:
    """Whether each target view [B V] has the pose of a source, and so shows nothing new."""
    source_BN44, target_BV44 = batch.source.cameras.c2w, batch.target.cameras.c2w
    difference = jnp.abs(target_BV44[:, :, None] - source_BN44[:, None]).max((-2, -1))
    return (difference < 1e-5).any(-1)


def init_state(
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    source: Views,
    patch: int,
) -> TrainState:
    """The state before the first step. Only the shapes of `source` and the window matter."""
    init_key, key = jax.random.split(jax.random.key(seed))
    views = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:])), source.replace(alpha=None))
    shape = (1, 1, patch, patch, 3)
    rays = Rays(origins=jnp.zeros(shape), dirs=jnp.ones(shape))
    params = model.init(init_key, views, rays)["params"]
    return TrainState(
        step=jnp.int32(0),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        key=key,
    )


def needed_flops(model: nn.Module, patch: int, params, batch: Batch) -> float:
    """Operations of a step without repeated ones: three times the model's forward products, since the gradient has twice as many.

    They are counted for a CPU, on any device, because a TPU's attention adds padding.

    Args:
      patch: side of the window of each target view, pixels.
      params, batch: arrays or their shapes.
    """

    def forward(params, batch):
        if hasattr(model, "objective"):
            keys_B = jax.random.split(jax.random.key(0), batch.source.rgb.shape[0])
            return objective(model, params, batch, keys_B, jnp.int32(0), 0.0)
        rays = ops_cameras.pixel_rays(batch.target.cameras, patch, patch)
        return model.apply({"params": params}, on_background(batch.source, 0.0), rays)

    sizes = jax.sharding.get_abstract_mesh().axis_sizes or (1, 1, 1)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, batch))
    with jax.sharding.use_abstract_mesh(sharding.abstract_device_mesh(sizes, "cpu")):
        return 3 * flops.count(forward, *shapes)


def random_crops(
    key: jax.Array,
    views: Views,
    patch: int,
    render_size: tuple[int, int],
    antialias: bool,
    foreground: bool,
) -> tuple[Rendering, Cameras]:
    """A random window of `patch` x `patch` pixels from each view, premultiplied, and the camera that sees exactly this window.

    8-bit images become float one view of each scene at a time, and only where the windows need them.

    Args:
      views: [B V], square.
      render_size: (low, high). First, the whole image is resized to a side drawn from this range for each scene, so that the
        window covers more or less of it. As in OpenLRM, openlrm/datasets/objaverse.py:104-114 at 3108b69.
      antialias: antialias that resize. Otherwise a window samples the sharp image (bilinearly) at points with gaps between them,
        so that few rays cover a large part of it (GRAF, https://arxiv.org/abs/2007.02442, section 3.2).
      foreground: centre nine of ten windows on a pixel of the object, at random; the tenth lies anywhere. TripoSR
        (https://arxiv.org/abs/2403.02151, section 2.3) crops "to focus on the foreground", without saying how.
    """
    size_key, corner_key, pixel_key = jax.random.split(key, 3)
    shape = views.rgb.shape[:2]
    low, high = render_size
    side_B1 = jax.random.randint(size_key, (shape[0], 1), low, high + 1)
    free_BV1 = jnp.broadcast_to(side_B1, shape)[..., None] - patch  # room for the corner
    place_BV2 = jax.random.uniform(corner_key, (*shape, 2))
    if foreground:
        alpha_BVHW = premultiplied(views).alpha
        place_BV2 = _around_foreground(pixel_key, alpha_BVHW, place_BV2, patch, free_BV1)
    corner_BV2 = jnp.minimum(jnp.floor(place_BV2 * (free_BV1 + 1)), free_BV1)
    sides_BV = jnp.broadcast_to(side_B1, shape)

    def window(view):
        return _window(*view, patch=patch, low=low, antialias=antialias)

    # One view of each scene at a time, not one scene: the device mesh splits the scenes.
    windows = jax.vmap(lambda scene: jax.lax.map(window, scene))(
        (views.rgb, views.alpha, corner_BV2, sides_BV)
    )
    extent_BV1 = 1.0 / sides_BV[..., None].astype(jnp.float32)
    cameras = ops_cameras.crop_cameras(
        views.cameras,
        corner_BV2 * extent_BV1,
        jnp.broadcast_to(patch * extent_BV1, corner_BV2.shape),
    )
    return windows, cameras


def _window(rgb_HW3, alpha_HW, corner_2, side, *, patch: int, low: int, antialias: bool):
    """The window at `corner_2` (row, column) of an image that is resized to `side` >= `low` pixels: a Rendering [patch patch]."""
    size = np.array(rgb_HW3.shape[:2])
    scale_2 = side / size
    # The filter reaches this many pixels of the image beyond the centres of the window's outer pixels. Most if side = low.
    reach_2 = jnp.maximum(1 / scale_2, 1) if antialias else 1
    most_2 = np.maximum(size / low, 1) if antialias else 1
    support = np.minimum(size, np.ceil((patch - 1) * size / low + 2 * most_2) + 2).astype(int)
    first_2 = jnp.floor((corner_2 + 0.5) / scale_2 - 0.5 - reach_2)
    start_2 = jnp.clip(first_2, 0, size - support).astype(int)

    def cut(x):
        if x is None or (support == size).all():
            return x
        rest = x.ndim - 2
        return jax.lax.dynamic_slice(x, (*start_2, *[0] * rest), (*support, *x.shape[2:]))

    whole = premultiplied(Views(rgb=cut(rgb_HW3), alpha=cut(alpha_HW), cameras=None))
    resized = jax.image.scale_and_translate(
        jnp.concatenate([whole.rgb, whole.alpha[..., None]], axis=-1),
        (patch, patch, 4),
        (0, 1),
        scale_2,
        start_2 * scale_2 - corner_2,
        "linear",
        antialias,
    )
    return Rendering(rgb=resized[..., :3], alpha=resized[..., 3])


def _around_foreground(key, alpha_BVHW, place_BV2, patch, free_BV1):
    """Moves windows, given by places in [0, 1], so that each is centred on a pixel of the object. One in ten stays in place."""
    which_key, pixel_key = jax.random.split(key)
    height, width = alpha_BVHW.shape[2:]
    pixel_BV = jax.random.categorical(
        pixel_key, jnp.log(alpha_BVHW.reshape(*alpha_BVHW.shape[:2], -1) + 1e-6)
    )
    pixel_BV2 = jnp.stack([pixel_BV // width + 0.5, pixel_BV % width + 0.5], axis=-1)
    centre_BV2 = pixel_BV2 / jnp.array([[[height, width]]]) * (free_BV1 + patch) - patch / 2
    around_BV2 = jnp.clip(centre_BV2 / jnp.maximum(free_BV1, 1), 0.0, 1.0)
    anywhere = jax.random.bernoulli(which_key, 0.1, place_BV2.shape[:-1])[..., None]
    return jnp.where(anywhere, place_BV2, around_BV2)


def recolored(key: jax.Array, source: Views, target: Rendering) -> tuple[Views, Rendering]:
    """In half of the scenes, at random, permutes the colour channels and darkens each by a factor from 0.6 to 1.

    The change is linear, so the colour may be straight, premultiplied or resized.
    """
    which_key, order_key, factor_key = jax.random.split(key, 3)
    count = source.rgb.shape[0]
    order_B3 = jax.random.permutation(
        order_key, jnp.tile(jnp.arange(3), (count, 1)), axis=1, independent=True
    )
    factor_B3 = jax.random.uniform(factor_key, (count, 3), minval=0.6, maxval=1.0)
    change_B33 = jax.nn.one_hot(order_B3, 3) * factor_B3[:, None]
    keep = jax.random.bernoulli(which_key, 0.5, (count, 1, 1))
    change_B33 = jnp.where(keep, jnp.eye(3), change_B33)

    def changed(x):
        rgb = as_float(x.rgb)
        return x.replace(rgb=jnp.einsum("bvhwc,bcd->bvhwd", rgb, change_B33, precision="highest"))

    return changed(source), changed(target)


def random_backgrounds(key: jax.Array, shape: tuple[int, int], greys: tuple[float, ...]):
    """A random colour for each view, [B V 1 1 3]: one of `greys`, or any colour if `greys` is empty."""
    if not greys:
        return jax.random.uniform(key, (*shape, 1, 1, 3))
    grey = jax.random.choice(key, jnp.array(greys, jnp.float32), (*shape, 1, 1, 1))
    return jnp.broadcast_to(grey, (*shape, 1, 1, 3))


def by_scene(function, keys_B: jax.Array, *trees):
    """`function(key, *trees)` for each scene alone, with its own key. Its arrays and results have the leading axis [1]."""

    def one(key, *trees):
        results = function(key, *jax.tree.map(lambda x: x[None], trees))
        return jax.tree.map(lambda x: x[0], results)

    return jax.vmap(one)(keys_B, *trees)


def _encode_and_render(model, source, rays, keys_B):
    scene = model.encode(source)
    return scene, model.render(scene, rays, keys_B)


def _accumulated(gradient, params, networks, batch_and_keys, count: int):
    """The mean gradient and scalars over `count` parts of the batch, processed in turn."""

    def mean(params, networks, parts):
        def add(total, part):
            new = gradient(params, networks, part)
            return jax.tree.map(lambda a, b: a + b / count, total, new), None

        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradient, params, networks, first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, parts)[0]

    parts = batch_axes.micro_batches(batch_and_keys, count)
    return batch_axes.gradient_over_shards(mean, params, networks, parts)
