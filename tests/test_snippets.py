"""Runs the snippets of README and docs/library.md unchanged except for smaller numbers, with the files that they name."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from posed_folder import ring, write_transforms
from test_imports import OF_TRAINING

from lrm_jax import models
from lrm_jax.ops import cameras
from lrm_jax.types import Views
from lrm_jax.weights import model_file

ROOT = Path(__file__).parents[1]
# The same calls with less to compute.
SMALLER = {"resolution=256": "resolution=48", "texture=1024": "texture=128", "size=512": "size=32", "orbit(24": "orbit(3"}  # fmt: skip


def snippet(page: str, name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    return found[1]


def run(program: str, folder: Path) -> str:
    """Runs a program in a fresh process, compiled as for users. Returns the last line that it prints."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_the_snippet_reconstructs_with_the_bundled_model(page, tmp_path):
    shutil.copy(ROOT / "lrm_jax/assets/examples/plant.png", tmp_path / "chair.png")
    program = snippet(page, "snippet")
    for large, small in SMALLER.items():
        assert large in program
        program = program.replace(large, small)
    program += f"\nprint(frames.shape, frames.dtype, sorted({OF_TRAINING!r} & set(sys.modules)))"
    assert run(program, tmp_path) == "(3, 32, 32, 4) uint8 []"
    assert (tmp_path / "chair.glb").read_bytes()[:4] == b"glTF"


def test_the_snippet_with_posed_images_renders_a_video(tmp_path):
    write_transforms(str(tmp_path / "garden"), ring())
    model = models.build("lvsm", "tiny", image_size=16)
    view = Views(rgb=jnp.zeros((1, 1, 16, 16, 3)), cameras=cameras.orbit(1, 2.0, 0.0, 40.0))
    view = view.replace(cameras=jax.tree.map(lambda x: x[None], view.cameras))
    rays = cameras.pixel_rays(view.cameras, 16, 16)
    params = model.init(jax.random.key(0), view, rays)["params"]
    model_file.save_model(tmp_path / "lvsm.safetensors", model, params, {})
    program = snippet("docs/library.md", "snippet: lvsm").replace("num_frames=60", "num_frames=3")
    assert run(program + "\nprint(video.shape, video.dtype)", tmp_path) == "(3, 16, 16, 3) uint8"
