"""A built data set gives the same samples as its folder, without TensorFlow, and survives damage."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_objects import FIELDS, write_object

from lrm_jax.data import objects, pipeline, records
from lrm_jax.types import InputError

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
import build_dataset  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with six objects: one is broken, one is in val, and one image is not an RGBA PNG."""
    folder = tmp_path_factory.mktemp("records") / "folder"
    for i in range(6):
        write_object(folder / f"pack-thing{chr(97 + i) * 3}", shade=30 + 30 * i)
    (folder / "pack-thingbbb/pose/003.npy").unlink()
    path = folder / "pack-thingccc/rgba/000.png"
    Image.open(path).quantize(colors=64).save(path)
    return folder


@pytest.fixture(scope="module")
def built(folder) -> Path:
    """The data set, built and read by a fresh interpreter that never imports TensorFlow."""
    out = folder.parent / "out"
    program = f"""
import sys
sys.path.insert(0, {str(TOOLS)!r})
import build_dataset
code = build_dataset.main([{str(folder)!r}, {str(out)!r}])
from lrm_jax.data import records
records.make({str(out)!r}, split="train", seed=0, num_target=1, source_size=8, target_size=8).elements[0]
assert "tensorflow" not in sys.modules
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # built, with one object left out
    assert "left out pack-thingbbb: pose/003.npy is missing" in done.stderr
    assert "5 objects, 1 left out" in done.stderr and not done.stdout
    return out


def test_samples_are_those_of_the_folder(folder, built):
    for split in ("train", "val", "all"):
        fields = {**FIELDS, "split": split, "mirror": True, "normalize": "source"}
        a = records.make(built, **fields)
        b = objects.make(folder, **fields)
        assert a.names == b.names and len(a.elements) == len(b.elements)
        for position in range(min(len(a.elements), 6)):
            # Poses are rounded to float32 either before or after the axes are flipped.
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6),
                a.elements[position],
                b.elements[position],
            )


def test_other_programs_read_it(built):
    import tensorflow_datasets as tfds

    source = tfds.data_source("lrm_objects", split="objects", data_dir=str(built))
    example = source[1]
    assert example["uid"] == b"pack-thingccc" and example["c2w"].shape == (8, 4, 4)
    assert example["rgba"][0].shape == (32, 32, 4)


def test_workers_read_it(built):
    source = records.make(
        built, split="train", seed=0, **{k: v for k, v in FIELDS.items() if k != "seed"}
    )
    one, two = (pipeline.open_batches(source, 2, num_workers=workers) for workers in (0, 1))
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, next(one), next(two))
    two.close()


def test_bad_records_are_replaced_and_named(built, monkeypatch, capsys):
    read = records._read

    def damaged(root, number):
        record = dict(read(root, number))
        if number == 1:
            record["rgba"] = [bytes(image)[:60] for image in record["rgba"]]
        if number == 3:
            record["c2w"] = record["c2w"] * np.nan
        return record

    monkeypatch.setattr(records, "_read", damaged)
    batches = pipeline.open_batches(records.make(built, split="all", **FIELDS), 5, prefetch=0)
    _, batch = next(batches)
    assert np.isfinite(batch.target.cameras.c2w).all()
    jax.tree.map(lambda x: np.testing.assert_array_equal(x[1], x[2]), batch)  # 2 is in 1's place
    error = capsys.readouterr().err
    assert "pack-thingccc: view " in error and "cannot be decoded" in error


def test_a_nan_pose_and_a_damaged_shard_are_input_errors(built, tmp_path, monkeypatch):
    class Records:
        def __getitem__(self, number):
            if number:
                raise RuntimeError("checksum")
            return {"c2w": np.full((8, 4, 4), np.nan), "fxfycxcy": np.ones((8, 4))}

    monkeypatch.setattr(records, "_records", lambda root: Records())
    source = records.make(built, split="all", **FIELDS)
    with pytest.raises(InputError, match="pack-thingaaa: a camera has values that are not finite"):
        source.elements[0]
    with pytest.raises(InputError, match="pack-thingccc: the record cannot be read"):
        source.elements[1]


def test_flipped_bits_on_disk_are_input_errors(built, tmp_path):
    import shutil

    shutil.copytree(built, tmp_path / "copy")
    (shard,) = tmp_path.rglob("*.array_record*")
    data = bytearray(shard.read_bytes())
    end = next(i for i in range(len(data) - 1, 0, -1) if data[i]) // 2  # records are at the front
    data[200:end] = bytes(np.random.default_rng(0).integers(0, 256, end - 200, np.uint8))
    shard.write_bytes(data)
    source = records.make(tmp_path / "copy", split="all", **FIELDS)
    with pytest.raises(InputError, match="pack-thing"):
        for position in range(5):
            source.elements[position]


def test_commands_end_with_a_line_and_2(folder, built, tmp_path, capsys):
    assert build_dataset.main([str(folder), str(built)]) == 2
    assert "exists: delete it" in capsys.readouterr().err
    assert build_dataset.main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "no such folder" in capsys.readouterr().err
    write_object(tmp_path / "bad/thing")
    np.save(tmp_path / "bad/thing/pose/000.npy", np.zeros((4, 4)))
    assert build_dataset.main([str(tmp_path / "bad"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "none of 1 objects can be used" in error and "pose/000.npy has shape (4, 4)" in error
    assert not list(tmp_path.rglob("*incomplete*")) and not list(tmp_path.rglob("dataset_info*"))
    with pytest.raises(InputError, match="no data set there"):
        records.make(tmp_path, split="train", **FIELDS)


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    def full(*args):  # like a full disk under tfds
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "_try_read", full)
    assert build_dataset.main([str(folder), str(tmp_path / "out")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*incomplete*"))
