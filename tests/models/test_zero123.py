"""Zero123, compared with tensors of the PyTorch reference (tests/goldens/README.md), stage by stage."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from lrm_jax.kernels import attention, attention_cuda
from lrm_jax.models import build, zero123
from lrm_jax.models.parts import torch_layout
from lrm_jax.models.zero123 import autoencoder, clip, diffusion, layouts
from lrm_jax.parallel import sharding
from lrm_jax.types import Cameras, Rays, Views
from lrm_jax.weights import references


def read(folder, name):
    with safe_open(folder / f"{name}.safetensors", "np") as f:
        return {key: f.get_tensor(key) for key in f.keys()}


def close(actual, wanted, relative=1e-4):
    """Relative to the largest value. 1e-4: the tolerance that is stated with the goldens."""
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(
        actual, wanted, atol=relative * max(np.abs(wanted).max(), 1e-6), rtol=0
    )


def last(x):
    """Channels last."""
    return jnp.asarray(np.moveaxis(x, -3, -1))


@pytest.fixture(scope="module")
def tiny(goldens):
    """The goldens, and a model with the U-Net, the autoencoder and the tower of their files."""
    nets, tower = read(goldens, "zero123_tiny"), read(goldens, "clip_vision_tiny")
    state = {k[6:]: v for k, v in nets.items() if k.startswith("state.")}
    state |= {k[6:]: v for k, v in tower.items() if k.startswith("state.")}
    fields = zero123.fields_from_torch(state)
    fields["tower"]["num_heads"] = 4
    model = build("zero123", "tiny", **fields, image_size=64, num_heads=4, remat="none")
    return types.SimpleNamespace(
        nets=nets, tower=tower, model=model, state=state, params=zero123.from_torch(state, model)
    )


def apply(tiny, function, *args):
    """`function(module, *args)` with the golden's parameters, jitted."""
    run = jax.jit(lambda params, args: tiny.model.apply({"params": params}, *args, method=function))
    return run(tiny.params, args)


def test_sizes_follow_from_names_and_shapes(tiny):
    model = tiny.model
    assert (model.channels, model.multiples, model.attention_levels) == (32, (1, 1, 2, 2), (0, 1, 2))  # fmt: skip
    assert (model.num_blocks, model.context_width) == (1, 24)
    assert dict(model.autoencoder) == dict(channels=32, multiples=(1, 1, 1, 2), num_blocks=1)
    assert dict(model.tower) == dict(side=28, patch=7, width=48, depth=3, num_heads=4, out=20)


@pytest.mark.parametrize("way", ["up", "down"])
def test_the_image_tower_is_clips(tiny, way):
    rgb = 0.5 * last(tiny.tower[f"in.{way}"]) + 0.5
    side = tiny.model.tower["side"]
    close(clip.preprocessed(rgb, side), last(tiny.tower[f"out.{way}.preprocessed"]))
    found = apply(tiny, lambda module, x: module.image_tower(x), rgb)
    close(found, tiny.tower[f"out.{way}.embedding"])


def test_the_autoencoder_is_the_references(tiny):
    moments = apply(tiny, lambda module, x: module.encoder(x), last(tiny.nets["in.image"]))
    latent = autoencoder.mode(moments)
    close(latent, last(tiny.nets["out.latent_mode"]))
    decoded = apply(tiny, lambda module, z: module.decoder(z), last(tiny.nets["out.latent_mode"]))
    close(decoded, last(tiny.nets["out.decoded"]))


def test_the_unet_finds_the_references_noise(tiny):
    nets = tiny.nets
    embedding, motion = nets["in.clip"][:, 0], nets["in.pose"]

    def run(module, x, t, embedding, motion):
        context_BVD = module._project(embedding, motion)
        return context_BVD, module.unet(x, t, module.context(context_BVD[:, 0]))

    x = jnp.concatenate([last(nets["in.x"]), last(nets["in.concat"])], axis=-1)
    context, noise = apply(tiny, run, x, nets["in.t"], embedding, motion)
    close(context, nets["out.context"])
    close(noise, last(nets["out.eps"]))


def test_steps_are_the_references(goldens, tiny):
    sampler = read(goldens, "zero123_sampler_tiny")
    for count in (50, 75):
        steps = diffusion.sampling_steps(count, 1.0)
        np.testing.assert_array_equal(steps.t[::-1], sampler[f"out.timesteps_{count}"])
    assert len(diffusion.sampling_steps(50, 1.0).t) == 49
    assert len(diffusion.sampling_steps(75, 1.0).t) == 76
    steps = diffusion.sampling_steps(50, 1.0)
    close(diffusion.alphas(), tiny.nets["out.alphas_cumprod"], 1e-6)
    close(steps.alpha[::-1], tiny.nets["out.ddim_alphas"][:-1], 1e-6)
    close(steps.alpha_next[::-1], tiny.nets["out.ddim_alphas_prev"][:-1], 1e-6)
    close(steps.sigma[::-1], tiny.nets["out.ddim_sigmas"][:-1], 1e-5)


@pytest.mark.parametrize("eta", [0, 1])
def test_sampling_follows_the_reference_step_by_step(goldens, tiny, eta):
    sampler, at = read(goldens, "zero123_sampler_tiny"), f"out.eta{eta}."
    steps = diffusion.sampling_steps(5, float(eta))
    np.testing.assert_array_equal(steps.t, sampler[at + "steps"])
    count = sampler["in.x_T"].shape[0]

    def run(module, rgb, embedding, motion, x, noise):
        latent = module._moments(rgb)[0]
        context = module._project(embedding, motion)[0]
        guided = module.guided(context, jnp.repeat(latent, count, axis=0))
        x, (each, images) = diffusion.sample(module, guided, lambda i: noise[i], x, steps)
        return latent, context, x, each, images, module.decode(x)

    rgb = 0.5 * last(sampler["in.image"]) + 0.5
    latent, context, x, each, images, decoded = apply(
        tiny, run, rgb, sampler["in.clip"][:, 0], sampler["out.pose"].swapaxes(0, 1), last(sampler["in.x_T"]), last(sampler["in.step_noise"])
    )  # fmt: skip
    close(latent, last(sampler["out.concat"]))
    close(context, sampler["out.context"][:, 0])
    close(each, last(sampler[at + "x"]))
    close(images, last(sampler[at + "pred_x0"]))
    close(x, last(sampler[at + "latent"]))
    close(decoded, last(sampler[at + "decoded"]))
    close(jnp.clip(0.5 * decoded + 0.5, 0, 1), last(sampler[at + "picture"]))


def at_angles(polar, azimuth, distance=1.2):
    polar, azimuth = np.radians(polar), np.radians(azimuth)
    ring = np.array([np.cos(azimuth), np.sin(azimuth)]) * np.sin(polar)
    return jnp.asarray(distance * np.array([*ring, np.cos(polar)]), jnp.float32)


def test_the_motion_of_cameras_is_the_references(goldens):
    sampler = read(goldens, "zero123_sampler_tiny")
    for (polar, azimuth), wanted in zip(sampler["in.degrees"], sampler["out.pose"][:, 0], strict=True):  # fmt: skip
        found = zero123.camera_motion(at_angles(60, 250), at_angles(60 + polar, 250 + azimuth))
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    further = zero123.camera_motion(at_angles(60, 250), at_angles(60, 250, 1.5))
    np.testing.assert_allclose(further, [0, 0, 1, 0.3], atol=1e-6)


@pytest.fixture(scope="module")
def training(goldens):
    return read(goldens, "zero123_training_tiny")


def loss_and_parts(tiny, training, params):
    golden = {key: jnp.asarray(value) for key, value in training.items() if key.startswith("in.")}

    def run(module):
        latent = module._moments(0.5 * last(training["in.cond"]) + 0.5)[0]
        scene = {"embedding": golden["in.clip"][:, 0], "latent": latent}
        return module.noise_errors(
            scene, golden["in.pose"], 0.5 * last(training["in.target"]) + 0.5, golden["in.t"],
            last(training["in.noise"]), last(training["in.posterior_noise"]), golden["in.dropout_u"],
        )  # fmt: skip

    errors = tiny.model.apply({"params": params}, method=run)
    return errors.mean(), errors


def test_the_loss_and_its_gradients_are_the_references(tiny, training):
    (loss, errors), grads = jax.jit(
        jax.value_and_grad(lambda params: loss_and_parts(tiny, training, params), has_aux=True)
    )(tiny.params)
    close(errors, training["out.loss_per_sample"])
    close(loss, training["out.loss"][0])
    found = torch_layout.to_torch(zero123.entries(tiny.model), grads)
    names = [key.removeprefix("grad.") for key in training if key.startswith("grad.")]
    assert len(names) == 9
    for name in names:
        close(found[name], training["grad." + name], 1e-3)
    # Attention to one token: queries, keys and their norm have no influence.
    unused = [name for name in found if "attn2.to_q" in name or "attn2.to_k" in name]
    assert unused and not any(found[name].any() for name in unused)
    # Trained are the U-Net, its context and the projection.
    trained = {k: v for k, v in grads.items() if k in ("unet", "context", "projection")}
    norm = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(trained)))
    np.testing.assert_allclose(norm, training["out.grad_norm"][0], rtol=1e-3)


def test_prompts_and_images_are_dropped_in_bands():
    no_prompt, no_image = zero123.dropped(jnp.array([0.0, 0.049, 0.051, 0.099, 0.101, 0.149, 0.151]))  # fmt: skip
    np.testing.assert_array_equal(no_prompt, [1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(no_image, [0, 0, 1, 1, 1, 1, 0])


def test_parameters_return_to_the_same_tensors(tiny):
    back = zero123.to_torch(tiny.params, tiny.model)
    for name, value in tiny.state.items():
        np.testing.assert_array_equal(back[name], value, name)
    constants = {k: v for k, v in back.items() if k not in tiny.state and not k.startswith(layouts.EMA)}  # fmt: skip
    close(constants["alphas_cumprod"], tiny.nets["out.alphas_cumprod"], 1e-6)


def test_sampling_uses_the_running_means_of_the_unet(tiny):
    names = [name for name in tiny.state if name.startswith(layouts.UNET)]
    means = {layouts.flattened(name): tiny.state[name] + 1 for name in names}
    assert layouts.EMA + "diffusion_modelinput_blocks00weight" in means
    leftovers = {"cond_stage_model.model.ln_final.bias": np.zeros(3), "betas": np.zeros(3), "model_ema.decay": np.zeros(())}  # fmt: skip
    own = layouts.own_tensors(tiny.state | means | leftovers)
    assert set(own) == set(tiny.state)
    for name, value in own.items():
        np.testing.assert_array_equal(value, tiny.state[name] + (name in names))


@pytest.fixture(scope="module")
def manifest(goldens):
    def shapes(name):
        text = (goldens / "manifests" / f"{name}.json").read_text()
        return {key: tuple(shape) for key, (shape, _) in json.loads(text)["tensors"].items()}

    return shapes


def test_the_released_files_names_are_made_exactly(manifest):
    model = build("zero123", "zero123")
    wanted = manifest("zero123")
    text_side = {name for name in wanted if name.startswith("cond_stage_model.model.")} - {name for name in wanted if name.startswith(layouts.TOWER)}  # fmt: skip
    shapes = torch_layout.torch_shapes(zero123.entries(model), references.param_shapes(model))
    made = layouts.released_file({k: np.broadcast_to(np.float32(0), v) for k, v in shapes.items()})
    assert {k: v.shape for k, v in made.items()} == {k: v for k, v in wanted.items() if k not in text_side}  # fmt: skip
    assert len(text_side) == 6


def test_diffusers_names_are_made_exactly(manifest):
    model = build("zero123", "zero123")
    shapes = torch_layout.torch_shapes(layouts.entries(model, False), references.param_shapes(model))  # fmt: skip
    made = layouts.linear_attention({k: np.broadcast_to(np.float32(0), v) for k, v in shapes.items()})  # fmt: skip
    assert {k: v.shape for k, v in made.items()} == manifest("zero123-diffusers")


@pytest.mark.parametrize("older", [False, True])
def test_diffusers_layout_gives_the_same_parameters(tiny, older):
    state = layouts.to_diffusers(tiny.params, tiny.model)
    if older:
        state["image_encoder/vision_model.embeddings.position_ids"] = np.arange(17)[None]
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for name in [x for x in state if x.startswith("vae/") and ".attentions." in x and "to_" in x]:  # fmt: skip
            to = next(name.replace(a, b) for a, b in names.items() if a in name)
            value = state.pop(name)
            state[to] = value[..., None, None] if value.ndim == 2 else value
    own = layouts.own_tensors(state)
    assert set(own) == set(tiny.state)
    for name, value in tiny.state.items():
        np.testing.assert_array_equal(own[name], value, name)
    missing = {k: v for k, v in state.items() if "mid_block.resnets.0.conv1.bias" not in k}
    assert len(set(tiny.state) - set(layouts.own_tensors(missing))) == 3


@pytest.mark.parametrize(
    ("kind", "widths"),
    [("NVIDIA H100 80GB HBM3", {40, 64, 80, 160}), ("NVIDIA A100-SXM4-80GB", {40, 64, 80})],
)
def test_heads_of_160_are_cudnn_s_from_hopper_on(kind, widths, monkeypatch):
    """The autoencoder's single head is too wide for it everywhere."""
    calls, others = set(), set()
    monkeypatch.setattr(
        attention_cuda, "attention_by_cudnn", lambda q, *_: calls.add(q.shape[-1]) or q
    )
    monkeypatch.setattr(
        attention, "_attention_by_products", lambda q, *_: others.add(q.shape[-1]) or q
    )
    model = build("zero123", "zero123", dtype="bfloat16")
    camera = Cameras(
        c2w=np.zeros((1, 1, 4, 4), np.float32), fxfycxcy=np.zeros((1, 1, 4), np.float32)
    )
    image = jax.ShapeDtypeStruct((1, 1, 256, 256, 3), jnp.float32)
    with jax.sharding.use_abstract_mesh(sharding.abstract_device_mesh((1, 1, 1), "gpu", kind)):
        jax.eval_shape(model.init, jax.random.key(0), Views(image, camera), Rays(image, image))
    assert calls == widths and others == {512, 160} - widths
