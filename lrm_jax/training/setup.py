"""Sets up a run from a config: the model, the compiled programs, and the shapes and shardings of their arguments."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from lrm_jax.data.elements import check_normalize
from lrm_jax.models import build
from lrm_jax.parallel import batch_axes, sharding
from lrm_jax.training import checkpoints, losses, optim
from lrm_jax.training.reports import grid_images
from lrm_jax.training.step import eval_step, init_state, train_step
from lrm_jax.types import Batch, Cameras, InputError, TrainState, Views
from lrm_jax.weights import loading


class Run(NamedTuple):
    """The compiled functions of a run, and the shapes and shardings of its state."""

    model: nn.Module
    init: Callable[[Any], TrainState]  # from parameters; None: random parameters
    step: Callable[[TrainState, Batch, dict], tuple[TrainState, dict]]  # donates the state
    evaluate: Callable[[Any, Batch], tuple[dict, dict]]  # scores, and images for a grid
    abstract_state: TrainState  # ShapeDtypeStructs with shardings


def make_run(config: ConfigDict, device_mesh: Mesh) -> Run:
    """Sets up all jitted functions of a run. Nothing is allocated or compiled until they are called."""
    train = config.train
    check_counts(train)
    model = build_model(**config.model)
    check_assumed_camera(config, model)
    schedule = optim.make_schedule(steps=train.steps, **config.schedule)
    optimizer = optim.make_optimizer(schedule, **config.optim)
    render_size = tuple(train.render_size) or (config.data.target_size,) * 2
    if len(render_size) != 2 or not train.patch <= render_size[0] <= render_size[1]:
        raise InputError(
            f"train.render_size={render_size}: must be (low, high) with train.patch={train.patch} <= low <= high"
        )
    init = functools.partial(
        init_state,
        model=model,
        optimizer=optimizer,
        seed=train.seed,
        source=abstract_batch(config, device_mesh, config.data.batch_size).source,
        patch=train.patch,
    )
    shapes = jax.eval_shape(init)
    shardings = sharding.infer(shapes, device_mesh)
    replicated, split = (
        NamedSharding(device_mesh, PartitionSpec(*axes)) for axes in ((), (sharding.BATCH_AXES,))
    )

    def start(params) -> TrainState:
        if params is None:
            return jax.jit(init, out_shardings=shardings)()

        def from_params(params):
            state = init()
            return state.replace(
                params=params,
                ema_params=jax.tree.map(jax.numpy.copy, params),
                opt_state=optimizer.init(params),
            )

        return jax.jit(from_params, out_shardings=shardings)(
            jax.device_put(params, shardings.params)
        )

    step = functools.partial(
        train_step,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        loss_weights=dict(config.losses),
        source_background=config.data.source_background,
        patch=train.patch,
        render_size=render_size,
        antialias=train.antialias,
        foreground_crops=train.foreground_crops,
        recolor=train.recolor,
        backgrounds=tuple(train.backgrounds),
        accumulate=train.accumulate,
        ema_decay=train.ema_decay,
    )

    def evaluate(params, batch: Batch):
        scores, rendering = eval_step(
            params, batch, model=model, source_background=config.data.source_background
        )
        return scores, grid_images(batch, rendering)

    return Run(
        model=model,
        init=start,
        step=sharding.jit(step, donate_argnums=0, out_shardings=(shardings, replicated)),
        # Renderings stay sharded: those of a whole batch would not fit on one device.
        evaluate=sharding.jit(evaluate, out_shardings=(replicated, split)),
        abstract_state=checkpoints.abstract(shapes, shardings),
    )


def trace_programs(config: ConfigDict, device_mesh: Mesh) -> dict[str, jax.stages.Traced]:
    """The "step" and the "evaluation" of a run, traced for a device mesh. Nothing is allocated or compiled."""
    check_batch_size(config, device_mesh)
    run = make_run(config, device_mesh)
    batch, held_out = (
        abstract_batch(config, device_mesh, size)
        for size in (config.data.batch_size, eval_batch_size(config.train, device_mesh))
    )
    with jax.set_mesh(device_mesh):
        step = run.step.trace(run.abstract_state, batch, losses.abstract_networks(config.losses))
        evaluation = run.evaluate.trace(run.abstract_state.ema_params, held_out)
    return {"step": step, "evaluation": evaluation}


def abstract_batch(config: ConfigDict, device_mesh: Mesh, batch_size: int) -> Batch:
    """The shapes of a global batch: ShapeDtypeStructs, split over the device mesh."""
    data = config.data
    split = NamedSharding(device_mesh, PartitionSpec(sharding.BATCH_AXES))

    # Not all kinds of data have this field.
    num_sources_shown = data.num_source if data.get("sources_as_targets", True) else 0

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=split)

    def views(count, size):
        return Views(
            rgb=array(np.uint8, count, size, size, 3),
            alpha=array(np.uint8, count, size, size),
            cameras=Cameras(
                c2w=array(np.float32, count, 4, 4), fxfycxcy=array(np.float32, count, 4)
            ),
        )

    return Batch(
        source=views(data.num_source, data.source_size),
        target=views(num_sources_shown + data.num_target, data.target_size),
    )


def check_counts(train: ConfigDict) -> None:
    """Raises InputError if a number of steps, parts, scenes, checkpoints or pixels is below 1."""
    for name in ("steps", "patch", "accumulate", "log_every", "save_every", "keep", "eval_every", "eval_scenes"):  # fmt: skip
        if train[name] < 1:
            raise InputError(f"train.{name}={train[name]}: must be at least 1")


def build_model(name: str, variant: str, **fields) -> nn.Module:
    """`models.build`, with errors for the user (InputError)."""
    try:
        return build(name, variant, **fields)
    except ValueError as error:
        raise InputError(f"config.model: {error}") from None


def initial_params(run: Run, init_from: str):
    """The parameters of `train.init_from`, or None if it is empty. It may be anything that `lrm reconstruct --weights` takes.

    Raises:
      InputError: the parameters differ from those of the config's model in names or shapes.
    """
    if not init_from:
        return None
    model, params, _ = loading.load_weights(init_from)
    wanted, found = (
        {name: leaf.shape for name, leaf in optim.named(tree)}
        for tree in (run.abstract_state.params, params)
    )
    if wrong := sorted(
        name for name in wanted | found if wanted.get(name, ()) != found.get(name, ())
    ):
        name = wrong[0]
        raise InputError(
            f"train.init_from={init_from}: {len(wrong)} parameters are not those of config.model, the first {name}: "
            f"{found.get(name, 'absent')} there, {wanted.get(name, 'absent')} in config.model: change config.model to match"
        )
    return params


def check_assumed_camera(config: ConfigDict, model: nn.Module) -> None:
    """Raises InputError if data.normalize is "image" and the model assumes another camera than the data."""
    if config.data.get("normalize") != "image":
        return
    check_normalize(config.data.normalize, config.data.assumed_camera)
    if not hasattr(model, "prepare"):
        raise InputError(
            f"data.normalize=image: {config.model.name} takes true cameras: choose another value"
        )
    distance, fov = config.data.assumed_camera
    blank = np.full((model.image_size, model.image_size, 4), 255, np.uint8)
    assumed = jax.tree.map(np.asarray, model.prepare([blank]).cameras)
    (x, y, z), focal = assumed.c2w[0, 0, :3, 3], assumed.fxfycxcy[0, 0, 1]
    named = distance, 0.5 / np.tan(np.radians(fov) / 2)
    at_azimuth_0 = abs(y) < 1e-4 < x
    if not (at_azimuth_0 and np.allclose((np.hypot(x, z), focal), named, atol=1e-3)):
        raise InputError(
            f"data.assumed_camera={(distance, fov)}: is not the camera that {config.model.name}:{config.model.variant} "
            "assumes, at azimuth 0: set it to the (distance, field of view) of the model"
        )


def check_batch_size(config: ConfigDict, device_mesh: Mesh) -> None:
    """Raises InputError if the batch does not divide over accumulation steps and the batch axes of the device mesh."""
    check_counts(config.train)
    shards = batch_axes.num_batch_shards(device_mesh) * config.train.accumulate
    if config.data.batch_size % shards:
        raise InputError(
            f"data.batch_size={config.data.batch_size} does not divide by {shards} (sharding.data x sharding.fsdp devices x "
            "train.accumulate): make it a multiple, or set sharding.tensor"
        )
    eval_batch_size(config.train, device_mesh)


def eval_batch_size(train: ConfigDict, device_mesh: Mesh) -> int:
    """The number of scenes that are evaluated at a time.

    Raises:
      InputError: this number does not divide over the batch axes of the device mesh.
    """
    shards = batch_axes.num_batch_shards(device_mesh)
    size = shards if train.eval_batch_size is None else train.eval_batch_size
    if size < 1 or size % shards:
        raise InputError(
            f"train.eval_batch_size={size} does not divide by {shards} (sharding.data x sharding.fsdp devices): make it a "
            "multiple, or None for one scene on each device"
        )
    return size
