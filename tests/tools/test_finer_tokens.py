import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import models
from lrm_jax.models import triposr
from lrm_jax.types import InputError
from lrm_jax.weights import loading, model_file, references

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from finer_tokens import (  # noqa: E402
    centres,
    finer_positions,
    main,
    refine,
    resampled,
    smaller_patches,
)

FIELDS = triposr.VARIANTS["tiny"]
ENCODER = {**FIELDS["encoder"], "patch": 8, "grid": 4}
FINE = {**FIELDS, "encoder": ENCODER, "plane_tokens": 6, "upsample": 3}


@pytest.fixture
def coarse():
    model = models.build("triposr", "tiny")
    return model, jax.tree.map(
        lambda x: np.random.default_rng(0).normal(0, 0.1, x.shape).astype(np.float32),
        references.param_shapes(model),
    )


def test_a_small_patch_equals_the_large_patch_that_repeats_its_pixels():
    rng = np.random.default_rng(0)
    kernel, patch = rng.normal(size=(16, 16, 3, 5)), rng.normal(size=(8, 8, 3))
    large = patch.repeat(2, 0).repeat(2, 1)
    small = np.einsum("yxc,yxcd->d", patch, smaller_patches(kernel, 8))
    np.testing.assert_allclose(small, np.einsum("yxc,yxcd->d", large, kernel))
    with pytest.raises(
        InputError, match="patches of 16 pixels cannot be divided into patches of 6"
    ):
        smaller_patches(kernel, 6)


def test_a_field_that_is_linear_in_place_stays_linear():
    def field(grid):
        at = (np.arange(grid) + 0.5) / grid
        return np.stack(np.broadcast_arrays(at[:, None], 3 - 2 * at[None]), -1)

    np.testing.assert_allclose(resampled(field(8)[None], centres(12, 8))[0], field(12), rtol=1e-6)
    positions = np.concatenate([[[7.0, 8.0]], field(2).reshape(-1, 2)])[None]
    finer = finer_positions(positions, 4)
    np.testing.assert_allclose(finer[0, 0], [7, 8])
    np.testing.assert_allclose(finer[0, 1:].reshape(4, 4, 2), field(4), rtol=1e-6)


def test_planes_of_equal_tokens_show_the_middle_of_each(coarse):
    """If a kernel is linear in the place of a cell, so are the finer planes, about the centres of the smaller squares."""
    model, params = coarse
    at = np.arange(2) - 0.5
    kernel = np.zeros_like(params["upsampler"]["kernel"])
    kernel[..., 0], kernel[..., 1] = at[None, :, None], at[None, None]
    params["upsampler"]["kernel"] = kernel
    finer = refine(params, model, triposr.MODEL(**FINE))["upsampler"]["kernel"]
    # The square of a token is 4 / 6 of the old size, in three cells.
    wanted = np.array([-1, 0, 1]) * 2 * (4 / 6) / 3
    np.testing.assert_allclose(finer[3, :, 0, 0], wanted, atol=1e-6)
    np.testing.assert_allclose(finer[3, 0, :, 1], wanted, atol=1e-6)


def test_the_file_is_a_model_that_renders(coarse, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(triposr.VARIANTS, "tiny-fine", FINE)
    model, params = coarse
    model_file.save_model(tmp_path / "coarse.safetensors", model, params, {"steps": 3})
    argv = [str(tmp_path / "coarse.safetensors"), str(tmp_path / "fine.safetensors"), "--variant"]
    assert main([*argv, "tiny-fine"]) == 0
    fine, finer, info = loading.load_weights(str(tmp_path / "fine.safetensors"))
    assert info["variant"] == "tiny-fine" and info["training"] == {"steps": 3}
    source = jax.tree.map(jnp.asarray, fine.prepare([np.full((32, 32, 4), 200, np.uint8)]))
    scene = fine.apply({"params": finer}, source, method="encode")
    assert scene["triplane"].shape == (1, 3, 18, 18, 8) and jnp.isfinite(scene["triplane"]).all()
    assert main([*argv, "nano"]) == 2
    assert "the two may differ only in their tokens" in capsys.readouterr().err
