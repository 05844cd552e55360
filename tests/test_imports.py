"""Imports point one way: a folder of the package imports only from the folders below it, or from the single modules named here."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lrm_jax"
LOW = {"types", "parallel"}
ALLOWED = {
    "types": set(),
    "parallel": {"types"},
    "ops": {"types"},
    "images": LOW | {"ops"},
    "kernels": LOW | {"ops"},
    "models": LOW | {"ops", "images", "kernels"},
    "mesh": LOW | {"ops", "images"},
    # Orbax only to open the checkpoint of a run.
    "weights": LOW | {"models", "training.checkpoints"},
    "api": LOW | {"ops", "images", "mesh", "weights"},
    "two_stage": LOW | {"ops", "kernels", "images", "models.parts", "weights.tensor_files", "api"},
    "data": LOW | {"ops", "images", "weights.tensor_files"},
    "metrics": LOW | {"ops", "weights.tensor_files", "data.held_out"},
    "evaluation": LOW | {"ops", "images", "mesh", "models", "weights", "data", "metrics"},
    "training": LOW | {"ops", "images", "models", "weights", "data", "metrics"},
}
ALLOWED["commands"] = set(ALLOWED) | {"__init__"}
ALLOWED["__main__"] = {"types", "__init__"}  # a command is imported by its name
ALLOWED["__init__"] = {"types", "api", "images"}  # imported when their names are used
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The modules of lrm_jax that a file imports, as "room.module"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            if top == "lrm_jax":
                found.add(".".join(rest[:2]) or "__init__")
            assert top not in ("tests", "tools", "configs"), f"{path} imports {name}"
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    allowed = ALLOWED[room(path)] | {room(path)}
    wrong = {x for x in imported(path) if not {x, x.split(".")[0]} & allowed}
    assert not wrong


def defined_in(module: str) -> set[str]:
    """The names that a module of lrm_jax defines, and the modules of a folder."""
    target = PACKAGE.joinpath(*module.split(".")[1:])
    source = target / "__init__.py" if target.is_dir() else target.with_suffix(".py")
    found = {path.stem for path in target.glob("*")}
    for node in ast.parse(source.read_text()).body:
        found |= {getattr(node, "name", None)}
        found |= {
            x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)
        }
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_name_comes_from_where_it_is_defined(path):
    """No module re-exports the names of another."""
    tree = ast.parse(path.read_text())
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "lrm_jax":
            for alias in node.names:
                assert alias.name in defined_in(node.module), f"{node.module}.{alias.name}"
                name = f"{node.module}.{alias.name}"
                if PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py").exists():
                    modules[alias.asname or alias.name] = name
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules
        ):
            name = modules[node.value.id]
            assert node.attr in defined_in(name) | {"__doc__"}, f"{name}.{node.attr}"


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


# These take seconds to import or are optional, so each is imported only where it is used.
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
        ("synthesize", HEAVY | OF_TRAINING),
        ("reconstruct", HEAVY | OF_TRAINING),
        ("convert", HEAVY | OF_TRAINING),
        ("check", HEAVY | OF_TRAINING),
    ],
)
def test_heavy_packages_are_imported_where_they_are_used(command, unwanted):
    program = f"import sys, lrm_jax.commands.{command}; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert "jax" in modules and not unwanted & set(modules)


WITHOUT_TRAINING = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
import lrm_jax

scene = lrm_jax.load().reconstruct(sys.argv[1])
frames, mesh = scene.render(lrm_jax.orbit(1), size=8), scene.mesh(32)
print(frames.shape, len(mesh.faces) > 100)
"""


def test_a_model_reconstructs_without_the_packages_of_training():
    hidden = OF_TRAINING | {"tensorflow_datasets", "tensorflow", "ml_collections"}
    example = PACKAGE / "assets" / "examples" / "plant.png"
    command = [sys.executable, "-c", WITHOUT_TRAINING.format(hidden=hidden), str(example)]
    assert subprocess.check_output(command, text=True) == "(1, 8, 8, 4) True\n"


def test_the_root_of_the_package_is_small():
    """Four files and fourteen folders at most."""
    names = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(names) <= 18 and sum(name.endswith(".py") for name in names) <= 4
    assert not list(PACKAGE.rglob("utils.py")) and not list(PACKAGE.rglob("common.py"))


ROOT = PACKAGE.parent


@pytest.mark.parametrize("room", ["lrm_jax", "tools", "configs"])
def test_no_file_and_no_function_is_long(room):
    for path in (ROOT / room).rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{path}: {node.name}"
