"""The bundled model and example, which a first `lrm reconstruct` shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax.commands import arguments
from lrm_jax.images import load, recentre
from lrm_jax.mesh import lattice
from lrm_jax.ops import cameras, resize
from lrm_jax.weights import loading


@pytest.fixture(scope="module")
def bundled():
    model, params, info = loading.load_weights(None)
    return model, params, info


def test_the_bundled_model_is_small_and_says_how_it_was_made(bundled):
    model, params, info = bundled
    assert (loading.BUNDLED).stat().st_size < 30e6
    assert info["family"] == "triposr" and info["variant"] == "nano-symmetric"
    assert (
        info["training"]["steps"] > 1000 and info["training"]["config"]["data"]["name"] == "objects"
    )


@pytest.mark.parametrize(
    "path", sorted(arguments.EXAMPLES.glob("*.png")), ids=lambda path: path.stem
)
def test_the_example_is_reconstructed_with_its_silhouette(bundled, path):
    model, params, _ = bundled
    image = load.load_image(path)
    source = model.prepare([image])
    scene = jax.jit(lambda p, s: model.apply({"params": p}, s, method="encode"))(params, source)
    view = cameras.orbit(1, model.source_distance, model.source_elevation, model.source_fov)
    rays = jax.tree.map(lambda x: x[None], cameras.pixel_rays(view, 64, 64))
    rendering = jax.jit(lambda p, s, r: model.apply({"params": p}, s, r, method="render"))(
        params, scene, rays
    )
    # Both are recentred, because the image's camera is not known exactly, and the model does not know its distance.
    seen = np.asarray(jnp.round(rendering.alpha[0, 0] * 255)).astype(np.uint8)
    seen = recentre.recenter_foreground(
        np.stack([seen] * 3 + [np.where(seen > 127, 255, 0)], -1).astype(np.uint8), 0.85
    )
    wanted = recentre.recenter_foreground(image, 0.85)
    small = [
        np.asarray(resize.resize_bilinear(x[..., 3:4].repeat(3, -1) / 255.0, 48))[..., 0] > 0.5
        for x in (seen, wanted)
    ]
    overlap = (small[0] & small[1]).sum() / (small[0] | small[1]).sum()
    assert overlap > 0.6

    @jax.jit
    def field(xyz):
        return model.apply({"params": params}, scene, xyz[None], method="query")[0][0]

    vertices, faces = lattice.extract(field, 64, model.radius, model.surface_level)
    assert len(faces) > 500
    assert np.ptp(vertices, axis=0).min() > 0.2  # not flat
