"""One-2-3-45, compared with tensors of the PyTorch reference (tests/goldens/README.md), stage by stage.

The reference counts pixels from their corners where it projects, so its principal point is half a pixel further than ours.
"""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from lrm_jax.models import build, one2345
from lrm_jax.models.parts import cost_volume, torch_layout, view_blending
from lrm_jax.ops import neus
from lrm_jax.types import Cameras, Rays, Rendering, Views


def read(folder, name):
    with safe_open(folder / f"{name}.safetensors", "np") as f:
        meta = json.loads(f.metadata()["golden"])
        return {key: f.get_tensor(key) for key in f.keys()}, meta


def close(actual, wanted, relative=1e-4):
    """Relative to the largest value. 1e-4: the tolerance that is stated with the goldens."""
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(
        actual, wanted, atol=relative * max(np.abs(wanted).max(), 1e-6), rtol=0
    )


@pytest.fixture(scope="module")
def recon(goldens):
    """The golden, its model and parameters, and the views: 0 is rendered, 1..6 make the volume."""
    golden, meta = read(goldens, "one2345_recon_tiny")
    state = {k[6:]: v for k, v in golden.items() if k.startswith("state.")}
    model = build("one2345", "one2345", volume_side=meta["vol_dims"], image_size=meta["image"])
    params = one2345.from_torch(state, model)
    side = meta["image"]
    matrix = golden["in.intrinsics"]
    numbers = [matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, 0, 2] + 0.5, matrix[:, 1, 2] + 0.5]
    cameras = Cameras(
        c2w=np.linalg.inv(golden["in.w2cs"]).astype(np.float32),
        fxfycxcy=(np.stack(numbers, axis=-1) / side).astype(np.float32),
    )
    rgb = golden["in.images"].transpose(0, 2, 3, 1).astype(np.float32) / 255
    views = jax.tree.map(lambda x: jnp.asarray(x)[None], Views(rgb=rgb, cameras=cameras))
    return types.SimpleNamespace(
        golden=golden, meta=meta, model=model, params=params, views=views, state=state
    )


def features(model, params, rgb, of_scene):
    def run(module, rgb):
        fused = module.pyramid(rgb, of_scene)
        return fused, module.compress(fused[:, 1:], of_scene)

    apply = jax.jit(lambda params, rgb: model.apply({"params": params}, rgb, method=run, mutable=["statistics"]))  # fmt: skip
    return apply(params, rgb)


@pytest.fixture(scope="module")
def scene(recon):
    """The golden's scene: features normalised over all seven views, the volume from the last six."""
    golden, model, params = recon.golden, recon.model, recon.params
    (fused, compressed), kept = features(model, params, recon.views.rgb, True)
    cameras = jax.tree.map(lambda x: x[:, 1:], recon.views.cameras)
    cost, active = jax.jit(jax.vmap(lambda f, c: cost_volume.cost_volume(f, c, 24, True)))(
        compressed, cameras
    )
    unet = jax.jit(
        lambda p, x, m: model.apply({"params": p}, x, m, True, method=lambda s, *a: s.unet(*a), mutable=["statistics"])
    )  # fmt: skip
    volume, kept_3d = unet(params, cost, active)
    images = jnp.concatenate([recon.views.rgb, fused], axis=-1)[:, 1:]
    del golden
    whole = {"volume": volume, "active": active, "images": images, "cameras": cameras}
    return types.SimpleNamespace(
        one=jax.tree.map(lambda x: x[0], whole), whole=whole, fused=fused[0], compressed=compressed[0], cost=cost[0],
        statistics={**kept["statistics"], **kept_3d["statistics"]},
    )  # fmt: skip


def weights_of(model, params):
    def run(module):
        sharpness = jnp.clip(jnp.exp(10 * module.log_sharpness), 1e-6, 1e6)
        return one2345.Weights(module.sdf(), module.blending(), sharpness)

    return model.apply({"params": params}, method=run)


def rays_of(golden):
    return Rays(origins=jnp.asarray(golden["out.rays_o"]), dirs=jnp.asarray(golden["out.rays_d"]))


def test_features_match_and_so_do_the_running_statistics(recon, scene):
    golden = recon.golden
    close(scene.fused[1, ::4, ::4].transpose(2, 0, 1), golden["out.train.fused_view1_every4"])
    wanted = golden["out.train.compressed_every4"]
    close(scene.compressed[:, ::4, ::4].transpose(0, 3, 1, 2), wanted)
    kept = scene.statistics["pyramid"]["conv0_0"]["norm"]
    name = "out.pyramid_feature_network.conv0.0.bn.running_"
    close(kept["mean"], golden[f"{name}mean.after"])
    close(kept["variance"], golden[f"{name}var.after"])
    kept = scene.statistics["unet"]["conv0"]["norm"]["variance"]
    close(kept, golden["out.sdf_network_lod0.sparse_costreg_net.conv0.net.1.running_var.after"])


def test_with_running_statistics_features_match(recon):
    (fused, _), _ = features(recon.model, recon.params, recon.views.rgb, False)
    wanted = recon.golden["out.eval.fused_view1_every4"]
    close(fused[0, 1, ::4, ::4].transpose(2, 0, 1), wanted)


def test_cost_volume_and_unet_match(recon, scene):
    golden = recon.golden
    coords = golden["out.active_coords"].astype(int)
    active = np.zeros((24,) * 3, bool)
    active[tuple(coords.T)] = True
    np.testing.assert_array_equal(scene.one["active"], active)
    rows = coords[golden["out.cost_rows"]]
    close(np.asarray(scene.cost)[tuple(rows.T)], golden["out.train.cost"])
    close(np.asarray(scene.one["volume"]).transpose(3, 0, 1, 2), golden["out.train.volume"])


def test_the_field_and_its_gradient_match_at_points_in_and_outside_the_volume(recon, scene):
    golden, weights = recon.golden, weights_of(recon.model, recon.params)
    points = jnp.asarray(golden["in.points"])
    close(one2345._latent(scene.one["volume"], points), golden["out.point_latent"])
    active = one2345.is_active(scene.one["active"], points)
    np.testing.assert_array_equal(active, golden["out.point_mask"] > 0)
    value, gradient = one2345._signed_distance(weights, scene.one["volume"], points)
    close(value[:, None], golden["out.point_sdf"])
    close(gradient, golden["out.point_gradient"])
    uniform = jnp.asarray(2 * golden["in.uniform_points"] - 1)
    close(one2345._signed_distance(weights, scene.one["volume"], uniform)[0][:, None], golden["out.sdf_random"])  # fmt: skip
    grid = cost_volume.grid_points(12).reshape(-1, 3)
    field, _ = recon.model.apply({"params": recon.params}, scene.whole, grid[None], method="query")
    close(field[0].reshape(12, 12, 12), golden["out.minus_sdf_grid12"])


def test_each_round_of_up_sampling_follows_from_the_ones_before(recon, scene):
    """A round amplifies rounding: a surface between two samples makes a step of up to 512 times the signed distance."""
    golden, weights = recon.golden, weights_of(recon.model, recon.params)
    rays = rays_of(golden)
    near, far = (jnp.full((24,), x) for x in golden["in.near_far"])
    even = near[:, None] + (far - near)[:, None] * jnp.linspace(0.0, 1.0, 64)[None]
    known = [even, *(jnp.asarray(golden[f"out.upsampled_z{i}"]) for i in range(4))]
    for i in range(4):
        xyz = [one2345.along(rays, t).reshape(-1, 3) for t in known[: i + 1]]
        inside = [one2345.is_active(scene.one["active"], x).reshape(24, -1) for x in xyz]
        sdfs = [
            one2345._signed_distance(weights, scene.one["volume"], x)[0].reshape(24, -1)
            for x in xyz
        ]
        sdfs[1:] = [
            jnp.where(m, x, neus.FAR_OUTSIDE) for x, m in zip(sdfs[1:], inside[1:], strict=True)
        ]
        joined = [jnp.concatenate(x, axis=-1) for x in (known[: i + 1], sdfs, inside)]
        t, distance, active = jax.lax.sort(joined, num_keys=1)
        new = neus.refined(t, distance, active, 64.0 * 2**i, 16)
        close(new, golden[f"out.upsampled_z{i}"], 2e-2)
    found = recon.model._distances(weights, scene.one, rays, near, far)
    close(found, golden["out.z"], 2e-2)


@pytest.fixture(scope="module")
def samples(recon, scene):
    golden = recon.golden
    near, far = golden["in.near_far"]
    last = jnp.full((24,), (far - near) / 64)
    shade = jax.jit(
        lambda w, s, r, t: one2345.shaded(
            w, s, r, t, last, recon.meta["alpha_inter_ratio"], "float32"
        )
    )
    weights = weights_of(recon.model, recon.params)
    return shade(weights, scene.one, rays_of(golden), jnp.asarray(golden["out.z"]))


def test_compositing_and_colours_along_rays_match(recon, samples):
    golden = recon.golden
    close(samples.t, golden["out.mid_z"])
    np.testing.assert_array_equal(samples.inside, golden["out.inside"])
    close(samples.sdf, golden["out.ray_sdf"])
    close(samples.gradient[:6], golden["out.ray_gradient"])
    close(samples.weight, golden["out.weights"])
    sums = one2345.ray_sums(samples)
    close(sums["rgb"], golden["out.color"])
    close(sums["alpha"][:, None], golden["out.weights_sum"])
    np.testing.assert_array_equal(sums["valid"][:, None], golden["out.color_valid"])
    close((samples.weight * samples.t).sum(-1)[:, None], golden["out.depth"])


def test_vertex_colours_are_seen_along_the_normal(recon, scene):
    golden, weights = recon.golden, weights_of(recon.model, recon.params)
    points = jnp.asarray(golden["in.vertices"])
    seen, geometry, images = one2345.supports(scene.one, points)
    np.testing.assert_array_equal(seen, golden["out.vertex_mask"])
    close(geometry, golden["out.vertex_geometry"])
    mask = golden["out.vertex_mask"][..., None]
    close(images * mask, golden["out.vertex_rgb_features"] * mask)
    _, gradient = one2345._signed_distance(weights, scene.one["volume"], points)
    normal = gradient / jnp.linalg.norm(gradient, axis=-1, keepdims=True)
    eyes = scene.one["cameras"].c2w[:, :3, 3]
    close(view_blending.angles(normal, eyes, points), golden["out.vertex_ray_diff"])
    _, rgb = recon.model.apply({"params": recon.params}, scene.whole, points[None], method="query")
    close(rgb[0], golden["out.vertex_color"])


def golden_loss(recon, params):
    """The reference's training loss for the golden's rays, samples and points, and its terms."""
    golden, model = recon.golden, recon.model

    def run(module):
        fused = module.pyramid(recon.views.rgb, True)
        compressed = module.compress(fused[:, 1:], True)
        cameras = jax.tree.map(lambda x: x[:, 1:], recon.views.cameras)
        cost, active = jax.vmap(lambda f, c: cost_volume.cost_volume(f, c, 24, True))(
            compressed, cameras
        )
        images = jnp.concatenate([recon.views.rgb, fused], axis=-1)[:, 1:]
        scene = {
            "volume": module.unet(cost, active, True),
            "active": active,
            "images": images,
            "cameras": cameras,
        }
        scene = jax.tree.map(lambda x: x[0], scene)
        sharpness = jnp.exp(10 * module.log_sharpness)
        weights = one2345.Weights(module.sdf(), module.blending(), sharpness)
        near, far = golden["in.near_far"]
        last = jnp.full((24,), (far - near) / 64)
        samples = one2345.shaded(
            weights,
            scene,
            rays_of(golden),
            jnp.asarray(golden["out.z"]),
            last,
            recon.meta["alpha_inter_ratio"],
            "float32",
        )
        uniform = jnp.asarray(2 * golden["in.uniform_points"] - 1)
        near = jnp.exp(
            -100 * jnp.abs(one2345._signed_distance(weights, scene["volume"], uniform)[0])
        )
        y, x = golden["in.ray_pixels_yx"].T
        wanted = Rendering(recon.views.rgb[0, 0, y, x], jnp.asarray(golden["in.ray_mask"][:, 0]))
        return one2345.terms(one2345.ray_sums(samples), wanted, near)

    terms, _ = model.apply({"params": params}, method=run, mutable=["statistics"])
    weights = dict(color_l1=1.0, eikonal=0.1, sparsity=0.02, mask_l1=0.1)
    return sum(weights[name] * value for name, value in terms.items()), terms


def test_losses_and_their_gradients_match(recon):
    golden, model = recon.golden, recon.model
    loss = jax.jit(jax.value_and_grad(lambda params: golden_loss(recon, params), has_aux=True))
    (total, terms), grads = loss(recon.params)
    names = dict(color_l1="color_fine_loss", eikonal="gradient_error_loss", sparsity="sparse_loss", mask_l1="fg_bg_loss")  # fmt: skip
    for ours, theirs in names.items():
        close(terms[ours], golden[f"out.loss.{theirs}"][0])
    close(total, golden["out.loss.loss"][0])
    state = torch_layout.to_torch(one2345.entries(model), grads)
    # The samples are given, so that the tolerance is that of any gradient.
    for name in (key[5:] for key in golden if key.startswith("grad.")):
        close(state[name], golden[f"grad.{name}"], 1e-3)
    norms_of = [np.linalg.norm(state[name]) for name in recon.meta["grad_norms"]]
    np.testing.assert_allclose(norms_of, golden["out.grad_norms"], rtol=2e-3, atol=1e-6)


def test_the_state_dict_comes_back_to_the_bit(recon):
    back = one2345.to_torch(recon.params, recon.model)
    assert back.keys() == recon.state.keys()
    for name, value in recon.state.items():
        assert back[name].dtype == value.dtype and back[name].shape == value.shape, name
        np.testing.assert_array_equal(back[name], value)
