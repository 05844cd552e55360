"""Zero123's networks in diffusers' and transformers' classes: the files load strictly, and give the same outputs. Needs torch."""

import jax
import numpy as np
import pytest
from tiny_models import tiny

from lrm_jax.models.zero123 import autoencoder, clip
from lrm_jax.weights import diffusers_folder, loading

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero123")
    tower = dict(side=16, patch=8, width=64, depth=2, num_heads=1, out=16)
    sizes = dict(multiples=(1, 2, 2), attention_levels=(0, 1), image_size=32, tower=tower)
    model, params = tiny("zero123", **sizes, autoencoder=dict(channels=32, multiples=(1, 2), num_blocks=2))  # fmt: skip
    params = jax.tree.map(lambda x: 0.1 * x, params)
    diffusers_folder.write(folder, model, params, {})
    return folder, model, params


def apply(exported, function, *args):
    _, model, params = exported
    return model.apply({"params": params}, *args, method=function)


def first(x):
    """Channels first, as a tensor."""
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, -3).copy())


def load(cls, folder):
    """Strictly: a tensor that is missing or left over is an error."""
    net, report = cls.from_pretrained(folder, output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return net.eval()


def test_the_unet_is_diffusers(exported):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 16, 16, 8)).astype(np.float32)
    context = rng.normal(size=(2, 16)).astype(np.float32)
    t = np.array([3, 700])
    net = load(diffusers.UNet2DConditionModel, exported[0] / "unet")
    with torch.no_grad():
        wanted = net(first(x), torch.from_numpy(t), torch.from_numpy(context)[:, None]).sample
    found = apply(exported, lambda module, x, t, c: module.unet(x, t, module.context(c)), *map(jax.numpy.asarray, (x, t, context)))  # fmt: skip
    scale = np.abs(found).max()
    np.testing.assert_allclose(first(found).numpy() / scale, wanted.numpy() / scale, atol=1e-4)


def test_the_autoencoder_is_diffusers(exported):
    rng = np.random.default_rng(0)
    x = jax.numpy.asarray(rng.uniform(-1, 1, (2, 32, 32, 3)), "float32")
    net = load(diffusers.AutoencoderKL, exported[0] / "vae")
    with torch.no_grad():
        latent = net.encode(first(x)).latent_dist.mode()
        decoded = net.decode(latent).sample
    moments = apply(exported, lambda module, x: module.encoder(x), x)
    np.testing.assert_allclose(first(autoencoder.mode(moments)), latent, atol=1e-4)
    z = jax.numpy.asarray(np.moveaxis(latent.numpy(), -3, -1))
    found = apply(exported, lambda module, z: module.decoder(z), z)
    np.testing.assert_allclose(first(found), decoded, atol=1e-4)


def test_the_image_tower_is_transformers(exported):
    rng = np.random.default_rng(0)
    rgb = jax.numpy.asarray(rng.uniform(size=(2, 32, 32, 3)), "float32")
    net = load(transformers.CLIPVisionModelWithProjection, exported[0] / "image_encoder")
    with torch.no_grad():
        wanted = net(first(clip.preprocessed(rgb, 16))).image_embeds
    found = apply(exported, lambda module, x: module.image_tower(x), rgb)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_the_folder_is_read_back(exported):
    folder, model, params = exported
    back, again, info = loading.read_weights(str(folder))
    assert info["family"] == "zero123" and back.autoencoder == model.autoencoder
    jax.tree.map(np.testing.assert_array_equal, again, params)
