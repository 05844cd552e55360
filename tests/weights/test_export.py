"""Conversion to the references and back loses nothing, refuses what they cannot load, and writes all files or none."""

import json
import os

import jax
import numpy as np
import pytest
import yaml
from tiny_models import each_model_is_traced_once, tiny  # noqa: F401

from lrm_jax import __main__
from lrm_jax.models import build
from lrm_jax.models.parts import vit
from lrm_jax.types import InputError
from lrm_jax.weights import export, loading, model_file, references, tensor_files

pytestmark = pytest.mark.usefixtures("each_model_is_traced_once")

# A model of each family, with fields that the reference's files cannot store.
ODD = {
    "triposr": dict(
        surface_level=5.0, source_distance=3.0, source_elevation=20.0, symmetric=True, upsample=4, foreground_ratio=0.7,
        image_size=48,
    ),
    "lrm": dict(
        image_size=48, surface_level=2.0, source_distance=1.5, num_importance=3, radius=0.9, background=0.5, normalize_image=False,
    ),
    "lvsm": dict(image_size=24),
}  # fmt: skip
TRAINING = {"steps": 7, "config": {"data": {"normalize": "image", "sizes": [1, 2.5]}}, "é": None}


def lrm(*argv):
    return __main__.main(["convert", *map(str, argv)])


def failed(capsys, *argv):
    """Runs `lrm convert`, which must fail. Returns its message: exactly one line, besides those of the stages."""
    assert lrm(*argv) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1 and printed.out == ""
    return lines[0]


@pytest.fixture
def odd_file(tmp_path):
    """A model file of a family with unusual fields."""

    def make(family, **fields):
        model, params = tiny(family, **ODD[family] | fields)
        path = tmp_path / f"{family}.safetensors"
        model_file.save_model(path, model, params, TRAINING)
        return path, model, params

    return make


@pytest.mark.parametrize(
    ("family", "fields", "files"),
    [
        ("triposr", {}, ["model.ckpt", "config.yaml"]),
        ("lrm", {}, ["model.safetensors", "config.json"]),
        ("lrm", {"release": "1.0"}, ["model.pth", "config.json"]),
        ("lvsm", {}, ["model_res24.pt"]),
    ],
)
def test_to_torch_and_back_is_the_same_model_and_training(
    odd_file, tmp_path, family, fields, files, caplog
):
    path, model, params = odd_file(family, **fields)
    force = [] if family == "lvsm" else ["--force"]
    assert lrm(path, tmp_path / "torch", "--to", "torch", *force) == 0
    assert sorted(os.listdir(tmp_path / "torch")) == sorted([*files, "lrm_jax.json"])
    assert lrm(tmp_path / "torch", tmp_path / "back.safetensors") == 0
    for weights in (
        tmp_path / "torch",
        tmp_path / "torch" / files[0],
        tmp_path / "back.safetensors",
    ):
        back, read, info = loading.read_weights(str(weights))
        assert model_file.fields_of(back) == model_file.fields_of(model) and back == model
        assert info["training"] == TRAINING and info["assumed"] == []
        jax.tree.map(np.testing.assert_array_equal, read, params)
    assert "assumed" not in caplog.text  # nothing was guessed on the way


def test_the_references_own_files_have_no_key_of_ours(odd_file, tmp_path):
    """TripoSR and OpenLRM refuse a config with an unknown key. LVSM loads ["model"] strictly."""
    for family, config in [("triposr", "config.yaml"), ("lrm", "config.json"), ("lvsm", None)]:
        _, model, params = odd_file(family)
        folder = tmp_path / family
        weights, *_ = export.write_reference(folder, model, params, TRAINING, force=True)
        if config is None:
            assert tensor_files.read(weights)[0].keys() == {"model"}
        else:
            told = yaml.safe_load((folder / config).read_text())
            assert told == references.family(family).config_to_torch(model)


def test_a_renamed_checkpoint_keeps_its_record_and_another_file_does_not_get_it(odd_file, tmp_path):
    _, model, params = odd_file("lvsm")
    weights, record = export.write_reference(tmp_path / "t", model, params, TRAINING)
    other = weights.with_name("other_res48.pt")
    other.write_bytes(weights.read_bytes())
    back, _, info = loading.read_weights(str(other))
    assert back.image_size == 48 and info["training"] == {}
    weights.unlink()
    back, _, info = loading.read_weights(str(other))
    assert back == model and info["training"] == TRAINING
    with pytest.raises(InputError, match="lrm_jax.json belongs to other.*: choose another") as e:
        record.write_text(record.read_text().replace(weights.name, other.name))
        export.write_reference(tmp_path / "t", model, params)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["fields"].update(width=64), r"describes another model \(.*mis-shaped: .*\): delete it"),
        (lambda r: r["fields"].update(depth=3), r"describes another model \(.* missing: .*\): delete it"),
        (lambda r: r["fields"].update(num_heads=0), "damaged or of a later lrm_jax"),
        (lambda r: r["fields"].update(colour=1), "damaged or of a later lrm_jax .*colour"),
        (lambda r: r.update(fields=[1]), "damaged or of a later lrm_jax .*fields is a list"),
        (lambda r: r.update(family="nerf"), "damaged or of a later lrm_jax .*nerf"),
        (lambda r: r.pop("weights"), "damaged or of a later lrm_jax .*weights"),
        (lambda r: r.update(version="2"), "of version 2: update lrm_jax"),
    ],
)  # fmt: skip
def test_a_record_of_another_model_is_refused_in_one_line(tmp_path, change, message):
    model, params = tiny()
    weights = export.write_reference(tmp_path, model, params, TRAINING, force=True)[0]
    record = json.loads((tmp_path / "lrm_jax.json").read_text())
    change(record)
    (tmp_path / "lrm_jax.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=f"^{weights}: .*{message}") as error:
        loading.read_weights(str(tmp_path))
    assert "\n" not in str(error.value)


def test_weights_of_another_family_beside_a_record_are_refused(tmp_path):
    export.write_reference(tmp_path / "a", *tiny("lrm"), force=True)
    export.write_reference(tmp_path / "b", *tiny("lvsm"))
    os.replace(tmp_path / "b" / "model_res16.pt", tmp_path / "a" / "model.safetensors")
    with pytest.raises(InputError, match="another model .the tensors of LVSM, not of OpenLRM"):
        loading.read_weights(str(tmp_path / "a"))


def test_a_record_that_is_not_json_is_refused(tmp_path):
    export.write_reference(tmp_path, *tiny(), force=True)
    (tmp_path / "lrm_jax.json").write_text("{")
    with pytest.raises(InputError, match="lrm_jax.json is damaged"):
        loading.read_weights(str(tmp_path))


# -- what a reference cannot load


@pytest.mark.parametrize(
    ("family", "variant", "odd"),
    [
        ("triposr", "triposr", []),
        ("triposr", "nano", ["encoder", "upsample=4"]),
        ("triposr", "nano-symmetric", ["encoder", "upsample=4", "symmetric=True"]),
        ("lrm", "openlrm-base-1.1", []),
        ("lrm", "openlrm-large-dino", []),
        ("lrm", "lrm", ["camera_numbers=20", "decoder_layers=10", "num_importance=0"]),
        ("lvsm", "tiny", []),
    ],
)
def test_what_a_reference_cannot_build_is_known(family, variant, odd):
    assert export.not_loadable(build(family, variant)) == odd


@pytest.mark.parametrize(
    ("fields", "odd"),
    [
        ({"surface_level": 1.0, "radius": 0.5, "image_size": 256}, []),  # in the config, or chosen at run time
        ({"encoder": vit.VARIANTS["dinov2-vitb14-reg"]}, ["encoder"]),
        ({"encoder": vit.VARIANTS["dino-vitb16"] | {"grid": 15}}, ["encoder"]),
    ],
)  # fmt: skip
def test_fields_of_triposr_that_are_only_in_its_code_are_known(fields, odd):
    assert export.not_loadable(build("triposr", "triposr", **fields)) == odd


@pytest.mark.parametrize(
    ("fields", "odd"),
    [
        ({"image_size": 256, "width": 256, "num_heads": 4}, []),
        ({"normalize_image": True}, ["normalize_image=True"]),
        ({"radius": 2.0}, ["radius=2.0"]),
        ({"release": "1.0"}, ["encoder"]),
        ({"encoder": vit.VARIANTS["dino-vitb16"], "normalize_image": True, "release": "1.0"}, []),
    ],
)
def test_fields_of_openlrm_that_are_only_in_its_code_are_known(fields, odd):
    assert export.not_loadable(build("lrm", "openlrm-base-1.1", **fields)) == odd


def test_what_its_reference_cannot_load_is_refused_without_force(odd_file, tmp_path, capsys):
    path, _, _ = odd_file("triposr")
    line = failed(capsys, path, tmp_path / "torch", "--to", "torch")
    assert "TripoSR cannot load this model (encoder, upsample=4, symmetric=True)" in line
    assert "--force writes it anyway" in line
    assert not (tmp_path / "torch").exists()


def test_with_force_it_is_written_with_a_warning(odd_file, tmp_path, caplog):
    path, _, _ = odd_file("triposr")
    assert lrm(path, tmp_path / "torch", "--to", "torch", "--force") == 0
    assert (
        "TripoSR cannot load what is written (encoder, upsample=4, symmetric=True): only lrm_jax"
        in caplog.text
    )


def test_a_model_that_its_reference_loads_needs_no_force_and_gives_no_warning(tmp_path, caplog):
    """The encoder is the published one, and the rest is tiny."""
    encoder = vit.VARIANTS["dino-vitb16"] | {"depth": 12}
    model = build("triposr", "tiny", encoder=encoder)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), references.param_shapes(model))
    model_file.save_model(tmp_path / "m.safetensors", model, params, {})
    assert lrm(tmp_path / "m.safetensors", tmp_path / "torch", "--to", "torch") == 0
    assert "cannot load" not in caplog.text
    told = yaml.safe_load((tmp_path / "torch" / "config.yaml").read_text())
    assert told["image_tokenizer"] == {"pretrained_model_name_or_path": "facebook/dino-vitb16"}


def test_parameters_without_a_name_are_never_lost(tmp_path):
    encoder = vit.VARIANTS["tiny"] | {"layer_scale": True}
    model, params = tiny(encoder=encoder)
    with pytest.raises(InputError, match="TripoSR has no names for 2 of its param.*scale1"):
        export.write_reference(tmp_path / "t", model, params, force=True)
    assert not (tmp_path / "t").exists()


def test_openlrm_with_dinov2_without_registers_comes_back(tmp_path):
    encoder = dict(
        patch=14, width=32, depth=2, num_heads=2, grid=2, resize="dino", norm_epsilon=1e-6
    )
    model, params = tiny("lrm", encoder=encoder | {"layer_scale": True}, normalize_image=False)
    export.write_reference(tmp_path, model, params, force=True)
    assert json.loads((tmp_path / "config.json").read_text())["encoder_type"] == "dinov2"
    back, read, _ = loading.read_weights(str(tmp_path))
    assert model_file.fields_of(back)["encoder"] == model_file.fields_of(model)["encoder"]
    jax.tree.map(np.testing.assert_array_equal, read, params)


# -- all or none


@pytest.mark.parametrize("blocked", ["config.yaml", "lrm_jax.json", "model.ckpt"])
def test_a_file_that_cannot_be_written_leaves_none(tmp_path, blocked):
    (tmp_path / blocked).mkdir()
    with pytest.raises((InputError, OSError)):
        export.write_reference(tmp_path, *tiny(), force=True)
    assert os.listdir(tmp_path) == [blocked] and not os.listdir(tmp_path / blocked)


def test_a_failure_while_writing_keeps_the_old_files(tmp_path, monkeypatch):
    export.write_reference(tmp_path, *tiny(), force=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "write_torch", full)
    with pytest.raises(OSError, match="No space"):
        export.write_reference(tmp_path, *tiny(seed=1, surface_level=1.0), force=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_force_needs_to_torch_and_a_run_s_folder_is_not_a_destination(odd_file, tmp_path, capsys):
    path, _, _ = odd_file("lrm")
    assert "--force has no effect without --to torch" in failed(
        capsys, path, tmp_path / "m.safetensors", "--force"
    )
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    line = failed(capsys, path, tmp_path / "run", "--to", "torch", "--force")
    assert "folder of a training run" in line and os.listdir(tmp_path / "run") == ["checkpoints"]


# -- what is assumed


def test_fields_that_neither_shapes_nor_config_nor_record_give_are_listed(tmp_path):
    model, params = tiny()
    export.write_reference(tmp_path, model, params, force=True)
    (tmp_path / "lrm_jax.json").unlink()
    _, _, info = loading.load_weights(str(tmp_path))
    assert "surface level 25: TripoSR's" in info["assumed"]
    assert "symmetric False: TripoSR's" in info["assumed"]
    told = ("image size", "num heads", "radius", "width", "upsample", "encoder")
    assert not [line for line in info["assumed"] if line.startswith(told)]


def test_a_published_model_without_its_config_assumes_the_published_sizes(goldens):
    manifest = json.loads((goldens / "manifests" / "triposr.json").read_text())
    state = {k: np.broadcast_to(np.float32(0), s) for k, (s, _) in manifest["tensors"].items()}
    _, _, assumed = references.recognise(state)
    assert "image size 512: as in the published TripoSR of the same shapes" in assumed
    assert "encoder heads 12: 64 channels each" in assumed
    _, _, with_config = references.recognise(state, manifest["about"]["config"])
    assert set(with_config) < set(assumed) and "surface level 25: TripoSR's" in with_config


def test_an_image_size_that_is_not_in_openlrm_s_config_is_listed():
    model, params = tiny("lrm")
    module = references.family("lrm")
    state, config = module.to_torch(params, model), module.config_to_torch(model)
    _, _, assumed = references.recognise(state, config)
    assert "image size 32: that of its encoder, whose positions need no resizing then" in assumed
    assert "source distance 2: OpenLRM's" in assumed
