import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import losses, metrics
from lrm_jax.types import Rendering


def rendering(rgb, alpha):
    return Rendering(rgb=jnp.full((1, 2, 4, 4, 3), rgb), alpha=jnp.full((1, 2, 4, 4), alpha))


def test_mse_is_the_mean_over_channels():
    np.testing.assert_allclose(
        losses.mse(rendering(0.5, 1.0), rendering(0.2, 1.0)), 0.09, rtol=1e-6
    )  # float32


def test_mask_is_the_cross_entropy_of_alpha():
    value = losses.mask(rendering(0.0, 0.25), rendering(0.0, 1.0))
    np.testing.assert_allclose(value, -np.log(0.25), rtol=3e-3)  # alpha is squeezed by 0.2 %


@pytest.mark.parametrize(("alpha", "label"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_saturated_mask_is_finite_and_has_a_gradient(alpha, label):
    value, slope = jax.value_and_grad(
        lambda a: losses.mask(rendering(0.0, a), rendering(0.0, label))
    )(alpha)
    assert np.isfinite(value) and abs(slope) > 1


def test_losses_are_computed_in_float32():
    low = rendering(jnp.bfloat16(0.5), jnp.bfloat16(0.5))
    assert all(
        x.dtype == jnp.float32
        for x in losses.terms(low, low, dict.fromkeys(losses.TERMS, 1.0)).values()
    )


def test_only_the_named_terms_are_computed_and_an_unknown_one_is_an_error():
    assert set(losses.terms(rendering(0.1, 0.5), rendering(0.0, 1.0), {"mse": 1.0})) == {"mse"}
    with pytest.raises(ValueError, match="no loss term mes; there are mse, mask"):
        losses.terms(rendering(0.1, 0.5), rendering(0.0, 1.0), {"mes": 1.0})


def test_psnr_of_an_error_of_a_tenth_is_twenty_decibels():
    value = metrics.psnr(jnp.full((2, 3, 4, 4, 3), 0.6), jnp.full((2, 3, 4, 4, 3), 0.5))
    assert value.shape == (2, 3)
    np.testing.assert_allclose(value, 20.0, rtol=1e-5)  # float32
