"""Reading and writing files of tensors. If torch is installed, it checks them too."""

import os
import pickle
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import scipy.io

from lrm_jax.parallel import whole_files
from lrm_jax.types import InputError
from lrm_jax.weights import tensor_files

CONTENT = {
    "weights": {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "half": np.full((2, 2), 0.5, np.float16),
        "bfloat16": np.full(3, 1.5, ml_dtypes.bfloat16),
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    },
    "kwargs": {
        "model": {"heads": 4, "rate": 0.5, "names": ["é", None, True], "big": 1 << 40},
        "none": {},
    },
}


def assert_same(read, expected):
    assert type(read) is type(expected) or isinstance(expected, dict)
    if isinstance(expected, dict):
        assert list(read) == list(expected)
        for key, value in expected.items():
            assert_same(read[key], value)
    elif isinstance(expected, np.ndarray):
        assert read.dtype == expected.dtype
        np.testing.assert_array_equal(read, expected)
    else:
        assert read == expected


def pickled_as_torch(path, program, storages=(), compression=zipfile.ZIP_STORED):
    """A file in torch's format with any pickle program in it."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        for i, data in enumerate(storages):
            archive.writestr(f"archive/data/{i}", data)
    return path


def tensor_program(offset, shape, strides, numel=4):
    """The pickle program of one float32 tensor, as torch writes it."""
    storage = (
        b"("
        + push("storage")
        + b"ctorch\nFloatStorage\n"
        + push("0")
        + push("cpu")
        + push(numel)
        + b"tQ"
    )
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + push(offset) + push(shape) + push(strides)
        + b"\x89ccollections\nOrderedDict\n)RtR."
    )  # fmt: skip


def test_torch_file_round_trips_to_the_bit(tmp_path):
    tensor_files.write_torch(tmp_path / "w.pth", CONTENT)
    read, metadata = tensor_files.read(tmp_path / "w.pth")
    assert metadata == {}
    assert_same(read, CONTENT)
    assert os.listdir(tmp_path) == ["w.pth"]


def test_torch_file_is_mapped_not_copied(tmp_path):
    tensor_files.write_torch(tmp_path / "w.pth", CONTENT)
    array = tensor_files.read(tmp_path / "w.pth")[0]["weights"]["a.weight"]
    assert not array.flags.owndata and not array.flags.writeable and array.flags.aligned


def test_torch_reads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    tensor_files.write_torch(tmp_path / "w.pth", CONTENT)
    for mapped in (False, True):
        read = torch.load(tmp_path / "w.pth", weights_only=True, mmap=mapped)
        assert read["kwargs"] == CONTENT["kwargs"]
        for name, value in CONTENT["weights"].items():
            assert read["weights"][name].shape == value.shape
            np.testing.assert_array_equal(
                read["weights"][name].float().numpy(), value.astype(np.float32)
            )


def test_we_read_what_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {
        k: torch.from_numpy(np.ascontiguousarray(v))
        for k, v in CONTENT["weights"].items()
        if k != "bfloat16"
    }
    tensors["strided"] = torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)[1:, :, ::2]
    tensors["bfloat16"] = torch.full((3,), 1.5, dtype=torch.bfloat16)
    module = torch.nn.Linear(2, 2)
    torch.save(
        {"state_dict": tensors, "module": module.state_dict(), "parameter": module.weight},
        tmp_path / "w.pt",
    )
    read, _ = tensor_files.read(tmp_path / "w.pt")
    for name, value in tensors.items():
        np.testing.assert_array_equal(
            read["state_dict"][name].astype(np.float32), value.float().numpy()
        )
    np.testing.assert_array_equal(read["module"]["bias"], module.bias.detach().numpy())
    np.testing.assert_array_equal(read["parameter"], module.weight.detach().numpy())


def test_we_read_what_torch_wrote_before_1_6(tmp_path):
    torch = pytest.importorskip("torch")
    whole = torch.arange(12.0)
    content = {"a": whole, "part": whole[4:].reshape(2, 4).T, "long": torch.tensor([1, 2, 3])}
    content["parameter"] = torch.nn.Linear(2, 2).weight
    content["half"] = torch.full((2, 2), 0.5, dtype=torch.float16)
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    read, metadata = tensor_files.read(tmp_path / "w.pth")
    assert metadata == {} and list(read) == list(content)
    for name, value in content.items():
        np.testing.assert_array_equal(read[name], value.detach().numpy())


def push(value):
    """The pickle program that pushes a plain value."""
    return pickle.dumps(value, protocol=2)[2:-1]


def old_torch(*tensors, parameter=None, little_endian=True):
    """The bytes of a list of float32 tensors in the file format of PyTorch in 2017.

    Args:
      parameter: how each tensor is wrapped: in "arguments", as the first of five items in the "state", or not at all.
    """
    items = b""
    for key, tensor in enumerate(tensors):
        storage = (
            b"(" + push("storage") + b"ctorch\nFloatStorage\n" + push(str(key)) + push("cuda:0")
        )
        storage += push(tensor.size) + b"NtQ"
        strides = tuple(s // 4 for s in tensor.strides)
        item = b"(" + storage + push(0) + push(tensor.shape) + push(strides) + b"t"
        item = b"ctorch._utils\n_rebuild_tensor\n" + item + b"R"
        if parameter == "arguments":
            item = (
                b"ctorch.nn.parameter\nParameter\n("
                + item
                + b"tR"
                + push((True, False, None))
                + b"b"
            )
        if parameter == "state":
            item = b"ctorch.nn.parameter\nParameter\n)\x81(" + item + b"NNI01\nI00\ntb"
        items += item
    machine = {"protocol_version": 1001, "little_endian": little_endian}
    head = [0x1950A86A20F9469CFC6C, 1001, machine]
    data = b"".join(pickle.dumps(value, protocol=2) for value in head)
    data += b"\x80\x02](" + items + b"e."
    data += pickle.dumps([str(key) for key in range(len(tensors))], protocol=2)
    return data + b"".join(np.int64(x.size).tobytes() + x.tobytes() for x in tensors)


TWO = np.arange(6, dtype=np.float32).reshape(2, 3), np.full(5, 7.0, np.float32)


@pytest.mark.parametrize("parameter", [None, "arguments", "state"])
def test_files_of_2017_hold_tensors_or_parameters(tmp_path, parameter):
    path = tmp_path / "vgg.pth"
    path.write_bytes(old_torch(*TWO, parameter=parameter))
    read, _ = tensor_files.read(path)
    assert len(read) == 2
    for actual, expected in zip(read, TWO, strict=True):
        np.testing.assert_array_equal(actual, expected)
        assert not actual.flags.writeable


def test_damaged_files_of_2017_are_one_line(tmp_path):
    path = tmp_path / "vgg.pth"
    path.write_bytes(old_torch(*TWO).replace(np.int64(5).tobytes(), np.int64(4).tobytes()))
    with pytest.raises(InputError, match="storage 1 is cut short"):
        tensor_files.read(path)
    path.write_bytes(old_torch(*TWO).replace(push(5) + b"NtQ", push(1 << 40) + b"NtQ"))
    with pytest.raises(InputError, match="storage 1 is larger than the file"):
        tensor_files.read(path)
    path.write_bytes(old_torch(*TWO, little_endian=False))
    with pytest.raises(InputError, match="big-endian"):
        tensor_files.read(path)
    path.write_bytes(
        old_torch(*TWO).replace(b"torch._utils\n_rebuild_tensor\n", b"posix\nsystem\n")
    )
    with pytest.raises(InputError, match="posix.system.*refused"):
        tensor_files.read(path)


def test_matlab_structs_are_dicts(tmp_path):
    cell = np.empty(2, object)
    cell[:] = [{"name": "a", "x": np.eye(3, dtype=np.float32)}, {"name": "b", "x": np.ones((1, 2))}]
    scipy.io.savemat(tmp_path / "m.mat", {"layers": cell, "meta": {"n": 3.0}})
    read, metadata = tensor_files.read(tmp_path / "m.mat")
    assert set(read) == {"layers", "meta"} and metadata == {}
    assert [layer["name"] for layer in read["layers"]] == ["a", "b"]
    np.testing.assert_array_equal(read["layers"][0]["x"], np.eye(3))
    assert read["layers"][0]["x"].dtype == np.float32


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_hostile_pickle_is_refused_and_not_run(tmp_path):
    path = pickled_as_torch(
        tmp_path / "w.ckpt", pickle.dumps({"a": Hostile(tmp_path / "hacked")}, protocol=2)
    )
    with pytest.raises(InputError, match=r"posix.mkdir.*refused"):
        tensor_files.read(path)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        b"\x80\x04\x8c\x0bcollections\x8c\x18OrderedDict.fromkeys.x\x93.",
        b"\x80\x02ctorch._utils\n_rebuild_qtensor\n.",
        b"\x80\x02ctorch\nload\n.",
        b"\x80\x02cnumpy\nndarray\n)\x81.",
    ],
)  # fmt: skip
def test_every_other_global_is_refused(tmp_path, program):
    with pytest.raises(InputError, match="refused|damaged"):
        tensor_files.read(pickled_as_torch(tmp_path / "w.ckpt", program))


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (5,), (1,)), (2, (2, 2), (2, 1)), (-1, (2,), (1,)), (3, (4,), (-1,)), (0, (2, 2), (1,)), (0, ("2",), (1,))],
)  # fmt: skip
def test_a_tensor_outside_its_storage_is_refused(tmp_path, offset, shape, strides):
    path = pickled_as_torch(tmp_path / "w.pt", tensor_program(offset, shape, strides), [bytes(16)])
    with pytest.raises(InputError, match="damaged"):
        tensor_files.read(path)


def test_valid_strided_tensor_is_a_view(tmp_path):
    data = np.arange(4, dtype=np.float32).tobytes()
    path = pickled_as_torch(tmp_path / "w.pt", tensor_program(1, (2, 2), (1, 1)), [data])
    np.testing.assert_array_equal(tensor_files.read(path)[0], [[1, 2], [2, 3]])


def damaged(path, tmp_path):
    """Copies of a file, cut at several places or with one byte of a tensor changed."""
    data = path.read_bytes()
    for size in (9, 100, len(data) // 2, len(data) - 1):
        cut = tmp_path / f"cut{size}"
        cut.write_bytes(data[:size])
        yield cut


@pytest.mark.parametrize("form", ["torch", "old torch", "safetensors", "matlab"])
def test_truncated_file_is_one_line(tmp_path, form):
    weights = {"a": np.arange(100, dtype=np.float32), "b": np.ones(4, np.float32)}
    path = tmp_path / "w"
    if form == "torch":
        tensor_files.write_torch(path, weights)
    elif form == "old torch":
        path.write_bytes(old_torch(*weights.values()))
    elif form == "matlab":
        scipy.io.savemat(path, weights, appendmat=False)
    else:
        tensor_files.write_safetensors(path, weights, {"k": "v"})
    for cut in damaged(path, tmp_path):
        with pytest.raises(InputError, match=f"^{cut}: .*(truncated|damaged).*again$"):
            tensor_files.read(cut)


def test_changed_bytes_of_a_torch_file_are_noticed(tmp_path):
    path = tmp_path / "w.pt"
    tensor_files.write_torch(path, {"a": np.arange(100, dtype=np.float32)})
    data = bytearray(path.read_bytes())
    data[data.index(np.float32(50).tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="checksum of archive/data/0"):
        tensor_files.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"hello, this is no checkpoint", "neither"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"PK\x03\x04" + bytes(200), "damaged"),
        (b"\x08" + bytes(7) + b"{" + bytes(20), "damaged"),
        (b"\x80\x02]q\x00.", "bare pickle"),
    ],
)  # fmt: skip
def test_other_files_are_refused_with_a_remedy(tmp_path, content, message):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        tensor_files.read(path)


def test_missing_file_and_folder_are_one_line(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        tensor_files.read(tmp_path / "none.ckpt")
    with pytest.raises(InputError, match="Is a directory"):
        tensor_files.read(tmp_path)


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), whole_files.replacing(path) as (temporary,):
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["w.safetensors"]


FULL_DISK = """
import pathlib, resource, signal, sys
import numpy as np
from lrm_jax.weights import tensor_files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
for write in (lambda *a: tensor_files.write_safetensors(*a, {}), tensor_files.write_torch):
    try:
        write(pathlib.Path(sys.argv[1]) / "w", {"a": np.zeros(1 << 18, np.float32)})
    except OSError as error:
        print(error.strerror)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits stand for a full disk")
def test_full_disk_is_the_systems_error_and_leaves_nothing(tmp_path):
    shown = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert shown.stdout.splitlines() == ["File too large"] * 2
    assert os.listdir(tmp_path) == []


def test_written_files_are_as_readable_as_any_other(tmp_path):
    (tmp_path / "other").write_bytes(b"")
    tensor_files.write_safetensors(tmp_path / "w", {"a": np.zeros(2, np.float32)}, {})
    assert (tmp_path / "w").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_safetensors_library_reads_what_we_write(tmp_path):
    weights = {k: v for k, v in CONTENT["weights"].items() if v.dtype != np.int64}
    tensor_files.write_safetensors(tmp_path / "w", weights, {"k": "é"})
    read, metadata = tensor_files.read(tmp_path / "w")
    assert metadata == {"k": "é"}
    assert_same({name: read[name] for name in weights}, weights)
