"""The flags of `lrm train`: their parser and their help."""

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from lrm_jax.types import InputError

USAGE = """\
usage: lrm train --config FILE --workdir FOLDER [--config.KEY=VALUE ...] [flags]
       lrm train --config FILE --dry_run [--config.KEY=VALUE ...]
       lrm train --config FILE --help"""
LIST_KEYS = "List the keys of a config with their values: lrm train --config FILE --help"
OF_CONFIG = {
    "--config FILE": "Python file with a function get_config(), such as configs/nano.py. FILE:NAME calls get_config(NAME). "
    "To try things out, configs/nano.py:tiny trains a tiny model for a few steps.",
    "--config.KEY VALUE": "Override one value of the config, for example --config.train.steps=100. Quote tuples: "
    '"--config.data.mix=(3,1)". --config FILE --help lists the keys.',
}
FLAGS = {
    "workdir": (flags.DEFINE_string, "FOLDER", "Write the run to this folder, or resume the run in it."),
    "dry_run": (flags.DEFINE_bool, "", "Compile the training step and the evaluation, print how much memory each needs per device, and exit with code 1 if one does not fit."),
    "coordinator": (flags.DEFINE_string, "HOST:PORT", "Address of process 0, for a run with several processes outside Slurm, GKE and Cloud TPU. Needs the next two flags."),
    "num_processes": (flags.DEFINE_integer, "N", "Number of processes in the run. 1: do not look for others."),
    "process_id": (flags.DEFINE_integer, "I", "Index of this process, from 0 to N - 1."),
}  # fmt: skip


def read(argv: list[str]) -> flags.FlagValues:
    """The values of FLAGS, and `config` with its overridden values. Flags that are not given are None.

    Raises:
      InputError: an unknown flag or config key, a value of the wrong type, or a config that cannot be loaded.
    """
    for arg in argv:
        path = Path(arg.split("=", 1)[-1].split(":")[0])
        if path.suffix == ".py":
            if not path.is_file():
                raise InputError(f"{path}: no such config: check the path")
            # A config may import its siblings, as `common` or as `configs.common`.
            sys.path[:0] = [str(folder) for folder in path.absolute().parents[:2]]
    values = flags.FlagValues()
    argv = ["lrm train", *argv]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    for name, (define, _, text) in FLAGS.items():
        define(name, None, text, flag_values=values)
    try:
        rest = values(argv)[1:]
    except Exception as error:  # a config is a program: it can raise anything
        raise InputError(_cause(error)) from None
    if rest:
        raise InputError(f"lrm train: unknown argument {rest[0]!r}: flags begin with --")
    return values


def _cause(error: Exception) -> str:
    """What is wrong with the flags or the config, in one line."""
    text = str(error).strip()
    if near := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text):
        return f"the config has no key {near[2]!r}: did you mean {near[1]!r}?"
    if isinstance(error, AttributeError) and (key := re.fullmatch(r"""["']+(\w+)["']+""", text)):
        return f"the config has no key {key[1]!r}: --config FILE --help lists its keys"
    if isinstance(error, flags.UnrecognizedFlagError):
        near = re.search(r"Did you mean: (\w+)", text)
        remedy = f"did you mean --{near[1]}?" if near else "see lrm train --help"
        return f"lrm train: unknown flag --{error.flagname}: {remedy}"
    remedy = "check it against the config file"
    if "Traceback" in text:  # raised by a config file
        text = text.splitlines()[-1]
    elif isinstance(error, flags.Error) and "--config." not in text:
        remedy = "see lrm train --help"
    elif not isinstance(error, (flags.Error, AttributeError, TypeError, ValueError)):
        text = f"{type(error).__name__}: {text}"
    text = " ".join(text.split()).strip('"')
    return f"lrm train: {text}: {remedy}"


def help_text(argv: list[str], description: str) -> str:
    """The help, with every key of the config if one is given.

    Raises:
      InputError: as in `read`.
    """
    argv = [arg for arg in argv if arg not in ("-h", "--help")]
    named = {f"--{name} {metavar}".rstrip(): text for name, (_, metavar, text) in FLAGS.items()}
    lines = [USAGE, "", description.strip(), "", "Flags:"]
    for name, text in (OF_CONFIG | named).items():
        lines += textwrap.wrap(
            text, 100, initial_indent=f"  {name:<25}", subsequent_indent=" " * 27
        )
    if (config := read(argv).config) is not None:
        lines += ["", "Keys of this config, with their values and types:", *keys_of(config)]
    else:
        lines += ["", LIST_KEYS]
    return "\n".join(lines)


def keys_of(config: ConfigDict, name: str = "config") -> Iterator[str]:
    """A line for each key of a config: name, value and type."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from keys_of(value, f"{name}.{key}")
        else:
            yield f"  {name}.{key} = {value!r}  ({config.get_type(key).__name__})"
