"""The flags of `lrm train`, and its help. tests/training/test_loop.py tests wrong flags."""

import subprocess
import sys
from pathlib import Path

import pytest

from lrm_jax import __main__
from lrm_jax.commands import train, train_flags
from lrm_jax.types import InputError

ROOT = Path(__file__).parents[2]
TINY = ["--config", f"{ROOT}/configs/nano.py:tiny"]


@pytest.fixture
def lrm(monkeypatch, capsys):
    """Runs `lrm train`. Returns exit code, stdout and stderr."""
    monkeypatch.setattr(__main__, "_use_compilation_cache", lambda: None)

    def run(*argv: str) -> tuple[int, str, str]:
        code = __main__.main(["train", *argv])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_help_has_every_flag_with_its_text(lrm, flag):
    code, stdout, stderr = lrm(flag)
    assert code == 0 and stderr == "" and stdout.startswith("usage: lrm train --config FILE")
    assert stdout.count("Exit code: ") == 1 and "lrm train --config FILE --help" in stdout
    words = " ".join(stdout.split())
    assert set(train_flags.FLAGS) == {
        "workdir", "dry_run", "coordinator", "num_processes", "process_id"
    }  # fmt: skip
    for name, (_, metavar, text) in train_flags.FLAGS.items():
        assert f"--{name} {metavar}".strip() + " " + text in words
    assert "config.train.steps =" not in stdout
    assert max(map(len, stdout.split("Flags:")[1].splitlines())) <= 100


def test_the_help_of_a_config_lists_its_keys_with_values_and_types(lrm):
    code, stdout, _ = lrm(*TINY, "--config.train.steps=7", "--config.data.mix=(3,1)", "--help")
    assert code == 0
    keys = [line.strip() for line in stdout.split("Keys of this config")[1].splitlines()[1:]]
    assert "config.train.steps = 7  (int)" in keys and "config.data.mix = (3, 1)  (tuple)" in keys
    assert "config.train.keep_every = None  (int)" in keys
    assert "config.model.name = 'triposr'  (str)" in keys
    config = train.parse([*TINY, "--dry_run"]).config
    names = [f"config.{section}.{name}" for section in config for name in config[section]]
    assert [key.split(" = ")[0] for key in keys] == names


def test_the_help_of_a_config_with_a_wrong_key_is_an_error(lrm):
    code, stdout, stderr = lrm(*TINY, "--config.train.stps=7", "--help")
    assert code == 2 and stdout == ""
    assert stderr == "lrm: error: the config has no key 'stps': did you mean 'steps'?\n"


def test_a_dry_run_that_does_not_fit_is_1(lrm, monkeypatch):
    monkeypatch.setattr(train, "dry_run", lambda config, device_mesh: int(config.train.steps == 4))
    assert lrm(*TINY, "--dry_run")[0] == 1
    assert lrm(*TINY, "--dry_run", "--config.train.steps=5")[0] == 0


def test_flags_are_parsed():
    argv = ["--workdir", "runs/a", "--coordinator=a:1", "--num_processes=2", "--process_id=1"]
    config, workdir, cluster, dry_run = train.parse([*TINY, *argv, "--config.train.steps=9"])
    assert config.train.steps == 9 and workdir == Path("runs/a") and dry_run is False
    assert cluster == {"coordinator": "a:1", "num_processes": 2, "process_id": 1}
    assert train.parse([*TINY, "--dry_run"])[1:] == (None, dict.fromkeys(cluster), True)
    for argv in (TINY, ["--workdir", "runs/a"], []):
        with pytest.raises(InputError, match="needs --config FILE --workdir FOLDER"):
            train.parse(argv)


@pytest.mark.parametrize("argv, code", [(["--help"], 0), (["--version"], 0), (["nonsense"], 2), ([], 2)])  # fmt: skip
def test_jax_is_not_imported_before_a_command_runs(argv, code):
    """Importing JAX takes a second."""
    program = (
        f"import sys; from lrm_jax import __main__; code = __main__.main({argv}); "
        "print('jax' in sys.modules, 'numpy' in sys.modules, code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"False False {code}", done.stderr


@pytest.mark.parametrize(
    "error, line",
    [
        (InputError("a.png: no image: name another"), "lrm: error: a.png: no image: name another\n"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GB\nmore"), "lrm: error: not enough memory (RESOURCE_EXHAUSTED: 9 GB): use a smaller batch, image or resolution\n"),
        (FileNotFoundError(2, "No such file", "a.npz"), "lrm: error: a.npz: No such file: check the path\n"),
    ],
)  # fmt: skip
def test_an_error_that_a_user_can_fix_is_one_line(lrm, monkeypatch, error, line):
    def main(argv):
        raise error

    monkeypatch.setattr(train, "main", main)
    assert lrm() == (2, "", line)


def test_another_error_is_not_hidden(lrm, monkeypatch):
    monkeypatch.setattr(train, "main", lambda argv: int("a"))
    with pytest.raises(ValueError, match="invalid literal"):
        lrm()
