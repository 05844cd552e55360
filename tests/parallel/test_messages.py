"""What a long job prints on stderr, on a terminal and in a log file."""

import io
import sys
import types

import pytest

from lrm_jax.parallel import messages


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that moves only when it is told to."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(messages, "time", types.SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


def run(clock, items, seconds: float, total=None, label="views") -> list:
    """Runs a loop that takes `seconds` for each item."""
    passed = []
    for item in messages.progress(items, total, label):
        clock.now += seconds
        passed.append(item)
    return passed


def test_a_log_file_gets_a_line_every_ten_seconds_and_one_at_the_end(clock, capsys):
    assert run(clock, range(9), 4.0) == list(range(9))
    assert capsys.readouterr().err.splitlines() == [
        "views: 3 of 9 (12.0 s)",
        "views: 6 of 9 (24.0 s)",
        "views: 9 of 9 (36.0 s)",
    ]


def test_a_log_file_has_no_carriage_returns(clock, capsys):
    run(clock, range(100), 1.0)
    printed = capsys.readouterr().err
    assert printed.endswith("views: 100 of 100 (100.0 s)\n") and "\r" not in printed
    assert printed.count("\n") == 10  # after 10, 20, ... 90 s, and at the end


@pytest.mark.parametrize("seconds, lines", [(0.1, 0), (0.6, 0), (0.7, 1)])
def test_a_loop_of_less_than_two_seconds_prints_nothing(clock, capsys, seconds, lines):
    run(clock, range(3), seconds)
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_the_number_of_items_may_be_unknown(clock, capsys):
    assert run(clock, iter("ab"), 11.0, label="") == ["a", "b"]
    assert capsys.readouterr().err == "1 (11.0 s)\n2 (22.0 s)\n"
    run(clock, iter("ab"), 11.0, total=2)
    assert capsys.readouterr().err == "views: 1 of 2 (11.0 s)\nviews: 2 of 2 (22.0 s)\n"


def test_a_terminal_gets_a_bar_that_disappears(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(messages, "DELAY", 0.0)
    assert list(messages.progress(range(3), 3, "views")) == [0, 1, 2]
    printed = sys.stderr.getvalue()
    assert "views" in printed and "\r" in printed and printed.split("\r")[-1].strip() == ""


def test_the_note_about_the_first_time_is_printed_once(clock, capsys):
    stages = messages.Stages()
    for number in (1, 2):
        with stages("encode", f" image {number}", first=" (compiling)"):
            clock.now += 2.0
    with stages("render", first=" (compiling)"):
        clock.now += 1.0
    assert stages.seconds == {"encode": 4.0, "render": 1.0}
    assert capsys.readouterr().err.splitlines() == [
        "[   0.0 s] encode image 1 (compiling)",
        "[   2.0 s] encode image 2",
        "[   4.0 s] render (compiling)",
    ]


def test_a_failed_stage_is_timed_and_counts_as_the_first(clock, capsys):
    stages = messages.Stages()
    with pytest.raises(ValueError), stages("encode", first=" (compiling)"):
        clock.now += 3.0
        raise ValueError
    with stages("encode", first=" (compiling)"):
        pass
    assert stages.seconds == {"encode": 3.0}
    assert capsys.readouterr().err.count("(compiling)") == 1
