import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from test_sharding import abstract_params

from lrm_jax import optim
from lrm_jax.types import InputError

SETTINGS = dict(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, clip_norm=1.0)


def test_norms_and_biases_are_not_decayed_and_all_else_is():
    mask = flatten_dict(optim.decay_mask(abstract_params("tiny")), sep="/")
    plain = {name for name, decayed in mask.items() if not decayed}
    assert "backbone/blocks/norm1/scale" in plain  # stacked layers: of rank 2
    assert "backbone/blocks/fc1/bias" in plain
    assert "decoder/bias_0" in plain
    assert "image_tokenizer/patch_bias" in plain
    assert {name for name in plain if "norm" not in name and "bias" not in name} == set()
    decayed = set(mask) - plain
    assert {
        "plane_queries",
        "backbone/blocks/fc1/kernel",
        "decoder/kernel_0",
        "upsampler/kernel",
    } <= decayed


def test_decay_shrinks_only_masked_parameters():
    params = {"fc1": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    optimizer = optim.make_optimizer(optax.constant_schedule(0.1), **SETTINGS)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["fc1"]["kernel"], -0.1 * 0.05, rtol=1e-6)  # float32 rounding
    np.testing.assert_array_equal(updates["fc1"]["bias"], 0)


def test_gradients_are_clipped_by_their_global_norm():
    params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros((2, 2))}
    optimizer = optim.make_optimizer(optax.constant_schedule(0.1), **SETTINGS)
    huge = jax.tree.map(lambda x: x + 1e6, params)
    _, state = optimizer.update(huge, optimizer.init(params), params)
    mu = optax.tree.get(state, "mu")
    np.testing.assert_allclose(optax.tree.norm(mu), 0.1, rtol=1e-5)  # (1 - b1) * 1, float32


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (5, 0.5), (10, 1.0), (60, 0.5), (110, 0.0)]
)
def test_learning_rate_warms_up_linearly_and_falls_as_a_cosine_to_zero(step, expected):
    schedule = optim.make_schedule(1.0, warmup_steps=10, steps=110)
    np.testing.assert_allclose(schedule(step), expected, atol=1e-6)  # float32 cosine


def test_a_warm_up_as_long_as_the_run_is_an_error():
    with pytest.raises(InputError, match="warmup_steps=100 must be less than train.steps=100"):
        optim.make_schedule(1.0, warmup_steps=100, steps=100)
