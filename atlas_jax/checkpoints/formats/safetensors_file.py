"""Safetensors files: a JSON header, then the arrays back to back.

Reading maps the file and writing streams it, so neither holds all arrays in memory.
"""

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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH = struct.Struct("<Q")  # number of bytes of the header


def open_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays by name as read-only views of the mapped file; UserError if the file is incomplete."""
    try:
        with safe_open(path, framework="np"):  # checks that the file holds every array and nothing else
            pass
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
    mapped = MappedFile(path)
    data_start = LENGTH.size + LENGTH.unpack_from(mapped)[0]
    header = json.loads(mapped[LENGTH.size : data_start])
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} is of type {entry['dtype']}; save it as F32 or BF16")
    return {
        name: np.ndarray(entry["shape"], DTYPES[entry["dtype"]], mapped, data_start + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def write_safetensors(path: Path, arrays: Mapping[str, ArrayLike], on_bytes: Callable[[int], object]) -> None:
    """Writes the arrays, reading ahead while one is written; calls `on_bytes(count)` after each array."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # Hugging Face's loader requires it
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": DTYPE_NAMES[array.dtype], "shape": array.shape, "data_offsets": (start, end)}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "xb") as file:
        file.write(LENGTH.pack(len(encoded)) + encoded)
        for data in stream(arrays.values(), file, on_bytes):
            file.write(data)
