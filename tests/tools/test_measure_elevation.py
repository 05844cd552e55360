"""The measurement of the elevation runs from 3D files to its table, in which true matches are nearly exact."""

import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS.parent / "tools"))
import measure_elevation  # noqa: E402


def test_true_matches_are_within_a_degree_and_sift_is_in_the_table(capsys, monkeypatch):
    monkeypatch.setattr(measure_elevation, "BANDS", ((0, 30), (30, 60)))
    assert measure_elevation.main([str(TESTS / "toys.zip"), "--objects", "2"]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in lines] == ["| true matches"] * 3 + ["| SIFT"] * 3
    assert [row[1:3] for row in lines[:3]] == [["0 to 30", "2"], ["30 to 60", "2"], ["all", "4"]]
    assert [row[4] for row in lines[:3]] == ["100%"] * 3


def test_objects_are_spread_evenly_by_name():
    assert measure_elevation.evenly(list("abcdef"), 3) == ["a", "c", "e"]
    assert measure_elevation.evenly(list("ab"), 3) == ["a", "b"]


def test_a_missing_folder_is_one_line(capsys, tmp_path):
    assert measure_elevation.main([str(tmp_path / "none")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_half_transparent_pixels_are_half_white():
    rgba = np.array([[[0, 100, 255, 51]]], np.uint8)
    np.testing.assert_array_equal(measure_elevation.on_white(rgba), [[[204, 224, 255]]])
