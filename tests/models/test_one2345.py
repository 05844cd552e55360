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
from lrm_jax.models.parts import cost_volume, norms, sdf, torch_layout, view_blending
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
    return model.apply({"params": params}, method="weights")


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
        weights = module.weights()
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
        return one2345.loss_terms(one2345.ray_sums(samples), wanted, near)

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


# -- the sparse U-Net as a dense one


def dense(coords, feats, side):
    volume = np.zeros((1, *(side,) * 3, feats.shape[1]), np.float32)
    mask = np.zeros((1, *(side,) * 3), bool)
    at = (0, *coords.astype(int).T)
    volume[at], mask[at] = feats, True
    return jnp.asarray(volume), jnp.asarray(mask), at


@pytest.mark.parametrize("of_scene", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", ["blob", "box"])
def test_the_dense_unet_with_masks_equals_the_sparse_one(goldens, case, of_scene):
    golden, _ = read(goldens, "one2345_sparse_unet_tiny")
    state = {k[6:]: np.asarray(v, np.float32) for k, v in golden.items() if k.startswith("state.")}
    params = torch_layout.from_torch(cost_volume.entries("", "unet"), state)["unet"]
    coords, feats = golden[f"in.{case}.coords"], golden[f"in.{case}.feats"]
    side = -(-int(coords.max() + 1) // 8) * 8
    volume, mask, at = dense(coords, feats, side)
    unet = cost_volume.VolumeUNet(channels=8)

    def loss(params, volume):
        y, kept = unet.apply({"params": params}, volume, mask, of_scene, mutable=["statistics"])
        rows = y[at]
        return (rows * jnp.linspace(-1, 1, rows.size).reshape(rows.shape)).sum(), (rows, y, kept)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (of_params, of_volume), (rows, whole, kept) = grad(params, volume)
    mode = "train" if of_scene else "eval"
    close(rows, golden[f"out.{case}.{mode}"])
    assert not np.asarray(whole)[~np.asarray(mask)].any()
    close(of_volume[at], golden[f"grad.{case}.{mode}.feats"], 1e-3)
    theirs = torch_layout.to_torch(cost_volume.entries("", "unet"), {"unet": of_params})
    prefix = f"grad.{case}.{mode}."
    for name in (k.removeprefix(prefix) for k in golden if k.startswith(prefix + "conv")):
        close(theirs[name], golden[prefix + name], 1e-3)
    if case == "blob" and of_scene:
        for name, running in (("mean", "running_mean"), ("variance", "running_var")):
            close(kept["statistics"]["conv5"]["norm"][name], golden[f"out.blob.{running}_after"])
    assert bool(kept) == of_scene


@pytest.mark.parametrize("case", ["blob", "box"])
def test_coarse_sites_go_one_past_the_end_and_not_below_the_smallest_fine_one(goldens, case):
    golden, _ = read(goldens, "one2345_sparse_unet_tiny")
    coords = golden[f"in.{case}.coords"].astype(int)
    side = -(-int(coords.max() + 1) // 8) * 8
    mask = np.zeros((1, *(side,) * 3), bool)
    mask[(0, *coords.T)] = True
    levels = cost_volume.levels(jnp.asarray(mask))
    for level in (1, 2, 3):
        found = {tuple(c) for c in np.argwhere(np.asarray(levels[level][0])) * 2**level}
        wanted = golden[f"out.{case}.level{level}_coords"].astype(int)
        assert found == {tuple(c) for c in wanted}


# -- rules that are easy to miss


def test_the_scale_of_an_activated_norm_is_positive_and_the_leaky_relu_comes_last():
    norm = norms.BatchNorm(leaky=True)
    x = jnp.array([[[-1.0], [1.0]]])
    params = norm.init(jax.random.key(0), x, True)["params"]
    params |= {"scale": jnp.array([-2.0]), "bias": jnp.array([-1.0])}
    y, _ = norm.apply({"params": params}, x, True, mutable=["statistics"])
    np.testing.assert_allclose(y[0, :, 0], [-0.03, 1.0], atol=1e-4)


def test_a_voxel_that_one_view_sees_is_not_active_and_unseen_features_count_only_for_parity():
    cameras = Cameras(
        c2w=jnp.stack([jnp.eye(4).at[2, 3].set(-3.0), jnp.eye(4).at[2, 3].set(0.0)]),
        fxfycxcy=jnp.array([[1.0, 1.0, 0.5, 0.5]] * 2),
    )
    features = jnp.stack([jnp.ones((8, 8, 1)), 5 * jnp.ones((8, 8, 1))])
    cost, active = cost_volume.cost_volume(features, cameras, 8, True)
    # The second camera stands in the middle and looks along z: it sees nothing below z = 0.
    assert not np.asarray(active)[:, :, :4].any() and np.asarray(active)[3, 3, 6]
    both = np.asarray(cost)[3, 3, 6]
    np.testing.assert_allclose(both, [4.0, 3.0], atol=1e-3)
    edge = jax.vmap(lambda c: cost_volume.project(c, jnp.zeros((1, 3)))[0])(cameras)
    assert np.isfinite(edge).all()


def test_the_volume_s_faces_at_minus_one_give_nothing_and_those_at_one_go_on_for_a_cell():
    volume = jnp.arange(1.0, 9.0)[:, None, None, None] * jnp.ones((8, 8, 8, 1))
    points = jnp.array([[-1.0, 0, 0], [-0.999, 0, 0], [1.0, 0, 0], [1.2, 0, 0], [1.3, 0, 0]])
    found = one2345._latent(volume, points)[:, 0]
    np.testing.assert_allclose(found, [0, 1.0035, 8, 8, 0], atol=1e-3)


def test_the_nearest_voxel_rounds_halves_to_even_and_ends_at_the_outer_faces():
    active = jnp.zeros((8, 8, 8), bool).at[2].set(True)
    x = (2 * np.array([1.5, 2.5, 2.51, -0.49, 7.51]) + 1) / 8 - 1
    points = jnp.stack([jnp.asarray(x), jnp.zeros(5), jnp.zeros(5)], axis=-1)
    np.testing.assert_array_equal(one2345.is_active(active, points), [True, True, False, False, False])  # fmt: skip
    outer = jnp.array([[-1.13, 0, 0], [1.13, 0, 0]])
    assert not one2345.is_active(jnp.ones((8, 8, 8), bool), outer).any()


def test_softplus_is_finite_with_all_its_derivatives_far_from_zero():
    x = jnp.array([[-1e4, -0.3, 0.0, 0.3, 1e4]])
    grad = jax.vmap(jax.grad(lambda x: sdf.softplus(x[None, None])[0, 0]))
    second = jax.vmap(jax.grad(jax.grad(lambda x: sdf.softplus(x[None, None])[0, 0])))
    np.testing.assert_allclose(sdf.softplus(x)[0], [0, 0, np.log(2) / 100, 0.3, 1e4], atol=1e-6)
    np.testing.assert_allclose(grad(x[0]), [0, 0, 0.5, 1, 1], atol=1e-6)
    np.testing.assert_allclose(second(x[0]), [0, 0, 25, 0, 0], atol=1e-3)


def test_the_point_s_code_has_no_factor_pi():
    found = sdf.code(jnp.array([[0.5, 0.0, 0.0]]))
    np.testing.assert_allclose(
        found[0, [3, 6, 9]], [np.sin(0.5), np.cos(0.5), np.sin(1.0)], rtol=1e-6
    )


def test_the_initial_field_is_nearly_a_sphere():
    layers = sdf.SDF().init_with_output(jax.random.key(0))[0]
    direction = jax.random.normal(jax.random.key(1), (64, 3))
    direction = direction / jnp.linalg.norm(direction, axis=-1, keepdims=True)
    latent = jax.random.normal(jax.random.key(2), (64, 16))
    inner, outer = (sdf.value(layers, radius * direction, latent) for radius in (0.2, 0.9))
    assert (inner < 0).all() and (outer > 0).all()


def test_a_ray_without_a_valid_sample_gives_no_nan():
    nothing = one2345.Samples(
        t=jnp.ones((4, 3)), sdf=jnp.full((4, 3), 100.0), gradient=jnp.zeros((4, 3, 3)), inside=jnp.zeros((4, 3), bool),
        weight=jnp.zeros((4, 3)), rgb=jnp.ones((4, 3, 3)), num_seeing=jnp.zeros((4, 3), int),
    )  # fmt: skip
    wanted = Rendering(jnp.ones((4, 3)), jnp.zeros(4))

    def total(gradient):
        sums = one2345.ray_sums(nothing._replace(gradient=gradient))
        return sum(one2345.loss_terms(sums, wanted, jnp.zeros(5)).values())

    value, grad = jax.value_and_grad(total)(nothing.gradient)
    assert value == 0 and np.isfinite(grad).all()


def test_three_quarters_of_the_rays_are_of_the_object_and_without_one_all_are_anywhere():
    alpha = jnp.zeros((2, 8, 8)).at[1, 2, 3].set(0.5)
    cameras = Cameras(c2w=jnp.tile(jnp.eye(4), (2, 1, 1)), fxfycxcy=jnp.array([[1.0, 1, 0.5, 0.5]] * 2))  # fmt: skip
    target = Views(rgb=jnp.zeros((2, 8, 8, 3)), cameras=cameras, alpha=alpha)
    rays, seen = one2345.random_rays(jax.random.key(0), target, 64)
    assert (seen.alpha == 0.5).sum() >= 48
    np.testing.assert_allclose(rays.dirs[63, :2] / rays.dirs[63, 2], [3.5 / 8 - 0.5, 2.5 / 8 - 0.5], atol=1e-6)  # fmt: skip
    _, empty = one2345.random_rays(jax.random.key(0), target.replace(alpha=0 * alpha), 64)
    assert (empty.alpha == 0).all()


def test_the_views_of_a_scene_may_be_on_several_devices(recon, scene):
    """The norms' statistics are over all views, wherever they are."""
    device_mesh = jax.make_mesh((7,), ("views",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:7])  # fmt: skip
    split = jax.sharding.NamedSharding(device_mesh, jax.P(None, "views"))
    (fused, _), _ = features(
        recon.model, recon.params, jax.device_put(recon.views.rgb, split), True
    )
    close(fused[0], scene.fused)
