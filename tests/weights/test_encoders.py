"""Encoders on their own are read with the names of torch hub or transformers, and written with those of transformers."""

import json

import jax
import numpy as np
import pytest
from tiny_models import each_model_is_traced_once, tiny  # noqa: F401

from lrm_jax.commands import convert
from lrm_jax.models.parts import encoders, torch_layout, vit
from lrm_jax.types import InputError
from lrm_jax.weights import export, loading, model_file, references, tensor_files

pytestmark = pytest.mark.usefixtures("each_model_is_traced_once")

DINO_HF = dict(resize="dino", norm_epsilon=1e-12)
DINO_HUB = dict(resize="dino", norm_epsilon=1e-6)
DINOV2 = dict(resize="dino", norm_epsilon=1e-6, layer_scale=True)
DINOV2_REG = DINOV2 | {"resize": "dinov2", "num_registers": 4}
ALL = pytest.mark.parametrize(
    "fields", [DINO_HF, DINO_HUB, DINOV2, DINOV2_REG], ids=["hf", "hub", "v2", "v2reg"]
)


def encoder(**fields):
    """An encoder with random parameters, and its state dict under transformers' names."""
    model = vit.ViT(**dict(patch=4, width=64, depth=2, num_heads=1, grid=3) | fields)
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: generator.normal(size=x.shape).astype(np.float32), references.param_shapes(model)
    )
    return model, params, encoders.to_torch(params, model)


def hub_state(model, params):
    """The state dict of an encoder, with torch hub's names."""
    entries = vit.hub_entries(
        "", "encoder", model.depth, model.num_registers > 0, model.layer_scale
    )
    return torch_layout.to_torch(entries, {"encoder": params})


@ALL
def test_encoder_round_trips_to_the_bit(tmp_path, fields):
    model, params, state = encoder(**fields)
    training = {"steps": 3}
    written = export.write_reference(tmp_path / "reference", model, params, training)
    assert [path.name for path in written] == ["model.safetensors", "config.json", "lrm_jax.json"]
    assert convert.main([str(tmp_path / "reference"), str(tmp_path / "ours.safetensors")]) == 0
    back, read, info = loading.read_weights(str(tmp_path / "ours.safetensors"))
    assert back == model and info["family"] == "vit" and info["training"] == training
    jax.tree.map(np.testing.assert_array_equal, read, params)
    stored, _ = tensor_files.read(written[0])
    assert stored.keys() == state.keys()
    assert all(np.array_equal(stored[name], state[name]) for name in state)


@ALL
def test_a_transformers_folder_without_our_record_gives_the_same_model(tmp_path, fields):
    model, params, _ = encoder(**fields, num_heads=4)
    export.write_reference(tmp_path, model, params)
    (tmp_path / "lrm_jax.json").unlink()
    back, read, info = loading.read_weights(str(tmp_path))
    assert back == model and info["assumed"] == []
    jax.tree.map(np.testing.assert_array_equal, read, params)
    (tmp_path / "config.json").unlink()
    back, _, info = loading.read_weights(str(tmp_path))
    assert back.num_heads == 1 and info["assumed"] == ["encoder heads 1: 64 channels each"]


@pytest.mark.parametrize("fields", [DINO_HUB, DINOV2, DINOV2_REG], ids=["v1", "v2", "v2reg"])
def test_torch_hubs_names_are_read(fields):
    model, params, _ = encoder(**fields)
    unused = {"mask_token": np.zeros((1, 64), np.float32)} if "layer_scale" in fields else {}
    back, read = references.from_reference(hub_state(model, params) | unused)
    assert back == model
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_a_wrong_tensor_in_torch_hubs_file_is_refused():
    model, params, _ = encoder(**DINOV2_REG)
    state = hub_state(model, params)
    with pytest.raises(InputError, match=r"3 missing: encoder.layer.1.attention.attention.query.b"):
        references.from_reference({k: v for k, v in state.items() if k != "blocks.1.attn.qkv.bias"})
    with pytest.raises(InputError, match="1 extra: surprise"):
        references.from_reference(state | {"surprise": np.ones(1)})
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"][:-1]
    with pytest.raises(InputError, match=r"1 mis-shaped: .*value.weight \[63, 64\] not \[64, 64\]"):
        references.from_reference(state)


@pytest.mark.parametrize(
    ("fields", "extra"),
    [
        (DINO_HF, {"pooler.dense.weight": (64, 64), "pooler.dense.bias": (64,)}),
        (DINOV2, {"embeddings.mask_token": (1, 64)}),
    ],
)
def test_encoder_files_have_the_tensors_that_only_transformers_needs(fields, extra):
    _, _, state = encoder(**fields)
    assert extra.items() <= {k: v.shape for k, v in state.items()}.items()


def test_dino_training_checkpoint_gives_its_teacher(tmp_path):
    model, params, _ = encoder(**DINO_HUB)
    teacher = {"module.backbone." + k: v for k, v in hub_state(model, params).items()}
    teacher["module.head.mlp.0.weight"] = np.ones((2, 64), np.float32)
    tensor_files.write_torch(
        tmp_path / "checkpoint.pth", {"student": {}, "teacher": teacher, "epoch": 3}
    )
    _, read, _ = loading.read_weights(str(tmp_path / "checkpoint.pth"))
    jax.tree.map(np.testing.assert_array_equal, read, params)


@pytest.mark.parametrize(
    ("prefix", "fields"),
    [("vit.", DINO_HF), ("dinov2.", DINOV2), ("dinov2_with_registers.", DINOV2_REG)],
)
def test_transformers_names_may_have_a_prefix(prefix, fields):
    model, params, state = encoder(**fields)
    back, read = references.from_reference({prefix + k: v for k, v in state.items()})
    assert back == model
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_dinov2_without_registers_resizes_its_positions_as_dino_does():
    for fields in (DINOV2, DINOV2_REG):
        model, _, state = encoder(**fields)
        assert references.from_reference(state)[0].resize == fields["resize"] == model.resize


def test_config_of_another_encoder_is_refused(tmp_path):
    model, params, _ = encoder(**DINO_HF)
    export.write_reference(tmp_path, model, params)
    (tmp_path / "lrm_jax.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in [
        ({"patch_size": 8}, "patch_size: 8, but"),
        ({"num_attention_heads": 3}, "3 heads do not divide"),
        ({"hidden_act": "relu"}, "hidden_act: relu"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            loading.read_weights(str(tmp_path))
    (tmp_path / "config.json").write_text('{"teacher": "dinov2"}')  # the config of something else
    assert loading.read_weights(str(tmp_path))[0] == model


def test_an_encoder_alone_is_not_a_reconstruction_model(tmp_path):
    model, params, _ = encoder(**DINO_HF)
    model_file.save_model(tmp_path / "e.safetensors", model, params, {})
    with pytest.raises(InputError, match="encoder alone"):
        loading.load_weights(str(tmp_path / "e.safetensors"))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (vit.VARIANTS["dino-vitb16"], "facebook/dino-vitb16"),
        (vit.VARIANTS["dinov2-vits14-reg"], "dinov2_vits14_reg"),
        (vit.VARIANTS["dinov2-vitb14-reg"], "dinov2_vitb14_reg"),
        (dict(patch=8, width=384, depth=12, num_heads=6, grid=28) | DINO_HF, "facebook/dino-vits8"),
        (dict(patch=14, width=1024, depth=24, num_heads=16, grid=37) | DINOV2, "dinov2_vitl14"),
        (vit.VARIANTS["tiny"], None),
        (vit.VARIANTS["dino-vitb16"] | {"norm_epsilon": 1e-6}, None),
        (vit.VARIANTS["dinov2-vitb14-reg"] | {"num_registers": 5}, None),
        (vit.VARIANTS["dino-vitb16"] | {"depth": 11}, None),
    ],
)
def test_published_encoders_have_the_names_used_in_configs(fields, name):
    assert encoders.published_name(fields) == name
