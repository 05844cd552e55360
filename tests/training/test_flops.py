"""The counts of lrm_jax/training/flops.py for traced functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from lrm_jax.parallel import sharding
from lrm_jax.training import flops

B, L, M, N, K = 2, 96, 160, 4, 32


@pytest.fixture
def cudnn(monkeypatch):
    """Makes it possible to trace cuDNN's attention, which first checks for the library."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91400)


def attention(implementation):
    def function(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation)

    return function


def gradient(function):
    return jax.grad(lambda *x: jnp.sum(function(*x).astype(jnp.float32)), (0, 1, 2))


def heads(length):
    return jax.ShapeDtypeStruct((B, length, N, K), jnp.bfloat16)


@pytest.mark.parametrize("wrap", [lambda x: x, jax.vmap, jax.jit], ids=["plain", "vmap", "jit"])
def test_cudnns_attention_counts_like_plain_attention(cudnn, wrap):
    shapes = heads(L), heads(M), heads(M)
    if wrap is jax.vmap:
        shapes = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in shapes]
    fused, plain = (flops.count(wrap(attention(name)), *shapes) for name in ("cudnn", "xla"))
    assert fused == plain > 0


def test_cudnns_gradient_counts_the_recomputed_scores(cudnn):
    shapes = heads(L), heads(M), heads(M)
    one = 2 * B * N * L * M * K  # operations of each of its products
    assert flops.count(gradient(attention("xla")), *shapes) == (2 + 4) * one
    assert flops.count(gradient(attention("cudnn")), *shapes) == (2 + 5) * one


def test_cudnns_other_layout_is_read_from_its_equation(cudnn):
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    shapes = [jax.ShapeDtypeStruct((B, N, x, K), jnp.bfloat16) for x in (L, M, M)]

    def function(q, k, v):
        return fused.dot_product_attention(q, k, v, qkv_layout="BNTH")

    assert flops.count(function, *shapes) == 4 * B * N * L * M * K


def test_values_may_be_wider_than_keys():
    one = 2 * B * N * L * M * K
    forward, backward = (
        flops.total(flops.attention_products(kind, B, N, L, M, K, 2 * K))
        for kind in ("forward", "backward")
    )
    assert (forward, backward) == ((1 + 2) * one, (3 + 2 * 2) * one)


def product_kernel(x_ref, w_ref, out_ref):
    out_ref[...] = jnp.dot(x_ref[...], w_ref[...]).astype(out_ref.dtype)


def by_triton(x, w):
    """A product in blocks of 128 rows."""
    return pl.pallas_call(
        product_kernel,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype),
        grid=(x.shape[0] // 128,),
        in_specs=[pl.BlockSpec((128, x.shape[1]), lambda i: (i, 0)), pl.BlockSpec(w.shape, lambda i: (0, 0))],
        out_specs=pl.BlockSpec((128, w.shape[1]), lambda i: (i, 0)),
        compiler_params=triton.CompilerParams(num_warps=4),
    )(x, w)  # fmt: skip


def test_a_triton_kernels_products_count_once_per_block():
    x, w = jnp.zeros((1024, 64), jnp.bfloat16), jnp.zeros((64, 32), jnp.bfloat16)
    assert flops.count(by_triton, x, w) == 2 * 1024 * 64 * 32
    kernels = flops.kernels(jax.make_jaxpr(lambda x, w: by_triton(by_triton(x, w @ w.T), w))(x, w))
    assert kernels == {
        ((1024, 64), (64, 64), (1024, 64)): {(128, 64, 64): 8},
        ((1024, 64), (64, 32), (1024, 32)): {(128, 32, 64): 8},
    }


def test_sizes_of_products_are_told_apart():
    def function(x, w, images, taps):
        layers = jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
        batched = jnp.einsum("bik,bjk->bij", w, w)
        return layers, batched, jax.lax.conv(images, taps, (1, 1), "SAME")

    shapes = [(8, 16), (5, 16, 16), (2, 3, 6, 6), (4, 3, 3, 3)]
    jaxpr = jax.make_jaxpr(function)(*map(np.zeros, shapes))
    assert flops.products(jaxpr.jaxpr) == {
        (8, 16, 16): 5,
        (16, 16, 16): 5,
        (2 * 6 * 6, 4, 3 * 3 * 3): 1,
    }


def test_a_function_jitted_for_a_cpus_vectors_is_counted():
    x = jnp.zeros((8, 16))
    assert flops.count(sharding.jit(lambda x: x @ x.T), x) == 2 * 8 * 8 * 16
