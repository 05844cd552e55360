"""The bundled model looks right; copies of it that are damaged in the ways that checkpoints are do not."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import trimesh
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from posed_ball import hull, posed
from test_synthesize import init, ring, write_transforms

from lrm_jax import __main__, api
from lrm_jax.commands import checks
from lrm_jax.images import captures
from lrm_jax.types import InputError
from lrm_jax.weights import loading, model_file


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(__main__, "_use_compilation_cache", lambda: None)


@pytest.fixture(scope="module")
def compiled():
    """`api.load`, which traces and compiles the programs of models with the same fields once."""
    models = {}

    def load(weights):
        module, params, info = loading.load_weights(weights)
        model = models.setdefault(repr(module), api.Model(module, params, info))
        model._params, model.info = jax.device_put(params, model._everywhere), info
        return model

    return load


@pytest.fixture
def check(tmp_path, monkeypatch, capfd, compiled):
    """Runs `lrm check`: exit code, the last line on stdout, the names of what does not look right."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "load", compiled)

    def run(*argv: str) -> tuple[int, str, set[str]]:
        quick = [] if "--exchanges" in argv else ["--no-exchanges"]
        code = __main__.main(["check", *argv, *quick, "--size", "64", "--resolution", "32"])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        lines = out.splitlines() or err.splitlines()[-1:]
        return code, lines[-1], {line.split()[1] for line in lines if line.startswith("!!")}

    return run


@pytest.fixture(scope="module")
def bundled() -> tuple:
    """Module, flat parameters, training."""
    module, params, info = loading.read_weights(None)
    return module, flatten_dict(params, sep="."), info["training"]


@pytest.fixture
def write(bundled, tmp_path):
    """Writes a copy of the bundled model with other tensors or fields; returns its name."""

    def write(changed: dict | None = None, **fields) -> str:
        module, flat, training = bundled
        params = unflatten_dict(flat | (changed or {}), sep=".")
        model_file.save_model(tmp_path / "x.safetensors", module.clone(**fields), params, training)
        return "x.safetensors"

    return write


def exchanged(flat: dict, a: str, b: str) -> dict:
    return {a: flat[b], b: flat[a]}


def test_the_bundled_model_looks_right(check):
    code, verdict, wrong = check("--json", "check.json")
    assert (code, verdict, wrong) == (0, "looks right", set())
    told = json.loads(Path("check.json").read_text())
    assert told["verdict"] == "looks right" and told["model"]["variant"] == "nano-symmetric"
    assert {Path(path).stem for path in told["images"]} == {"hydrant", "plant"}
    assert all(x["psnr"] > 20 for x in told["images"].values())


@pytest.mark.parametrize(
    "names",
    [
        ("backbone.blocks.cross_attn.out.kernel", "backbone.blocks.cross_attn.q.kernel"),
        ("image_tokenizer.blocks.attn.out.kernel", "image_tokenizer.blocks.attn.q.kernel"),
    ],
)
def test_two_exchanged_tensors_are_seen_in_the_given_view(check, write, bundled, names):
    code, verdict, wrong = check(write(exchanged(bundled[1], *names)))
    assert code == 1 and verdict.startswith("does not look right: ") and "outline" in wrong


def test_an_exchange_that_changes_little_is_found_by_undoing_it(check, write, bundled):
    code, verdict, wrong = check("--exchanges")
    assert (code, wrong) == (0, set())
    names = "backbone.blocks.self_attn.q.kernel", "backbone.blocks.self_attn.k.kernel"
    code, verdict, wrong = check(write(exchanged(bundled[1], *names)), "--exchanges")
    assert code == 1 and wrong == {"exchanges"}
    assert "q and k of backbone.blocks.self_attn look exchanged" in verdict


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_scaled_decoder_does_not_look_right(check, write, bundled, factor):
    scaled = {k: factor * x for k, x in bundled[1].items() if k.startswith("decoder.kernel")}
    code, _, wrong = check(write(scaled))
    assert code == 1 and wrong & {"field", "colours"}


def test_a_model_that_is_declared_as_another_variant_does_not_look_right(check, write):
    fields = dict(radius=0.87, source_distance=1.9, source_elevation=0.0, surface_level=25.0)
    code, verdict, wrong = check(write(**fields))
    assert code == 1 and "size" in wrong and "wrong size" in verdict


def test_an_untrained_model_does_not_look_right(check, write, bundled):
    rng = np.random.default_rng(0)

    def start(name, x):
        if "kernel" in name:
            return kernel(rng, *x.shape) / np.sqrt(x.shape[-2])
        return np.full(x.shape, name.endswith("scale"), np.float32) if x.ndim < 3 else x

    code, _, wrong = check(write({k: start(k, x) for k, x in bundled[1].items()}))
    assert code == 1 and "training" in wrong and len(wrong) > 2


def test_a_file_that_cannot_be_loaded_does_not_look_right_and_a_missing_one_is_not_checked(check):
    Path("cut.safetensors").write_bytes(loading.BUNDLED.read_bytes()[:100_000])
    code, verdict, wrong = check("cut.safetensors")
    assert (code, wrong) == (1, {"load"}) and "cannot be loaded" in verdict
    code, error, _ = check("missing.safetensors")
    assert code == 2 and error.startswith("lrm: error: ") and "missing.safetensors" in error


def test_weights_for_posed_images_are_checked_with_a_folder_of_them(check, tmp_path):
    module, params = init("lvsm")
    params = jax.tree.map(np.abs, params)  # a norm's scale is positive
    model_file.save_model(tmp_path / "lvsm.safetensors", module, params, {})
    text = "looks right, judging by the tensors alone"
    assert check("lvsm.safetensors") == (0, text, set())
    write_transforms("scene", ring())
    code, _, wrong = check("lvsm.safetensors", "scene", "--json", "check.json")
    assert (code, wrong) == (1, {"views"})
    assert len(json.loads(Path("check.json").read_text())["views"]) == 4


# -- the parts


def kernel(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("fc.kernel", np.zeros((3, 8, 8)), "mostly zeros"),
        ("fc.kernel", np.full((3, 8, 8), 0.1), "constant"),
        ("fc.kernel", np.stack([np.eye(8) * 1e5 + 1, np.ones((8, 8)) + np.eye(8)]), "odd"),
        ("norm1.scale", np.linspace(-1, 1, 8), "looks like a bias"),
        ("norm1.scale", np.ones(8), "never trained"),
    ],
)
def test_numbers_alone_tell_of_damage(name, value, cause):
    rng = np.random.default_rng(0)
    flat = {"a.kernel": kernel(rng, 5, 8, 8), "a.bias": np.zeros((5, 8)), "norm1.scale": np.full(8, 0.9)}  # fmt: skip
    assert [x.ok for x in checks.tensors(unflatten_dict(flat, sep="."))] == [True]
    found = checks.tensors(unflatten_dict(flat | {name: value}, sep="."))
    assert [x.ok for x in found] == [False] and cause in found[0].cause


def test_a_framed_image_does_not_tell_where_the_object_was_nor_how_large():
    rgba = np.zeros((96, 96, 4), np.float32)
    rgba[10:30, 5:45] = rgba[10:20, 5:15] = [0.2, 0.5, 0.1, 1]
    small, share = checks.framed(rgba)
    moved = np.roll(rgba, (50, 30), (0, 1)).repeat(2, 0).repeat(2, 1)
    again, same_share = checks.framed(moved)
    assert share == same_share == pytest.approx(40 / 96)
    # The sizes are rounded to pixels.
    assert checks.overlap(small[..., 3] > 0.5, again[..., 3] > 0.5) > 0.9
    assert checks.framed(np.zeros((8, 8, 4), np.float32)) is None


def test_one_image_that_is_difficult_does_not_fail_the_model():
    good = {"low": 0, "high": 100, "inside": 0.1, "walls": 0, "largest": 1, "outline": 0.95, "psnr": 25, "margin": 10,
            "colour": 0.05, "saturated": 0, "opacity": 1, "fog": 0, "agreement": 0.9, "size": 1}  # fmt: skip
    hard = good | {"outline": 0.3, "size": 0.5}
    found = checks.judged({"thin": hard, "a": good, "b": good}, 5.0, knows_camera=True)
    assert not [x for x in found if x.ok is False]
    assert [x.text for x in found if x.name == "image"] == [
        "difficult for this model (outline, size); the bundled examples are not"
    ]
    found = checks.judged({"thin": hard, "a": hard, "b": good}, 5.0, knows_camera=True)
    assert {x.name for x in found if x.ok is False} == {"outline", "size"}


class Ball:
    """A scene whose mesh is closed, open, or not there."""

    def __init__(self, kind: str):
        self.kind = kind

    def mesh(self, resolution: int) -> trimesh.Trimesh:
        if self.kind == "none":
            raise InputError("the surface is empty")
        ball = trimesh.creation.icosphere(1)
        return ball if self.kind == "closed" else ball.submesh([range(40)], append=True)


@pytest.mark.parametrize(
    ("kinds", "ok", "text"),
    [
        (["closed", "none"], True, "80 triangles, watertight"),
        (["open", "none", "closed"], None, "40 triangles, not watertight"),
        (["none", "closed"], None, "the surface is empty"),
        (["open", "none"], False, "40 triangles, not watertight"),
    ],
)
def test_an_open_mesh_fails_the_model_if_all_are_open(kinds, ok, text):
    found = checks.mesh([Ball(kind) for kind in kinds], 32)
    assert (found.ok, found.text) == (ok, text)


def test_an_image_beside_a_copy_of_itself_is_judged_without_it():
    image = np.zeros((40, 40, 4), np.float32)
    image[8:32, 8:32] = [0.5, 0.2, 0.1, 1]
    framed = checks.framed(image)
    other = framed[0][..., ::-1].copy()
    other[..., 3] = framed[0][..., 3]
    alone = checks.compared(framed, framed, [other])
    assert checks.compared(framed, framed, [framed[0], other]) == alone and alone["margin"] > 20


def test_an_example_that_is_given_is_not_compared_with_itself(check, tmp_path):
    given = Path(loading.BUNDLED.parent / "examples" / "plant.png")
    Image.open(given).save(tmp_path / "copy.png")
    assert check(str(loading.BUNDLED), "copy.png")[:2] == (0, "looks right")


def test_source_views_of_a_family_with_a_surface_are_drawn_again():
    finding, numbers = checks.views(hull(), captures.posed_images(*posed()))
    assert finding.text.startswith("PSNR") and len(numbers) == 4
    assert min(x["psnr"] for x in numbers) > 20 and min(x["gain"] for x in numbers) > 3
