import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.metrics

from lrm_jax.ops import image_metrics
from lrm_jax.types import InputError


def test_psnr_of_an_error_of_a_tenth_is_twenty_decibels():
    value = image_metrics.psnr(jnp.full((2, 3, 4, 4, 3), 0.6), jnp.full((2, 3, 4, 4, 3), 0.5))
    assert value.shape == (2, 3)
    np.testing.assert_allclose(value, 20.0, rtol=1e-5)  # float32


def scikit_ssim(x, y):
    return skimage.metrics.structural_similarity(
        x, y, channel_axis=-1, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pairs():
    """[3 2 H W 3]: noise, a smooth ramp with an edge, and a flat white background with a little noise."""
    generator = np.random.default_rng(0)
    shape = (24, 31, 3)
    noise = generator.random(shape)
    ramp = np.broadcast_to(np.linspace(0, 1, shape[1])[None, :, None], shape)
    white = np.ones(shape)
    return np.stack(
        [
            (noise, 0.7 * noise + 0.3 * generator.random(shape)),
            (ramp, np.where(ramp > 0.5, 1.0, ramp)),
            (white, white - 0.02 * generator.random(shape)),
        ]
    )


def test_ssim_is_scikit_images(pairs):
    expected = [[scikit_ssim(x, y)] for x, y in pairs]
    x, y = (jnp.asarray(pairs[:, i : i + 1], jnp.float32) for i in (0, 1))
    np.testing.assert_allclose(jax.jit(image_metrics.ssim)(x, y), expected, atol=1e-5)  # float32


def test_ssim_of_less_than_a_window_is_an_error():
    with pytest.raises(InputError, match="10 x 64 pixels are too small for SSIM"):
        image_metrics.ssim(jnp.ones((2, 10, 64, 3)), jnp.ones((2, 10, 64, 3)))


def test_iou_is_the_shared_share_and_one_where_both_are_empty():
    alpha = jnp.zeros((3, 1, 4, 4)).at[:2, 0, :, :2].set(0.9).at[:, 0, 3, 3].set(0.4)
    target = jnp.zeros((3, 1, 4, 4)).at[0, 0, :2].set(1.0)
    # Left half against upper half; left half against nothing; nothing against nothing.
    np.testing.assert_allclose(image_metrics.iou(alpha, target)[:, 0], [4 / 12, 0, 1], rtol=1e-6)
