import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lrm_jax import sharding, train_report


def test_the_overview_names_every_parameter_with_its_shape_sharding_and_the_sum():
    device_mesh = sharding.make_device_mesh(2, 2, 2)
    split = NamedSharding(device_mesh, PartitionSpec("fsdp", None))
    params = {
        "blocks": {"fc1": {"kernel": jax.ShapeDtypeStruct((8, 5), jnp.float32, sharding=split)}},
        "scale": jax.ShapeDtypeStruct((3,), jnp.bfloat16),
    }
    lines = train_report.parameter_overview(params).splitlines()
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
                "val/psnr": 18.0,
                "samples_per_second": 1234.56,
                "mfu": 0.4321,
                "data_wait": 0.051,
                "skipped": 2.0,
                "bad_records": 1.0,
                "grad_norm": 1.0,
            },
            "step 100/100  loss 2.0000  psnr 19.88 dB  val 18.00 dB  1234.56 samples/s  MFU 43.2%  data wait 5%"
            "  ETA 0:00:00  skipped 2  bad records 1",
        ),
        (
            {"step": 1, "train/loss": 1.0, "samples_per_second": 0.02, "skipped": 0.0},
            "step 1/100  loss 1.0000  0.02 samples/s  ETA 11:00:00",
        ),
    ],
    ids=["least", "all", "slow"],
)
def test_progress_is_one_line_of_what_the_row_has(row, expected):
    assert train_report.progress_line(row, steps=100, batch_size=8) == expected
