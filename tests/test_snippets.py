"""Runs the snippets of README and docs/library.md unchanged except for smaller numbers, with the files that they name."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from posed_ball import posed, write_folder
from posed_folder import ring, write_transforms
from tiny_models import tiny, untrained, write_two_models

from lrm_jax import models
from lrm_jax.weights import model_file

ROOT = Path(__file__).parents[1]
# Less to compute, the same calls.
SMALLER = {"resolution=256": "resolution=48", "texture=1024": "texture=128", "size=512": "size=32", "orbit(24": "orbit(3", "scene.render()": "scene.render(size=32)"}  # fmt: skip


def run(page: str, name: str, tmp_path, monkeypatch, **smaller) -> dict:
    """Runs a snippet in a folder, with arguments replaced: by SMALLER, and old by new in `smaller`. Returns its variables."""
    program = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", (ROOT / page).read_text(), re.S)[
        1
    ]
    for large, small in (smaller | SMALLER).items():
        program = program.replace(large, small)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(program, found)
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_the_snippet_reconstructs_with_the_bundled_model(page, tmp_path, monkeypatch):
    shutil.copy(ROOT / "lrm_jax/assets/examples/plant.png", tmp_path / "chair.png")
    found = run(page, "snippet", tmp_path, monkeypatch)
    assert found["frames"].shape == (3, 32, 32, 4) and found["frames"].dtype == np.uint8
    assert (tmp_path / "chair.glb").read_bytes()[:4] == b"glTF"


def test_the_snippet_of_posed_images_draws_a_video(tmp_path, monkeypatch):
    write_transforms(str(tmp_path / "garden"), ring())
    model, params = tiny("lvsm", image_size=16)
    model_file.save_model(tmp_path / "lvsm.safetensors", model, params, {})
    fewer = {"num_frames=60": "num_frames=3"}
    found = run("docs/library.md", "snippet: lvsm", tmp_path, monkeypatch, **fewer)
    assert found["video"].shape == (3, 16, 16, 3) and found["video"].dtype == np.uint8


def test_the_snippet_of_two_stages_makes_a_mesh(tmp_path, monkeypatch):
    (tmp_path / "one2345").mkdir()
    write_two_models(tmp_path / "one2345")
    shutil.copy(ROOT / "lrm_jax/assets/examples/plant.png", tmp_path / "chair.png")
    fewer = {"seed=1": "seed=1, steps=3"}
    found = run("docs/library.md", "snippet: two stages", tmp_path, monkeypatch, **fewer)
    assert len(found["images"]) == 40 and (tmp_path / "chair.glb").read_bytes()[:4] == b"glTF"


def test_the_snippet_of_posed_images_makes_a_mesh(tmp_path, monkeypatch):
    write_folder(tmp_path / "capture", *posed())
    path = tmp_path / "one2345.safetensors"
    model_file.save_model(path, models.build("one2345", "tiny"), untrained("one2345"), {})
    fewer = {"size=256": "size=16"}
    found = run("docs/library.md", "snippet: one2345", tmp_path, monkeypatch, **fewer)
    assert found["frames"].shape == (3, 32, 32, 4) and found["again"].shape == (3, 16, 16, 4)
    assert (tmp_path / "capture.ply").read_bytes()[:3] == b"ply"
