"""Attention: the kernels of all platforms equal plain attention."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from lrm_jax.kernels import attention as kernels_attention
from lrm_jax.kernels import attention_cpu, attention_cuda, attention_plain, attention_tpu, tokens
from lrm_jax.models import lrm, lvsm, triposr
from lrm_jax.models.parts import layers
from lrm_jax.parallel import batch_axes, sharding
from lrm_jax.training import flops
from lrm_jax.types import InputError


def in_parts(kernel):
    """Calls attention in parts, as `attention` does."""

    def attention(q, k, v, num_keys_B):
        return batch_axes.split_batch_and_heads(
            partial(kernel, interpret=True), (q, k, v), num_keys_B
        )

    return attention


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("lengths", [(12, 12), (12, 5), (12, 64), (12, 69)])
@pytest.mark.parametrize(
    "attention",
    [
        kernels_attention.attention,
        partial(attention_cpu.attention_by_head, num_keys_B=None, max_scores=70),
        partial(attention_plain.attention_by_xla, num_keys_B=None, max_scores=25),
    ],
)
def test_attention_by_head_or_in_chunks_equals_jax_s(lengths, attention):
    num_queries, num_keys = lengths
    q, k, v = (
        random(0, 2, num_queries, 3, 8),
        random(1, 2, num_keys, 3, 8),
        random(2, 2, num_keys, 3, 8),
    )

    def outputs(attention):
        def total(q, k, v):
            out = attention(q, k, v)
            return jnp.sum(out**2), out

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (gradients, out), (wanted, expected) = map(outputs, (attention, jax.nn.dot_product_attention))
    np.testing.assert_allclose(out, expected, atol=1e-6)  # float32
    for actual, expected in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("lengths", [(64, 128), (5, 67), (130, 64), (65, 3)])
@pytest.mark.parametrize("num_keys", [None, [1, 3]])
def test_attention_by_cudnn_pads_lengths_without_a_trace(lengths, num_keys, monkeypatch):
    """JAX's own attention in place of cuDNN's: the padding is what is tested."""
    by_jax = jax.nn.dot_product_attention
    seen = []

    def of_blocks(q, k, v, implementation, **lengths):
        assert implementation == "cudnn"
        seen.extend(x.shape[1] for x in (q, k, v))
        return by_jax(q, k, v, **lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", of_blocks)
    q, k, v = (random(i, 2, n, 3, 8) for i, n in enumerate((lengths[0], *lengths[1:] * 2)))
    num_keys = None if num_keys is None else jnp.int32(num_keys)

    def outputs(attention):
        def total(q, k, v):
            out = attention(q, k, v)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    found = outputs(partial(attention_cuda.attention_by_cudnn, num_keys_B=num_keys))
    wanted = outputs(partial(by_jax, key_value_seq_lengths=num_keys))
    assert seen and all(length % 64 == 0 for length in seen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


@pytest.mark.parametrize(
    "module",
    [
        lambda x: (layers.MLP(4), x),
        lambda x: (triposr.Block(2, "float32"), x, x),
        lambda x: (lvsm.Block(2, "float32"), (x, jnp.float32(1)), None),
    ],
    ids=["MLP", "TripoSR", "LVSM"],
)
def test_tokens_in_parts_equal_all_at_once(module, monkeypatch):
    module, *inputs = module(random(0, 2, 12, 8))

    def outputs():
        @jax.grad
        def gradient(params):
            return sum(jnp.sum(x**2) for x in jax.tree.leaves(module.apply(params, *inputs)))

        params = jax.jit(module.init)(jax.random.key(1), *inputs)
        return params, *jax.jit(lambda p: (module.apply(p, *inputs), gradient(p)))(params)

    whole = outputs()
    monkeypatch.setattr(tokens, "TOKENS", 4)
    text = str(jax.make_jaxpr(module.apply)(whole[0], *inputs))
    assert "length=3" in text  # the number of parts
    parts = outputs()
    for actual, wanted in zip(*map(jax.tree.leaves, (parts, whole)), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)
    assert jax.tree.structure(parts) == jax.tree.structure(whole)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_the_kernel_for_tpus_equals_jax_s_where_it_pads_and_where_keys_are_padding(sizes):
    q, k, v = random(0, 4, 130, 2, 8), random(1, 4, 140, 2, 8), random(2, 4, 140, 2, 8)
    device_mesh = sharding.make_device_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])

    def outputs(attention, num_keys):
        def total(q, k, v):
            out = attention(q, k, v, num_keys)
            return jnp.sum(out**2), out

        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    def by_jax(q, k, v, num_keys):
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=num_keys)

    for num_keys in (None, jnp.array([1, 130, 139, 140])):
        kernel = in_parts(attention_tpu.attention_by_splash)
        with jax.set_mesh(device_mesh):
            found = jax.jit(partial(outputs, kernel))(num_keys)
        wanted = jax.jit(partial(outputs, by_jax))(num_keys)
        for actual, expected in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


def test_the_kernel_fits_the_devices_of_the_mesh_and_runs_on_the_part_of_each():
    """A program for a pod is traced on a machine without one (tools/aot.py)."""
    pod = sharding.abstract_device_mesh((4, 2, 2), "tpu", "TPU v4")
    x = jax.ShapeDtypeStruct((16, 256, 4, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(pod):
        jaxpr = str(jax.make_jaxpr(kernels_attention.attention)(x, x, x))
    assert "pallas_call" in jaxpr and "bf16[2,256,2,64]" in jaxpr
    assert "pallas_call" not in str(jax.make_jaxpr(kernels_attention.attention)(x, x, x))


@pytest.mark.parametrize("num_keys", [6, 70])
def test_attention_by_head_of_large_scores_equals_jax_s(num_keys):
    """The scores have a bound above the limit from which the largest score is subtracted."""
    q, k, v = (
        30 * random(0, 1, 4, 1, 8),
        random(1, 1, num_keys, 1, 8),
        random(2, 1, num_keys, 1, 8),
    )
    bound = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max() * 8**-0.5
    assert bound > 60

    def outputs(attention):
        total = lambda *x: jnp.sum(attention(*x) ** 2)  # noqa: E731
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)

    found, wanted = outputs(kernels_attention.attention), outputs(jax.nn.dot_product_attention)
    for actual, expected in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert np.isfinite(kernels_attention.attention(1e3 * q, 1e3 * k, v)).all()


@pytest.mark.parametrize("scale", [1, 30])
def test_attention_by_head_ignores_padding_keys(scale):
    q, k, v = scale * random(0, 3, 4, 2, 8), random(1, 3, 70, 2, 8), random(2, 3, 70, 2, 8)
    num_keys = jnp.array([1, 40, 67])
    found = jax.jit(kernels_attention.attention)(q, k, v, num_keys)
    q, k, v = map(np.asarray, (q, k, v))
    for i, count in enumerate(np.asarray(num_keys)):
        wanted = jax.jit(jax.nn.dot_product_attention)(
            q[i : i + 1], k[i : i + 1, :count], v[i : i + 1, :count]
        )
        np.testing.assert_allclose(found[i : i + 1], wanted, rtol=1e-4, atol=1e-5)


def test_attention_by_head_of_float16_does_not_overflow():
    """Nothing is subtracted from scores below 60, and exp(40) overflows float16."""
    q, v = random(2, 1, 70, 1, 8), random(4, 1, 70, 1, 8)
    q = q * (40 * 8**0.5) ** 0.5 / jnp.linalg.norm(q, axis=-1, keepdims=True)
    half = [x.astype(jnp.float16) for x in (q, q, v)]
    found = attention_cpu.attention_by_head(*half, num_keys_B=None)
    wanted = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in half))
    assert found.dtype == jnp.float16
    # A score near 40 is rounded to 1/64.
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=0.05)


def test_exp_of_attention_is_exp_and_so_is_its_gradient():
    x = np.linspace(-87, 88, 100_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    rounding = 1.3 * 2.0**-24 * np.abs(x) + 3e-7  # from x log2(e), and from the series
    for values in (attention_cpu._exp(x), jax.vmap(jax.grad(attention_cpu._exp))(x)):
        assert (np.abs(np.float64(values) / exact - 1) < rounding).all()
    assert attention_cpu._exp(jnp.float32(0)) == 1
    lowest = jnp.maximum(jnp.array([-88.0, -1e9, -jnp.inf]), attention_cpu._LOWEST)
    assert (attention_cpu._exp(lowest) < 1.2e-38).all()
    assert jnp.isnan(attention_cpu._exp(jnp.float32(jnp.nan)))


@pytest.mark.parametrize("sizes", [None, (4, 1, 1), (2, 1, 2)])
def test_operations_of_a_kernel_are_counted_as_often_as_it_runs(sizes):
    """Two products of L x M x K for each head of each sequence, on any devices."""
    B, L, M, N, K = 4, 256, 1024, 2, 8
    q, k, v = random(0, B, L, N, K), random(1, B, M, N, K), random(2, B, M, N, K)
    attention = partial(in_parts(attention_tpu.attention_by_splash), num_keys_B=None)
    if sizes is None:
        assert flops.count(attention, q, k, v) == 4 * B * N * L * M * K
        return
    with jax.set_mesh(sharding.make_device_mesh(*sizes, devices=jax.devices()[:4])):
        jaxpr = jax.make_jaxpr(attention)(q, k, v).jaxpr
    assert flops.count_jaxpr(jaxpr) == 4 * B * N * L * M * K
    assert flops.count_jaxpr(jaxpr, only_in_kernels=True) == 4 * B * N * L * M * K


def test_gelu_is_by_erf_in_float32_and_so_is_its_gradient():
    x = np.linspace(-9, 9, 1001, dtype=np.float32)
    phi = [0.5 * math.erfc(-value / math.sqrt(2)) for value in x.astype(float)]
    slope = phi + x * np.exp(-0.5 * x.astype(float) ** 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(layers.gelu(jnp.asarray(x)), x * phi, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(layers.gelu))(x), slope, atol=1e-6)
    half = jnp.asarray(x, jnp.bfloat16)
    assert layers.gelu(half).dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        layers.gelu(half), layers.gelu(half.astype(jnp.float32)).astype(jnp.bfloat16)
    )


def gradient_of_stack(block, remat, *inputs, dtype="float32"):
    """The gradient of a stack of three blocks, as a function of its parameters, and these."""
    stack = layers.stack(block, 3, remat, num_heads=2, dtype=dtype)
    params = jax.eval_shape(stack.init, jax.random.key(0), *inputs)
    params = jax.tree.map(lambda x: 0.3 * random(x.size, *x.shape), params)

    def loss(params):
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(stack.apply(params, *inputs)))

    return jax.grad(loss), params


@pytest.mark.parametrize(
    ("block", "inputs"),
    [
        (lrm.Block, lambda x: (x, x[:, :5], x[:, 0])),
        (triposr.Block, lambda x: (x, x[:, :5])),
        (lvsm.Block, lambda x: ((x, jnp.float32(0)), None)),
    ],
    ids=["LRM", "TripoSR", "LVSM"],
)
def test_what_is_kept_for_the_backward_pass_changes_its_products_and_not_the_gradient(
    block, inputs
):
    found, work = {}, {}
    for remat in layers.REMAT:
        gradient, params = gradient_of_stack(block, remat, *inputs(random(0, 2, 12, 16)))
        found[remat], work[remat] = jax.jit(gradient)(params), flops.count(gradient, params)
    for remat, result in found.items():
        for a, b in zip(*map(jax.tree.leaves, (found["none"], result)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=remat)
    assert work["none"] <= work["products"] < work["attention"] < work["blocks"]


@pytest.mark.parametrize(
    ("remat", "calls"), [("none", 1), ("products", 1), ("attention", 1), ("blocks", 2)]
)
def test_cudnns_forward_kernel_runs_again_in_the_backward_pass_only_if_blocks_alone_are_kept(
    remat, calls, monkeypatch
):
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91400)
    x_BLD = jnp.zeros((2, 69, 16), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(sharding.abstract_device_mesh((1, 1, 1), "gpu")):
        gradient, params = gradient_of_stack(
            lvsm.Block, remat, (x_BLD, jnp.float32(0)), None, dtype="bfloat16"
        )
        text = str(jax.make_jaxpr(gradient)(params))
    assert len(re.findall(r"dot_product_attention_fwd_wrapper\[", text)) == calls
    assert len(re.findall(r"dot_product_attention_bwd_wrapper\[", text)) == 1


@pytest.mark.parametrize(
    ("remat", "calls"), [("none", 1), ("products", 1), ("attention", 1), ("blocks", 2)]
)
def test_so_does_splash_attentions(remat, calls):
    x_BLD = jnp.zeros((2, 128, 16))
    with jax.sharding.use_abstract_mesh(sharding.abstract_device_mesh((1, 1, 1), "tpu")):
        gradient, params = gradient_of_stack(lvsm.Block, remat, (x_BLD, jnp.float32(0)), None)
        jaxpr = jax.make_jaxpr(gradient)(params).jaxpr
        # As XLA does: a call whose results have no use stays in the traced program.
        used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    assert len(re.findall(r"name=splash_mha_fwd", str(used))) == calls


def test_an_unknown_choice_of_what_is_kept_names_the_known_ones():
    with pytest.raises(InputError, match="model.remat=.all.: choose one of none, products, attention, blocks"):  # fmt: skip
        layers.stack(lvsm.Block, 2, "all", num_heads=2, dtype="float32")
