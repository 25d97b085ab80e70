"""Writes `torch.save` files without torch and without `pickle`, with the few opcodes that tensors need.

A file is a zip of uncompressed members, as `torch_reader` reads it: a pickle of the structure, and the bytes of each
tensor, aligned so that PyTorch can map them. `torch.load(..., weights_only=True)` opens it.
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
class TensorRef:
    """Stands for a tensor in the pickle; the zip member `data/{key}` holds its values, in C order."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclasses.dataclass(frozen=True)
class Attributes:
    """Pickled as an OrderedDict with these attributes: `weights_only=True` refuses an `argparse.Namespace`."""

    values: dict[str, Any]


def write_torch(
    path: Path, model: Mapping[str, ArrayLike], extra: Mapping[str, Any], on_bytes: Callable[[int], object]
) -> None:
    """Writes what `torch.save({"model": model, **extra}, path)` writes, reading ahead while one array is written.

    Two names of one array object share its bytes, as tied weights do. Calls `on_bytes(count)` after each array.
    """
    unique = {id(array): array for array in model.values()}
    keys = {object_id: str(position) for position, object_id in enumerate(unique)}
    tensors = {name: TensorRef(keys[id(x)], tuple(x.shape), np.dtype(x.dtype)) for name, x in model.items()}
    with open(path, "xb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add_member(archive, "data.pkl", dump({"model": tensors, **extra}))
        _add_member(archive, "byteorder", b"little")
        for key, data in zip(keys.values(), stream(unique.values(), file, on_bytes), strict=True):
            _add_member(archive, f"data/{key}", data)
        _add_member(archive, "version", b"3\n")


def write_tensor(path: Path, array: np.ndarray) -> None:
    """Writes what `torch.save(tensor, path)` writes for one tensor."""
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
        _add_member(archive, "data.pkl", dump(TensorRef("0", array.shape, array.dtype)))
        _add_member(archive, "byteorder", b"little")
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        _add_member(archive, "data/0", data.data)
        _add_member(archive, "version", b"3\n")


def _add_member(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Adds a member whose bytes begin at a multiple of ALIGNMENT, padded by an extra field "FB" as in PyTorch."""
    info = zipfile.ZipInfo(f"{FOLDER}/{name}")
    info.file_size, info.compress_size, info.CRC = len(data), len(data), 0
    zip64 = len(data) * 1.05 > zipfile.ZIP64_LIMIT  # the condition under which `open` writes a larger header
    start = archive.start_dir + len(info.FileHeader(zip64)) + 4
    padding = -start % ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w") as file:
        file.write(data)


def dump(value: Any) -> bytes:
    """Pickles `TensorRef`, `Attributes`, strings, numbers, None, tuples and dicts, with protocol 2; else TypeError."""
    return b"\x80\x02" + _pickle_value(value) + b"."


def _pickle_value(value: Any) -> bytes:
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
            return b"(" + b"".join(map(_pickle_value, value)) + b"t"
        case dict():
            return b"}(" + b"".join(_pickle_value(key) + _pickle_value(item) for key, item in value.items()) + b"u"
        case Attributes():
            return _pickle_call("collections", "OrderedDict") + _pickle_value(value.values) + b"b"
        case TensorRef():
            return _pickle_tensor(value)
        case _:
            raise TypeError(f"a {type(value).__name__} has no place in a checkpoint")


def _pickle_tensor(tensor: TensorRef) -> bytes:
    size = math.prod(tensor.shape)
    strides = tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape)))
    storage_type = _pickle_global("torch", f"{STORAGES[tensor.dtype]}Storage")
    storage = (
        b"(" + _pickle_value("storage") + storage_type + b"".join(map(_pickle_value, (tensor.key, "cpu", size))) + b"tQ"
    )
    arguments = b"".join(map(_pickle_value, (0, tensor.shape, strides, False))) + _pickle_call(
        "collections", "OrderedDict"
    )
    return _pickle_global("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + arguments + b"tR"


def _pickle_call(module: str, name: str) -> bytes:
    return _pickle_global(module, name) + b")R"


def _pickle_global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()
