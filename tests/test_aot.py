"""What tools/hlo.py counts in compiled programs, against closed forms; and tools/aot.py's command line."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import aot  # noqa: E402
import bench_train  # noqa: E402
import hlo  # noqa: E402

from lrm_jax import sharding  # noqa: E402
from lrm_jax.types import InputError  # noqa: E402


def count(function, *arguments, **jit):
    return hlo.count(jax.jit(function, **jit).lower(*arguments).compile().as_text())


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products_in_nested_loops_count_as_often_as_they_run():
    def inner(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x), None

    costs = count(lambda x, w: jax.lax.scan(inner, x, w)[0], shape(8, 64), shape(5, 64, 64))
    assert costs.flops == 5 * 3 * 2 * 8 * 64 * 64
    assert costs.loops_of_unknown_length == 0


def test_a_loop_without_a_readable_length_is_counted_once_and_reported():
    def function(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 1e3, lambda x: x @ w, x)

    costs = count(function, shape(8, 64), shape(64, 64))
    assert costs.flops == 2 * 8 * 64 * 64
    assert costs.loops_of_unknown_length == 1


def test_convolutions_count_the_taps_that_meet_the_picture():
    costs = count(
        lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        shape(2, 6, 6, 4), shape(3, 3, 4, 8),
    )  # fmt: skip
    taps = (3 * 6 - 2) ** 2  # of each row of 6 pixels, 4 have three taps and 2 have two
    assert costs.flops == 2 * 2 * 8 * 4 * taps


@pytest.mark.parametrize(
    ("line", "left", "right", "flops"),
    [
        # As libtpu 0.0.42 writes them for a v4; T(...) is the tiling. [16 scenes, 16 heads] are batch axes, disguised as space.
        (
            "bf16[16,16,64,3072]{3,2,1,0:T(8,128)(2,1)} convolution(%a, %b), window={size=16x16 stride=15x15 lhs_dilate=16x16}, dim_labels=0f1b_01oi->01bf",
            "bf16[16,1024,16,64]{3,2,1,0}", "bf16[16,16,3072,1024]{3,2,1,0}", 2 * 16 * 16 * 64 * 3072 * 1024,
        ),
        (
            "bf16[16,3072,16,64]{1,3,2,0:T(8,128)(2,1)S(3)} convolution(%a, %b), window={size=1x16 pad=0_0x15_15 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f",
            "bf16[16,3072,1024,1]{1,2,3,0}", "bf16[16,64,1024,1]{2,1,0,3}", 2 * 16 * 3072 * 1024 * 1024,
        ),
    ],
)  # fmt: skip
def test_a_tpus_products_written_as_convolutions_are_counted_as_products(line, left, right, flops):
    text = (
        f"HloModule m\n\nENTRY %main (a: f32[], b: f32[]) -> f32[] {{\n  %a = {left} parameter(0)\n"
        f"  %b = {right} parameter(1)\n  ROOT %c = {line}\n}}\n"
    )
    assert hlo.count(text).flops == flops


def test_collectives_have_the_bytes_of_their_arrays():
    device_mesh = sharding.make_device_mesh(data=1, fsdp=8)
    rows, whole = (NamedSharding(device_mesh, PartitionSpec(*x)) for x in (("fsdp",), ()))
    batch, kernel = (
        jax.ShapeDtypeStruct(s, jnp.float32, sharding=rows) for s in ((64, 32), (32, 16))
    )

    def gradient(kernel, batch):
        return jax.grad(lambda k: jnp.tanh(batch @ k).sum())(kernel)

    gathered = count(gradient, kernel, batch, out_shardings=whole)
    gather, reduce = gathered.collectives["all-gather"], gathered.collectives["all-reduce"]
    assert (gather.count, gather.payload, gather.sent) == (1, 32 * 16 * 4, 32 * 16 * 4 * 7 / 8)
    assert (reduce.count, reduce.payload, reduce.sent) == (1, 32 * 16 * 4, 32 * 16 * 4 * 2 * 7 / 8)
    # Each of 8 devices has an eighth of the batch.
    assert gathered.flops == 2 * (2 * 8 * 32 * 16)


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", 4),
        ("replica_groups=[2,4]<=[8], use_global_device_ids=true", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", 2),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}, dimensions={0}", 8),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0','axis_1'}, dimensions={0}", 16),
    ],
)
def test_group_sizes_are_read_from_every_notation(written, size):
    assert hlo.group_size(written) == size


def test_stacked_layers_are_read_once_and_not_once_a_layer():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    costs = count(layers, shape(8, 256), shape(16, 256, 256))
    weights = 16 * 256 * 256 * 4
    # Copied out of the stack (read and written) and read by the product, in a program of at most a few more small arrays.
    assert weights <= costs.memory_bytes < 4 * weights


def test_arrays_that_stay_on_the_chip_are_told_apart():
    both = (
        "(f32[2,128]{1,0:T(2,128)S(1)}, /*index=1*/bf16[128]{0:T(256)(128)(2,1)}, pred[]{:T(128)})"
    )
    assert hlo.array_bytes(both) == 1024 + 256 + 1
    assert hlo.array_bytes(both, main_memory_only=True) == 256 + 1


def test_an_unknown_topology_is_named():
    with pytest.raises(InputError, match="v9:2x2: must be cpu, or one of v4, v5p, v5e, v6e"):
        aot.open_topology("v9:2x2")


def test_aot_prints_memory_collectives_and_work_of_a_cpu(capsys):
    assert aot.main(["--topology", "cpu", "--config", f"{ROOT}/configs/nano.py:tiny"]) == 0
    lines = capsys.readouterr().out
    assert "triposr:tiny on 1 x cpu" in lines
    for word in ("arguments", "temporaries", "collectives", "step as compiled"):
        assert word in lines
    share = float(lines.split(" of the share")[0].split()[-1])
    # What XLA could drop as unused makes it less than 1; work done twice would make it 2.
    np.testing.assert_allclose(share, 1.0, atol=0.1)


def test_a_program_that_this_jax_cannot_read_is_one_line(monkeypatch, capsys):
    """As of v6e by libtpu 0.0.52 with jax 0.10.2."""

    def as_text(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nmore")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", as_text)
    assert aot.main(["--topology", "cpu", "--config", f"{ROOT}/configs/nano.py:tiny"]) == 2
    printed = capsys.readouterr()
    assert "temporaries" in printed.out
    assert "RET_CHECK" in printed.err and "jax[tpu]" in printed.err and printed.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v6e:2x2"])
def test_aot_compiles_for_tpus(topology, capsys):
    pytest.importorskip("libtpu")
    assert aot.main(["--topology", topology, "--config", f"{ROOT}/configs/nano.py:tiny"]) == 0
    assert "bound by" in capsys.readouterr().out


def test_bench_train_prints_the_rates_of_a_step(capsys, tmp_path):
    arguments = ["--steps", "1", "--json", str(tmp_path / "rates.json")]
    arguments += ["--config", f"{ROOT}/configs/nano.py:tiny", "--config.data.name=procedural"]
    assert bench_train.main(arguments) == 0
    printed = capsys.readouterr().out
    for word in ("samples/s", "mfu", "planned for one device", "loader"):
        assert word in printed
    row = json.loads((tmp_path / "rates.json").read_text())
    assert row["with_recomputation"] > row["mfu"] > 0
