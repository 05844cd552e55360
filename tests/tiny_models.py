"""Tiny random models for several test modules, with the state dicts and configs of their references."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import two_stage
from lrm_jax.models import build
from lrm_jax.ops import cameras
from lrm_jax.types import Rays, Views
from lrm_jax.weights import model_file, references


@pytest.fixture(scope="module")
def each_model_is_traced_once():
    """Traces each model once. Tracing takes a second, and a hundred tests share a few tiny models."""
    traced, trace = {}, references.param_shapes

    def param_shapes(model):
        if repr(model) not in traced:
            traced[repr(model)] = trace(model)
        return traced[repr(model)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(references, "param_shapes", param_shapes)
        patch.setattr(references, "param_shapes", param_shapes)
        yield


def tiny(family="triposr", seed=0, **overrides):
    """A random tiny model and its parameters."""
    model = build(family, "tiny", **overrides)
    generator = np.random.default_rng(seed)
    shapes = references.param_shapes(model)
    return model, jax.tree.map(lambda x: generator.normal(size=x.shape).astype(np.float32), shapes)


def untrained(family):
    """The parameters of a tiny model of posed images, as training starts with them."""
    model = build(family, "tiny")
    source = cameras.orbit(3, 2.5, 20.0, 40.0)
    source, rays = jax.tree.map(lambda x: x[None], (source, cameras.pixel_rays(source, 8, 8)))
    views = Views(rgb=jnp.ones((1, 3, model.image_size, model.image_size, 3)), cameras=source)
    return jax.jit(model.init)(jax.random.key(0), views, rays)["params"]


def write_two_models(folder):
    """A folder that names two tiny models of a two-stage reconstruction. The first draws noise that depends on all that it should."""
    module, rng = build("zero123", "tiny"), np.random.default_rng(0)
    shapes = references.param_shapes(module)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
    model_file.save_model(folder / "views.safetensors", module, params, {})
    surface = build("one2345", "tiny")
    model_file.save_model(folder / "surface.safetensors", surface, untrained("one2345"), {})
    parts = {"views": "views.safetensors", "reconstruction": "surface.safetensors"}
    (folder / two_stage.PARTS).write_text(json.dumps(parts))


def tiny_state(family="triposr", **overrides):
    """The state dict and config of a tiny model, in the form of its reference."""
    model, params = tiny(family, **overrides)
    module = references.family(family)
    return module.to_torch(params, model), module.config_to_torch(model)


def renamed(state, old, new):
    return {new if k == old else k: v for k, v in state.items()}


def abstract_params(variant):
    def init():
        model = build("triposr", variant)
        views = Views(rgb=jnp.zeros((1, 1, model.image_size, model.image_size, 3)), cameras=None)
        rays = Rays(origins=jnp.zeros((1, 1, 1, 1, 3)), dirs=jnp.ones((1, 1, 1, 1, 3)))
        return model.init(jax.random.key(0), views, rays)["params"]

    return jax.eval_shape(init)
