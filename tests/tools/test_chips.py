"""The costs of products, lookups and transfers in tools/chips.py."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import chips  # noqa: E402
import hlo  # noqa: E402
from chips import CHIPS  # noqa: E402


@pytest.mark.parametrize(
    ("chip", "sizes", "share"),
    [
        ("v4", (4096, 64, 64), 1 / 4),
        ("v4", (64, 4096, 64), 1 / 4),  # the longer side is the rows
        ("v4", (4096, 64, 128), 1 / 2),
        ("v4", (1028, 768, 768), 1028 / 1032),
        ("v4", (4096, 768, 27), 27 / 128),
        ("v6e", (4096, 64, 64), 1 / 16),
        ("h100", (4096, 64, 64), 1),
        ("h100", (100, 4, 64), 100 / 128 / 2),
        ("a100", (100, 4, 64), 100 / 112 / 2),
    ],
)
def test_products_cost_whole_tiles(chip, sizes, share):
    work = 2 * 3 * np.prod(sizes)
    np.testing.assert_allclose(work / chips.tiled_flops({sizes: 3}, CHIPS[chip].tile), share)


ROWS = 2_097_152 * 3 * 4


@pytest.mark.parametrize(
    ("kind", "dtype", "seconds"),
    [("gather", "bf16", 1.1e-3), ("scatter-add", "f32", 12.4e-3), ("scatter-add", "bf16", 4.188)],
)
def test_lookups_of_an_h200_take_the_measured_time(kind, dtype, seconds):
    width = 64 * (4 if dtype == "f32" else 2)
    lookups = {hlo.Lookup(kind, dtype, width, width): ROWS}
    np.testing.assert_allclose(chips.lookup_seconds(lookups, CHIPS["h200"]), seconds, rtol=0.02)
    assert chips.lookup_seconds(lookups, CHIPS["a100"]) > 1.5 * seconds


def test_a_gpu_moves_sectors_of_32_bytes():
    narrow, wide = (
        chips.lookup_seconds({hlo.Lookup("gather", "f32", size, size): 1}, CHIPS["h100"])
        for size in (4, 32)
    )
    assert narrow == wide


def test_a_group_with_one_device_per_host_uses_one_adapter():
    chip = CHIPS["a100"]
    assert chips.link_seconds({0: 300e9}, chip) == 1
    assert chips.link_seconds({1: 25e9}, chip) == 1
    assert chips.link_seconds({8: 200e9}, chip) == 1  # eight adapters
    assert chips.link_seconds({0: 1e9, 1: 1e9}, chip) == 1 / 300 + 1 / 25
    assert chips.link_seconds({0: 270e9}, CHIPS["v4"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5p:2x2x1", "v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lookups_of_a_tpu_take_the_time_that_xla_estimates(topology, dtype):
    pytest.importorskip("libtpu")
    place = jax.sharding.SingleDeviceSharding(chips.open_topology(topology)[0])
    planes, values, places = (
        jax.ShapeDtypeStruct(shape, kind, sharding=place)
        for shape, kind in (((4096, 128), dtype), ((65536, 128), dtype), ((65536,), jnp.int32))
    )
    chip = CHIPS[topology.split(":")[0]]
    for function, arguments in (
        (lambda planes, places: planes[places], (planes, places)),
        (lambda planes, places, values: planes.at[places].add(values), (planes, places, values)),
    ):
        compiled = jax.jit(function).trace(*arguments).lower().compile()
        costs = hlo.count(compiled.as_text())
        # The rows that go in or come out are also written or read once.
        rows = values.size * values.dtype.itemsize / chip.lookups["gather"]
        found = chips.lookup_seconds(costs.lookups, chip) + rows
        np.testing.assert_allclose(found, compiled.cost_analysis()["optimal_seconds"], rtol=0.05)
