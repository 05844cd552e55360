"""`lrm <command>`: runs a command. Only this file turns errors into exit codes."""

import errno
import hashlib
import importlib
import logging
import os
import platform
import sys
from pathlib import Path

import lrm_jax

# JAX takes a second to import: nothing here may import it before a command runs.
COMMANDS = {
    "reconstruct": "turn images of objects into meshes, videos and viewer pages",
    "synthesize": "render new views of a scene from images with known cameras",
    "check": "tell whether a checkpoint is what it should be",
    "convert": "convert PyTorch checkpoints to model files, and back",
    "train": "train a model from a config",
    "evaluate": "compare a model with held-out views and true surfaces",
}
USAGE = "\n".join(
    [
        "usage: lrm <command> [arguments]    (lrm <command> --help shows the arguments)",
        "",
        *(f"  {name:<12} {text}" for name, text in COMMANDS.items()),
        "",
        "  --version    print the version",
        "",
        "Exit code: 0 everything was done; 1 some inputs failed, the others are done; 2 nothing was done, or wrong usage.",
    ]
)
REMEDIES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EROFS: "write to another folder",
    errno.EACCES: "change its permissions, or use another folder",
    errno.EPERM: "change its permissions, or use another folder",
    errno.EEXIST: "move that file away, or use another folder",
    errno.ENOTDIR: "move that file away, or use another folder",
    errno.EISDIR: "give a file, not a folder",
    errno.ENOENT: "check the path",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
      The exit code: 0 everything was done; 1 some inputs failed, the others are done (`lrm train --dry_run`: the run does not
      fit in memory); 2 nothing was done, or wrong usage: one line on stderr says why; 130 interrupted; 143 `lrm train` saved
      after SIGTERM or Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"lrm_jax {lrm_jax.__version__}")
        return 0
    if argv[0] not in COMMANDS:
        return _fail(f"no command {argv[0]!r}: choose one of {', '.join(COMMANDS)}")
    return _run(argv[0], argv[1:])


def _run(command: str, argv: list[str]) -> int:
    """Runs a command. Turns errors that the user can fix into one line and an exit code."""
    logging.basicConfig(format="lrm: %(message)s", level=logging.WARNING)
    try:
        _use_compilation_cache()
        return importlib.import_module(f"lrm_jax.commands.{command}").main(argv)
    except ValueError as error:
        from lrm_jax.types import InputError

        if not isinstance(error, InputError):
            raise
        return _fail(str(error))
    except OSError as error:
        if error.errno is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        remedy = REMEDIES.get(error.errno, "check the path and the disk")
        return _fail(f"{place}{error.strerror}: {remedy}")
    except RuntimeError as error:  # JaxRuntimeError is one
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        reason = str(error).splitlines()[0]
        return _fail(f"not enough memory ({reason}): use a smaller batch, image or resolution")
    except KeyboardInterrupt:
        print("lrm: interrupted", file=sys.stderr)
        return 130


def _fail(message: str) -> int:
    print(f"lrm: error: {message}", file=sys.stderr)
    return 2


def _use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in LRM_JAX_CACHE or ~/.cache/lrm_jax. Does nothing if that is not writable."""
    import jax

    try:
        folder = Path(os.environ.get("LRM_JAX_CACHE") or Path.home() / ".cache" / "lrm_jax")
        # Machines with different processors may share a home folder, and a program compiled for one may not run on the other.
        folder = folder / hashlib.sha256(_processor().encode()).hexdigest()[:12]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the home folder is unknown
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
