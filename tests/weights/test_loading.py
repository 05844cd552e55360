"""Model files, sources of weights, and `lrm convert`."""

import json
import os
import re
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors import safe_open
from tiny_models import each_model_is_traced_once, renamed, tiny, tiny_state  # noqa: F401

from lrm_jax import __main__
from lrm_jax.commands import convert
from lrm_jax.models import build
from lrm_jax.types import InputError, Views
from lrm_jax.weights import export, loading, model_file, references, tensor_files

pytestmark = pytest.mark.usefixtures("each_model_is_traced_once")


# -- our model file


@pytest.mark.parametrize(
    ("dtype", "rtol"), [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8)]
)
def test_model_file_round_trips(tmp_path, dtype, rtol):  # rtol: half a unit in the last place
    model, params = tiny()
    training = {"steps": 12, "data": "é"}
    model_file.save_model(tmp_path / "m.safetensors", model, params, training, dtype=dtype)
    back, read, summary = model_file.load_model(tmp_path / "m.safetensors")
    assert back == model and summary == training
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7 if rtol else 0),
        read,
        params,
    )
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(read))
    size = sum(x.size for x in jax.tree.leaves(params)) * np.dtype(jnp.dtype(dtype)).itemsize
    assert size < (tmp_path / "m.safetensors").stat().st_size < size + 20000


def test_a_model_file_describes_itself(tmp_path):
    model, params = tiny()
    model_file.save_model(tmp_path / "m.safetensors", model, params, {"steps": 1})
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


def test_settings_for_running_a_model_are_not_in_its_file(tmp_path):
    model, params = tiny(dtype="bfloat16", ray_chunk=7, remat="none")
    model_file.save_model(tmp_path / "m.safetensors", model, params, {})
    back, _, _ = model_file.load_model(tmp_path / "m.safetensors")
    assert back == build("triposr", "tiny")


def rewritten(tmp_path, change):
    """Rewrites a model file after `change(tensors, metadata)`."""
    path = tmp_path / "m.safetensors"
    model, params = tiny()
    model_file.save_model(path, model, params, {})
    tensors, metadata = tensor_files.read(path)
    change(tensors, metadata)
    tensor_files.write_safetensors(path, tensors, metadata)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("plane_queries"), "1 missing: plane_queries"),
        (lambda t, m: m.update(fields=m["fields"].replace('"num_heads": 2', '"num_heads": 0')), "its description is damaged"),
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
        model_file.load_model(path)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    model, params = tiny()
    for bad, dtype in [(np.nan, "float32"), (np.inf, "float32"), (1e6, "float16")]:
        params["plane_queries"][0, 0, 0, 0] = bad
        with pytest.raises(InputError, match="plane_queries has numbers that are not finite"):
            model_file.save_model(tmp_path / "m.safetensors", model, params, {}, dtype=dtype)
    assert not os.listdir(tmp_path)
    path = rewritten(
        tmp_path, lambda t, m: t.update(plane_queries=t["plane_queries"] * np.float32(np.nan))
    )
    with pytest.raises(InputError, match="plane_queries has numbers that are not finite"):
        loading.load_weights(str(path))


# -- sources of weights


def test_without_weights_the_bundled_model_is_loaded(tmp_path, monkeypatch):
    model, params = tiny()
    monkeypatch.setattr(loading, "BUNDLED", tmp_path / "nano.safetensors")
    with pytest.raises(InputError, match="no bundled model.*--weights"):
        loading.load_weights()
    model_file.save_model(tmp_path / "nano.safetensors", model, params, {"steps": 5})
    back, read, info = loading.load_weights(None)
    assert back == model and info["training"] == {"steps": 5} and info["variant"] == "tiny"
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(read))


def snapshot(folder, family):
    """A folder in the layout of huggingface_hub: links to blobs."""
    state, config = tiny_state(family)
    model, params = references.from_reference(state, config)
    blobs = folder / "blobs"
    (folder / "snapshots" / "0").mkdir(parents=True)
    for path in export.write_reference(blobs, model, params, force=True):
        (folder / "snapshots" / "0" / path.name).symlink_to(path)
    return folder / "snapshots" / "0"


@pytest.mark.parametrize("family", ["triposr", "lrm"])
def test_snapshot_folder_is_read(tmp_path, family):
    folder = snapshot(tmp_path, family)
    _, _, info = loading.load_weights(str(folder))
    assert info["family"] == family and Path(info["path"]).parent == folder


@pytest.mark.parametrize("family", ["triposr", "lrm"])
def test_hub_names_download_only_what_the_references_use(tmp_path, monkeypatch, family):
    folder, asked = snapshot(tmp_path, family), []

    def download(repo_id, *, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _, _, info = loading.load_weights("hf:somebody/Some-Model_1.1")
    assert info["family"] == family
    weights = ["model.safetensors", "model.ckpt", "model.pth"]
    names = [*weights, "config.yaml", "config.json", "lrm_jax.json"]
    assert asked == [("somebody/Some-Model_1.1", names)]


def test_hub_falls_back_to_the_older_file_name(tmp_path, monkeypatch):
    state, config = tiny_state("lrm")
    (tmp_path / "config.json").write_text(json.dumps(config))

    def download(repo_id, *, allow_patterns):
        if "pytorch_model.bin" in allow_patterns:
            tensor_files.write_torch(tmp_path / "pytorch_model.bin", state)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert loading.load_weights("hf:somebody/model")[2]["family"] == "lrm"


def test_a_file_of_a_hub_repository_can_be_named(tmp_path, monkeypatch):
    asked = []

    def download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns[0]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, params = model_file.load_model(loading.BUNDLED)[:2]
    model_file.save_model(tmp_path / "scene.safetensors", model, params, {})
    info = loading.load_weights("hf:a/b/scene.safetensors")[2]
    assert info["family"] == "triposr" and asked == [("a/b", "scene.safetensors")]
    with pytest.raises(InputError, match="a/b has no file other.pt"):
        loading.load_weights("hf:a/b/other.pt")
    with pytest.raises(InputError, match="expected hf:ORG/NAME"):
        loading.load_weights("hf:a/b/../../c")


def test_failed_download_is_one_line_with_a_remedy(monkeypatch):
    def download(repo_id, *, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the hub\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        InputError, match=r"^hf:a/b: cannot be downloaded \(cannot reach the hub\): check.*$"
    ):
        loading.load_weights("hf:a/b")
    with pytest.raises(InputError, match="expected hf:ORG/NAME"):
        loading.load_weights("hf:TripoSR")


def test_repository_without_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo_id, allow_patterns: str(tmp_path)
    )
    with pytest.raises(InputError, match="has none of model.safetensors"):
        loading.load_weights("hf:a/b")


def test_folder_with_one_odd_name_is_read_and_with_two_or_none_refused(tmp_path):
    with pytest.raises(InputError, match="this has none"):
        loading.load_weights(str(tmp_path))
    model, params = tiny()
    model_file.save_model(tmp_path / "mine.safetensors", model, params, {})
    assert loading.load_weights(str(tmp_path))[0] == model
    model_file.save_model(tmp_path / "yours.safetensors", model, params, {})
    with pytest.raises(InputError, match=r"several \(mine.safetensors, yours.safetensors\)"):
        loading.load_weights(str(tmp_path))


def saved_run(folder, steps):
    """The folder of a run. At step n, its running means are the parameters plus n."""
    from lrm_jax.training import checkpoints
    from lrm_jax.types import TrainState

    model, params = tiny()
    config = {"model": {"name": "triposr", "variant": "tiny", "dtype": "bfloat16"}}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with checkpoints.open_folder(folder, keep=2) as manager:
        for step in steps:
            state = TrainState(
                step=jnp.int32(step),
                params=params,
                ema_params=jax.tree.map(lambda x: x + step, params),  # noqa: B023
                opt_state=(params, {"count": jnp.int32(step)}),
                key=jax.random.key(0),
            )
            checkpoints.save(manager, step, state)
        manager.wait_until_finished()
    return model, params, config


def test_workdir_gives_the_running_mean_of_its_last_checkpoint(tmp_path):
    saved_run(tmp_path, [])
    with pytest.raises(InputError, match="not saved a checkpoint yet"):
        loading.load_weights(str(tmp_path))
    model, params, config = saved_run(tmp_path, [7])
    back, read, info = loading.load_weights(str(tmp_path))
    assert back == model and info["training"] == {"steps": 7, "config": config}
    assert info["assumed"] == [] and info["path"] == str(tmp_path)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 7), read, params)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="config.json is not from a training run"):
        loading.load_weights(str(tmp_path))


def test_a_run_at_a_step(tmp_path):
    run = tmp_path / "run"
    _, params, config = saved_run(run, [1, 2, 3])
    _, read, info = loading.load_weights(f"{run}@2")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 2), read, params)
    assert info["training"] == {"steps": 2, "config": config} and info["path"] == f"{run}@2"
    with pytest.raises(InputError, match=r"run@1: step 1 was not kept: choose one of 2, 3$"):
        loading.load_weights(f"{run}@1")
    with pytest.raises(InputError, match=f"^{run}@x: cannot be read"):
        loading.load_weights(f"{run}@x")
    (tmp_path / "plain").mkdir()
    with pytest.raises(InputError, match="not the folder of a training run.*leave out @3"):
        loading.load_weights(f"{tmp_path / 'plain'}@3")
    # If a file or folder has exactly this name, it is used.
    model_file.save_model(tmp_path / "run@3" / "model.safetensors", *tiny(), {"steps": 9})
    assert loading.load_weights(f"{run}@3")[2]["training"] == {"steps": 9}


def test_what_is_kept_of_a_run_is_read(tmp_path):
    model, params = tiny()
    (tmp_path / "config.json").write_text('{"model": {"name": "triposr", "variant": "tiny"}}')
    model_file.save_model(tmp_path / "model.safetensors", model, params, {"steps": 4})
    assert loading.load_weights(str(tmp_path))[2]["training"] == {"steps": 4}
    (tmp_path / "checkpoints").mkdir()  # but empty
    assert loading.load_weights(str(tmp_path))[2]["training"] == {"steps": 4}


def test_a_hub_name_without_hf_is_an_error_that_shows_the_right_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match="^stabilityai/TripoSR: no such file .* hf:stabilityai/TripoSR for"
    ):
        loading.load_weights("stabilityai/TripoSR")
    for path in ("out/model.safetensors", "./x/y/z", "../a"):
        with pytest.raises(InputError, match="cannot be read: No such file") as error:
            loading.load_weights(path)
        assert "hf:" not in str(error.value)
    model_file.save_model(tmp_path / "stabilityai" / "TripoSR" / "m.safetensors", *tiny(), {})
    assert loading.load_weights("stabilityai/TripoSR")[2]["variant"] == "tiny"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_computes_in_the_given_dtype(tmp_path, dtype):
    model_file.save_model(tmp_path / "m.safetensors", *tiny(), {})
    model, params, _ = loading.load_weights(str(tmp_path / "m.safetensors"), dtype=dtype)
    assert model == build("triposr", "tiny", dtype=dtype)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))
    rgb = jnp.zeros((1, 1, model.image_size, model.image_size, 3))
    planes = jax.eval_shape(
        lambda p: model.apply({"params": p}, Views(rgb=rgb, cameras=None), method="encode"), params
    )
    assert planes["triplane"].dtype == dtype


def test_an_unknown_dtype_is_refused_before_anything_is_read():
    with pytest.raises(InputError, match="^dtype float64: not one of float32, bfloat16, float16"):
        loading.load_weights("/nowhere", dtype="float64")


# -- the command


def failed(capsys, *argv):
    """Runs `lrm convert`, which must fail. Returns its message: exactly one line, besides those of the stages."""
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
    model_file.save_model(source, model, params, {})
    assert "name a folder" in failed(capsys, source, tmp_path / "model.ckpt", "--to", "torch")
    assert "name a folder" in failed(capsys, source, source, "--to", "torch")
    assert "must end in .safetensors" in failed(capsys, source, tmp_path / "model.ckpt")
    assert "--dtype" in failed(
        capsys, source, tmp_path / "out", "--to", "torch", "--dtype", "float16"
    )
    assert str(source) in failed(capsys, source, source / "below.safetensors")
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_folder_as_destination_gets_a_model_file(tmp_path):
    model, params = tiny()
    model_file.save_model(tmp_path / "m.safetensors", model, params, {"steps": 3})
    (tmp_path / "out").mkdir()
    assert (
        convert.main([str(tmp_path / "m.safetensors"), str(tmp_path / "out"), "--dtype", "float16"])
        == 0
    )
    assert model_file.load_model(tmp_path / "out" / "model.safetensors")[2] == {"steps": 3}


def test_the_help_lists_what_can_be_read(capsys):
    with pytest.raises(SystemExit):
        convert.main(["--help"])
    shown = capsys.readouterr().out
    assert (
        "--to {lrm_jax,torch,diffusers}" in shown and "hf:ORG/NAME" in shown and "OpenLRM" in shown
    )
