"""Safetensors: a header in JSON, then the arrays, one behind the other. Neither reading nor writing needs memory."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from atlas_jax.errors import UserError
from atlas_jax.storage.lazy_array import ArrayLike, stream
from atlas_jax.storage.mapped_file import MappedFile

DTYPES = {
    **{"F64": np.dtype("float64"), "F32": np.dtype("float32"), "F16": np.dtype("float16")},
    **{"BF16": np.dtype(ml_dtypes.bfloat16), "BOOL": np.dtype("bool"), "U8": np.dtype("uint8")},
    **{"I64": np.dtype("int64"), "I32": np.dtype("int32"), "I16": np.dtype("int16"), "I8": np.dtype("int8")},
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH = struct.Struct("<Q")  # of the header


def open_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name, read-only views of the mapped file; UserError if it is not whole."""
    try:
        with safe_open(path, framework="np"):  # checks that every array is in the file, and nothing else
            pass
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
    mapped = MappedFile(path)
    behind = LENGTH.size + LENGTH.unpack_from(mapped)[0]
    header = json.loads(mapped[LENGTH.size : behind])
    header.pop("__metadata__", None)
    for name, about in header.items():
        if about["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} is of type {about['dtype']}; save it as F32 or BF16")
    return {
        name: np.ndarray(about["shape"], DTYPES[about["dtype"]], mapped, behind + about["data_offsets"][0])
        for name, about in header.items()
    }


def write_safetensors(path: Path, arrays: Mapping[str, ArrayLike], tell: Callable[[int], object]) -> None:
    """Writes the arrays, while the next one is read; `tell` hears of the bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # Hugging Face's loader wants to know
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": NAMES[array.dtype], "shape": array.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(LENGTH.pack(len(text)) + text)
        for data in stream(arrays.values(), file, tell):
            file.write(data)
