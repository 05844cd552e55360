"""LoFTR, compared with tensors of the PyTorch reference (tests/goldens/README.md), stage by stage."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from lrm_jax.models.parts import torch_layout
from lrm_jax.two_stage import loftr
from lrm_jax.types import InputError
from lrm_jax.weights import tensor_files

TINY = loftr.LoFTR(widths=(16, 24, 32), num_heads=4, num_coarse=2)
GRID = (14, 14)  # coarse cells of the golden's images


def close(actual, wanted, relative=1e-4):
    """Relative to the largest value. 1e-4: the tolerance that is stated with the goldens."""
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, atol=relative * np.abs(wanted).max(), rtol=0)


@pytest.fixture(scope="module")
def golden(goldens):
    with safe_open(goldens / "loftr_tiny.safetensors", "np") as f:
        return {key: f.get_tensor(key) for key in f.keys()}


@pytest.fixture(scope="module")
def state(golden):
    return {k.removeprefix("state."): v for k, v in golden.items() if k.startswith("state.")}


@pytest.fixture(scope="module")
def params(state):
    return loftr.from_torch(state, TINY)


@pytest.fixture(scope="module")
def stages(golden, params):
    """Each stage's result, from ours of the stage before; the windows of all candidates."""

    @jax.jit
    def run(params, grey):
        model = TINY.bind({"params": params})
        coarse, fine = model.features(grey)
        x, y = model.relate(tuple(coarse))
        confidence = loftr.confidences(x, y)
        found = loftr.best_matches(confidence, GRID, GRID, TINY.max_matches)
        windows = (model.windows(fine[0], x, found.i, 14), model.windows(fine[1], y, found.j, 14))
        related = model.relate_windows(*windows)
        return dict(
            coarse=coarse, fine=fine, x=x, y=y, confidence=confidence, found=found,
            windows=windows, related=related, offset=loftr.offsets(*related),
        )  # fmt: skip

    grey = np.concatenate([golden["in.image0"], golden["in.image1"]])[:, 0]
    out = run(params, grey)
    return types.SimpleNamespace(**out, valid=np.asarray(out["found"].valid))


def test_features_match(golden, stages):
    close(stages.coarse.transpose(0, 3, 1, 2), golden["act.coarse"])
    close(stages.fine.transpose(0, 3, 1, 2), golden["act.fine"])


def test_the_position_code_matches_and_counts_from_1(golden):
    code = loftr.position_code(*GRID, 32)
    coarse = golden["act.coarse"][0].transpose(1, 2, 0)
    close((coarse + code).reshape(1, 196, 32), golden["act.coarse0_with_position"])
    x, y, frequency = 4, 2, 1e4 ** (-2 * 3 / 16)  # column 3, row 1; the fourth frequency
    wanted = [f(p * frequency) for p in (x, y) for f in (np.sin, np.cos)]
    np.testing.assert_allclose(code[1, 3, 12:16], wanted, rtol=1e-6)


def test_coarse_features_and_confidences_match(golden, stages):
    close(stages.x[None], golden["act.coarse0_out"])
    close(stages.y[None], golden["act.coarse1_out"])
    close(stages.confidence[None], golden["out.confidence"])


def test_the_second_image_attends_to_what_the_first_has_become(params):
    """With the first image as it was before, its features would be others by far more than the golden's tolerance."""
    block = loftr.TransformerPair(num_heads=4)
    weights = jax.tree.map(lambda x: x[0], params["coarse"])
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 6, 32))
    (_, second), _ = block.apply({"params": weights}, (x, y))
    layer = loftr.TransformerLayer(num_heads=4)
    of_self, of_cross = ({"params": weights[f"{k}_attention"]} for k in ("self", "cross"))
    x, y = layer.apply(of_self, x, x), layer.apply(of_self, y, y)
    close(second, layer.apply(of_cross, y, layer.apply(of_cross, x, y)))
    assert np.abs(second - layer.apply(of_cross, y, x)).max() > 0.01 * np.abs(second).max()


def test_the_same_cells_match(golden, stages):
    found, valid = stages.found, stages.valid
    np.testing.assert_array_equal(found.i[valid], golden["out.i"])
    np.testing.assert_array_equal(found.j[valid], golden["out.j"])
    close(found.confidence[valid], golden["out.mconf"])
    assert len(valid) == 196  # as many candidates as cells: fewer than max_matches


def test_windows_and_the_second_point_match(golden, stages):
    """The golden's third number of `expec_f`, the spread of the second point, only weights the training loss."""
    for number in (0, 1):
        close(stages.windows[number][stages.valid], golden[f"act.window{number}"])
        close(stages.related[number][stages.valid], golden[f"act.fine{number}_out"])
    close(stages.offset[stages.valid] / 4, golden["out.expec_f"][:, :2])


def test_points_match_and_the_first_stays_at_the_corner_of_its_cell(golden, params):
    grey = np.concatenate([golden["in.image0"], golden["in.image1"]])[:, 0]
    found, xy0, xy1 = jax.jit(TINY.apply)({"params": params}, grey)
    valid = np.asarray(found.valid)
    np.testing.assert_array_equal(xy0[valid], golden["out.mkpts0_f"])
    np.testing.assert_array_equal(xy0[valid], golden["out.mkpts0_c"])
    np.testing.assert_array_equal(loftr.corners(found.j, 14)[valid], golden["out.mkpts1_c"])
    close(xy1[valid], golden["out.mkpts1_f"])


@pytest.mark.parametrize("shapes", [((6, 7), (6, 7)), ((7, 5), (5, 7))])
def test_cells_at_the_edges_of_either_image_have_no_match(shapes):
    confidence = np.eye(np.prod(shapes[0]), dtype=np.float32)
    found = loftr.best_matches(jnp.asarray(confidence), *shapes, 1000)
    inside = [
        {int(k) for k in np.arange(np.prod(s)).reshape(s)[2:-2, 2:-2].reshape(-1)} for s in shapes
    ]
    assert set(np.asarray(found.i)[found.valid].tolist()) == inside[0] & inside[1]


def test_a_match_is_the_best_of_both_cells_and_confident():
    """In a 6 x 6 grid the cells 14, 15, 20, 21 are inside."""
    confidence = np.zeros((36, 36), np.float32)
    confidence[14, 15] = 0.4  # cell 15's best is another
    confidence[20, 15] = 0.5
    confidence[15, 20] = 0.2  # not above the threshold
    confidence[21, 21], confidence[21, 0] = 0.3, 0.4  # cell 21's best is at the edge
    found = loftr.best_matches(jnp.asarray(confidence), (6, 6), (6, 6), 1000)
    valid = np.asarray(found.valid)
    assert found.i[valid].tolist() == [20] and found.j[valid].tolist() == [15]


def test_a_smaller_number_of_matches_keeps_the_most_confident(golden):
    confidence = jnp.asarray(golden["out.confidence"][0])
    found = loftr.best_matches(confidence, GRID, GRID, 5)
    best = np.sort(np.argsort(-golden["out.mconf"])[:5])
    assert found.valid.all()
    np.testing.assert_array_equal(found.i, golden["out.i"][best])
    np.testing.assert_array_equal(found.j, golden["out.j"][best])


# -- images


def test_grey_is_opencv_s():
    primaries = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)
    # Of cv2.cvtColor(..., COLOR_RGB2GRAY), OpenCV 5.0.
    assert loftr.grey_bytes(primaries[None]).tolist() == [[76, 150, 29, 255]]


def test_resizing_counts_from_pixel_centres_without_a_low_pass_filter():
    ramp = np.broadcast_to(np.arange(0, 240, 60, dtype=np.uint8), (4, 4))
    # cv2.resize(ramp, (8, 8), interpolation=INTER_LINEAR), OpenCV 5.0.
    assert loftr.resized(ramp, 8)[3].tolist() == [0, 15, 45, 75, 105, 135, 165, 180]
    np.testing.assert_array_equal(loftr.resized(ramp.T, 8), loftr.resized(ramp, 8).T)
    point = np.zeros((9, 9), np.uint8)
    point[4, 4] = 200
    assert loftr.resized(point, 3).tolist() == [[0, 0, 0], [0, 200, 0], [0, 0, 0]]


def test_pairs_of_images_match_as_they_do_alone(golden, params, monkeypatch):
    monkeypatch.setattr(loftr, "SIDE", 112)
    grey = np.rint(255 * np.concatenate([golden["in.image0"], golden["in.image1"]])[:, 0])
    grey = np.stack([grey[0], grey[1], grey[0, ::-1], grey[1, ::-1]]).astype(np.uint8)
    found = loftr.matches(params, np.stack([grey] * 3, axis=-1), TINY)
    assert list(found) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    apply = jax.jit(TINY.apply)
    for (i, j), rows in found.items():
        alone, xy0, xy1 = apply({"params": params}, grey[[i, j]] / np.float32(255))
        valid = np.asarray(alone.valid)
        wanted = np.concatenate(
            [(xy0 + 0.5) * 256 / 112, (xy1 + 0.5) * 256 / 112, alone.confidence[:, None]], -1
        )
        close(rows, wanted[valid])
    assert len(found[0, 1]) and len(found[2, 3])


def test_images_that_are_not_square_bytes_are_refused(params):
    for images in (np.zeros((4, 8, 9, 3), np.uint8), np.zeros((4, 8, 8, 3), np.float32)):
        with pytest.raises(InputError, match="give uint8 .V S S 3."):
            loftr.matches(params, images, TINY)


# -- checkpoints


def test_checkpoints_come_back_to_the_bit(state, params):
    back = loftr.to_torch(params, TINY)
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert back[name].dtype == value.dtype, name
        np.testing.assert_array_equal(back[name], value)
    short = {name.removeprefix("matcher."): value for name, value in state.items()}
    jax.tree.map(np.testing.assert_array_equal, loftr.from_torch(short, TINY), params)


def test_a_torch_file_of_the_published_form_is_read(state, params, tmp_path):
    path = tmp_path / "indoor_ds_new.ckpt"
    tensor_files.write_torch(path, {"state_dict": state})
    read = loftr.from_torch(tensor_files.read(path)[0]["state_dict"], TINY)
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_the_published_manifest_is_consumed_and_produced_exactly(goldens):
    manifest = json.loads((goldens / "manifests" / "loftr.json").read_text())
    shapes = {key: tuple(shape) for key, (shape, _) in manifest["tensors"].items()}
    state = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    ours = loftr.from_torch(state)
    wanted = loftr.param_shapes()
    assert jax.tree.map(np.shape, ours) == jax.tree.map(lambda x: x.shape, wanted)
    assert torch_layout.torch_shapes(loftr.entries(), wanted) == shapes
    types_of = {key: value.dtype.name for key, value in loftr.to_torch(ours).items()}
    assert types_of == {key: dtype for key, (_, dtype) in manifest["tensors"].items()}


@pytest.mark.parametrize("change", ["missing", "extra", "mis-shaped"])
def test_other_tensors_are_refused(state, change):
    name = "matcher.loftr_fine.layers.1.merge.weight"
    state = dict(state)
    if change == "extra":
        name = "matcher.loftr_fine.layers.2.merge.weight"
        state[name] = np.zeros((16, 16), np.float32)
    elif change == "missing":
        del state[name]
    else:
        state[name] = state[name][:8]
    with pytest.raises(
        InputError, match=f"1 tensors are missing, extra or mis-shaped, such as {name}"
    ):
        loftr.from_torch(state, TINY)
