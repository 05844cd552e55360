"""Settings made before jax starts: eight CPU devices, fast compilation of slower programs, shape checks, strict rank promotion.

Tests against goldens also run on a GPU: `JAX_PLATFORMS=cuda python -m pytest tests/models/test_goldens.py`.
"""

import os
from pathlib import Path

ON_CPU = os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu"
if ON_CPU:
    # Most of the tests' time is compilation. Without LLVM's optimisation they take two thirds of the time. Commands that the
    # tests start compile as for users.
    os.environ["XLA_FLAGS"] = " ".join(
        [
            "--xla_force_host_platform_device_count=8",
            "--xla_backend_optimization_level=0",
            os.environ.get("XLA_FLAGS", ""),
        ]
    )

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# The commands that the tests start use a subfolder of it.
os.environ.setdefault("LRM_JAX_CACHE", str(Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_compilation_cache_dir", os.environ["LRM_JAX_CACHE"])
# Cache all programs, because the workers compile the same small ones.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
CHECKED = (
    "ops", "models", "kernels", "images.load", "images.cutout", "images.recentre", "mesh.surface", "mesh.lattice",
    "mesh.formats", "mesh.texture", "data.procedural.raytrace", "two_stage.elevation", "two_stage.sift",
)  # fmt: skip
install_import_hook([f"lrm_jax.{room}" for room in CHECKED], "beartype.beartype")


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of golden tensors. LRM_GOLDENS can name another folder with files of the same form."""
    return Path(os.environ.get("LRM_GOLDENS", Path(__file__).parent / "goldens"))


def pytest_addoption(parser):
    parser.addoption(
        "--update-goldens", action="store_true", help="write the text files that tests compare with"
    )


@pytest.fixture
def same_text(request):
    """Compares a text with a file in tests/. `--update-goldens` writes that file, so that git diff shows the changes."""

    def check(name: str, text: str) -> None:
        path = Path(__file__).parent / name
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.read_text() == text, f"{name}: look at the change, then --update-goldens"

    return check


@pytest.fixture(autouse=True)
def full_precision(request):
    """Tests against goldens compute float32 products in full float32, also on a GPU, where XLA would use TF32."""
    if ON_CPU or "goldens" not in request.fixturenames:
        yield
        return
    with jax.default_matmul_precision("highest"):
        yield


def pytest_collection_modifyitems(items):
    """Runs the journey first. It takes longest, and if it came last, the other workers would wait for it."""
    items.sort(key=lambda item: item.path.name != "test_journey.py")
