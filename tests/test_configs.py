import ast
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lrm_jax import losses, optim, sharding, train
from lrm_jax.models import build
from lrm_jax.types import Batch, Cameras, Views

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "common")


def load(name, size=""):
    config, _, _ = train.parse(
        ["--config", f"{CONFIGS / name}.py:{size}".rstrip(":"), "--workdir", "unused"]
    )
    return config


def abstract_batch(data):
    def views(num_views, size):
        shape = (data.batch_size, num_views)
        cameras = Cameras(c2w=jnp.zeros((*shape, 4, 4)), fxfycxcy=jnp.zeros((*shape, 4)))
        return Views(
            rgb=jnp.zeros((*shape, size, size, 3)),
            alpha=jnp.zeros((*shape, size, size)),
            cameras=cameras,
        )

    def make():
        num_targets = data.num_source + data.num_target
        return Batch(
            source=views(data.num_source, data.source_size),
            target=views(num_targets, data.target_size),
        )

    return jax.eval_shape(make)


@pytest.mark.parametrize("size", ["", "tiny"])
@pytest.mark.parametrize("name", NAMES)
def test_every_config_makes_a_train_step_whose_shapes_agree(name, size):
    config = load(name, size)
    schedule = optim.make_schedule(steps=config.train.steps, **config.schedule)
    optimizer = optim.make_optimizer(schedule, **config.optim)
    model = build(**config.model)
    batch = abstract_batch(config.data)
    # The source's shape is all that init looks at.
    init = partial(train.init_state, model=model, optimizer=optimizer, seed=config.train.seed)
    state = jax.eval_shape(
        lambda: init(source=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch.source))
    )
    step = partial(
        train.train_step, model=model, optimizer=optimizer, schedule=schedule, loss_weights=dict(config.losses),
        source_background=config.data.source_background, patch=config.train.patch, ema_decay=config.train.ema_decay,
    )  # fmt: skip
    after, scalars = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert scalars["train/loss"].shape == ()
    assert set(config.losses) <= set(losses.TERMS)
    sharding.make_device_mesh(**config.sharding)
    assert {"steps", "log_every", "save_every", "eval_every"} <= set(config.train)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_a_config_is_inert_data_and_says_what_to_expect(path):
    tree = ast.parse(path.read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    modules = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports}
    assert all(m.split(".")[0] in ("ml_collections", "configs") for m in modules)
    if path.stem != "common":
        assert "Expected: " in ast.get_docstring(tree)
        assert f"--config configs/{path.name}" in ast.get_docstring(tree)
