import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lrm_jax.parallel import sharding
from lrm_jax.training import reports
from lrm_jax.types import Batch, Cameras, Rendering, Views


def test_the_overview_names_every_parameter_with_its_shape_sharding_and_the_sum():
    device_mesh = sharding.make_device_mesh(2, 2, 2)
    split = NamedSharding(device_mesh, PartitionSpec("fsdp", None))
    params = {
        "blocks": {"fc1": {"kernel": jax.ShapeDtypeStruct((8, 5), jnp.float32, sharding=split)}},
        "scale": jax.ShapeDtypeStruct((3,), jnp.bfloat16),
    }
    lines = reports.parameter_overview(params).splitlines()
    kernel = next(line for line in lines if "blocks/fc1/kernel" in line)
    assert "(8, 5)" in kernel and "float32" in kernel and "fsdp" in kernel and " 40 " in kernel
    assert lines[-1] == "Total: 43 -- 166 bytes"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"step": 25, "train/loss": 0.12345, "samples_per_second": 8.0},
            "step 25/100  loss 0.1235  8.00 samples/s  ETA 0:01:15",
        ),
        (
            {
                "step": 100.0,
                "train/loss": 2.0,
                "train/psnr": 19.876,
                "samples_per_second": 1234.56,
                "mfu": 0.4321,
                "data_wait": 0.051,
                "skipped": 2.0,
                "bad_records": 1.0,
                "grad_norm": 1.0,
            },
            "step 100/100  loss 2.0000  psnr 19.88 dB  1234.56 samples/s  MFU 43.2%  data wait 5%"
            "  ETA 0:00:00  skipped 2  bad records 1",
        ),
        (
            {"step": 1, "train/loss": 1.0, "samples_per_second": 0.02, "skipped": 0.0},
            "step 1/100  loss 1.0000  0.02 samples/s  ETA 11:00:00",
        ),
    ],
    ids=["least", "all", "slow"],
)
def test_progress_is_one_line_with_the_values_of_the_row(row, expected):
    assert reports.progress_line(row, steps=100, batch_size=8) == expected


def test_the_psnr_of_a_report_comes_from_the_mean_error():
    rows = [{"train/psnr": x, "train/loss": y, "skipped": 0} for x, y in ((10.0, 1.0), (30.0, 3.0))]
    means = reports.mean_of([*rows, {"train/psnr": np.nan, "train/loss": np.nan, "skipped": 1}])
    np.testing.assert_allclose(means["train/psnr"], -10 * np.log10((0.1 + 0.001) / 2))
    assert means["train/loss"] == 2.0 and means["skipped"] == 1


def test_a_line_of_an_evaluation_has_all_scores():
    line = reports.evaluation_line(5, 10, {"val/psnr": 18.0, "val/source_psnr": 20.0})
    assert line == "step 5/10  held-out scenes:  psnr 18.00 dB  given views 20.00 dB"


@pytest.mark.parametrize("side", [4, 600])
def test_a_grid_shows_the_source_and_target_render_and_depth_of_each_view(side):
    """Larger images are thinned to every second pixel or fewer."""
    cameras = Cameras(c2w=jnp.zeros((2, 1, 4, 4)), fxfycxcy=jnp.zeros((2, 1, 4)))
    shape = (2, 2, side, side)
    red, green = (jnp.broadcast_to(jnp.eye(3)[i], (*shape, 3)) for i in (0, 1))
    batch = Batch(
        source=Views(
            rgb=jnp.full((2, 1, 8, 8, 3), 40, jnp.uint8),
            alpha=jnp.full((2, 1, 8, 8), 255, jnp.uint8),
            cameras=cameras,
        ),
        target=Views(rgb=red, cameras=cameras),
    )
    ramp = jnp.broadcast_to(jnp.arange(side, dtype=jnp.float32), shape)
    whole = Rendering(rgb=green, alpha=jnp.ones(shape), depth=ramp)
    images = jax.tree.map(np.asarray, reports.grid_images(batch, whole))
    grid = reports.image_grid(images)
    shown = {4: 4, 600: 200}[side]
    assert grid.shape == (2 * shown, 7 * shown, 3) and grid.dtype == np.uint8
    tiles = grid.reshape(2, shown, 7, shown, 3).swapaxes(1, 2)
    assert (tiles[:, 0] == 40).all()
    for v in (0, 1):
        assert (tiles[:, 1 + 3 * v] == (255, 0, 0)).all()
        assert (tiles[:, 2 + 3 * v] == (0, 255, 0)).all()
        assert (np.diff(tiles[:, 3 + 3 * v, :, ::2, 0].astype(int)) <= 0).all()
    without = reports.grid_images(batch, Rendering(rgb=green))
    assert reports.image_grid(jax.tree.map(np.asarray, without)).shape == (
        2 * shown,
        5 * shown,
        3,
    )
