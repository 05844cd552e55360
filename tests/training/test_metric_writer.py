import io
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from lrm_jax.training import metric_writer


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """The events of all files in the order of writing. Each TFRecord has a length, its checksum, the data and its checksum."""
    found = []
    for path in sorted(
        (workdir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns
    ):
        data = path.read_bytes()
        while data:
            size = struct.unpack("<Q", data[:8])[0]
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def values(workdir):
    return {
        (event.step, value.tag): value for event in events(workdir) for value in event.summary.value
    }


def test_scalars_are_lines_of_json_as_soon_as_they_are_written(tmp_path):
    writer = metric_writer.open_writer(tmp_path / "run", 0, tensorboard=False)
    assert isinstance(writer, metric_writer.metric_writers.MetricWriter)
    writer.write_scalars(np.int64(5), {"train/loss": jnp.float32(0.5), "val/psnr": np.float64(20)})
    writer.write_scalars(6, {"train/loss": float("nan"), "grad_norm": np.float32("inf")})
    assert rows(tmp_path / "run") == [
        {"step": 5, "train/loss": 0.5, "val/psnr": 20.0},
        {"step": 6, "train/loss": None, "grad_norm": None},
    ]
    writer.close()
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "tra', b'{"step": 3}', b"\0\0\0\n", b"[3]\n", b"\xff\n"]
)
def test_a_resumed_run_removes_incomplete_lines_and_those_after_its_first_step(tmp_path, torn):
    with open(tmp_path / "metrics.jsonl", "wb") as file:
        file.write(b'{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3}\n' + torn)
    writer = metric_writer.open_writer(tmp_path, 2, tensorboard=False)
    writer.write_scalars(3, {"a": 4})
    writer.close()
    assert rows(tmp_path) == [{"step": 1, "a": 1}, {"step": 2, "a": 2}, {"step": 3, "a": 4}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_files_hold_scalars_images_and_texts(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.uniform(-0.5, 1.5, (2, 8, 6, 3)).astype(np.float32)
    writer = metric_writer.open_writer(tmp_path, 0, tensorboard=True)
    writer.write_scalars(7, {"train/loss": jnp.float32(0.25)})
    writer.write_images(7, {"one": jnp.asarray(images[0]), "both": images})
    eight_bits = rng.integers(0, 256, (8, 6, 3), np.uint8)
    writer.write_images(7, {"bytes": eight_bits})
    writer.write_texts(7, {"parameters": "a table"})
    writer.close()
    found = values(tmp_path)
    assert found[7, "train/loss"].simple_value == 0.25
    image = np.asarray(Image.open(io.BytesIO(found[7, "one"].image.encoded_image_string)))
    np.testing.assert_allclose(image / 255, np.clip(images[0], 0, 1), atol=1 / 255)  # 8 bits
    both = Image.open(io.BytesIO(found[7, "both"].image.encoded_image_string))
    assert both.size[0] * both.size[1] == 2 * 8 * 6  # side by side
    as_written = Image.open(io.BytesIO(found[7, "bytes"].image.encoded_image_string))
    np.testing.assert_array_equal(np.asarray(as_written), eight_bits)
    assert b"a table" in found[7, "parameters/text_summary"].tensor.string_val[0]


def test_a_resumed_run_hides_the_events_after_its_first_step(tmp_path):
    for first, value in [(0, 1.0), (2, 2.0)]:
        writer = metric_writer.open_writer(tmp_path, first, tensorboard=True)
        for step in range(first + 1, 5):
            writer.write_scalars(step, {"a": value})
        writer.close()
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert sorted(starts) == [1, 3]  # TensorBoard drops earlier events with a step of 3 or more


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = metric_writer.open_writer(tmp_path, 0, tensorboard=True)
    writer.write_scalars(1, {"a": 1.0})
    writer.write_images(1, {"b": np.zeros((1, 2, 2, 3))})
    writer.flush()
    writer.close()
    assert list(tmp_path.iterdir()) == []
