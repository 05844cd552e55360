"""The commands tools/aot.py and tools/bench_train.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import aot  # noqa: E402
import bench_train  # noqa: E402
import chips  # noqa: E402

from lrm_jax.types import InputError  # noqa: E402


def test_an_unknown_topology_is_named():
    with pytest.raises(InputError, match="v9:2x2: must be cpu, or one of v4, v5p, v5e, v6e, a100"):
        chips.open_topology("v9:2x2")


def test_gpus_are_given_as_a_number_or_as_hosts_times_gpus(capsys):
    arguments = ["--topology", "h100:2x2x2", "--config", f"{ROOT}/configs/nano.py:tiny"]
    assert aot.main(arguments) == 2
    printed = capsys.readouterr().err
    assert "hosts x GPUs" in printed and "jax[cuda13]" in printed and printed.count("\n") == 1


def test_aot_prints_memory_collectives_and_work_of_a_cpu(capsys):
    assert aot.main(["--topology", "cpu", "--config", f"{ROOT}/configs/nano.py:tiny"]) == 0
    lines = capsys.readouterr().out
    assert "triposr:tiny on 1 x cpu" in lines
    for word in (
        "arguments",
        "temporaries",
        "collectives",
        "as compiled",
        "step: ",
        "evaluation: ",
    ):
        assert word in lines
    share = float(lines.split(" of the share")[0].split()[-1])
    # It is below 1 because XLA drops unused work. If work were done twice, it would be 2.
    np.testing.assert_allclose(share, 1.0, atol=0.1)


def test_a_program_that_this_jax_cannot_read_is_one_line(monkeypatch, capsys):
    """Such as a program for v6e from libtpu 0.0.52, with jax 0.10.2."""

    def as_text(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nmore")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", as_text)
    # Fails for a program that compiles quickly.
    small = jax.jit(jax.numpy.sin).trace(jax.ShapeDtypeStruct((8,), "float32"))
    monkeypatch.setattr(aot.setup, "trace_programs", lambda config, device_mesh: {"step": small})
    monkeypatch.setattr(aot, "needed_by_step", lambda config, device_mesh: 1.0)
    assert aot.main(["--topology", "cpu", "--config", f"{ROOT}/configs/nano.py:tiny"]) == 2
    printed = capsys.readouterr()
    assert "temporaries" in printed.out
    assert "RET_CHECK" in printed.err and "jax[tpu]" in printed.err and printed.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v6e:2x2"])
def test_aot_compiles_for_tpus(topology, capsys):
    pytest.importorskip("libtpu")
    assert aot.main(["--topology", topology, "--config", f"{ROOT}/configs/nano.py:tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("bound by") and "MFU" in line for line in lines)
    assert any(line.startswith("evaluation: ") and "GB in all" in line for line in lines)


@pytest.mark.slow
def test_aot_compiles_for_a_gpu_with_cudnns_attention_and_the_fused_field():
    """Runs in a separate process, because the plugin's settings are read when JAX starts."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    command = [sys.executable, "tools/aot.py", "--topology", "h100:1", "--config", "configs/openlrm.py:tiny"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    step, evaluation = done.stdout.split("evaluation: ")

    def written(text, kind):
        (line,) = [line for line in text.splitlines() if kind in line]
        return int(line.split()[-2])

    assert written(step, "cuDNN attention forward") == written(step, "cuDNN attention backward") > 0
    assert written(evaluation, "cuDNN attention forward") >= 1
    assert written(step, "kernel field_forward") >= 1
    assert written(step, "kernel field_backward") >= 1
    assert written(step, "scatter-add of bf16") == written(step, "scatter-add of f16") == 0
    assert "bound by" in step


def test_bench_train_prints_the_rates_of_a_step(capsys, tmp_path):
    arguments = ["--steps", "1", "--json", str(tmp_path / "rates.json")]
    config = f"{ROOT}/configs/lvsm_objects.py:tiny"  # compiles faster than a renderer
    arguments += ["--config", config, "--config.data.name=procedural"]
    assert bench_train.main(arguments) == 0
    printed = capsys.readouterr().out
    for word in ("samples/s", "mfu", "planned for one device", "loader"):
        assert word in printed
    row = json.loads((tmp_path / "rates.json").read_text())
    assert row["with_recomputation"] > row["mfu"] > 0
