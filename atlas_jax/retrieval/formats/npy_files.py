"""The .npy files of an index: memory-mapped for reading, written by rows from any number of threads and processes."""

import os
from pathlib import Path

import numpy as np

from atlas_jax.errors import UserError

REBUILD = "copy the index again, or build it again"


def read_array(path: Path, dtype: np.typing.DTypeLike, shape: tuple[int, ...]) -> np.ndarray:
    """A memory map of a .npy file, refused unless it is what the index says it is. Never unpickles."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: not a whole .npy file ({error}); {REBUILD}") from error
    if array.dtype != dtype or array.shape != shape:
        raise UserError(
            f"{path}: {array.dtype} {list(array.shape)}, but the index has {np.dtype(dtype)} {list(shape)}; {REBUILD}"
        )
    return array


def create_array(path: Path, dtype: np.typing.DTypeLike, shape: tuple[int, ...]) -> np.memmap:
    """A memory map of a new .npy file that has all of its space: a full disk is an error now, not a crash later."""
    array = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)
    with open(path, "r+b") as file:
        allocate(file.fileno(), os.fstat(file.fileno()).st_size)
    return array


class VectorFile:
    """A new .npy file of vectors (float16, "p d") that is written by rows, from any number of threads and processes.

    `create` it once; then each opens it. Rows go where they belong in the file itself: two hosts may write neighbours,
    which in mapped pages would not be safe.
    """

    def __init__(self, path: Path, count: int, dim: int):
        self.shape = count, dim
        self._file = path.open("r+b", buffering=0)
        np.lib.format.read_magic(self._file)
        np.lib.format.read_array_header_1_0(self._file)
        self._first = self._file.tell()

    @classmethod
    def create(cls, path: Path, count: int, dim: int) -> "VectorFile":
        """With all of its space: a full disk is an error now, not later."""
        with path.open("wb") as file:
            shape = {"descr": "<f2", "fortran_order": False, "shape": (count, dim)}
            np.lib.format.write_array_header_1_0(file, shape)
            file.flush()
            allocate(file.fileno(), file.tell() + 2 * count * dim)
        return cls(path, count, dim)

    def __setitem__(self, rows: slice, values: np.ndarray) -> None:
        start, stop, _ = rows.indices(self.shape[0])
        whole = np.ascontiguousarray(values, np.float16)
        if whole.shape != (stop - start, self.shape[1]):
            raise ValueError(f"{whole.shape} for rows {start} to {stop} of {self.shape}")
        data, offset = whole.data.cast("B"), self._first + 2 * start * self.shape[1]
        while len(data):
            written = os.pwrite(self._file.fileno(), data, offset)
            data, offset = data[written:], offset + written

    def sync(self) -> None:
        """From here on other hosts may read what was written."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more will be written."""
        self._file.close()


def allocate(file: int, size: int) -> None:
    """Makes a file so long, with the space on the disk where the system can promise it."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:  # macOS
        os.ftruncate(file, size)
