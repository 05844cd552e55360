"""State dicts of the references: goldens are equal to the bit, published manifests match exactly, and each refusal is one line."""

import json
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors import safe_open
from tiny_models import each_model_is_traced_once, renamed, tiny, tiny_state  # noqa: F401

from lrm_jax.commands import convert
from lrm_jax.types import InputError
from lrm_jax.weights import (
    diffusers_folder,
    export,
    loading,
    model_file,
    references,
    tensor_files,
)
from lrm_jax.weights.references import family

pytestmark = pytest.mark.usefixtures("each_model_is_traced_once")

GOLDENS = ["openlrm_dino_tiny", "openlrm_dinov2_tiny", "openlrm_v10_tiny", "triposr_tiny"]
MANIFESTS = [
    "openlrm-small-1.1",
    "openlrm-base-1.1",
    "openlrm-large-1.1",
    "openlrm-large-dino",
    "triposr",
]
POOLER = "image_tokenizer.model.pooler.dense."


def golden(folder, name):
    with safe_open(folder / f"{name}.safetensors", "np") as file:
        state = {
            k.removeprefix("state."): file.get_tensor(k)
            for k in file.keys()
            if k.startswith("state.")
        }
        config = json.loads(file.metadata()["golden"])["config"]
    return state, config if name == "triposr_tiny" else config | {"source_size": 80}


def write_as_reference(folder, name, state, config):
    """Writes the files that the reference of this golden would write. Returns the path of the weights."""
    folder.mkdir(exist_ok=True)
    if name == "triposr_tiny":
        tensor_files.write_torch(folder / "model.ckpt", state)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return folder / "model.ckpt"
    if name == "openlrm_v10_tiny":
        infer = {"source_size": config["source_size"], "render_size": 192}
        model = {k: v for k, v in config.items() if k != "source_size"}
        tensor_files.write_torch(
            folder / "model.pth", {"weights": state, "kwargs": {"model": model, "infer": infer}}
        )
        return folder / "model.pth"
    tensor_files.write_safetensors(folder / "model.safetensors", state, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors"


def tensors_of(path):
    content, _ = tensor_files.read(path)
    return content.get("weights", content)


def assert_equal_states(actual, expected):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


# -- in both directions


@pytest.mark.parametrize("name", GOLDENS)
def test_reference_to_model_file_to_reference_is_the_same_to_the_bit(
    goldens, tmp_path, name, capsys
):
    state, config = golden(goldens, name)
    source = write_as_reference(tmp_path / "reference", name, state, config)
    assert convert.main([str(source), str(tmp_path / "ours.safetensors")]) == 0
    assert (
        convert.main(
            [str(tmp_path / "ours.safetensors"), str(tmp_path / "back"), "--to", "torch", "--force"]
        )
        == 0
    )
    if name == "triposr_tiny":  # the reference never uses its pooler, so it is dropped by design
        state |= {k: np.zeros_like(v) for k, v in state.items() if k.startswith(POOLER)}
    assert_equal_states(tensors_of(tmp_path / "back" / source.name), state)
    assert f"wrote {tmp_path / 'ours.safetensors'}" in capsys.readouterr().out


@pytest.mark.parametrize("name", GOLDENS)
def test_the_config_survives_a_round_trip(goldens, tmp_path, name):
    state, config = golden(goldens, name)
    model, params, _ = loading.read_weights(
        str(write_as_reference(tmp_path / "reference", name, state, config))
    )
    written = export.write_reference(tmp_path / "back", model, params, force=True)
    back = yaml.safe_load(written[1].read_text())
    assert {k: back[k] for k in config if k in back} == {k: config[k] for k in config if k in back}
    assert set(config) - set(back) <= {"source_size"}
    assert model.image_size == config.get("cond_image_size", config.get("source_size"))


@pytest.mark.parametrize("name", GOLDENS)
def test_torch_loads_the_written_reference(goldens, tmp_path, name):
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    state, config = golden(goldens, name)
    model, params = references.from_reference(state, config)
    path = export.write_reference(tmp_path, model, params, force=True)[0]
    loaded = (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    )
    loaded = loaded.get("weights", loaded)
    assert {k: tuple(v.shape) for k, v in loaded.items()} == {k: v.shape for k, v in state.items()}
    for key, value in loaded.items():
        assert key.startswith(POOLER) or np.array_equal(value.numpy(), state[key]), key


@pytest.mark.parametrize("with_config", [True, False], ids=["config", "shapes"])
@pytest.mark.parametrize("name", MANIFESTS)
def test_published_manifest_is_consumed_and_produced_exactly(goldens, name, with_config):
    manifest = json.loads((goldens / "manifests" / f"{name}.json").read_text())
    shapes = {key: tuple(shape) for key, (shape, _) in manifest["tensors"].items()}
    state = {
        key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()
    }  # takes no memory
    model, checked, _ = references.recognise(
        state, manifest["about"]["config"] if with_config else None
    )
    assert model_file.variant_of(model) == name
    assert set(checked) == set(shapes)
    assert references.torch_shapes(model) == shapes
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == manifest["parameters"]


def test_16_bit_checkpoint_is_widened(goldens):
    state, config = golden(goldens, "openlrm_dino_tiny")
    _, expected = references.from_reference(
        {k: v.astype(ml_dtypes.bfloat16).astype(np.float32) for k, v in state.items()}, config
    )
    _, params = references.from_reference(
        {k: v.astype(ml_dtypes.bfloat16) for k, v in state.items()}, config
    )
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_removed(prefix):
    state, config = tiny_state()
    _, expected = references.from_reference(state, config)
    _, params = references.from_reference({prefix + k: v for k, v in state.items()}, config)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_compiled_submodules_are_unwrapped():
    state, config = tiny_state("lrm")
    wrapped = {
        re.sub(r"^(synthesizer\.decoder)\.", r"\1._orig_mod.", k): v for k, v in state.items()
    }
    assert wrapped.keys() != state.keys()
    references.from_reference(wrapped, config)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_training_checkpoints_are_unwrapped(tmp_path, wrapper):
    state, config = tiny_state()
    tensor_files.write_torch(tmp_path / "last.ckpt", {"step": 3, wrapper: state})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    model, _, info = loading.load_weights(str(tmp_path / "last.ckpt"))
    assert info["family"] == "triposr" and model.num_heads == 2


# -- strictness


@pytest.mark.parametrize("family", ["triposr", "lrm"])
def test_every_missing_name_is_reported(family):
    state, config = tiny_state(family)
    for name in state:
        with pytest.raises(InputError, match=rf"1 missing: {re.escape(name)}[:;]"):
            references.recognise({k: v for k, v in state.items() if k != name}, config)


@pytest.mark.parametrize(
    "name",
    [
        "backbone.transformer_blocks.1.attn1.to_q.weight",
        "tokenizer.embeddings",
        "post_processor.upsample.weight",
        POOLER + "bias",
    ],
)
def test_renamed_tensor_is_reported_under_both_names(name):
    state, config = tiny_state()
    with pytest.raises(
        InputError, match=rf"1 missing: {re.escape(name)}; 1 extra: surprise.weight: use"
    ):
        references.from_reference(renamed(state, name, "surprise.weight"), config)


def test_many_wrong_names_are_counted_and_the_first_named():
    state, config = tiny_state()
    names = [k for k in state if ".attn1." in k]
    with pytest.raises(
        InputError, match=rf"{len(names)} missing: {re.escape(names[0])}, .*, \.\.\.: use"
    ):
        references.from_reference({k: v for k, v in state.items() if k not in names}, config)


def test_mis_shaped_tensor_is_reported_with_both_shapes():
    state, config = tiny_state()
    state["backbone.proj_in.weight"] = np.zeros((32, 31), np.float32)
    with pytest.raises(
        InputError, match=r"1 mis-shaped: backbone.proj_in.weight \[32, 31\] not \[32, 32\]"
    ):
        references.from_reference(state, config)
    state["tokenizer.embeddings"] = np.zeros((3, 32), np.float32)
    with pytest.raises(InputError, match="another rank"):
        references.from_reference(state, config)


def test_wrong_tensors_are_reported_before_a_missing_config():
    state, _ = tiny_state()
    with pytest.raises(InputError, match="1 extra: surprise"):
        references.from_reference(state | {"surprise": np.ones(1, np.float32)})


def test_fields_that_shapes_do_not_give_are_named():
    state, _ = tiny_state()
    with pytest.raises(
        InputError,
        match=r"neither.*its image_size, num_heads.*num_samples.*put its config.yaml beside",
    ):
        references.from_reference(state)


def test_config_of_another_model_is_refused():
    state, config = tiny_state()
    decoder = config["decoder"]
    for wrong, message in [
        (config | {"decoder": decoder | {"activation": "relu"}}, "decoder.activation: relu"),
        (config | {"decoder": decoder | {"n_hidden_layers": 9}}, "decoder.n_hidden_layers: 9"),
        ({k: v for k, v in config.items() if k != "renderer"}, "lacks 'renderer'"),
        (config | {"backbone": config["backbone"] | {"num_attention_heads": 3}}, "3 heads"),
        (config | {"backbone": config["backbone"] | {"num_attention_heads": "two"}}, "'two'"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            references.from_reference(state, wrong)


def test_trunc_exp_is_exp_forward():
    state, config = tiny_state()
    expected, _ = references.from_reference(state, config)
    config["renderer"]["density_activation"] = "trunc_exp"
    model, _ = references.from_reference(state, config)
    assert model == expected


def test_another_activation_is_refused():
    state, config = tiny_state()
    config["renderer"]["density_activation"] = "softplus"
    with pytest.raises(InputError, match="renderer.density_activation: softplus"):
        references.from_reference(state, config)


@pytest.mark.parametrize(
    ("name", "size"),
    [("scene_decoder_only_256", 256), ("x_res512", 512), ("m_res64", 64), ("lvsm_step_5000", None), ("lvsm_20", None)],
)  # fmt: skip
def test_the_file_name_gives_the_image_size_of_lvsm(name, size):
    assert references.name_config(Path(f"{name}.pt")) == (size and {"image_size": size})


def test_an_image_size_that_is_in_no_config_is_reported(caplog):
    state, config = tiny_state("lrm")
    model, _ = references.from_reference(state, config)
    assert model.image_size == 32 and "source_size" in caplog.text


def test_unknown_family_is_refused():
    with pytest.raises(InputError, match=r"unet.a, unet.b.*no known family: TripoSR"):
        references.from_reference({"unet.a": np.ones(1), "unet.b": np.ones(1)})


@pytest.mark.parametrize(
    "content", [{"weights": {"a": 1.0}}, [1, 2], {}, {"state_dict": {"a": {"b": 2}}, "x": 1}]
)
def test_file_without_a_state_dict_is_refused(tmp_path, content):
    tensor_files.write_torch(tmp_path / "w.pt", content)
    with pytest.raises(InputError, match=r"w.pt: .*state_dict"):
        loading.read_weights(str(tmp_path / "w.pt"))


@pytest.mark.parametrize(("key", "value"), [("cond_image_size", 8), ("num_samples_per_ray", 1)])
def test_a_config_without_anything_to_see_is_refused(key, value):
    state, config = tiny_state()
    section = config if key in config else config["renderer"]
    section[key] = value
    with pytest.raises(InputError, match=f"gives {value} for .*, at least"):
        references.from_reference(state, config)


# -- One-2-3-45: a file of several networks


def networks_of(state):
    networks = {}
    for key, value in state.items():
        network, _, rest = key.partition(".")
        networks.setdefault(network, {})[rest] = value
    return networks


def one2345_state(folder):
    with safe_open(folder / "one2345_recon_tiny.safetensors", "np") as file:
        return {k[6:]: file.get_tensor(k) for k in file.keys() if k.startswith("state.")}


def test_a_file_of_several_networks_comes_back_to_the_bit(goldens, tmp_path):
    state = one2345_state(goldens)
    training = {"optimizer": {"state": {}, "param_groups": []}, "iter_step": 7, "val_step": 0}
    source = tmp_path / "ckpt_215000.pth"
    tensor_files.write_torch(source, networks_of(state) | training)
    assert convert.main([str(source), str(tmp_path / "ours.safetensors")]) == 0
    ours = [str(tmp_path / "ours.safetensors"), str(tmp_path / "back"), "--to", "torch"]
    assert convert.main(ours) == 0
    back, _ = tensor_files.read(tmp_path / "back" / "ckpt_215000.pth")
    assert back.pop("iter_step") == 215_000 and back.pop("val_step") == 0
    assert back.keys() == networks_of(state).keys()
    for name, network in networks_of(state).items():
        assert_equal_states(back[name], network)


def test_one2345_s_published_manifest_is_consumed_and_produced_exactly(goldens):
    manifest = json.loads((goldens / "manifests" / "one2345.json").read_text())
    shapes = {key: tuple(shape) for key, (shape, _) in manifest["tensors"].items()}
    state = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    model, checked, assumed = references.recognise(state)
    assert model_file.variant_of(model) == "one2345" and "volume side 96" in " ".join(assumed)
    # Versions of InPlaceABN that do not count batches lack these.
    uncounted = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert set(checked) == set(references.recognise(uncounted)[1]) >= set(shapes)
    assert references.torch_shapes(model).items() >= shapes.items()


def test_a_network_of_one2345_that_is_missing_is_named(goldens):
    state = one2345_state(goldens)
    name = "rendering_network_lod0.rgb_fc.4.bias"
    with pytest.raises(InputError, match=f"1 missing: {re.escape(name)}"):
        references.recognise({k: v for k, v in state.items() if k != name})


def test_a_volume_of_another_size_is_written_only_by_force(tmp_path):
    model, params = tiny("one2345")
    params = jax.tree.map(np.rint, params)  # counts of batches are whole
    with pytest.raises(
        InputError, match="One-2-3-45 cannot load this model .image_size=16, volume_side=8"
    ):
        export.write_reference(tmp_path, model, params)
    export.write_reference(tmp_path, model, params, force=True)
    back, again, info = loading.read_weights(str(tmp_path))
    assert back.volume_side == 8 and info["family"] == "one2345"
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_zero123_is_written_in_both_layouts_and_read_back(tmp_path):
    model, params = tiny("zero123")
    source = tmp_path / "zero123.safetensors"
    model_file.save_model(source, model, params, {})
    with pytest.raises(InputError, match="Zero123 cannot load this model .image_size=16, channels=32"):  # fmt: skip
        convert.main([str(source), str(tmp_path / "torch"), "--to", "torch"])
    assert convert.main([str(source), str(tmp_path / "torch"), "--to", "torch", "--force"]) == 0
    assert (tmp_path / "torch" / "zero123-xl.ckpt").exists()
    assert convert.main([str(source), str(tmp_path / "nets"), "--to", "diffusers"]) == 0
    for folder in ("torch", "nets"):
        back, again, info = loading.read_weights(str(tmp_path / folder))
        assert info["family"] == "zero123" and back == model
        jax.tree.map(np.testing.assert_array_equal, again, params)


def test_an_incomplete_folder_of_diffusers_is_one_line(tmp_path):
    model, params = tiny("zero123")
    diffusers_folder.write(tmp_path, model, params, {})
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    with pytest.raises(InputError, match="vae has none of .*: download the whole"):
        loading.read_weights(str(tmp_path))


def test_a_tensor_of_zero123_that_is_missing_is_named():
    model, params = tiny("zero123")
    state = family("zero123").to_torch(params, model)
    del state["cc_projection.bias"]
    with pytest.raises(InputError, match="cc_projection.bias"):
        references.from_checkpoint(state, Path("zero123-xl.ckpt"), model)
    del state["cc_projection.weight"]
    with pytest.raises(InputError, match="it lacks|not the tensors|missing"):
        references.recognise(state)


def test_only_zero123_has_diffusers_layout(tmp_path):
    model, params = tiny("lvsm")
    model_file.save_model(tmp_path / "lvsm.safetensors", model, params, {})
    with pytest.raises(InputError, match="--to diffusers is for Zero123"):
        convert.main([str(tmp_path / "lvsm.safetensors"), str(tmp_path / "x"), "--to", "diffusers"])
