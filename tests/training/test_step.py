import math
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balls import ball, batch

from lrm_jax.models import build
from lrm_jax.ops import cameras, compositing
from lrm_jax.parallel import batch_axes, sharding
from lrm_jax.training import losses, optim, step
from lrm_jax.types import Cameras, Rendering, Views

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import hlo  # noqa: E402

SETTINGS = dict(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, clip_norm=1.0)
STEP = dict(
    loss_weights={"mse": 1.0, "mask": 0.05},
    source_background=0.5,
    patch=8,
    render_size=(16, 16),
    antialias=True,
    foreground_crops=False,
    recolor=False,
    backgrounds=(),
    accumulate=1,
    ema_decay=0.99,
)
# Only windows and backgrounds are random. Here there is one grey, and each window is the whole view.
WHOLE_VIEWS = dict(patch=16, backgrounds=(1.0,), loss_weights={"mse": 1.0})


def functions(source, **changed):
    """`init_state` and `train_step` of a tiny TripoSR."""
    model = build("triposr", "tiny")
    schedule = optim.make_schedule(1e-2, warmup_steps=1, steps=100)
    optimizer = optim.make_optimizer(schedule, **SETTINGS)
    init = partial(
        step.init_state, model=model, optimizer=optimizer, seed=0, source=source, patch=8
    )
    update = partial(
        step.train_step, model=model, optimizer=optimizer, schedule=schedule, **(STEP | changed)
    )
    return init, update


def compiled(device_mesh, source, **changed):
    """`init_state` and `train_step`, compiled when they are first called."""
    init, update = functions(source, **changed)
    shardings = sharding.infer(jax.eval_shape(init), device_mesh)
    update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
    return jax.jit(init, out_shardings=shardings), update


@pytest.fixture(scope="module")
def on_one_device():
    """A device mesh, and `compiled` for it and four scenes with two target views of 16 pixels."""
    device_mesh = sharding.make_device_mesh(1, 1, 1, jax.devices()[:1])
    return device_mesh, *compiled(device_mesh, batch(0, 4, 2, 32, 16).source)


def test_one_step_on_two_by_four_devices_equals_one_device_and_the_loss_falls(on_one_device):
    scenes, results = batch(0, 4, 2, 32, 16), []
    two_by_four = sharding.make_device_mesh(1, 2, 4)
    for device_mesh, init, update in (
        (two_by_four, *compiled(two_by_four, scenes.source)),
        on_one_device,
    ):
        with jax.set_mesh(device_mesh):
            state = init()
            kernel = state.params["backbone"]["blocks"]["fc1"]["kernel"]
            assert kernel.addressable_shards[0].data.size * device_mesh.size == kernel.size
            on_device = batch_axes.global_batch(scenes, device_mesh)
            state, first = update(state, on_device, {})
            results.append(jax.device_get((first, state.opt_state)))
            params = jax.device_get(state.params)
            results[-1] += (params,)
    for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # sums in another order, float32
    # The scalars have no error amplified by division by small second moments.
    for name, value in results[0][0].items():
        np.testing.assert_allclose(value, results[1][0][name], rtol=1e-5, err_msg=name)

    with jax.set_mesh(device_mesh):
        for _ in range(80):
            state, last = update(state, on_device, {})
    assert last["train/loss"] < 0.5 * first["train/loss"]
    assert last["train/psnr"] > first["train/psnr"] + 3
    assert int(state.step) == 81 and int(last["skipped"]) == 0
    same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state.params, state.ema_params)), strict=True)]  # fmt: skip
    assert not all(same)


RANDOM = dict(recolor=True, foreground_crops=True, render_size=(12, 16), backgrounds=(0.0, 1.0))


def test_a_step_in_parts_on_eight_devices_equals_one_device_at_once_with_all_that_is_random():
    scenes = batch(0, 16, 1, 32, 16)
    results = []
    for sizes, accumulate in (((2, 4, 1), 2), ((1, 1, 1), 2), ((1, 1, 1), 1)):
        devices = jax.devices()[: math.prod(sizes)]
        device_mesh = sharding.make_device_mesh(*sizes, devices)
        with jax.set_mesh(device_mesh):
            init, update = compiled(device_mesh, scenes.source, accumulate=accumulate, **RANDOM)
            state, scalars = update(init(), batch_axes.global_batch(scenes, device_mesh), {})
            results.append(jax.device_get((scalars, state.params)))
    for result in results[1:]:
        for name, value in results[0][0].items():
            np.testing.assert_allclose(value, result[0][name], rtol=1e-5, err_msg=name)
        for a, b in zip(*map(jax.tree.leaves, (results[0], result)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # sums in another order, float32


def test_parameters_are_gathered_and_gradients_reduced_once_a_step_whatever_the_number_of_parts():
    scenes = batch(0, 32, 1, 32, 16)
    device_mesh = sharding.make_device_mesh(2, 4, 1)
    found = {}
    with jax.set_mesh(device_mesh):
        for accumulate in (2, 4):
            init, update = compiled(device_mesh, scenes.source, accumulate=accumulate)
            state = init()
            given = batch_axes.global_batch(scenes, device_mesh)
            text = update.lower(state, given, {}).compile().as_text()
            found[accumulate] = {
                kind: (traffic.count, traffic.payload)
                for kind, traffic in hlo.count(text).collectives.items()
            }
    assert found[2] == found[4]
    params = sharding.infer(state.params, device_mesh)
    split = sum(x.nbytes for x, s in zip(*map(jax.tree.leaves, (state.params, params)), strict=True) if "fsdp" in s.spec)  # fmt: skip
    assert found[2]["all-gather"][1] == found[2]["reduce-scatter"][1] == split


def test_a_poisoned_batch_is_skipped_and_counted(on_one_device):
    device_mesh, init, update = on_one_device
    scenes = batch(0, 4, 2, 32, 16)
    poisoned = scenes.replace(
        target=scenes.target.replace(rgb=scenes.target.rgb * np.float32(np.nan))
    )
    with jax.set_mesh(device_mesh):
        before = jax.device_get(init().params)
        after, scalars = update(init(), batch_axes.global_batch(poisoned, device_mesh), {})
    assert int(scalars["skipped"]) == 1 and not np.isfinite(scalars["grad_norm"])
    for a, b in zip(*map(jax.tree.leaves, (before, after.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(after.step) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_network_computes_in_the_dtype_of_the_model(monkeypatch, dtype):
    """Tests only dtypes. Nothing is computed."""
    scenes, given = batch(0, 2, 1, 32, 16), []

    def distance(params, x, y, dtype):
        given.append(dtype)
        return jnp.square(x - y).mean((-3, -2, -1)) * params["scale"]

    monkeypatch.setattr(losses.lpips, "distance", distance)
    init, update = functions(scenes.source, loss_weights={"lpips": 1.0})
    update = partial(update, model=build("triposr", "tiny", dtype=dtype))
    networks = {"lpips": {"scale": jnp.float32(1)}}
    _, scalars = jax.eval_shape(update, jax.eval_shape(init), scenes, networks)
    assert given == [dtype]
    assert scalars["train/lpips"].dtype == jnp.float32


@pytest.mark.parametrize("foreground", [False, True])
def test_a_crop_is_what_its_camera_sees(foreground):
    target = batch(0, 2, 3, 8, 32).target
    centre, radius = np.zeros(3, np.float32), np.float32(0.5)
    rays = jax.tree.map(np.asarray, cameras.pixel_rays(target.cameras, 32, 32))
    rgb, alpha = ball(rays, centre, radius)
    crops, crop_cameras = step.random_crops(
        jax.random.key(0), target.replace(rgb=rgb, alpha=alpha), 12, (32, 32), True, foreground
    )
    assert crops.rgb.shape == (2, 3, 12, 12, 3)
    rays = jax.tree.map(np.asarray, cameras.pixel_rays(crop_cameras, 12, 12))
    expected_rgb, expected_alpha = ball(rays, centre, radius)
    assert 0.1 < expected_alpha.mean() < 0.99  # neither empty nor full
    np.testing.assert_array_equal(crops.alpha, expected_alpha)
    inside = expected_alpha > 0
    np.testing.assert_allclose(
        crops.rgb[inside], expected_rgb[inside], atol=1e-3
    )  # float32 error for grazing rays


def gradient_views(size):
    """One view. Its red is the column and its green the row, as fractions."""
    at = (np.arange(size, dtype=np.float32) + 0.5) / size
    rgb = np.stack([np.tile(at, (size, 1)), np.tile(at[:, None], size), np.zeros((size, size))], -1)
    camera = Cameras(
        c2w=np.eye(4, dtype=np.float32)[None, None], fxfycxcy=np.array([[[1, 1, 0.5, 0.5]]], np.float32)
    )  # fmt: skip
    return Views(rgb=np.float32(rgb)[None, None], cameras=camera)


@pytest.mark.parametrize("antialias", [True, False])
def test_a_resized_crop_is_what_its_camera_sees(antialias):
    views, patch = gradient_views(64), 8
    for seed in range(6):
        crops, camera = step.random_crops(
            jax.random.key(seed), views, patch, (16, 40), antialias, False
        )
        # With c2w = identity, f = 1 and c = 0.5, the place in the image is direction + 0.5.
        rays = cameras.pixel_rays(camera, patch, patch)
        place = rays.dirs[..., :2] / rays.dirs[..., 2:] + 0.5
        # The filter is not exact between pixels. An error of half a pixel would be 1e-2.
        inner = ((place > 0.08) & (place < 0.92)).all(-1)
        np.testing.assert_allclose(crops.rgb[..., :2][inner], place[inner], atol=2e-3)
        extent = 1 / camera.fxfycxcy[0, 0, 0]
        assert patch / 40 - 1e-6 <= extent <= patch / 16 + 1e-6


def windows_of_whole_images(key, views, patch, render_size, antialias, foreground):
    """A slow oracle of `random_crops`: all images become float, and the resize reads all of their pixels."""
    size_key, corner_key, pixel_key = jax.random.split(key, 3)
    whole, shape = compositing.premultiplied(views), views.rgb.shape[:2]
    side_B = jax.random.randint(size_key, (shape[0], 1), render_size[0], render_size[1] + 1)[:, 0]
    place_BV2 = jax.random.uniform(corner_key, (*shape, 2))
    free_BV1 = jnp.tile(side_B[:, None, None] - patch, (1, shape[1], 1))
    if foreground:
        place_BV2 = step._around_foreground(pixel_key, whole.alpha, place_BV2, patch, free_BV1)
    corner_BV2 = jnp.minimum(jnp.floor(place_BV2 * (free_BV1 + 1)), free_BV1)
    rgba = jnp.concatenate([whole.rgb, whole.alpha[..., None]], -1)
    windows = [
        jax.image.scale_and_translate(
            rgba[b, v], (patch, patch, 4), (0, 1), jnp.tile(side_B[b] / rgba.shape[2], 2), -corner_BV2[b, v], "linear",
            antialias,
        )
        for b in range(shape[0]) for v in range(shape[1])
    ]  # fmt: skip
    return np.stack(windows).reshape(*shape, patch, patch, 4)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("foreground", [False, True])
@pytest.mark.parametrize("form", ["uint8", "float32", "opaque"])
@pytest.mark.parametrize(
    ("patch", "render_size"), [(8, (8, 24)), (8, (40, 48)), (8, (64, 96)), (48, (48, 48))]
)
def test_windows_cut_from_bytes_are_those_of_whole_images(
    patch, render_size, form, foreground, antialias
):
    """The pixels that they need may be all of an image of 48 pixels, a part of it, or less than a window's size."""
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (2, 2, 48, 48, 4)).astype(np.uint8)
    rgba[..., 3] *= rng.integers(0, 2, (2, 2, 48, 48)).astype(np.uint8)  # some are transparent
    if form == "float32":
        rgba = np.float32(rgba / 255)
    alpha = None if form == "opaque" else rgba[..., 3]
    views = batch(0, 2, 2, 8, 8).target.replace(rgb=rgba[..., :3], alpha=alpha)
    key = jax.random.key(patch + foreground)
    crops, _ = step.random_crops(key, views, patch, render_size, antialias, foreground)
    whole = windows_of_whole_images(key, views, patch, render_size, antialias, foreground)
    cut = np.concatenate([crops.rgb, crops.alpha[..., None]], -1)
    # Places in the image are float32: they differ by up to 1e-5 pixels, and neighbouring pixels by up to 1.
    np.testing.assert_allclose(cut, whole, atol=1e-4)


@pytest.mark.parametrize("antialias", [True, False])
def test_images_never_become_float_all_at_once(antialias):
    shape = (4, 8, 128, 128)
    views = Views(
        rgb=np.zeros((*shape, 3), np.uint8), alpha=np.zeros(shape, np.uint8),
        cameras=Cameras(c2w=np.zeros((4, 8, 4, 4)), fxfycxcy=np.ones((4, 8, 4))),
    )  # fmt: skip
    used, pixels = {}, np.prod(shape)
    for low in (16, 128):
        crops = partial(
            step.random_crops, patch=16, render_size=(low, 128), antialias=antialias, foreground=False
        )  # fmt: skip
        compiled = jax.jit(crops).lower(jax.random.key(0), views).compile()
        used[low] = compiled.memory_analysis().temp_size_in_bytes
    # All images as floats are 16 bytes a pixel. One of eight views is 2, and the resize may copy it; windows of 19 x 19 pixels are
    # hardly any. The rest is copies of the bytes: at most two, as this compiler without optimisation makes them.
    assert used[16] < 10 * pixels
    assert used[128] < 8 * pixels


def test_without_antialiasing_a_window_is_points_with_gaps():
    views = gradient_views(48)
    # The middle two of four columns are white. A point is between these, while a filter sees all four.
    columns = np.float32((np.arange(48) + 1) // 2 % 2)
    views = views.replace(rgb=np.tile(columns, (48, 1))[None, None, ..., None].repeat(3, -1))
    sharp, smooth = (
        step.random_crops(jax.random.key(0), views, 8, (12, 12), antialias, False)[0].rgb
        for antialias in (False, True)
    )
    np.testing.assert_allclose(sharp, 1, atol=1e-5)
    np.testing.assert_allclose(smooth[..., 1:-1, :], 0.5, atol=0.1)


def test_windows_on_the_foreground_hold_a_small_object():
    views = gradient_views(64)
    alpha = np.zeros((1, 1, 64, 64), np.float32)
    alpha[..., 10:14, 50:54] = 1
    views, seen = views.replace(alpha=alpha), {}
    for foreground in (False, True):
        crop = jax.jit(
            lambda key, f=foreground: step.random_crops(key, views, 8, (64, 64), True, f)[
                0
            ].alpha.max()
        )
        seen[foreground] = np.mean([float(crop(jax.random.key(i))) for i in range(40)])
    assert seen[True] > 0.8 and seen[False] < 0.3


def test_a_perfect_rendering_has_no_loss_on_any_background():
    target = compositing.premultiplied(batch(0, 2, 2, 8, 8).target)
    background = step.random_backgrounds(jax.random.key(0), (2, 2), ())
    wanted = compositing.blend(target, background)
    rendering = Rendering(rgb=target.rgb, alpha=target.alpha)
    np.testing.assert_allclose(
        losses.mse(compositing.blend(rendering, background), wanted), 0, atol=1e-12
    )
    corner = jnp.broadcast_to(background[:, :, 0, 0], wanted.rgb[:, :, 0, 0].shape)
    np.testing.assert_allclose(wanted.rgb[:, :, 0, 0], corner, rtol=1e-6)  # no ball in the corner


def test_backgrounds_have_the_given_greys():
    colours = step.random_backgrounds(jax.random.key(0), (8, 8), (0.0, 0.5, 1.0))
    assert set(np.unique(colours)) == {0.0, 0.5, 1.0}
    assert np.ptp(np.asarray(colours), axis=-1).max() == 0


def test_bytes_and_floats_are_the_same_images():
    source = batch(0, 1, 1, 8, 8).source
    as_bytes = source.replace(
        rgb=np.uint8(source.rgb * 255 + 0.5), alpha=np.uint8(source.alpha * 255)
    )
    a, b = (compositing.on_background(views, 0.5) for views in (source, as_bytes))
    assert a.alpha is None and b.alpha is None
    np.testing.assert_array_equal(a.rgb[0, 0, 0, 0], 0.5)  # the corner has no ball
    np.testing.assert_allclose(a.rgb, b.rgb, atol=0.5 / 255 + 1e-6)  # rounding to 8 bits


def test_all_images_of_a_scene_change_colour_alike_and_every_other_scene_stays():
    scenes = batch(0, 64, 2, 8, 8)
    given = scenes.source, compositing.premultiplied(scenes.target)
    changed = jax.jit(step.recolored)(jax.random.key(0), *given)
    kept = 0
    for i in range(64):
        before, after = (
            np.concatenate([np.asarray(images.rgb)[i].reshape(-1, 3) for images in x])
            for x in (given, changed)
        )
        change, *_ = np.linalg.lstsq(before, after)
        np.testing.assert_allclose(before @ change, after, atol=1e-5)
        if np.abs(before - after).max() < 1e-6:
            kept += 1
        else:
            assert ((np.abs(change) > 1e-4).sum(0) == 1).all()  # channels are permuted
            assert 0.6 - 1e-4 < change.max(0).min() and change.max() < 1 + 1e-4
    assert 20 < kept < 44
    for x, y in zip(given, changed, strict=True):
        np.testing.assert_array_equal(x.alpha, y.alpha)


def test_train_psnr_comes_from_the_mean_error_and_not_from_empty_windows():
    """Half of the windows show only the background, which a model without density renders perfectly.

    The programs are those of the test of accumulated gradients.
    """
    scenes = batch(0, 4, 1, 32, 16)
    alpha = scenes.target.alpha * np.float32([1, 0, 1, 0])[:, None, None, None]
    scenes = scenes.replace(target=scenes.target.replace(alpha=alpha))
    psnr = {}
    for accumulate in (1, 2):
        init, update = functions(scenes.source, **WHOLE_VIEWS, accumulate=accumulate)
        _, scalars = jax.jit(update)(jax.jit(init)(), scenes, {})
        psnr[accumulate] = scalars["train/psnr"]
        np.testing.assert_allclose(
            psnr[accumulate], -10 * np.log10(scalars["train/mse"]), rtol=1e-5
        )
    assert psnr[1] < 30
