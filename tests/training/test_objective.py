"""A family's own terms of the loss in the training step, and the running statistics of its norms: One2345 on procedural objects."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax.commands import train
from lrm_jax.data.procedural import source
from lrm_jax.models import build, objective_terms
from lrm_jax.training import losses, step
from lrm_jax.types import InputError
from lrm_jax.weights import model_file

TINY = [
    "--config", "configs/one2345.py:tiny", "--config.data.name=procedural", "--config.data.normalize=azimuth",
    "--config.data.source_size=16", "--config.data.target_size=16", "--config.data.prefetch=0",
]  # fmt: skip
TIMES = ("samples_per_second", "mfu", "data_wait")


def rows(workdir):
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run of four steps."""
    workdir = tmp_path_factory.mktemp("straight")
    assert train.main([*TINY, "--workdir", str(workdir)]) == 0
    return workdir


def test_the_report_has_the_terms_and_their_weighted_sum(straight):
    row = rows(straight)[0]
    names = [f"train/{name}" for name in ("color_l1", "eikonal", "sparsity", "mask_l1")]
    weights = (1.0, 0.1, 0.02, 0.1)
    total = sum(w * row[name] for w, name in zip(weights, names, strict=True))
    np.testing.assert_allclose(row["train/loss"], total, rtol=1e-5)
    assert "train/psnr" not in row and "train/mse" not in row
    assert row["train/sparsity"] == 0 == row["train/mask_l1"]
    assert min(rows(straight)[2][name] for name in names) > 0


def test_running_statistics_follow_the_scenes_and_are_not_trained(straight):
    _, params, _ = model_file.load_model(straight / "model.safetensors")
    norm = params["pyramid"]["conv0_0"]["norm"]
    # The exported parameters are running means themselves.
    assert 0 < norm["num_batches"] <= 4
    assert np.abs(norm["mean"]).max() > 1e-4 and np.abs(norm["variance"] - 1).max() > 1e-2


def test_statistics_that_are_not_finite_are_not_kept():
    params = {"norm": {"mean": jnp.zeros(2), "scale": jnp.ones(2)}, "bias": jnp.ones(1)}
    new = step.with_statistics(params, {"norm": {"mean": jnp.array([0.5, jnp.nan])}})
    np.testing.assert_array_equal(new["norm"]["mean"], [0.5, 0.0])
    assert new["norm"]["scale"] is params["norm"]["scale"] and new["bias"] is params["bias"]


def test_the_terms_of_another_family_are_unknown():
    own = objective_terms(build("one2345", "tiny"))
    losses.check({"color_l1": 1.0, "mse": 1.0}, {}, own)
    assert objective_terms(build("triposr", "tiny")) == ()
    with pytest.raises(InputError, match="no loss term color_l1: choose from mse"):
        losses.check({"color_l1": 1.0}, {})
    with pytest.raises(InputError, match="no loss term colour: choose from mse.*mask_l1"):
        losses.check({"colour": 1.0}, {}, own)
    with pytest.raises(InputError, match="no term has a weight"):
        losses.check({"color_l1": 0.0}, {}, own)


def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(straight, tmp_path):
    """A signal stops the first run, as in tests/training/test_loop.py."""
    make, count = source.make, 0

    def stopping(**fields):
        made = make(**fields)

        def element(x):
            nonlocal count
            count += 1
            if count == 20:
                os.kill(os.getpid(), signal.SIGTERM)
            return x

        return dataclasses.replace(made, elements=made.elements.map(element))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(source, "make", stopping)
        assert train.main([*TINY, "--workdir", str(tmp_path)]) == 143
    assert rows(tmp_path)[-1]["step"] < 4
    assert train.main([*TINY, "--workdir", str(tmp_path)]) == 0
    models = [model_file.load_model(x / "model.safetensors")[1] for x in (straight, tmp_path)]
    jax.tree.map(np.testing.assert_array_equal, *models)
    whole, resumed = (
        {r["step"]: r for r in rows(x) if "train/loss" in r} for x in (straight, tmp_path)
    )
    for number, row in whole.items():
        assert row | dict.fromkeys(TIMES) == resumed[number] | dict.fromkeys(TIMES)
