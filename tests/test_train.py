import json
import os
import signal
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import convert, losses, optim, sharding, train
from lrm_jax.models import build
from lrm_jax.ops import cameras
from lrm_jax.types import Batch, InputError, Rendering, Views

TINY = [
    "--config",
    "configs/nano.py:tiny",
    "--config.data.name=balls",
    "--config.data.num_target=2",
]
SETTINGS = dict(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, clip_norm=1.0)


def ball(rays, centre, radius):
    """Colour by world position and alpha of balls of `centre` [B 3] and `radius` [B], seen along rays [B V H W]."""
    offset = rays.origins - centre[:, None, None, None]
    b = (offset * rays.dirs).sum(-1)
    discriminant = b**2 - (offset**2).sum(-1) + radius[:, None, None, None] ** 2
    t = -b - np.sqrt(np.maximum(discriminant, 0))
    alpha = (discriminant > 0).astype(np.float32)
    return np.clip(0.5 + rays.origins + t[..., None] * rays.dirs, 0, 1), alpha


class Balls:
    """Balls of random places and sizes: a batch is a function of the seed and the step."""

    def __init__(self, seed, batch_size, num_target, source_size, target_size):
        self.seed, self.shape, self.sizes = (
            seed,
            (batch_size, num_target),
            (source_size, target_size),
        )

    def batch(self, step):
        rng = np.random.default_rng((self.seed, step))
        num_scenes, num_views = self.shape
        centre = rng.uniform(-0.2, 0.2, (num_scenes, 3)).astype(np.float32)
        radius = rng.uniform(0.3, 0.5, num_scenes).astype(np.float32)

        def views(num_views, size):
            orbit = cameras.orbit(num_views, 3.0, 20.0, 40.0)
            orbit = jax.tree.map(lambda x: np.tile(x[None], (num_scenes,) + (1,) * x.ndim), orbit)
            rays = jax.tree.map(np.asarray, cameras.pixel_rays(orbit, size, size))
            rgb, alpha = ball(rays, centre, radius)
            return Views(rgb=rgb, alpha=alpha, cameras=orbit)

        return Batch(source=views(1, self.sizes[0]), target=views(num_views, self.sizes[1]))


@pytest.fixture
def balls(monkeypatch):
    def make(root, *, split, seed, batch_size, num_target, source_size, target_size, **unused):
        return Balls(seed + (split == "val"), batch_size, num_target, source_size, target_size)

    module = types.ModuleType("lrm_jax.data.balls")
    module.make = make
    monkeypatch.setitem(sys.modules, "lrm_jax.data.balls", module)
    return module


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def equal_to_the_bit(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def one_step_fn(model, **changed):
    schedule = optim.make_schedule(1e-2, warmup_steps=1, steps=100)
    optimizer = optim.make_optimizer(schedule, **SETTINGS)
    settings = dict(
        loss_weights={"mse": 1.0, "mask": 0.05}, source_background=0.5, patch=8, ema_decay=0.99
    )
    step = partial(
        train.train_step,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        **(settings | changed),
    )
    init = partial(train.init_state, model=model, optimizer=optimizer, seed=0)
    return init, step


def test_terminated_and_resumed_equals_uninterrupted_to_the_bit(
    balls, tmp_path, monkeypatch, capsys
):
    assert train.main([*TINY, "--workdir", str(tmp_path / "straight")]) == 0
    assert "step 4/4  loss" in capsys.readouterr().err

    draw = Balls.batch

    def draw_and_terminate(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(Balls, "batch", draw_and_terminate)
        assert train.main([*TINY, "--workdir", str(tmp_path / "resumed")]) == train.INTERRUPTED
    stopped = rows(tmp_path / "resumed")[-1]["step"]
    assert stopped < 4
    assert not (tmp_path / "resumed" / "model.safetensors").exists()
    # A run that is killed between a report and a save leaves lines behind that the resumed one writes again.
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/loss": 7.0}\n{"step": 5, "tr')
    assert train.main([*TINY, "--workdir", str(tmp_path / "resumed")]) == 0

    straight, resumed = rows(tmp_path / "straight"), rows(tmp_path / "resumed")
    assert [row["step"] for row in resumed] == [1, 2, 3, 4]
    for a, b in zip(straight, resumed, strict=True):
        assert a | {"samples_per_second": 0} == b | {"samples_per_second": 0}
    assert "val/psnr" in straight[-1]
    models = [
        convert.load_model(tmp_path / name / "model.safetensors")[1]
        for name in ("straight", "resumed")
    ]
    assert equal_to_the_bit(*models)
    assert [p.name for p in (tmp_path / "straight" / "grids").iterdir()] == ["0000004.png"]

    exported = tmp_path / "exported.safetensors"
    assert (
        train.main([*TINY, "--workdir", str(tmp_path / "straight"), "--export", str(exported)]) == 0
    )
    assert equal_to_the_bit(convert.load_model(exported)[1], models[0])
    with pytest.raises(InputError, match="another model"):
        train.main([*TINY, "--workdir", str(tmp_path / "straight"), "--config.model.variant=nano"])


def started(device_mesh, source):
    """A state and the compiled step of a tiny TripoSR."""
    init, step = one_step_fn(build("triposr", "tiny"))
    init = partial(init, source=source)
    shardings = sharding.infer(jax.eval_shape(init), device_mesh)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return jax.jit(init, out_shardings=shardings)(), step


def test_one_step_on_two_by_four_devices_equals_one_device_and_the_loss_falls():
    batch = Balls(0, 4, 2, 32, 16).batch(0)
    device_meshes = (
        sharding.make_device_mesh(1, 2, 4),
        sharding.make_device_mesh(1, 1, 1, jax.devices()[:1]),
    )
    results = []
    for device_mesh in device_meshes:
        with jax.set_mesh(device_mesh):
            state, step = started(device_mesh, batch.source)
            kernel = state.params["backbone"]["blocks"]["fc1"]["kernel"]
            assert kernel.addressable_shards[0].data.size * device_mesh.size == kernel.size
            state, first = step(state, sharding.global_batch(batch, device_mesh))
            results.append(jax.device_get((first, state.opt_state, state.params)))
    for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # sums in another order, float32

    with jax.set_mesh(device_meshes[1]):
        for _ in range(80):
            state, last = step(state, batch)
    assert last["train/loss"] < 0.5 * first["train/loss"]
    assert last["train/psnr"] > first["train/psnr"] + 3
    assert int(state.step) == 81
    assert not equal_to_the_bit(state.params, state.ema_params)


def test_a_crop_is_what_its_camera_sees():
    batch = Balls(0, 2, 3, 8, 32).batch(0)
    centre, radius = np.zeros((2, 3), np.float32), np.array([0.5, 0.4], np.float32)
    rgb, alpha = ball(
        jax.tree.map(np.asarray, cameras.pixel_rays(batch.target.cameras, 32, 32)), centre, radius
    )
    crops = train.random_crops(jax.random.key(0), batch.target.replace(rgb=rgb, alpha=alpha), 12)
    assert crops.rgb.shape == (2, 3, 12, 12, 3)
    rays = jax.tree.map(np.asarray, cameras.pixel_rays(crops.cameras, 12, 12))
    expected_rgb, expected_alpha = ball(rays, centre, radius)
    assert 0.1 < expected_alpha.mean() < 0.99  # neither empty nor full
    np.testing.assert_array_equal(crops.alpha, expected_alpha)
    inside = expected_alpha > 0
    np.testing.assert_allclose(
        crops.rgb[inside], expected_rgb[inside], atol=1e-3
    )  # float32 at grazing rays


def test_a_perfect_rendering_has_no_loss_on_any_background():
    target = Balls(0, 2, 2, 8, 8).batch(0).target
    rendering = Rendering(rgb=target.rgb * target.alpha[..., None], alpha=target.alpha)
    background = jax.random.uniform(jax.random.key(0), (2, 2, 1, 1, 3))
    wanted = train.as_seen(target, background)
    np.testing.assert_allclose(
        losses.mse(train.blend(rendering, background), wanted), 0, atol=1e-12
    )
    corner = jnp.broadcast_to(background[:, :, 0, 0], wanted.rgb[:, :, 0, 0].shape)
    np.testing.assert_allclose(
        wanted.rgb[:, :, 0, 0], corner, rtol=1e-6
    )  # the ball is not in the corner


def test_sources_are_composited_on_the_grey_of_the_config():
    source = Balls(0, 1, 1, 8, 8).batch(0).source
    opaque = train.on_background(source, 0.5)
    assert opaque.alpha is None
    np.testing.assert_array_equal(opaque.rgb[0, 0, 0, 0], 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.setps=3"], "^the config has no key 'setps': did you mean 'steps'"),
        (
            ["--config.model.variant=huge"],
            "triposr has no variant 'huge'; it has triposr, nano, tiny",
        ),
        (["--config.train.steps=many"], "steps"),
        (["--config.data.batch_size=6"], "data.batch_size=6 does not divide over 8"),
        (["--config.sharding.tensor=3"], "does not arrange 8 devices"),
        (["--steps=3"], "steps"),
        (["stray"], "lrm train needs --config"),
        (["--config=configs/absent.py"], "^configs/absent.py: no such config"),
        (["--config.schedule.warmup_steps=9"], "warmup_steps=9 must be less than train.steps=4"),
    ],
)
def test_a_wrong_argument_is_one_line_and_leaves_no_workdir(balls, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message) as error:
        train.main([*TINY, "--workdir", str(tmp_path / "run"), *arguments])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(balls, tmp_path, monkeypatch):
    draw = Balls.batch

    def poisoned(self, step):
        batch = draw(self, step)
        return batch.replace(
            target=batch.target.replace(rgb=batch.target.rgb * (np.nan if step == 2 else 1))
        )

    monkeypatch.setattr(Balls, "batch", poisoned)
    with pytest.raises(
        InputError, match="not finite between steps 3 and 3: the last good checkpoint is of step 2"
    ):
        train.main([*TINY, "--workdir", str(tmp_path / "run")])
