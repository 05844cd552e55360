"""Files of named tensors: reads and writes safetensors and `torch.save` files without PyTorch, and reads MATLAB files.

A `torch.save` file is a zip archive of uncompressed members: `data.pkl`, a pickle that names its tensors' storages, and
one member of raw bytes for each storage (format: https://github.com/pytorch/pytorch/blob/v2.6.0/torch/serialization.py).
Before PyTorch 1.6 it was several pickles, then the storages; torchvision's files still are. A pickle is a program. We run it
with an unpickler that knows tensors, OrderedDict and plain containers, and refuses every other name, as
`torch.load(weights_only=True)` does.
"""

import io
import json
import math
import mmap
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lrm_jax.parallel.whole_files import replacing
from lrm_jax.types import InputError

# torch's storage classes and the element type of each, little-endian.
STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# The start of a torch file from before PyTorch 1.6, after the pickle's protocol: the first bytes of the long
# 0x1950a86a20f9469cfc6c.
OLD_TORCH = b"\x8a\x0a\x6c\xfc\x9c\x46"
# The element types that we write to safetensors files, and their names there.
DTYPES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}


def read(path: str | os.PathLike) -> tuple[object, dict[str, str]]:
    """Reads a file of tensors, recognised by its first bytes, not by its name.

    Returns:
      The file's content, and its metadata (empty for torch and MATLAB files). For a safetensors file, a dict of arrays. For a
      torch file whatever was saved: dicts, lists and plain values, with NumPy arrays for the tensors. Its arrays are read-only
      views of the mapped file, not copies (except for files from before PyTorch 1.6), and its checksums are verified. For a
      MATLAB 5 file its variables: structs become dicts, cell arrays become lists or arrays of objects.

    Raises:
      InputError: the file is missing, not a file of tensors, truncated, damaged, or a pickle of other things than tensors.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if head.startswith(b"PK\x03\x04"):
        return _read_torch(path), {}
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head[2:].startswith(OLD_TORCH):
        return _read_old_torch(path), {}
    if head[:1] == b"\x80":
        raise InputError(
            f"{path}: a bare pickle, not a file that torch.save wrote: save the state dict with torch.save"
        )
    if head.startswith(b"MATLAB 5"):
        return _read_matlab(path), {}
    if head.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path}: a Git LFS pointer, not the file itself: run `git lfs pull` there"
        )
    what = "empty" if not head else "neither a safetensors nor a torch file"
    raise InputError(f"{path}: {what}: download it again, or check the path")


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes `path` whole or not at all, with one tensor in memory at a time. Raises OSError if the system refuses.

    The format is that of https://github.com/huggingface/safetensors. The library's own writer is not used, because only the owner
    can read its files.
    """
    header, end = {"__metadata__": metadata}, 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": DTYPES[array.dtype],
            "shape": array.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as (temporary,), open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(_bytes(array))


def write_torch(path: Path, content: object) -> None:
    """Writes dicts, lists, plain values and arrays for `torch.load(path, weights_only=True)`, which reads the arrays as tensors.

    `path` is written whole or not at all. Raises OSError if the system refuses.
    """
    arrays: list[np.ndarray] = []
    program = b"\x80\x02" + _pickled(content, arrays) + b"."
    with replacing(path) as (temporary,), zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        for i, array in enumerate(arrays):
            member = zipfile.ZipInfo(f"archive/data/{i}")
            # A padding field before the data aligns storages to 64 bytes, so that a reader that maps the file gets aligned
            # arrays.
            start = archive.fp.tell() + 30 + len(member.filename) + 4
            member.extra = struct.pack("<HH", 0x4246, -start % 64) + bytes(-start % 64)
            archive.writestr(member, _bytes(array))
        archive.writestr("archive/version", "3\n")


def check_names(found: Mapping[str, tuple], wanted: Mapping[str, tuple], title: str) -> None:
    """Raises InputError if names or shapes differ; the message has the first few and their number."""
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    misshaped = [
        f"{name} {list(found[name])} not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    kinds = {"missing": missing, "extra": extra, "mis-shaped": misshaped}
    if problems := [_listed(kind, names) for kind, names in kinds.items() if names]:
        raise InputError(
            f"not the tensors of {title}: {'; '.join(problems)}: use an unchanged checkpoint"
        )


def _listed(kind, names):
    return f"{len(names)} {kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"


def _read_safetensors(path):
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (
        SafetensorError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # the last: a dtype that NumPy lacks
        raise InputError(
            f"{path}: damaged or truncated safetensors file ({error}): download it again"
        ) from error


def _read_torch(path):
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {m.filename.partition("/")[2]: m for m in archive.infolist()}
        if "data.pkl" not in members:
            raise InputError(
                f"{path}: a zip archive without data.pkl: not a checkpoint that torch.save wrote"
            )
        if "byteorder" in members and bytes(_member(mapped, members["byteorder"])) != b"little":
            raise InputError(
                f"{path}: written on a big-endian machine: save it again on a little-endian one"
            )

        def storage(key, dtype, size):
            data = _member(mapped, members[f"data/{key}"])
            if len(data) < size * dtype.itemsize:
                raise ValueError(f"storage {key} is shorter than its tensors")
            return np.frombuffer(data, dtype, size) if size else np.empty(0, dtype)

        program = io.BytesIO(_member(mapped, members["data.pkl"]))
        return _Unpickler(path, program, storage).load()
    except InputError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise anything
        raise _damaged_torch(path, error) from error


def _read_old_torch(path):
    """Reads five pickles (magic number, version, machine, content, the storages' keys), then each storage's size and bytes."""
    try:
        with open(path, "rb") as file:
            length, storages = os.fstat(file.fileno()).st_size, {}

            def storage(key, dtype, size):
                if size * dtype.itemsize > length:
                    raise ValueError(f"storage {key} is larger than the file")
                storages[key] = np.empty(
                    size, dtype
                )  # filled below: its bytes come after the pickles
                return storages[key]

            _, _, machine, content, keys = (
                _Unpickler(path, file, storage).load() for _ in range(5)
            )
            if not machine["little_endian"]:
                raise InputError(
                    f"{path}: written on a big-endian machine: save it again on a little-endian one"
                )
            if set(keys) != set(storages):
                raise ValueError("its storages are not those of its tensors")
            for key in keys:
                (size,) = struct.unpack("<q", file.read(8))
                data = storages[key].view(np.uint8)
                if size != storages[key].size or file.readinto(data) != data.size:
                    raise ValueError(f"storage {key} is cut short")
        return _without_parameters(content)
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise _damaged_torch(path, error) from error


def _damaged_torch(path, error):
    reason = str(error) or type(error).__name__
    return InputError(f"{path}: truncated or damaged torch file ({reason}): download it again")


def _read_matlab(path):
    import scipy.io  # here: only one network's weights come as MATLAB files

    try:
        content = scipy.io.loadmat(path, simplify_cells=True)
    except Exception as error:  # a damaged file can raise anything
        reason = str(error).split("\n")[0] or type(error).__name__
        raise InputError(
            f"{path}: truncated or damaged MATLAB file ({reason}): download it again"
        ) from error
    return {name: value for name, value in content.items() if not name.startswith("__")}


def _member(mapped, member):
    """The bytes of an archive member, without a copy."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{member.filename} is compressed")
    name_length, extra_length = struct.unpack_from("<HH", mapped, member.header_offset + 26)
    start = member.header_offset + 30 + name_length + extra_length
    data = memoryview(mapped)[start : start + member.file_size]
    if len(data) != member.file_size:
        raise ValueError(f"{member.filename} is cut short")
    if member.CRC and zlib.crc32(data) != member.CRC:  # 0: torch was told not to write checksums
        raise ValueError(f"the checksum of {member.filename} is wrong")
    return data


class _Unpickler(pickle.Unpickler):
    """Runs the next pickle of `file`. Allows only tensors and plain containers; `storage(key, dtype, size)` returns an array."""

    def __init__(self, path, file, storage):
        super().__init__(file, encoding="utf-8")
        self.path, self.storage, self.storages = path, storage, {}

    def find_class(self, module, name):
        if module == "torch" and name in STORAGES:
            return name  # a string, not an object that a hostile pickle could call or change
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor"): lambda *arguments: _strided(*arguments),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: _strided(*arguments[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch.nn.parameter", "Parameter"): _Parameter,
        }
        if (module, name) not in allowed:
            raise InputError(
                f"{self.path}: its pickle asks for {module}.{name}, which is not a tensor and could run code, so it is refused:"
                " save its state dict alone, or as .safetensors"
            )
        return allowed[module, name]

    def persistent_load(self, pid):
        kind, storage, key, _, size, *view = pid
        if kind != "storage":
            raise ValueError(f"a {kind} where a storage was expected")
        if key not in self.storages:
            self.storages[key] = self.storage(key, STORAGES[storage], size)
        if (
            view and view[0] is not None
        ):  # before PyTorch 0.4: a part of a storage with a key of its own
            _, start, size = view[0]
            return self.storages[key][start : start + size]
        return self.storages[key]


class _Parameter:
    """A parameter as PyTorch before 0.4 pickled it: the tensor is an argument or, still earlier, the first of five states."""

    def __init__(self, tensor=None, *_):
        self.tensor = tensor

    def __setstate__(self, state):
        if len(state) == 5:
            self.tensor = state[0]


def _without_parameters(value):
    """Containers with tensors in place of the parameters."""
    if isinstance(value, dict):
        return {k: _without_parameters(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_parameters(v) for v in value)
    return value.tensor if isinstance(value, _Parameter) else value


def _strided(storage, offset, shape, strides):
    """A tensor's view of its storage. Bounds are checked, because NumPy's as_strided would read outside the storage."""
    if len(shape) != len(strides) or offset < 0 or min((*shape, *strides), default=0) < 0:
        raise ValueError("a tensor has impossible strides")
    if math.prod(shape) == 0:
        return np.empty(shape, storage.dtype)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if last >= storage.size:
        raise ValueError("a tensor reaches outside its storage")
    byte_strides = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, byte_strides, writeable=False)


def _bytes(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _pickled(value, arrays):
    """The pickle program, protocol 2, that pushes `value`. Appends its arrays to `arrays`, in the order of their storages."""
    if isinstance(value, dict):
        items = b"".join(_pickled(k, arrays) + _pickled(v, arrays) for k, v in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, list | tuple):
        return b"](" + b"".join(_pickled(v, arrays) for v in value) + b"e"
    if not isinstance(value, np.ndarray):
        return pickle.dumps(value, protocol=2)[2:-1]  # without the header and the STOP opcode

    def plain(x):
        return pickle.dumps(x, protocol=2)[2:-1]

    storage_class = next(name for name, dtype in STORAGES.items() if dtype == value.dtype)
    storage = (
        plain("storage") + b"ctorch\n" + storage_class.encode() + b"\n" + plain(str(len(arrays)))
    )
    storage = b"(" + storage + plain("cpu") + plain(value.size) + b"tQ"
    arrays.append(value)
    strides = tuple(math.prod(value.shape[i + 1 :]) for i in range(value.ndim))
    arguments = (
        storage
        + plain(0)
        + plain(value.shape)
        + plain(strides)
        + b"\x89ccollections\nOrderedDict\n)R"
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"
