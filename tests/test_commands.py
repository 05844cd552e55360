"""Every command in the pages and docstrings is accepted by its program, and every program is run by a test."""

import argparse
import ast
import re
import runpy
import shlex
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from lrm_jax import __main__
from lrm_jax.commands import train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("lrm_jax/**/*.md")]
MODULES = [path for room in ("lrm_jax", "tools", "configs") for path in ROOT.glob(f"{room}/**/*.py")]  # fmt: skip
TOOLS = {str(path.relative_to(ROOT)) for path in ROOT.glob("tools/*.py") if "__main__" in path.read_text()}  # fmt: skip
RUN_BY = {
    "lrm check": "tests/commands/test_check.py::test_the_bundled_model_looks_right",
    "lrm convert": "tests/models/test_lvsm.py::test_lrm_convert_round_trips_a_checkpoint_to_the_bit",
    "lrm evaluate": "tests/test_journey.py::test_what_was_trained_is_evaluated_and_reconstructs",
    "lrm reconstruct": "tests/test_journey.py::test_what_was_trained_is_evaluated_and_reconstructs",
    "lrm synthesize": "tests/commands/test_synthesize.py::test_frames_video_sheet_and_report_are_written",
    "lrm train": "tests/test_journey.py::test_killed_and_resumed_equals_uninterrupted_to_the_bit",
    "tools/aot.py": "tests/tools/test_aot.py::test_aot_prints_memory_collectives_and_work_of_a_cpu",
    "tools/average_weights.py": "tests/tools/test_average_weights.py::test_the_mean_of_two_is_a_model_file_that_names_both",
    "tools/bench.py": "tests/tools/test_bench.py::test_a_family_is_timed_in_a_process_of_its_own",
    "tools/bench_gpu.py": "tests/tools/test_bench_gpu.py::test_without_a_gpu_it_says_so_in_one_line",
    "tools/bench_torch.py": "",  # needs PyTorch
    "tools/build_dataset.py": "tests/test_journey.py::folder",
    "tools/finer_tokens.py": "tests/tools/test_finer_tokens.py::test_the_file_is_a_model_that_renders",
    "tools/measure_elevation.py": "tests/tools/test_measure_elevation.py::test_true_matches_are_within_a_degree_and_sift_is_in_the_table",
    "tools/predict_views.py": "tests/tools/test_predict_views.py::test_only_views_that_are_missing_are_drawn",
    "tools/render_objects.py": "tests/test_journey.py::folder",
}


class Parsed(Exception):
    """The program has accepted its arguments."""


def lines_of_page(text: str) -> list[str]:
    """The lines of shell blocks, and the commands within sentences."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    sentences = re.sub(r"```.*?```", "", text, flags=re.S)
    inline = re.findall(r"`((?:lrm|python) [^` ]+ [^`]+)`", sentences)
    return re.sub(r"\\\n *", "", "\n".join(blocks)).splitlines() + inline


def lines_of_docstring(text: str) -> list[str]:
    """Indented commands, without the explanations to the right of them."""
    lines = re.sub(r"\\\n *", "", text).splitlines()
    return [re.split(r"\s{3,}", line.strip())[0] for line in lines if line.startswith("    ")]


def commands_in(line: str) -> list[list[str]]:
    """The words of each command of this project in a line. [OPTIONS ...] count as given, and shell variables as 1."""
    found = []
    for part in re.sub(r"\$\w+", "1", line).split("&&"):
        if match := re.search(r"(?:^|[\s/])((?:lrm|python) .*)", part):
            words = shlex.split(match[1], comments=True)
            if words[:2] == ["python", "-m"] or len(words) < 2 or "--help" in words:
                continue
            if words[0] == "python" or words[1] in __main__.COMMANDS:
                found.append([word.strip("[]") for word in words if word.strip("[]") != "..."])
    return found


def shown() -> dict[str, list[str]]:
    """The commands by their text, without duplicates."""
    lines = [line for path in PAGES for line in lines_of_page(path.read_text())]
    for path in MODULES:
        lines += lines_of_docstring(ast.get_docstring(ast.parse(path.read_text())) or "")
    return {" ".join(words): words for line in lines for words in commands_in(line)}


SHOWN = shown()


def program(words: list[str]) -> str:
    return " ".join(words[:2]) if words[0] == "lrm" else words[1]


@pytest.mark.parametrize("command", SHOWN)
def test_a_shown_command_is_accepted_by_its_program(command, monkeypatch):
    """The program knows the flags, and the config loads with its overrides. Then the program is stopped."""
    words = SHOWN[command]
    parse_args, parse_config = argparse.ArgumentParser.parse_args, train.parse

    def stop_after(parse):
        def stopping(*args):
            parse(*args)
            raise Parsed

        return stopping

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after(parse_args))
    monkeypatch.setattr(train, "parse", stop_after(parse_config))
    monkeypatch.setattr(__main__, "_use_compilation_cache", lambda: None)
    for name in ("torch", "torch.nn", "torch.nn.functional"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.setattr(sys, "argv", words[1:])
    with pytest.raises(Parsed):
        if words[0] == "lrm":
            code = __main__.main(words[1:])
            if "--help" in words and code == 0:
                raise Parsed
        else:
            runpy.run_path(words[1], run_name="__main__")


def test_many_commands_are_found():
    assert len(SHOWN) > 40
    assert "python tools/build_dataset.py runs/toys/views runs/toys/records" in SHOWN
    assert "lrm synthesize --source garden --weights scene_decoder_only_256.pt --out out" in SHOWN


def test_every_program_is_run_by_a_test():
    programs = TOOLS | {f"lrm {name}" for name in __main__.COMMANDS}
    assert set(RUN_BY) == programs >= {program(words) for words in SHOWN.values()}
    for test in filter(None, RUN_BY.values()):
        path, name = test.split("::")
        assert f"\ndef {name}(" in (ROOT / path).read_text(), test


def test_shown_extras_and_test_files_exist():
    text = "\n".join(path.read_text() for path in PAGES)
    setup = (ROOT / "setup.py").read_text()
    extras = re.findall(r"(?:lrm_jax|\.)\[([\w,]+)\]", text)
    assert extras and all(f'"{name}": [' in setup for x in extras for name in x.split(","))
    runs = re.findall(r"python -m pytest([^`\n]*)", text)
    assert len(runs) > 1 and all((ROOT / x).exists() for run in runs for x in re.findall(r"\S+\.py", run))  # fmt: skip
