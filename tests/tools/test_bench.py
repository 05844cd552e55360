"""tools/bench.py runs. Its `train` is tested in tests/tools/test_aot.py."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import bench  # noqa: E402


def test_a_family_is_timed_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "rows.json"
    command = [sys.executable, ROOT / "tools/bench.py", "lvsm:tiny"]
    options = ["--stages", "encode-1", "--repeats", "0", "--json", path]
    printed = subprocess.check_output([*command, *options], text=True)
    report = json.loads(path.read_text())
    (row,) = report["rows"]
    assert (row["family"], row["stage"]) == ("lvsm:tiny", "encode-1")
    assert row["seconds"] > 0 and row["rate_gflops"] > 0 and row["peak_gb"] > 0
    assert "lvsm:tiny" in printed and report["dtype"] == "float32"


@pytest.mark.parametrize(
    "families, code", [(["lvsm:tiny"], 0), (["lvsm:huge", "lvsm:tiny"], 1), (["lvsm:huge"], 2)]
)
def test_a_family_that_fails_does_not_end_the_others(monkeypatch, tmp_path, capsys, families, code):
    row = {"family": "lvsm:tiny", "stage": "frame-1"}
    popen = subprocess.Popen

    def child(command, **options):
        program = "import sys; sys.exit(3)"
        if "lvsm:tiny" in command:
            program = f"print('{{}}'); print({json.dumps(row)!r})"
        return popen([sys.executable, "-c", program], **options)

    monkeypatch.setattr(subprocess, "Popen", child)
    monkeypatch.setattr(bench, "print_row", lambda row: None)
    monkeypatch.setattr(bench, "commit", lambda: "")
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["bench.py", *families, "--json", str(path)])
    assert bench.main() == code
    assert ("lvsm:huge: its process ended with 3" in capsys.readouterr().err) == (code > 0)
    assert path.exists() == (code < 2)
    assert code == 2 or json.loads(path.read_text())["rows"] == [row]


def test_a_triplane_family_has_a_surface(monkeypatch):
    products = bench.compiled(lambda a: a @ a, (np.eye(64, dtype=np.float32),)), 2 * 64**3
    monkeypatch.setattr(bench, "plain_products", lambda dtype: products)
    rows = list(bench.measure("triposr:tiny", ["encode", "surface"], 0, "float32"))
    assert [row["stage"] for row in rows] == ["encode", "surface"]
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 for row in rows)
