"""`lrm train`: one pure, sharded training step for every family, and the loop around it.

    lrm train --config configs/nano.py --workdir runs/nano [--config.train.steps=100]
    lrm train --config configs/nano.py --workdir runs/nano --export nano.safetensors

The first resumes where the workdir's last checkpoint ends, to the bit: a batch is a function of the step. It leaves there
`checkpoints/`, `metrics.jsonl` (one object a line: `step`, `train/loss`, ...), `grids/` (source, then target and render of
each view) and at the end `model.safetensors`. The second only writes the model file of the last checkpoint, also while the
run is still going.
"""

import contextlib
import functools
import importlib
import io
import json
import math
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict, config_flags
from PIL import Image

from lrm_jax import checkpoints, convert, losses, metrics, optim, sharding
from lrm_jax.models import build
from lrm_jax.ops import cameras as ops_cameras
from lrm_jax.report import write_file
from lrm_jax.types import Batch, InputError, Rays, Rendering, TrainState, Views

INTERRUPTED = 143  # exit code after SIGTERM, 128 + 15: saved, and the same command goes on


def main(argv: list[str]) -> int:
    """Runs `lrm train`. Returns the exit code: 0, or 143 where SIGTERM ended the run after saving it."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    config, workdir, export = parse(argv)
    if export is not None:
        model, params, info = convert.load_weights(str(workdir))
        return save_model(export, model, params, info["training"])

    device_mesh = sharding.make_device_mesh(**config.sharding)
    check_batch_size(config.data.batch_size, device_mesh)
    model = build_model(**config.model)
    train_data, val_data, source_background = open_data(**config.data)
    schedule = optim.make_schedule(steps=config.train.steps, **config.schedule)
    optimizer = optim.make_optimizer(schedule, **config.optim)
    claim(workdir, config)

    with jax.set_mesh(device_mesh), checkpoints.open_folder(workdir) as manager:
        source, seed = train_data.batch(0).source, config.train.seed
        init = functools.partial(
            init_state, model=model, optimizer=optimizer, seed=seed, source=source
        )
        shapes = jax.eval_shape(init)
        shardings = sharding.infer(shapes, device_mesh)
        state = checkpoints.restore(manager, checkpoints.abstract(shapes, shardings))
        if state is None:
            state = jax.jit(init, out_shardings=shardings)()
        step_fn = jax.jit(
            functools.partial(
                train_step, model=model, optimizer=optimizer, schedule=schedule, loss_weights=dict(config.losses),
                source_background=source_background, patch=config.train.patch, ema_decay=config.train.ema_decay,
            ),
            donate_argnums=0,
            out_shardings=(shardings, NamedSharding(device_mesh, PartitionSpec())),
        )  # fmt: skip
        eval_fn = jax.jit(
            functools.partial(eval_step, model=model, source_background=source_background)
        )
        state = fit(
            state,
            step_fn,
            eval_fn,
            train_data,
            val_data,
            device_mesh,
            manager,
            workdir,
            config.train,
        )
    if int(state.step) < config.train.steps:
        return INTERRUPTED
    training = {"steps": int(state.step), "config": config.to_dict()}
    return save_model(
        workdir / "model.safetensors", model, jax.device_get(state.ema_params), training
    )


# -- the step


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    loss_weights: dict[str, float],
    source_background: float,
    patch: int,
    ema_decay: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update: a random window of every target view, on a random background, against its rendering.

    Args:
      state: donated by the caller.
      batch: target views with straight colour and alpha, or opaque.
      source_background: grey that the source views are composited on.
      patch: side of the windows, pixels.
      ema_decay: of the running mean of the parameters, reached after 10 / (1 - ema_decay) steps.

    Returns:
      The new state, and scalars by name: the losses and PSNR as `train/...`, the gradient's norm before clipping.
    """
    background_key, crop_key, render_key = jax.random.split(
        jax.random.fold_in(state.key, state.step), 3
    )
    batch = sharding.constrain_batch(batch)
    source = on_background(batch.source, source_background)
    target = random_crops(crop_key, batch.target, patch)
    rays = ops_cameras.pixel_rays(target.cameras, patch, patch)
    background = jax.random.uniform(background_key, (*target.rgb.shape[:2], 1, 1, 3))
    wanted = as_seen(target, background)

    def total_loss(params):
        rendering = model.apply({"params": params}, source, rays, render_key)
        seen = blend(rendering, background)
        terms = losses.terms(seen, wanted, loss_weights)
        total = sum(loss_weights[name] * value for name, value in terms.items())
        return total, {"loss": total, **terms, "psnr": metrics.psnr(seen.rgb, wanted.rgb).mean()}

    grads, scalars = jax.grad(total_loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
    ema_params = jax.tree.map(
        lambda old, new: old + (1 - decay) * (new - old), state.ema_params, params
    )
    scalars = {f"train/{name}": value for name, value in scalars.items()}
    scalars |= {"grad_norm": optax.tree.norm(grads), "learning_rate": schedule(state.step)}
    state = state.replace(
        step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state
    )
    return state, scalars


def eval_step(
    params, batch: Batch, *, model: nn.Module, source_background: float
) -> tuple[jax.Array, jax.Array]:
    """The whole target views on white, without a key: (PSNR [B V], rendered colour [B V H W 3])."""
    batch = sharding.constrain_batch(batch)
    rays = ops_cameras.pixel_rays(batch.target.cameras, *batch.target.rgb.shape[2:4])
    rendering = model.apply(
        {"params": params}, on_background(batch.source, source_background), rays
    )
    white = jnp.ones((1, 1, 1, 1, 3))
    seen = blend(rendering, white)
    return metrics.psnr(seen.rgb, as_seen(batch.target, white).rgb), seen.rgb


def random_crops(key: jax.Array, views: Views, size: int) -> Views:
    """One `size` x `size` window of every view, each with the camera that sees just it."""
    height, width = views.rgb.shape[2:4]
    limits = jnp.array([height - size + 1, width - size + 1])
    corners = jax.random.randint(key, (*views.rgb.shape[:2], 2), 0, limits[None, None])

    def crop(picture, corner):
        start = (*corner, *(0,) * (picture.ndim - 2))
        return jax.lax.dynamic_slice(picture, start, (size, size, *picture.shape[2:]))

    crop = jax.vmap(jax.vmap(crop))
    extent = jnp.array([height, width], jnp.float32)[None, None]
    return Views(
        rgb=crop(views.rgb, corners),
        alpha=None if views.alpha is None else crop(views.alpha, corners),
        cameras=ops_cameras.crop_cameras(
            views.cameras, corners / extent, jnp.broadcast_to(size / extent, corners.shape)
        ),
    )


def on_background(views: Views, background: float) -> Views:
    """Opaque views, composited on a grey where they have an alpha channel."""
    if views.alpha is None:
        return views
    alpha = views.alpha[..., None]
    return views.replace(rgb=views.rgb * alpha + background * (1 - alpha), alpha=None)


def as_seen(views: Views, background: jax.Array) -> Rendering:
    """What a perfect model would render, on `background` [B V 1 1 3]."""
    if views.alpha is None:
        return Rendering(rgb=views.rgb, alpha=jnp.ones_like(views.rgb[..., 0]))
    alpha = views.alpha[..., None]
    return Rendering(rgb=views.rgb * alpha + background * (1 - alpha), alpha=views.alpha)


def blend(rendering: Rendering, background: jax.Array) -> Rendering:
    """A rendering's premultiplied colour on `background` [B V 1 1 3]; as it is where the family draws its own."""
    if rendering.alpha is None:
        return rendering
    return rendering.replace(rgb=rendering.rgb + background * (1 - rendering.alpha[..., None]))


# -- the loop


def fit(
    state: TrainState,
    step_fn,
    eval_fn,
    train_data,
    val_data,
    device_mesh: Mesh,
    manager,
    workdir: Path,
    train: ConfigDict,
) -> TrainState:
    """Trains to `train.steps`, or to SIGTERM; the state it returns is saved.

    Raises:
      InputError: the loss or the gradient is not finite. Nothing of that state is saved.
    """
    first = int(state.step)
    log = open_log(workdir / "metrics.jsonl", first)
    pending = []  # scalars of the steps since the last report, still on the device
    clock, images_since = time.perf_counter(), 0
    with (
        terminated() as stop,
        contextlib.closing(prefetch(train_data, first, train.steps)) as batches,
        log,
    ):
        for step, batch in enumerate(batches, first + 1):
            images_since += batch.source.rgb.shape[0]
            state, scalars = step_fn(state, sharding.global_batch(batch, device_mesh))
            pending.append(scalars)
            jax.block_until_ready(
                pending[-2:][0]
            )  # at most two steps under way: batches are not hoarded
            last = step == train.steps or stop.is_set()
            evaluating = step % train.eval_every == 0 or step == train.steps
            saving = step % train.save_every == 0 or last
            if step % train.log_every == 0 or evaluating or saving:
                row = {"step": step, **mean_of(pending)}
                if not math.isfinite(row["train/loss"] + row["grad_norm"]):
                    raise InputError(
                        f"the loss is not finite between steps {step - len(pending) + 1} and {step}: the last good "
                        f"checkpoint is of step {manager.latest_step()}; lower schedule.learning_rate"
                    )
                row["samples_per_second"] = images_since / (time.perf_counter() - clock)
                if evaluating:
                    row |= evaluate(
                        eval_fn,
                        state.ema_params,
                        val_data,
                        device_mesh,
                        train.eval_batches,
                        workdir,
                        step,
                    )
                log.write(json.dumps(row) + "\n")
                print_progress(row, train.steps, batch.source.rgb.shape[0])
                pending, images_since = [], 0
                if saving:
                    checkpoints.save(manager, step, state)
                clock = time.perf_counter()
            if last:
                break
    manager.wait_until_finished()
    return state


def evaluate(
    eval_fn, params, data, device_mesh: Mesh, num_batches: int, workdir: Path, step: int
) -> dict[str, float]:
    """Mean PSNR over the first batches of `data`; the pictures of the first go to `grids/`."""
    values = []
    for i in range(num_batches):
        batch = data.batch(i)
        psnr, rgb = eval_fn(params, sharding.global_batch(batch, device_mesh))
        values.append(np.asarray(psnr))
        if i == 0:
            write_file(workdir / "grids" / f"{step:07d}.png", grid_png(batch, np.asarray(rgb)))
    return {"val/psnr": float(np.mean(values))}


def prefetch(data, first: int, last: int) -> Iterator[Batch]:
    """Batches of steps first..last-1; the next one is made in a thread while the device works on this one."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(data.batch, first)
        for step in range(first, last):
            batch = ahead.result()
            if step + 1 < last:
                ahead = pool.submit(data.batch, step + 1)
            yield batch


@contextlib.contextmanager
def terminated() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or Ctrl-C sets; a second one ends the process as usual."""
    stop = threading.Event()
    previous = {}

    def note(number, frame):
        stop.set()
        signal.signal(number, previous[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# -- start and end


def init_state(
    *, model: nn.Module, optimizer: optax.GradientTransformation, seed: int, source: Views
) -> TrainState:
    """The state before the first step. Only the shape of one source picture matters."""
    init_key, key = jax.random.split(jax.random.key(seed))
    views = jax.tree.map(
        lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), source.replace(alpha=None)
    )
    rays = Rays(origins=jnp.zeros((1, 1, 1, 1, 3)), dirs=jnp.ones((1, 1, 1, 1, 3)))
    params = model.init(init_key, views, rays)["params"]
    ema_params = jax.tree.map(jnp.copy, params)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        ema_params=ema_params,
        opt_state=optimizer.init(params),
        key=key,
    )


def open_data(*, name: str, source_background: float, **fields):
    """The training and the validation source of `lrm_jax.data.<name>`, and the grey behind the source views."""
    make = importlib.import_module(f"lrm_jax.data.{name}").make
    return make(split="train", **fields), make(split="val", **fields), source_background


def build_model(name: str, variant: str, **fields) -> nn.Module:
    """`models.build`, with its errors as a person should see them."""
    try:
        return build(name, variant, **fields)
    except ValueError as error:
        raise InputError(f"config.model: {error}") from None


def check_batch_size(batch_size: int, device_mesh: Mesh) -> None:
    """Raises InputError where the batch axes of the device mesh do not divide the batch."""
    shards = sharding.num_batch_shards(device_mesh)
    if batch_size % shards:
        raise InputError(
            f"data.batch_size={batch_size} does not divide over {shards} devices: make it a multiple, or set sharding.tensor"
        )


def save_model(path: Path, model: nn.Module, params, training: dict) -> int:
    """Writes the model file: the running mean of the parameters, and how they were trained."""
    convert.save_model(path, model, params, training)
    print(f"wrote {path} (step {training['steps']})", file=sys.stderr)
    return 0


def parse(argv: list[str]) -> tuple[ConfigDict, Path, Path | None]:
    """The config with its overrides, the workdir, and the file to export to.

    Raises:
      InputError: an unknown flag or config key, or a value of the wrong type.
    """
    for arg in argv:
        path = Path(arg.split("=", 1)[-1].split(":")[0])
        if path.suffix == ".py":
            if not path.is_file():
                raise InputError(f"{path}: no such config: check the path")
            sys.path.insert(
                0, str(path.absolute().parents[1])
            )  # a config starts from its siblings: `configs.common`
    values = flags.FlagValues()
    argv = ["lrm train", *argv]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_string(
        "workdir", None, "folder of the run; an existing one is resumed", flag_values=values
    )
    flags.DEFINE_string(
        "export", None, "only write the last checkpoint's model file here", flag_values=values
    )
    try:
        rest = values(argv)[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        if near := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(error)):
            raise InputError(
                f"the config has no key {near[2]!r}: did you mean {near[1]!r}?"
            ) from None
        message = " ".join(str(error).split()).strip('"')
        raise InputError(f"lrm train: {message}: check it against the config file") from None
    config = values.config
    if rest or config is None or values.workdir is None:
        raise InputError(
            "lrm train needs --config FILE --workdir FOLDER, and single keys as --config.train.steps=100"
        )
    return config, Path(values.workdir), Path(values.export) if values.export else None


def claim(workdir: Path, config: ConfigDict) -> None:
    """Writes `config.json` into a new workdir; in one that is resumed the model must be the same."""
    path = workdir / "config.json"
    if path.exists() and json.loads(path.read_text())["model"] != config.model.to_dict():
        raise InputError(f"{workdir} holds a run of another model: choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    write_file(path, config.to_json(indent=2).encode())


# -- what a person sees


def open_log(path: Path, first: int):
    """Opens the log for appending, without the lines that a killed run wrote after the step it resumes from."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first]
    write_file(path, "".join(kept).encode())
    return path.open("a", buffering=1)


def mean_of(scalars: list[dict[str, jax.Array]]) -> dict[str, float]:
    """The mean of each named scalar over some steps."""
    values = jax.device_get(scalars)
    return {name: float(np.mean([row[name] for row in values])) for name in values[0]}


def print_progress(row: dict, steps: int, batch_size: int) -> None:
    """One line: step, loss, PSNR, speed and time to go."""
    seconds = int((steps - row["step"]) * batch_size / row["samples_per_second"])
    val = f"  val {row['val/psnr']:.2f} dB" if "val/psnr" in row else ""
    print(
        f"step {row['step']}/{steps}  loss {row['train/loss']:.4f}  psnr {row['train/psnr']:.2f} dB{val}  "
        f"{row['samples_per_second']:.1f} samples/s  ETA {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def grid_png(batch: Batch, rendered: np.ndarray) -> bytes:
    """A row a scene: the source, then target and render of each view, on white."""
    views, size = batch.target, batch.target.rgb.shape[2:4]
    alpha = np.ones(views.rgb.shape[:-1]) if views.alpha is None else np.asarray(views.alpha)
    target = np.asarray(views.rgb) * alpha[..., None] + 1 - alpha[..., None]
    pairs = np.stack([target, rendered], axis=2)  # [B V 2 H W 3]
    rows = []
    for source, pictures in zip(
        np.asarray(on_background(batch.source, 1.0).rgb[:, 0]), pairs, strict=True
    ):
        first = Image.fromarray(to_uint8(source)).resize(size[::-1], Image.Resampling.BOX)
        rows.append(
            np.concatenate(
                [np.asarray(first), *to_uint8(pictures.reshape(-1, *pictures.shape[2:]))], axis=1
            )
        )
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(buffer, format="PNG")
    return buffer.getvalue()


def to_uint8(rgb: np.ndarray) -> np.ndarray:
    """[0, 1] to [0, 255], rounded."""
    return (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8)
