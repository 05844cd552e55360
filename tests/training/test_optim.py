import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import abstract_params

from lrm_jax.parallel import sharding
from lrm_jax.training import optim
from lrm_jax.types import InputError

SETTINGS = dict(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, clip_norm=1.0)


def two_layers():
    """Parameters of two layers, and gradients with global norm 0.3."""
    rng = np.random.default_rng(0)
    params = {
        name: {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "bias": jnp.ones(3)}
        for name in ("encoder", "decoder")
    }
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    norm = optax.tree.norm(grads)
    return params, jax.tree.map(lambda x: x * 0.3 / norm, grads)


def trained(optimizer, params, all_grads):
    """Parameters and optimiser state after some updates."""
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for grads in all_grads:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def adamw_by_hand(param, grads, rates, *, decay, b1=0.9, b2=0.95, eps=1e-8):
    """Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, algorithm 2, in float64."""
    p, mu, nu = np.float64(param), 0.0, 0.0
    for t, (g, rate) in enumerate(zip(np.float64(grads), rates, strict=True), 1):
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g**2
        p = p - rate * ((mu / (1 - b1**t)) / (np.sqrt(nu / (1 - b2**t)) + eps) + decay * p)
    return p


def test_everything_but_norms_and_biases_is_decayed():
    mask = flatten_dict(optim.decay_mask(abstract_params("tiny")), sep="/")
    plain = {name for name, decayed in mask.items() if not decayed}
    assert "backbone/blocks/norm1/scale" in plain  # stacked layers have rank 2
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
    np.testing.assert_allclose(
        optim.grad_norm(state), np.sqrt(8) * 1e6, rtol=1e-6
    )  # the norm before clipping


def test_three_updates_are_adamw_with_the_groups_factor_on_rate_and_decay():
    params, grads = two_layers()
    all_grads = [grads, jax.tree.map(jnp.negative, grads), grads]
    rates = [0.1, 0.2, 0.05]
    schedule = lambda count: jnp.array(rates)[count]  # noqa: E731
    # The first matching pattern applies, so "kernel" does not apply to the encoder.
    groups = {"encoder/k": 0.25, "kernel": 0.5}
    got, state = trained(
        optim.make_optimizer(schedule, **SETTINGS, groups=groups), params, all_grads
    )
    for layer, name, factor in [
        ("encoder", "kernel", 0.25),
        ("decoder", "kernel", 0.5),
        ("decoder", "bias", 1.0),
    ]:
        by_hand = adamw_by_hand(
            params[layer][name],
            [g[layer][name] for g in all_grads],
            np.multiply(rates, factor),
            decay=0.05 * (name == "kernel"),
        )
        np.testing.assert_allclose(got[layer][name], by_hand, rtol=2e-5)  # float32 against float64
    assert int(optim.num_skipped(state)) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30, 20.0], ids=str)
def test_a_bad_update_changes_only_the_count_of_the_schedule(bad):
    params, grads = two_layers()
    poisoned = jax.tree.map(jnp.copy, grads)
    poisoned["decoder"]["bias"] = poisoned["decoder"]["bias"].at[1].set(bad)

    def run(rates, all_grads):
        schedule = lambda count: jnp.array(rates)[count]  # noqa: E731
        optimizer = optim.make_optimizer(schedule, **SETTINGS, skip_norm=5.0)
        return trained(optimizer, params, all_grads)

    got, state = run([0.1, 0.2, 0.05], [grads, poisoned, grads])
    wanted, wanted_state = run([0.1, 0.05], [grads, grads])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("mu", "nu"):
        for a, b in zip(
            *(jax.tree.leaves(optax.tree.get(s, name)) for s in (state, wanted_state)), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    assert (int(optim.num_skipped(state)), int(optim.num_skipped(wanted_state))) == (1, 0)


def test_without_a_limit_a_large_gradient_is_clipped_and_a_non_finite_one_is_skipped():
    params, grads = two_layers()
    long = jax.tree.map(lambda x: x * 1e6, grads)
    broken = jax.tree.map(lambda x: x * np.nan, grads)
    optimizer = optim.make_optimizer(optax.constant_schedule(0.1), **SETTINGS)
    got, state = trained(optimizer, params, [long, broken])
    assert int(optim.num_skipped(state)) == 1
    assert not np.isfinite(optim.grad_norm(state))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    assert not np.array_equal(got["encoder"]["kernel"], params["encoder"]["kernel"])


def test_frozen_parameters_stay_have_no_moments_and_do_not_count_in_the_norm():
    params, grads = two_layers()
    grads["encoder"] = jax.tree.map(lambda x: x * np.nan, grads["encoder"])
    optimizer = optim.make_optimizer(
        optax.constant_schedule(0.1), **SETTINGS, skip_norm=5.0, freeze="^encoder/"
    )
    got, state = trained(optimizer, params, [grads])
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(got["encoder"][name], params["encoder"][name])
        assert not np.array_equal(got["decoder"][name], params["decoder"][name])
    assert len(jax.tree.leaves(optax.tree.get(state, "mu"))) == 2
    assert int(optim.num_skipped(state)) == 0
    np.testing.assert_allclose(
        optim.grad_norm(state), optax.tree.norm(grads["decoder"]), rtol=1e-6
    )  # float32


def test_muon_makes_matrices_orthogonal_and_leaves_the_rest_to_adamw():
    rng = np.random.default_rng(0)
    params = {
        "blocks": {"kernel": jnp.asarray(rng.normal(size=(2, 8, 5)), jnp.float32), "bias": jnp.ones((2, 5))},
        "head": {"kernel": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)},
    }  # fmt: skip
    grads = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), params)
    settings = SETTINGS | dict(weight_decay=0.0, clip_norm=100.0)
    schedule = optax.constant_schedule(0.1)
    plain, _ = trained(optim.make_optimizer(schedule, **settings), params, [grads])
    muon = optim.make_optimizer(schedule, **settings, muon="blocks/kernel$")
    got, state = trained(muon, params, [grads])
    np.testing.assert_array_equal(got["head"]["kernel"], plain["head"]["kernel"])
    np.testing.assert_array_equal(got["blocks"]["bias"], plain["blocks"]["bias"])
    for layer in range(2):
        change = np.asarray(params["blocks"]["kernel"][layer] - got["blocks"]["kernel"][layer])
        s = np.linalg.svd(change, compute_uv=False)
        # Five Newton-Schulz iterations bring the singular values near 1: between 0.7 and 1.2.
        assert (np.abs(s / (0.1 * 0.2 * np.sqrt(8)) - 0.95) < 0.3).all()
        # The change has the gradient's singular vectors, so the product of the two is symmetric and positive.
        product = change.T @ np.asarray(grads["blocks"]["kernel"][layer])
        np.testing.assert_allclose(product, product.T, atol=1e-3 * np.abs(product).max())
        assert np.linalg.eigvalsh(product).min() > 0
    assert int(optim.num_skipped(state)) == 0


def infer_shardings(**settings):
    """The shardings of an optimiser's state, and of the parameters by name, for a tiny TripoSR on 4 x 2 devices."""
    device_mesh = sharding.make_device_mesh(1, 4, 2)
    params = abstract_params("tiny")
    optimizer = optim.make_optimizer(optax.constant_schedule(0.1), **SETTINGS, **settings)
    of_state = sharding.infer(jax.eval_shape(optimizer.init, params), device_mesh)
    return of_state, flatten_dict(sharding.infer(params, device_mesh), sep="/")


def test_moments_of_muon_are_sharded_like_their_parameters():
    of_state, wanted = infer_shardings(muon="blocks/.*/kernel$")
    found = set()
    for path, value in jax.tree_util.tree_leaves_with_path(of_state):
        name = optim.name_of(path)
        if (at := name.find("mu/")) >= 0 and (name := name[at + 3 :]) in wanted:
            assert value == wanted[name], name
            found.add(name)
    assert found == set(wanted)


def test_moments_of_a_partly_frozen_model_are_sharded_like_their_parameters():
    of_state, wanted = infer_shardings(freeze="^image_tokenizer/")
    mu = flatten_dict(optax.tree.get(of_state, "mu"), sep="/")
    moments = {name: value for name, value in mu.items() if jax.tree.leaves(value)}
    assert {name for name in wanted if not name.startswith("image_tokenizer/")} == set(moments)
    for name, value in moments.items():
        assert value == wanted[name], name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(freeze="enkoder"), r"^optim.freeze: 'enkoder' matches no parameter: .*decoder/bias"),
        (dict(freeze="coder"), "^optim.freeze: 'coder' matches all parameters"),
        (dict(freeze="(en"), r"^optim.freeze: '\(en' is not a regular expression"),
        (dict(muon="bias"), "^optim.muon: 'bias' matches decoder/bias, which is not a matrix"),
        (
            dict(groups=[("encoder", 0.1), ("x", 0.1)]),
            "^optim.groups: 'x' matches no parameter",
        ),
        (dict(groups={"encoder": 0.0}), r"^optim.groups\['encoder'\]=0.0 must be greater"),
        (dict(skip_norm=-1.0), "^optim.skip_norm=-1.0 must be greater than 0"),
        (dict(clip_norm=float("nan")), "^optim.clip_norm=nan must be greater than 0"),
    ],
)
def test_a_pattern_or_number_that_does_nothing_is_an_error_of_one_line(settings, message):
    with pytest.raises(InputError, match=message) as error:
        optimizer = optim.make_optimizer(optax.constant_schedule(0.1), **(SETTINGS | settings))
        jax.eval_shape(optimizer.init, two_layers()[0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (5, 0.5), (10, 1.0), (60, 0.5), (110, 0.0)]
)
def test_learning_rate_warms_up_linearly_and_falls_as_a_cosine_to_zero(step, expected):
    schedule = optim.make_schedule(1.0, warmup_steps=10, steps=110)
    np.testing.assert_allclose(schedule(step), expected, atol=1e-6)  # the cosine is in float32


def test_a_warm_up_as_long_as_the_run_is_an_error():
    with pytest.raises(InputError, match="warmup_steps=100 must be less than train.steps=100"):
        optim.make_schedule(1.0, warmup_steps=100, steps=100)
