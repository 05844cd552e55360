"""What the benchmarks share: peak memory, and what was measured on which machine."""

import platform
import resource
import subprocess
from pathlib import Path

import jax


def reset_peak() -> None:
    """Starts the peak of resident memory anew, where Linux lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_gb() -> float:
    """Peak of the accelerator's memory, or of this process's resident memory since `reset_peak`."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def machine() -> str:
    """Device, cores and versions."""
    device = jax.devices()[0]
    return f"{device.device_kind}, {jax.device_count()} device(s), jax {jax.__version__}, Python {platform.python_version()}"


def commit() -> str:
    """The commit that was measured."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
