"""tools/average_weights.py: the mean of several models."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import tiny

from lrm_jax import models
from lrm_jax.weights import loading, model_file

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from average_weights import main  # noqa: E402


def saved(path, seed, **overrides):
    model, params = tiny(seed=seed, **overrides)
    model_file.save_model(path, model, params, {"steps": 10 + seed})
    return params


def test_the_mean_of_two_is_a_model_file_that_names_both(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        models.family("triposr").VARIANTS,
        "tiny-symmetric",
        models.family("triposr").VARIANTS["tiny"] | {"symmetric": True},
    )
    paths = [str(tmp_path / f"{seed}.safetensors") for seed in range(2)]
    first, second = (saved(path, seed) for seed, path in enumerate(paths))
    dst = tmp_path / "soup.safetensors"
    assert main([str(dst), *paths, "--variant", "tiny-symmetric"]) == 0
    assert capsys.readouterr().out == f"{dst}\n"
    model, params, info = loading.load_weights(str(dst))
    assert model.symmetric and info["variant"] == "tiny-symmetric"
    assert info["training"] == {"steps": 21, "averaged": paths}
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(c, (a + b) / 2, rtol=1e-6, atol=1e-7),
        first, second, params,
    )  # fmt: skip


def test_an_unwritable_path_is_one_line(tmp_path, capsys):
    saved(tmp_path / "0.safetensors", 0)
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file" / "soup.safetensors"), str(tmp_path / "0.safetensors")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("average_weights: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        (dict(depth=1), [], "in its fields: models to average must be the same"),
        (
            {},
            ["--variant", "nano"],
            "--variant nano: its parameters differ from those of the given triposr",
        ),
        ({}, ["--variant", "huge"], "triposr has no variant 'huge'"),
        (None, [], "1.safetensors: cannot be read"),
    ],
)
def test_models_without_a_mean_are_one_line(tmp_path, capsys, fields, options, message):
    paths = [str(tmp_path / f"{seed}.safetensors") for seed in range(2)]
    saved(paths[0], 0)
    if fields is not None:
        saved(paths[1], 1, **fields)
    assert main([str(tmp_path / "soup.safetensors"), *paths, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "soup.safetensors").exists()
