import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lrm_jax.training import losses
from lrm_jax.types import InputError, Rendering


def rendering(rgb, alpha):
    return Rendering(rgb=jnp.full((1, 2, 4, 4, 3), rgb), alpha=jnp.full((1, 2, 4, 4), alpha))


def test_mse_is_the_mean_over_channels():
    np.testing.assert_allclose(
        losses.mse(rendering(0.5, 1.0), rendering(0.2, 1.0)), 0.09, rtol=1e-6
    )  # float32


def test_mask_is_the_cross_entropy_of_alpha():
    value = losses.mask(rendering(0.0, 0.25), rendering(0.0, 1.0))
    np.testing.assert_allclose(value, -np.log(0.25), rtol=3e-3)  # the loss scales alpha by 0.2 %


@pytest.mark.parametrize(("alpha", "label"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_saturated_mask_is_finite_and_has_a_gradient(alpha, label):
    value, slope = jax.value_and_grad(
        lambda a: losses.mask(rendering(0.0, a), rendering(0.0, label))
    )(alpha)
    assert np.isfinite(value) and abs(slope) > 1


def test_losses_are_computed_in_float32():
    low = rendering(jnp.bfloat16(0.5), jnp.bfloat16(1.0))
    weights = dict.fromkeys(("mse", "mask", "mask_mse", "tv"), 1.0)
    scene = {"triplane": jnp.ones((1, 3, 4, 4, 2), jnp.bfloat16)}
    values = losses.terms(low, low, weights, scene=scene)
    assert {name: x.dtype for name, x in values.items()} == dict.fromkeys(weights, jnp.float32)


def test_tv_is_openlrms(goldens):
    golden = load_file(goldens / "openlrm_dino_tiny.safetensors")
    planes_BPhwC = jnp.asarray(golden["out.planes"].transpose(0, 1, 3, 4, 2))
    value = losses.tv({"triplane": planes_BPhwC})
    np.testing.assert_allclose(value, golden["out.loss_tv"][0], rtol=1e-5)  # float32


def test_tv_counts_each_direction_by_its_own_pairs():
    rows, columns = jnp.arange(3.0), jnp.arange(5.0)
    plane = 2 * rows[:, None] + 3 * columns[None]
    planes_BPhwC = jnp.broadcast_to(plane[None, None, :, :, None], (2, 3, 3, 5, 4))
    np.testing.assert_allclose(losses.tv({"triplane": planes_BPhwC}), 4 + 9, rtol=1e-6)  # float32


@pytest.mark.parametrize("name", ["lpips", "perceptual"])
def test_networks_compare_every_view_and_their_parameters_are_arguments(monkeypatch, name):
    def distance(params, x, y, dtype):
        assert dtype == "bfloat16"
        assert x.shape == y.shape == (1, 2, 4, 4, 3)
        return params["scale"] * jnp.abs(x - y).mean((-3, -2, -1)) * jnp.array([[1.0, 3.0]])

    monkeypatch.setattr(losses.NETWORKS[name], "distance", distance)

    @jax.jit
    def terms(networks):
        pair = rendering(0.5, 1.0), rendering(0.25, 1.0)
        return losses.terms(*pair, {name: 2.0}, networks=networks, dtype="bfloat16")

    for scale in (1.0, 10.0):
        value = terms({name: {"scale": jnp.float32(scale)}})[name]
        np.testing.assert_allclose(value, 0.25 * scale * 2, rtol=1e-6)  # unweighted; float32


def test_only_terms_with_a_weight_are_computed():
    bare = rendering(0.1, 0.5).replace(alpha=None)
    weights = {"mse": 1.0} | dict.fromkeys(set(losses.TERMS) - {"mse"}, 0.0)
    assert set(losses.terms(bare, bare, weights)) == {"mse"}
    losses.check(weights, {})
    assert losses.load_networks(weights, {"lpips": "", "perceptual": ""}) == {}


OPAQUE = Rendering(rgb=jnp.ones((1, 1, 2, 2, 3)), alpha=jnp.ones((1, 1, 2, 2)))


@pytest.mark.parametrize(
    ("name", "rendered", "message"),
    [
        ("mes", OPAQUE, "no loss term mes: choose from mse, mask"),
        ("lpips", OPAQUE, "config.losses.lpips=0.5 needs .*lrm convert vgg16.*--linear.*config.networks.lpips=FILE"),
        ("perceptual", OPAQUE, "losses.perceptual=0.5 needs .*lrm convert imagenet-vgg.*config.networks.perceptual=FILE"),
        ("tv", OPAQUE, "no planes: set config.losses.tv=0"),
        ("mask", OPAQUE.replace(alpha=None), "no alpha: set config.losses.mask=0"),
        ("mask_mse", OPAQUE.replace(alpha=None), "no alpha: set config.losses.mask_mse=0"),
    ],
)  # fmt: skip
def test_a_term_that_lacks_its_inputs_is_named(name, rendered, message):
    scene = {"tokens": jnp.ones((1, 4, 8))}
    with pytest.raises(InputError, match=message) as error:
        losses.terms(rendered, OPAQUE, {"mse": 1.0, name: 0.5}, scene=scene)
    assert "\n" not in str(error.value)


def test_missing_and_misnamed_networks_are_reported_before_training(tmp_path):
    with pytest.raises(InputError, match="no such file.*lrm convert vgg16"):
        losses.load_networks({"lpips": 2.0}, {"lpips": str(tmp_path / "absent.safetensors")})
    with pytest.raises(InputError, match="no network vgg: choose from lpips, perceptual"):
        losses.load_networks({"mse": 1.0}, {"vgg": "x.safetensors"})
