"""PyTorch's files, written without torch and without `pickle`: the few opcodes that name tensors stand here.

A file is a zip of uncompressed members, as `torch_file` reads it: a pickle that says what there is, and the bytes of
each tensor, aligned so that PyTorch can map them. `torch.load(..., weights_only=True)` opens it.
"""

import dataclasses
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from atlas_jax.storage.lazy_array import ArrayLike, stream

ALIGNMENT = 64  # bytes
FOLDER = "archive"
STORAGES = {
    **{np.dtype("float64"): "Double", np.dtype("float32"): "Float", np.dtype("float16"): "Half"},
    **{np.dtype(ml_dtypes.bfloat16): "BFloat16", np.dtype("int64"): "Long", np.dtype("int32"): "Int"},
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a pickle: all of the member `data/{key}`."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclasses.dataclass(frozen=True)
class Attributes:
    """An OrderedDict with these attributes: an `argparse.Namespace` that `weights_only` lets pass."""

    values: dict[str, Any]


def write_torch(
    path: Path, model: Mapping[str, ArrayLike], about: Mapping[str, Any], tell: Callable[[int], object]
) -> None:
    """What `torch.save({"model": model, **about}, path)` writes, an array after the other while the next one is read.

    Two names of one array share its bytes, as tied weights do. `tell` hears of the bytes.
    """
    once = {id(array): array for array in model.values()}
    keys = {number: str(place) for place, number in enumerate(once)}
    tensors = {name: Tensor(keys[id(a)], tuple(a.shape), np.dtype(a.dtype)) for name, a in model.items()}
    with open(path, "xb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _member(archive, "data.pkl", dump({"model": tensors, **about}))
        _member(archive, "byteorder", b"little")
        for key, data in zip(keys.values(), stream(once.values(), file, tell), strict=True):
            _member(archive, f"data/{key}", data)
        _member(archive, "version", b"3\n")


def write_tensor(path: Path, array: np.ndarray) -> None:
    """What `torch.save(tensor, path)` writes of one tensor."""
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
        _member(archive, "data.pkl", dump(Tensor("0", array.shape, array.dtype)))
        _member(archive, "byteorder", b"little")
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        _member(archive, "data/0", data.data)
        _member(archive, "version", b"3\n")


def _member(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Adds a file whose bytes begin at a multiple of ALIGNMENT; PyTorch too fills the space with a field "FB"."""
    info = zipfile.ZipInfo(f"{FOLDER}/{name}")
    info.file_size, info.compress_size, info.CRC = len(data), len(data), 0
    zip64 = len(data) * 1.05 > zipfile.ZIP64_LIMIT  # when `open` reserves room for longer sizes
    start = archive.start_dir + len(info.FileHeader(zip64)) + 4
    padding = -start % ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w") as file:
        file.write(data)


def dump(value: Any) -> bytes:
    """A pickle of protocol 2 of tensors, texts, numbers, None and dicts of these."""
    return b"\x80\x02" + _value(value) + b"."


def _value(value: Any) -> bytes:
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(digits)]) + digits
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            text = value.encode()
            return b"X" + struct.pack("<I", len(text)) + text
        case tuple():
            return b"(" + b"".join(map(_value, value)) + b"t"
        case dict():
            return b"}(" + b"".join(_value(key) + _value(inner) for key, inner in value.items()) + b"u"
        case Attributes():
            return _call("collections", "OrderedDict") + _value(value.values) + b"b"
        case Tensor():
            return _tensor(value)
        case _:
            raise TypeError(f"a {type(value).__name__} has no place in a checkpoint")


def _tensor(tensor: Tensor) -> bytes:
    size = math.prod(tensor.shape)
    strides = tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape)))
    kind = _name("torch", f"{STORAGES[tensor.dtype]}Storage")
    storage = b"(" + _value("storage") + kind + b"".join(map(_value, (tensor.key, "cpu", size))) + b"tQ"
    rest = b"".join(map(_value, (0, tensor.shape, strides, False))) + _call("collections", "OrderedDict")
    return _name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + rest + b"tR"


def _call(module: str, name: str) -> bytes:
    return _name(module, name) + b")R"


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()
