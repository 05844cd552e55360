"""Imports point one way (DESIGN): a module may import only from the layers below it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lrm_jax"
COMMANDS = {"train", "reconstruct", "synthesize", "convert", "evaluate"}
LOW = {"types"}
ALLOWED = {
    "types": set(),
    "sharding": LOW,
    "ops": LOW | {"ops"},
    "models": LOW | {"ops", "models", "sharding"},
    "vgg": LOW | {"tensor_files"},
    "lpips": LOW | {"tensor_files", "vgg"},
    "perceptual": LOW | {"tensor_files", "vgg"},
    "losses": LOW | {"lpips", "perceptual"},
    "metrics": LOW,
    "data": LOW | {"ops", "data", "tensor_files"},
    "optim": LOW,
    "checkpoints": LOW,
    "report": LOW,
    "metric_writer": LOW | {"report"},
    "flops": set(),
    "train_report": LOW | {"report", "step"},
    "step": LOW | {"flops", "ops", "losses", "metrics", "optim", "sharding"},
    "tensor_files": LOW,
    "references": LOW | {"models", "tensor_files"},
    "surface_metrics": LOW,
    "mean_object": LOW | {"data"},
    "evaluation_page": set(),
    "evaluation_scores": LOW
    | {"ops", "step", "metrics", "lpips", "mean_object", "sharding", "surface_metrics"},
    "evaluate_objects": LOW
    | {"convert", "data", "evaluation_page", "evaluation_scores", "mean_object", "models", "ops"}
    | {"report", "step", "surface_metrics"},
    "evaluate_scenes": LOW | {"convert", "data", "evaluation_page", "evaluation_scores", "report"},
    "__main__": LOW | COMMANDS | {"lrm_jax"},
    "__init__": set(),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The layers of lrm_jax that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [
                f"{node.module}.{alias.name}" if node.module == "lrm_jax" else node.module
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "lrm_jax":
                found.add(parts[1] if len(parts) > 1 else "lrm_jax")
            assert parts[0] not in ("tests", "tools", "configs"), f"{path} imports {name}"
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    if layer(path) in COMMANDS:
        return_allowed = set(ALLOWED) | COMMANDS | {"lrm_jax"}
        assert imported(path) <= return_allowed
    else:
        assert imported(path) <= ALLOWED[layer(path)]


def test_a_family_never_imports_another_family():
    families = ("lrm", "triposr", "lvsm")
    for name in families:
        for node in ast.walk(ast.parse((PACKAGE / "models" / f"{name}.py").read_text())):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.startswith("lrm_jax.models")
            ):
                taken = {node.module.rsplit(".", 1)[-1], *(alias.name for alias in node.names)}
                assert not taken & (set(families) - {name})


# Seconds to import, or to install: each is imported where it is used.
HEAVY = {
    "IPython", "embreex", "fast_simplification", "huggingface_hub", "imageio", "imageio_ffmpeg", "matplotlib", "pandas",
    "rembg", "skimage", "tensorflow", "tensorflow_datasets", "torch", "trimesh", "xatlas",
}  # fmt: skip
OF_TRAINING = {"array_record", "clu", "grain", "optax", "orbax", "tensorboardX"}


@pytest.mark.parametrize(
    ("command", "unwanted"),
    [
        ("train", HEAVY),
        ("evaluate", HEAVY),
        ("synthesize", HEAVY),
        ("reconstruct", HEAVY | OF_TRAINING),
        ("convert", HEAVY | OF_TRAINING),
    ],
)
def test_heavy_packages_are_imported_where_they_are_used(command, unwanted):
    program = f"import sys, lrm_jax.{command}; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert "jax" in modules and not unwanted & set(modules)
