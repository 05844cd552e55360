"""tools/bench.py gpu: its steps at tiny sizes, its time limits with failing steps, its table, and its message without a GPU."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lrm_jax.commands import train
from lrm_jax.parallel import sharding
from lrm_jax.training import setup

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import bench_gpu  # noqa: E402
import bench_steps  # noqa: E402
import measure  # noqa: E402

# A program of steps for `bench_gpu.run_steps`: one gives a number, one raises, one prints, one hangs, one crashes its process.
PROGRAM = """
import os, sys, time
sys.path.insert(0, {tools!r})
import bench_gpu
from bench_steps import Step

def raises():
    raise ValueError("no such size\\nmore")

def prints():
    print("not a result")
    return dict(ms=2.0)

def hangs():
    with open({pid!r}, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)

RUNS = dict(number=lambda: dict(ms=1.0), raises=raises, prints=prints, hangs=hangs, ends=lambda: os._exit(7))
bench_gpu.run_here([Step(name, 0, RUNS[name.split()[0]]) for name in sys.argv[1:]])
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(tools=str(ROOT / "tools"), pid=str(tmp_path / "pid")))
    return [sys.executable, str(path)]


def step(work, limit=60.0, alone=False):
    return bench_gpu.Step(work, limit, None, alone)


def test_a_step_that_fails_is_reported_and_the_rest_continues(program, tmp_path):
    steps = [
        step("number"), step("raises"), step("prints"), step("hangs", limit=1.0), step("ends"), step("number alone", alone=True)
    ]  # fmt: skip
    rows, times = [], []

    def record(row):
        rows.append(row)
        times.append(time.monotonic())

    bench_gpu.run_steps(steps, program, 300.0, record)
    assert [row["work"] for row in rows] == [x.work for x in steps]
    assert [row.get("ms") for row in rows] == [1.0, None, 2.0, None, None, 1.0]
    assert rows[1]["failed"] == "ValueError: no such size"
    assert rows[3]["failed"] == "took longer than 1 s"
    assert rows[4]["failed"] == "its process ended with code 7"
    assert all("jax" in row["machine"] for row in rows)
    assert times[-1] - times[0] > 1.0  # the first row came before the others ran
    with pytest.raises(ProcessLookupError):  # the process that hung is gone
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_when_the_time_is_over_the_running_step_is_stopped_and_the_rest_is_listed(program):
    rows = []
    steps = [step("hangs"), step("number"), step("number alone", alone=True)]
    bench_gpu.run_steps(steps, program, 1.0, rows.append)
    assert [row["work"] for row in rows] == [x.work for x in steps]
    assert "the time for all works was over" in rows[0]["failed"]
    assert [row["failed"] for row in rows[1:]] == ["not run: the 1 s for all works were over"] * 2


def test_results_are_written_and_printed_as_they_come(monkeypatch, tmp_path, capsys):
    works, out = [x.work for x in bench_steps.STEPS[:3]], tmp_path / "out" / "bench.jsonl"

    def run_steps(steps, program, seconds, record):
        assert seconds == 120
        for count, x in enumerate(steps, 1):
            record({"work": x.work, "ms": 1.5 * count, "tflop": 3.0})
            assert len(out.read_text().splitlines()) == count
            assert f"{1.5 * count:g} ms" in capsys.readouterr().out

    monkeypatch.setattr(bench_gpu, "run_steps", run_steps)
    assert bench_gpu.main([*works, "--minutes", "2", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["work"] for row in rows} >= set(works) and "commit" in rows[0]


@pytest.mark.parametrize("failed, code", [((), 0), ((1,), 1), ((0, 1), 2)])
def test_the_exit_code_tells_whether_all_some_or_no_works_failed(
    monkeypatch, tmp_path, failed, code
):
    works = [x.work for x in bench_steps.STEPS[:2]]

    def run_steps(steps, program, seconds, record):
        for i, work in enumerate(works):
            record({"work": work, **({"failed": "why"} if i in failed else {"ms": 1.0})})

    monkeypatch.setattr(bench_gpu, "run_steps", run_steps)
    assert bench_gpu.main([*works, "--out", str(tmp_path / "bench.jsonl")]) == code


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "bench.py"), "gpu", "--out", "bench.jsonl"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "finds no GPU" in done.stderr
    assert not list(tmp_path.iterdir())


def test_every_step_has_a_row_with_the_originals_in_the_file_and_in_the_docs():
    known = bench_gpu.read_originals()
    assert [x.work for x in bench_steps.STEPS] == list(known)
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for row in known.values():
        columns = bench_gpu.table_row(row, {}).split(" | ")[:4]
        assert " | ".join(columns) in page


# -- the steps


TINY = dict(family="triposr", variant="tiny", dtype="float32")


@pytest.mark.parametrize("gradient", [False, True])
def test_operations_of_the_pieces_are_those_of_their_products(gradient):
    """The gradient has three times as many, and for attention, which recomputes its scores, four times as many."""
    points = dict(num_points=256, width=16, gradient=gradient)
    times = 3 if gradient else 1
    mlp = 2 * 256 * (16 * 16 * 2 + 16 * 4) * times
    rows = [
        (bench_steps.products(num_layers=4, **points), mlp),
        (bench_steps.field(side=8, num_layers=4, **points), mlp),
        (bench_steps.lookup(side=8, **points), 0),
        (
            bench_steps.attention(2, 128, 65, heads=2, gradient=gradient),
            4 * 2 * 128 * 65 * 2 * 64 * (4 if gradient else 1),
        ),
    ]
    if not gradient:
        rows.append((bench_steps.product(64), 2 * 64**3))
    for row, work in rows:
        np.testing.assert_allclose(1e12 * row["tflop"], work, rtol=1e-4)  # five digits
        assert row["ms"] > 0 and row["peak_gb"] > 0 and row["planned_gb"] > 0


@pytest.mark.parametrize(
    "run",
    [
        functools.partial(bench_steps.planes, **TINY),
        functools.partial(bench_steps.planes, "lrm", "tiny", "bfloat16"),
        functools.partial(bench_steps.view, **TINY, side=8),
        functools.partial(bench_steps.mesh, **TINY, resolution=32),
        functools.partial(bench_steps.encode_views, "lvsm", "tiny", 2, "bfloat16"),
        functools.partial(bench_steps.frame, "tiny", 2, num_frames=3),
        functools.partial(bench_steps.training_step, "lvsm_scenes.py:tiny"),
    ],
    ids=["planes", "planes-lrm", "view", "mesh", "encode_views", "frame", "training_step"],
)
def test_each_step_measures_a_tiny_model(run):
    row = run()
    assert row["ms"] > 0 and row["tflop"] > 0 and row["first_seconds"] > 0
    np.testing.assert_allclose(row["tflop_per_second"], row["tflop"] / row["ms"] * 1e3, rtol=1e-3)
    json.dumps(row)


def test_the_timed_update_is_not_skipped():
    """It would be skipped if the gradient were not finite."""
    config, *_ = train.parse(
        ["--config", f"{ROOT}/configs/lvsm_scenes.py:tiny", "--workdir", "unused"]
    )  # fmt: skip
    device_mesh = sharding.make_device_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(device_mesh):
        run = setup.make_run(config, device_mesh)
        state = measure.random_state(run.abstract_state)
        batch = bench_steps.noise_batch(config, device_mesh)
        _, scalars = run.step(state, batch, {})
    assert 0 < scalars["grad_norm"] < np.inf and int(scalars["skipped"]) == 0
