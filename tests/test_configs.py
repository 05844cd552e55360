"""Every config loads, documents its expected results, and makes a full-size training step with matching shapes. Nothing is allocated."""

import ast
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lrm_jax.commands import train
from lrm_jax.kernels import attention_cuda, attention_plain, field_cuda
from lrm_jax.parallel import sharding
from lrm_jax.training import losses, reports, setup
from lrm_jax.training.step import needed_flops
from lrm_jax.types import Rendering

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

CONFIGS = ROOT / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "common")
LVSM = ("", "encoder-decoder-256", "decoder-only-512", "encoder-decoder-512", "small", "tiny")
SIZES = {
    "openlrm": ("small", "base", "large", "tiny"),
    "lvsm_objects": (*LVSM, "nano"),
    "lvsm_scenes": LVSM,
    "nano": ("", "fine", "tiny"),
    "one2345": ("", "nano", "tiny"),
    "zero123": ("", "nano", "tiny"),
}
# Fine-tuning configs have the sizes of their siblings, so one of them is enough.
CASES = [
    f"{name}:{size}"
    for name in NAMES
    for size in SIZES.get(name, ("",) if name.endswith("_finetune") else ("", "tiny"))
]


def load(case):
    config, *_ = train.parse(
        ["--config", f"{CONFIGS}/{case.replace(':', '.py:').rstrip(':')}", "--workdir", "unused"]
    )
    return config


@pytest.mark.parametrize("case", CASES)
def test_every_config_makes_a_training_step_whose_shapes_agree(case):
    config = load(case)
    devices = jax.devices()[: config.data.batch_size]
    device_mesh = sharding.make_device_mesh(**config.sharding, devices=devices)
    setup.check_batch_size(config, device_mesh)
    run = setup.make_run(config, device_mesh)
    batch = setup.abstract_batch(config, device_mesh, config.data.batch_size)
    with jax.set_mesh(device_mesh):
        after, scalars = jax.eval_shape(
            run.step, run.abstract_state, batch, losses.abstract_networks(config.losses)
        )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), run.abstract_state
    )
    weighted = {name for name, weight in config.losses.items() if weight}
    assert {f"train/{name}" for name in weighted | {"loss"}} <= set(scalars)
    assert all(value.shape == () for value in scalars.values())


@pytest.mark.parametrize("case", CASES)
def test_a_config_is_what_it_was(case, same_text):
    same_text(
        f"configs/{case.rstrip(':').replace(':', '-')}.json",
        load(case).to_json(indent=1, sort_keys=True) + "\n",
    )


def test_sources_that_are_no_targets_are_not_counted():
    """One2345's batches: only other views are supervised. Scenes have no such field: their sources are always targets."""
    config = load("nano:tiny")
    device_mesh = sharding.make_device_mesh(**config.sharding)
    counts = {}
    for shown in (True, False):
        with config.data.unlocked():
            config.data.update(num_source=3, num_target=2, sources_as_targets=shown)
        batch = setup.abstract_batch(config, device_mesh, 8)
        counts[shown] = batch.source.rgb.shape[1], batch.target.rgb.shape[1]
    assert counts == {True: (3, 5), False: (3, 2)}
    scenes = load("lvsm_scenes:tiny")
    batch = setup.abstract_batch(scenes, device_mesh, 8)
    assert batch.target.rgb.shape[1] == scenes.data.num_source + scenes.data.num_target


@pytest.mark.parametrize("case", [case for case in CASES if "tiny" not in case])
def test_the_images_of_a_config_are_those_of_its_model(case):
    config = load(case)
    model = setup.build_model(**config.model)
    assert config.data.source_size == getattr(model, "image_size", config.data.source_size)
    low, high = tuple(config.train.render_size) or (config.data.target_size,) * 2
    assert config.train.patch <= low <= high <= config.data.target_size
    assert config.data.batch_size % config.train.accumulate == 0


@pytest.mark.parametrize("case", [case for case in CASES if "tiny" not in case])
def test_an_evaluation_needs_less_than_300_mb_on_a_host_of_eight_devices(case):
    """Counts the batch, the data fetched for the grid, and the grid as an array, as Pillow's copy, and as PNG."""
    config = load(case)
    device_mesh = sharding.make_device_mesh(data=-1)
    batch = setup.abstract_batch(
        config, device_mesh, setup.eval_batch_size(config.train, device_mesh)
    )
    target = batch.target.rgb
    alpha = jax.ShapeDtypeStruct(target.shape[:-1], jnp.float32)
    rgb = jax.ShapeDtypeStruct(target.shape, jnp.float32)
    rendering = Rendering(rgb=rgb, alpha=alpha, depth=alpha)
    images = jax.eval_shape(reports.grid_images, batch, rendering)
    assert images["target"].shape[0] == reports.GRID_SCENES
    assert max(images["render"].shape[2:4]) <= reports.GRID_SIDE

    def size(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    B, V, H, W, _ = images["target"].shape
    grid = B * H * (1 + 3 * V) * W * 3
    assert size(batch) + size(images) + 3 * grid < 300e6


def test_the_paper_size_lrm_costs_what_its_sizes_say():
    """Computes the transformer's products by hand: 16 layers of 3072 tokens of width 1024, which attend to 1025 tokens of width 768."""
    config = load("lrm:")
    device_mesh = sharding.make_device_mesh(**config.sharding)
    run = setup.make_run(config, device_mesh)
    batch = setup.abstract_batch(config, device_mesh, config.data.batch_size)
    with jax.set_mesh(device_mesh):
        needed = needed_flops(run.model, config.train.patch, run.abstract_state.params, batch)
    with jax.sharding.use_abstract_mesh(
        sharding.abstract_device_mesh((4, 2, 2), "tpu", "TPU v4")
    ):  # these platforms pad attention
        assert needed == needed_flops(
            run.model, config.train.patch, run.abstract_state.params, batch
        )
    L, M, D, E = 3072, 1025, 1024, 768
    block = 4 * L * D**2 + 2 * L**2 * D  # self-attention
    block += 2 * L * D**2 + 2 * M * E * D + 2 * L * M * D  # cross-attention
    block += 8 * L * D**2
    encoder = 12 * (12 * M * E**2 + 2 * M**2 * E)
    samples = 4 * 128**2 * 128 * (8 * 64**2 + 64 * 4)  # the decoder after its first layer
    by_hand = 3 * 2 * 1024 * (16 * block + encoder + samples)
    # Not counted: upsampling, projection of the planes, embedding of the camera, patches.
    assert by_hand < needed < 1.03 * by_hand


@pytest.mark.parametrize("case", ["lrm:tiny", "triposr:tiny", "lvsm_scenes:tiny"])
def test_no_gradient_of_a_16_bit_step_on_a_gpu_is_scattered_in_16_bits(case, monkeypatch):
    """Atomic additions in 16 bits retry: 2 million lookups took 4.2 s on an H200, and 12 ms in float32."""
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    # Without a GPU, cuDNN's attention cannot be lowered.
    monkeypatch.setattr(attention_cuda, "attention_by_cudnn", attention_plain.attention_by_xla)
    # The fused field adds in float32: see tests/kernels/test_field_cuda.py.
    monkeypatch.setattr(field_cuda, "can", lambda planes: False)
    config = load(case)
    assert config.model.dtype == "bfloat16"
    device_mesh = sharding.make_device_mesh(data=-1)
    with jax.set_mesh(device_mesh):
        run = setup.make_run(config, device_mesh)
        batch = setup.abstract_batch(config, device_mesh, config.data.batch_size)
        traced = run.step.trace(run.abstract_state, batch, losses.abstract_networks(config.losses))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    scattered = re.findall(r'"stablehlo.scatter".*\n *\^bb0\(%\w+: tensor<(\w+)>', text)
    assert len(scattered) == text.count('"stablehlo.scatter"')
    assert not {"bf16", "f16"} & set(scattered)
    assert ("f32" in scattered) == (config.model.name != "lvsm")  # gradient of the planes


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_a_config_is_inert_data_and_says_what_to_expect(path):
    tree = ast.parse(path.read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    modules = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports}
    assert all(m.split(".")[0] in ("ml_collections", "configs") for m in modules)
    if path.stem != "common":
        assert "Expected: " in ast.get_docstring(tree)
        assert f"--config configs/{path.name}" in ast.get_docstring(tree)
