"""Runs the commands of docs/training.md from 3D files to a model. Kills the training run midway."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TIMES = ("samples_per_second", "mfu", "data_wait")


def commands(folder):
    """The commands of the page by program, changed to write into `folder` instead of `runs/toys`."""
    text = (ROOT / "docs" / "training.md").read_text()
    block = re.search(r"<!-- journey -->\s*```sh\n(.*?)```", text, re.S)[1]
    lines = block.replace("\\\n", " ").strip().splitlines()
    words = [[w.replace("runs/toys", str(folder)) for w in shlex.split(x, comments=True)] for x in lines]  # fmt: skip
    return {Path(w[1] if w[0] == "python" else w[0] + "-" + w[1]).stem: w for w in words}


def start(words, devices=1):
    """Starts a command. On one device it compiles as for users; on eight it compiles fast, for slower programs."""
    program = {"python": [sys.executable], "lrm": [sys.executable, "-m", "lrm_jax"]}[words[0]]
    flags = f"--xla_force_host_platform_device_count={devices}"
    if devices > 1:
        flags += " --xla_backend_optimization_level=0"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*program, *words[1:]], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


def run(words, devices=1):
    process = start(words, devices)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def rows(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def without_times(row):
    return {name: value for name, value in row.items() if name not in TIMES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The objects, rendered and built once."""
    path = tmp_path_factory.mktemp("toys")
    run(commands(path)["render_objects"])
    output = run(commands(path)["build_dataset"])
    assert "24 objects" in output
    return path


@pytest.fixture(scope="module")
def trained(folder):
    """The run, trained once on one device, without interruption."""
    run(commands(folder)["lrm-train"])
    return folder / "run"


def training_and_evaluations(workdir):
    """The lines of metrics.jsonl by step, without times, for training and for evaluations."""
    found = {}, {}
    for row in rows(workdir):
        found["val/psnr" in row][row["step"]] = without_times(row)
    return found


@pytest.mark.parametrize("devices", [1, 8])
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(folder, trained, devices):
    train = commands(folder)["lrm-train"]
    workdir = trained if devices == 1 else folder / f"run{devices}"
    straight, killed = (
        [w.replace(str(folder / "run"), f"{workdir}{suffix}") for w in train]
        for suffix in ("", "-killed")
    )
    if workdir != trained:
        run(straight, devices)
    steps, evaluations = training_and_evaluations(workdir)
    assert list(steps) == list(range(1, 13)) and list(evaluations) == [4, 8, 12]

    moment = random.randint(3, 10)  # after the first checkpoint
    process = start(killed, devices)
    while process.poll() is None and len(rows(Path(f"{workdir}-killed"))) < moment:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = rows(Path(f"{workdir}-killed"))
    assert moment <= len(before), f"killed at step {moment}"
    assert not (Path(f"{workdir}-killed") / "model.safetensors").exists()
    run(killed, devices)
    steps_again, evaluations_again = training_and_evaluations(Path(f"{workdir}-killed"))
    assert steps_again == steps, f"killed at line {moment}"
    # An evaluation that was interrupted is not repeated, so that a crash in an evaluation cannot come again.
    assert len(evaluations_again) >= 2 and evaluations_again.items() <= evaluations.items()


def test_what_was_trained_is_evaluated_and_reconstructs(folder, trained):
    words = commands(folder)
    output = run(words["lrm-evaluate"])
    assert "psnr" in output.lower()
    scores = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert set(scores["mean"]) == {
        "psnr", "ssim", "lpips", "iou", "chamfer", "fscore@0.1", "fscore@0.2", "fscore@0.5"
    }  # fmt: skip
    assert 3 < scores["mean"]["psnr"] < 40 and list(scores["objects"]) == ["toys-box_B"]
    # After twelve steps the field may not reach its level. Then the command must say so in one line. Otherwise it writes a surface.
    process = start(words["lrm-reconstruct"])
    output, _ = process.communicate(timeout=300)
    if process.returncode:
        assert process.returncode == 2 and "error" in output and "surface" in output
    else:
        assert list((folder / "out").rglob("surface.glb"))
