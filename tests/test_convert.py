"""Weights from anywhere and back: golden state dicts to the bit, published manifests exactly, and every refusal in one line."""

import json
import os
import re
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors import safe_open

from lrm_jax import __main__, convert, references, tensor_files
from lrm_jax.models import build, vit
from lrm_jax.types import InputError

GOLDENS = ["openlrm_dino_tiny", "openlrm_dinov2_tiny", "openlrm_v10_tiny", "triposr_tiny"]
MANIFESTS = [
    "openlrm-small-1.1",
    "openlrm-base-1.1",
    "openlrm-large-1.1",
    "openlrm-large-dino",
    "triposr",
]
POOLER = "image_tokenizer.model.pooler.dense."


@pytest.fixture(autouse=True, scope="module")
def each_model_is_traced_once():
    """Tracing takes a second, and a hundred checks here are of a few tiny models."""
    traced, trace = {}, references.param_shapes

    def param_shapes(model):
        if repr(model) not in traced:
            traced[repr(model)] = trace(model)
        return traced[repr(model)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(references, "param_shapes", param_shapes)
        patch.setattr(convert, "param_shapes", param_shapes)
        yield


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
    """The files that the reference of this golden would leave. Returns the weights' path."""
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


def tiny(family="triposr", seed=0, **overrides):
    """A random tiny model and its parameters."""
    model = build(family, "tiny", **overrides)
    generator = np.random.default_rng(seed)
    shapes = references.param_shapes(model)
    return model, jax.tree.map(lambda x: generator.normal(size=x.shape).astype(np.float32), shapes)


def tiny_state(family="triposr", **overrides):
    """A tiny model's state dict and config, as its reference has them."""
    model, params = tiny(family, **overrides)
    module = references.family(family)
    return module.to_torch(params, model), module.config_to_torch(model)


# -- both ways


@pytest.mark.parametrize("name", GOLDENS)
def test_reference_to_model_file_to_reference_is_the_same_to_the_bit(
    goldens, tmp_path, name, capsys
):
    state, config = golden(goldens, name)
    source = write_as_reference(tmp_path / "reference", name, state, config)
    assert convert.main([str(source), str(tmp_path / "ours.safetensors")]) == 0
    assert (
        convert.main([str(tmp_path / "ours.safetensors"), str(tmp_path / "back"), "--to", "torch"])
        == 0
    )
    if name == "triposr_tiny":  # the reference never uses its pooler: lost by design
        state |= {k: np.zeros_like(v) for k, v in state.items() if k.startswith(POOLER)}
    assert_equal_states(tensors_of(tmp_path / "back" / source.name), state)
    assert f"wrote {tmp_path / 'ours.safetensors'}" in capsys.readouterr().out


@pytest.mark.parametrize("name", GOLDENS)
def test_config_comes_back(goldens, tmp_path, name):
    state, config = golden(goldens, name)
    model, params, _ = convert.read_weights(
        str(write_as_reference(tmp_path / "reference", name, state, config))
    )
    written = references.write_reference(tmp_path / "back", model, params)
    back = yaml.safe_load(written[1].read_text())
    assert {k: back[k] for k in config if k in back} == {k: config[k] for k in config if k in back}
    assert set(config) - set(back) <= {"source_size"}
    assert model.image_size == config.get("cond_image_size", config.get("source_size"))


@pytest.mark.parametrize("name", GOLDENS)
def test_torch_loads_the_written_reference(goldens, tmp_path, name):
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    state, config = golden(goldens, name)
    model, params = convert.from_reference(state, config)
    path = references.write_reference(tmp_path, model, params)[0]
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
    }  # no memory
    model, checked = references.recognise(
        state, manifest["about"]["config"] if with_config else None
    )
    assert convert.variant_of(model) == name
    assert set(checked) == set(shapes)
    assert references.torch_shapes(model) == shapes
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == manifest["parameters"]


def test_16_bit_checkpoint_is_widened(goldens):
    state, config = golden(goldens, "openlrm_dino_tiny")
    _, expected = convert.from_reference(
        {k: v.astype(ml_dtypes.bfloat16).astype(np.float32) for k, v in state.items()}, config
    )
    _, params = convert.from_reference(
        {k: v.astype(ml_dtypes.bfloat16) for k, v in state.items()}, config
    )
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_of_names_are_taken_off(prefix):
    state, config = tiny_state()
    _, expected = convert.from_reference(state, config)
    _, params = convert.from_reference({prefix + k: v for k, v in state.items()}, config)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_compiled_submodules_are_unwrapped():
    state, config = tiny_state("lrm")
    wrapped = {
        re.sub(r"^(synthesizer\.decoder)\.", r"\1._orig_mod.", k): v for k, v in state.items()
    }
    assert wrapped.keys() != state.keys()
    convert.from_reference(wrapped, config)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_training_checkpoints_are_unwrapped(tmp_path, wrapper):
    state, config = tiny_state()
    tensor_files.write_torch(tmp_path / "last.ckpt", {"step": 3, wrapper: state})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    model, _, info = convert.load_weights(str(tmp_path / "last.ckpt"))
    assert info["family"] == "triposr" and model.num_heads == 2


@pytest.mark.parametrize(
    ("family", "variant", "odd"),
    [
        ("triposr", "triposr", []),
        ("triposr", "nano", ["encoder", "upsample"]),
        ("lrm", "openlrm-base-1.1", []),
        ("lrm", "lrm", ["camera_numbers", "decoder_layers"]),
    ],
)
def test_what_a_reference_cannot_build_is_known(family, variant, odd):
    assert references._fixed_otherwise(build(family, variant), family) == odd


def test_model_that_its_reference_cannot_load_is_said(tmp_path, caplog):
    references.write_reference(tmp_path, *tiny())
    assert "TripoSR cannot load what is written: it has no such encoder" in caplog.text


# -- encoders alone


def encoder(**fields):
    model = vit.ViT(patch=4, width=64, depth=2, num_heads=1, grid=3, **fields)
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: generator.normal(size=x.shape).astype(np.float32), references.param_shapes(model)
    )
    return model, params, references.encoders.to_torch(params, model)


DINO_HF = dict(resize="dino", norm_epsilon=1e-12)
DINO_HUB = dict(resize="dino", norm_epsilon=1e-6)
DINOV2 = dict(resize="dinov2", norm_epsilon=1e-6, layer_scale=True)


@pytest.mark.parametrize(
    "fields",
    [DINO_HF, DINO_HUB, DINOV2, DINOV2 | {"num_registers": 4}],
    ids=["hf", "hub", "v2", "v2reg"],
)
def test_encoder_round_trips_to_the_bit(tmp_path, fields):
    model, params, state = encoder(**fields)
    path = references.write_reference(tmp_path / "reference", model, params)[0]
    convert.main([str(path), str(tmp_path / "ours.safetensors")])
    back, read, info = convert.read_weights(str(tmp_path / "ours.safetensors"))
    assert back == model and info["family"] == "vit"
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert_equal_states(tensors_of(path), state)


@pytest.mark.parametrize(
    ("fields", "extra"),
    [
        (DINO_HF, {"pooler.dense.weight": (64, 64), "pooler.dense.bias": (64,)}),
        (DINOV2, {"mask_token": (1, 64)}),
    ],
)  # fmt: skip
def test_encoder_files_have_what_their_reference_wants_but_never_uses(fields, extra):
    _, _, state = encoder(**fields)
    assert extra.items() <= {k: v.shape for k, v in state.items()}.items()


def test_dino_training_checkpoint_gives_its_teacher(tmp_path):
    _, params, state = encoder(**DINO_HUB)
    teacher = {"module.backbone." + k: v for k, v in state.items()} | {
        "module.head.mlp.0.weight": np.ones((2, 64), np.float32)
    }
    tensor_files.write_torch(
        tmp_path / "checkpoint.pth", {"student": {}, "teacher": teacher, "epoch": 3}
    )
    _, read, _ = convert.read_weights(str(tmp_path / "checkpoint.pth"))
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_hf_names_of_dino_may_have_a_prefix():
    _, params, state = encoder(**DINO_HF)
    _, read = convert.from_reference({"vit." + k: v for k, v in state.items()})
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_transformers_dinov2_equals_torch_hubs():
    _, params, hub = encoder(**DINOV2, num_registers=4)
    renames = {
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "register_tokens": "embeddings.register_tokens",
        "norm": "layernorm",
    }
    hf = {}
    for name, value in hub.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            for part, x in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                hf[f"encoder.layer.{match[1]}.attention.attention.{part}.{match[2]}"] = x
        elif match := re.fullmatch(r"blocks\.(\d+)\.(.*)", name):
            rest = re.sub(r"ls([12])\.gamma", r"layer_scale\1.lambda1", match[2])
            hf[
                f"encoder.layer.{match[1]}.{rest.replace('attn.proj', 'attention.output.dense')}"
            ] = value
        else:
            stem = next(k for k in renames if name == k or name.startswith(k + "."))
            hf[renames[stem] + name.removeprefix(stem)] = value
    _, read = convert.from_reference(hf)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    del hf["encoder.layer.1.attention.attention.key.bias"]
    with pytest.raises(InputError, match="blocks.1.attn.qkv.bias"):
        convert.from_reference(hf)


def test_encoder_alone_is_no_reconstruction_model(tmp_path):
    model, params, _ = encoder(**DINO_HF)
    convert.save_model(tmp_path / "e.safetensors", model, params, {})
    with pytest.raises(InputError, match="encoder alone"):
        convert.load_weights(str(tmp_path / "e.safetensors"))


# -- strictness


def renamed(state, old, new):
    return {new if k == old else k: v for k, v in state.items()}


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
        convert.from_reference(renamed(state, name, "surprise.weight"), config)


def test_many_wrong_names_are_counted_and_the_first_named():
    state, config = tiny_state()
    names = [k for k in state if ".attn1." in k]
    with pytest.raises(
        InputError, match=rf"{len(names)} missing: {re.escape(names[0])}, .*, \.\.\.: use"
    ):
        convert.from_reference({k: v for k, v in state.items() if k not in names}, config)


def test_mis_shaped_tensor_is_reported_with_both_shapes():
    state, config = tiny_state()
    state["backbone.proj_in.weight"] = np.zeros((32, 31), np.float32)
    with pytest.raises(
        InputError, match=r"1 mis-shaped: backbone.proj_in.weight \[32, 31\] not \[32, 32\]"
    ):
        convert.from_reference(state, config)
    state["tokenizer.embeddings"] = np.zeros((3, 32), np.float32)
    with pytest.raises(InputError, match="another rank"):
        convert.from_reference(state, config)


def test_tensors_are_judged_before_a_missing_config():
    state, _ = tiny_state()
    with pytest.raises(InputError, match="1 extra: surprise"):
        convert.from_reference(state | {"surprise": np.ones(1, np.float32)})


def test_what_shapes_do_not_tell_is_named():
    state, _ = tiny_state()
    with pytest.raises(
        InputError,
        match=r"neither.*its image_size, num_heads.*num_samples.*put its config.yaml beside",
    ):
        convert.from_reference(state)


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
            convert.from_reference(state, wrong)


def test_trunc_exp_is_exp_forward():
    state, config = tiny_state()
    expected, _ = convert.from_reference(state, config)
    config["renderer"]["density_activation"] = "trunc_exp"
    model, _ = convert.from_reference(state, config)
    assert model == expected


def test_picture_size_that_no_config_tells_is_said(caplog):
    state, config = tiny_state("lrm")
    model, _ = convert.from_reference(state, config)
    assert model.image_size == 32 and "source_size" in caplog.text


def test_unknown_family_is_refused():
    with pytest.raises(InputError, match=r"unet.a, unet.b.*no known family: TripoSR"):
        convert.from_reference({"unet.a": np.ones(1), "unet.b": np.ones(1)})


@pytest.mark.parametrize(
    "content", [{"weights": {"a": 1.0}}, [1, 2], {}, {"state_dict": {"a": {"b": 2}}, "x": 1}]
)
def test_file_without_a_state_dict_is_refused(tmp_path, content):
    tensor_files.write_torch(tmp_path / "w.pt", content)
    with pytest.raises(InputError, match=r"w.pt: .*state_dict"):
        convert.read_weights(str(tmp_path / "w.pt"))


# -- our model file


@pytest.mark.parametrize(
    ("dtype", "rtol"), [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8)]
)
def test_model_file_round_trips(tmp_path, dtype, rtol):  # rtol: half a unit in the last place
    model, params = tiny()
    training = {"steps": 12, "data": "é"}
    convert.save_model(tmp_path / "m.safetensors", model, params, training, dtype=dtype)
    back, read, summary = convert.load_model(tmp_path / "m.safetensors")
    assert back == model and summary == training
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7 if rtol else 0),
        read,
        params,
    )
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(read))
    size = sum(x.size for x in jax.tree.leaves(params)) * np.dtype(jnp.dtype(dtype)).itemsize
    assert size < (tmp_path / "m.safetensors").stat().st_size < size + 20000


def test_model_file_says_what_it_is(tmp_path):
    model, params = tiny()
    convert.save_model(tmp_path / "m.safetensors", model, params, {"steps": 1})
    with safe_open(tmp_path / "m.safetensors", "np") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert (
        metadata["family"] == "triposr"
        and metadata["variant"] == "tiny"
        and metadata["version"] == "1"
    )
    assert json.loads(metadata["training"]) == {"steps": 1}
    assert json.loads(metadata["fields"])["num_heads"] == 2
    assert "backbone.blocks.self_attn.q.kernel" in names and "plane_queries" in names


def test_how_a_model_is_run_is_not_in_its_file(tmp_path):
    model, params = tiny(dtype="bfloat16", ray_chunk=7, remat=False)
    convert.save_model(tmp_path / "m.safetensors", model, params, {})
    back, _, _ = convert.load_model(tmp_path / "m.safetensors")
    assert back == build("triposr", "tiny")


def rewritten(tmp_path, change):
    """A model file after `change(tensors, metadata)`."""
    path = tmp_path / "m.safetensors"
    model, params = tiny()
    convert.save_model(path, model, params, {})
    tensors, metadata = tensor_files.read(path)
    change(tensors, metadata)
    tensor_files.write_safetensors(path, tensors, metadata)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("plane_queries"), "1 missing: plane_queries"),
        (lambda t, m: t.update(other=t["plane_queries"]), "1 extra: other"),
        (lambda t, m: t.update(plane_queries=t["plane_queries"][:2]), r"1 mis-shaped: plane_queries \[2, 4, 4, 32\] not"),
        (lambda t, m: m.update(version="2"), "version 2: update"),
        (lambda t, m: m.update(fields="{"), "damaged"),
        (lambda t, m: m.update(fields=m["fields"][:-1] + ', "colour": 1}'), "colour"),
        (lambda t, m: m.update(family="nerf"), "nerf"),
        (lambda t, m: m.pop("training"), "training"),
        (lambda t, m: m.clear(), "not a model file"),
    ],
)  # fmt: skip
def test_changed_model_file_is_refused(tmp_path, change, message):
    path = rewritten(tmp_path, change)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: .*{message}"):
        convert.load_model(path)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    model, params = tiny()
    for bad, dtype in [(np.nan, "float32"), (np.inf, "float32"), (1e6, "float16")]:
        params["plane_queries"][0, 0, 0, 0] = bad
        with pytest.raises(InputError, match="plane_queries has numbers that are not finite"):
            convert.save_model(tmp_path / "m.safetensors", model, params, {}, dtype=dtype)
    assert not os.listdir(tmp_path)
    path = rewritten(
        tmp_path, lambda t, m: t.update(plane_queries=t["plane_queries"] * np.float32(np.nan))
    )
    with pytest.raises(InputError, match="plane_queries has numbers that are not finite"):
        convert.load_weights(str(path))


# -- where weights come from


def test_nothing_is_the_bundled_model(tmp_path, monkeypatch):
    model, params = tiny()
    monkeypatch.setattr(convert, "BUNDLED", tmp_path / "nano.safetensors")
    with pytest.raises(InputError, match="no bundled model.*--weights"):
        convert.load_weights()
    convert.save_model(tmp_path / "nano.safetensors", model, params, {"steps": 5})
    back, read, info = convert.load_weights(None)
    assert back == model and info["training"] == {"steps": 5} and info["variant"] == "tiny"
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(read))


def snapshot(folder, family):
    """A folder as huggingface_hub leaves it: links to blobs."""
    state, config = tiny_state(family)
    model, params = convert.from_reference(state, config)
    blobs = folder / "blobs"
    (folder / "snapshots" / "0").mkdir(parents=True)
    for path in references.write_reference(blobs, model, params):
        (folder / "snapshots" / "0" / path.name).symlink_to(path)
    return folder / "snapshots" / "0"


@pytest.mark.parametrize("family", ["triposr", "lrm"])
def test_snapshot_folder_is_read(tmp_path, family):
    folder = snapshot(tmp_path, family)
    _, _, info = convert.load_weights(str(folder))
    assert info["family"] == family and Path(info["path"]).parent == folder


@pytest.mark.parametrize("family", ["triposr", "lrm"])
def test_hub_names_download_only_what_the_references_use(tmp_path, monkeypatch, family):
    folder, asked = snapshot(tmp_path, family), []

    def download(repo_id, *, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _, _, info = convert.load_weights("hf:somebody/Some-Model_1.1")
    assert info["family"] == family
    names = ["model.safetensors", "model.ckpt", "model.pth", "config.yaml", "config.json"]
    assert asked == [("somebody/Some-Model_1.1", names)]


def test_hub_falls_back_to_the_older_file_name(tmp_path, monkeypatch):
    state, config = tiny_state("lrm")
    (tmp_path / "config.json").write_text(json.dumps(config))

    def download(repo_id, *, allow_patterns):
        if "pytorch_model.bin" in allow_patterns:
            tensor_files.write_torch(tmp_path / "pytorch_model.bin", state)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert convert.load_weights("hf:somebody/model")[2]["family"] == "lrm"


def test_a_file_of_a_hub_repository_can_be_named(tmp_path, monkeypatch):
    asked = []

    def download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns[0]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, params = convert.load_model(convert.BUNDLED)[:2]
    convert.save_model(tmp_path / "scene.safetensors", model, params, {})
    info = convert.load_weights("hf:a/b/scene.safetensors")[2]
    assert info["family"] == "triposr" and asked == [("a/b", "scene.safetensors")]
    with pytest.raises(InputError, match="a/b has no file other.pt"):
        convert.load_weights("hf:a/b/other.pt")
    with pytest.raises(InputError, match="expected hf:ORG/NAME"):
        convert.load_weights("hf:a/b/../../c")


def test_failed_download_is_one_line_with_a_remedy(monkeypatch):
    def download(repo_id, *, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the hub\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        InputError, match=r"^hf:a/b: cannot be downloaded \(cannot reach the hub\): check.*$"
    ):
        convert.load_weights("hf:a/b")
    with pytest.raises(InputError, match="expected hf:ORG/NAME"):
        convert.load_weights("hf:TripoSR")


def test_repository_without_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo_id, allow_patterns: str(tmp_path)
    )
    with pytest.raises(InputError, match="has none of model.safetensors"):
        convert.load_weights("hf:a/b")


def test_folder_with_one_odd_name_is_read_and_with_two_or_none_refused(tmp_path):
    with pytest.raises(InputError, match="this has none"):
        convert.load_weights(str(tmp_path))
    model, params = tiny()
    convert.save_model(tmp_path / "mine.safetensors", model, params, {})
    assert convert.load_weights(str(tmp_path))[0] == model
    convert.save_model(tmp_path / "yours.safetensors", model, params, {})
    with pytest.raises(InputError, match=r"several \(mine.safetensors, yours.safetensors\)"):
        convert.load_weights(str(tmp_path))


def test_workdir_gives_the_running_mean_of_its_last_checkpoint(tmp_path):
    from lrm_jax import checkpoints
    from lrm_jax.types import TrainState

    model, params = tiny()
    means = jax.tree.map(lambda x: x + 1, params)
    config = {"model": {"name": "triposr", "variant": "tiny"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with checkpoints.open_folder(tmp_path) as manager:
        with pytest.raises(InputError, match="not saved a checkpoint yet"):
            convert.load_weights(str(tmp_path))
        state = TrainState(
            step=jnp.int32(7),
            params=params,
            ema_params=means,
            opt_state=(params, {"count": jnp.int32(7)}),
            key=jax.random.key(0),
        )
        checkpoints.save(manager, 7, state)
        manager.wait_until_finished()
    back, read, info = convert.load_weights(str(tmp_path))
    assert back == model and info["training"] == {"steps": 7, "config": config}
    jax.tree.map(np.testing.assert_array_equal, read, means)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="config.json is not that of a training run"):
        convert.load_weights(str(tmp_path))


# -- the command


def failed(capsys, *argv):
    """What `lrm convert` prints on failing: exactly one line, beside the stages'."""
    assert __main__.main(["convert", *map(str, argv)]) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1 and printed.out == ""
    return lines[0]


def test_bad_sources_exit_with_2_and_leave_nothing(tmp_path, capsys):
    state, config = tiny_state()
    good, out = tmp_path / "in", tmp_path / "out"
    good.mkdir()
    (good / "config.yaml").write_text(yaml.safe_dump(config))
    tensor_files.write_torch(good / "model.ckpt", state)
    data = (good / "model.ckpt").read_bytes()
    (good / "model.ckpt").write_bytes(data[: len(data) // 2])
    assert "truncated" in failed(capsys, good, out / "m.safetensors")
    tensor_files.write_torch(
        good / "model.ckpt", renamed(state, "backbone.norm.bias", "backbone.norm.bais")
    )
    assert "1 missing: backbone.norm.bias; 1 extra: backbone.norm.bais" in failed(
        capsys, good, out, "--to", "torch"
    )
    tensor_files.write_torch(good / "model.ckpt", {"unet.conv": np.ones(3, np.float32)})
    assert "no known family" in failed(capsys, good, out / "m.safetensors")
    assert "No such file" in failed(capsys, tmp_path / "none.ckpt", out / "m.safetensors")
    assert not out.exists()


def test_bad_destinations_exit_with_2_and_leave_nothing(tmp_path, capsys):
    model, params = tiny()
    source = tmp_path / "m.safetensors"
    convert.save_model(source, model, params, {})
    assert "name a folder" in failed(capsys, source, tmp_path / "model.ckpt", "--to", "torch")
    assert "name a folder" in failed(capsys, source, source, "--to", "torch")
    assert "ends in .safetensors" in failed(capsys, source, tmp_path / "model.ckpt")
    assert "--dtype" in failed(
        capsys, source, tmp_path / "out", "--to", "torch", "--dtype", "float16"
    )
    assert str(source) in failed(capsys, source, source / "below.safetensors")
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_config_that_cannot_be_written_leaves_no_weights(tmp_path):
    model, params = tiny()
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(OSError):
        references.write_reference(tmp_path, model, params)
    assert os.listdir(tmp_path / "config.yaml") == []


def test_folder_as_destination_gets_a_model_file(tmp_path):
    model, params = tiny()
    convert.save_model(tmp_path / "m.safetensors", model, params, {"steps": 3})
    (tmp_path / "out").mkdir()
    assert (
        convert.main([str(tmp_path / "m.safetensors"), str(tmp_path / "out"), "--dtype", "float16"])
        == 0
    )
    assert convert.load_model(tmp_path / "out" / "model.safetensors")[2] == {"steps": 3}


def test_help_tells_what_can_be_read(capsys):
    with pytest.raises(SystemExit):
        convert.main(["--help"])
    shown = capsys.readouterr().out
    assert "--to {lrm_jax,torch}" in shown and "hf:ORG/NAME" in shown and "OpenLRM" in shown
