"""The .npy files of an index: memory-mapped for reading, written by rows from any number of threads and processes."""

import errno
import os
from pathlib import Path

import numpy as np

from atlas_jax.errors import UserError

REBUILD = "copy the index again, or build it again"


def read_array(path: Path, dtype: np.typing.DTypeLike, shape: tuple[int, ...]) -> np.ndarray:
    """Memory-maps a .npy file; UserError unless it is whole and has this dtype and shape. Never unpickles."""
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
    """Creates and allocates a .npy file and memory-maps it: a full disk is an OSError now, not a crash later."""
    array = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)
    with open(path, "r+b") as file:
        allocate(file.fileno(), os.fstat(file.fileno()).st_size)
    return array


class VectorFile:
    """A .npy file of vectors (float16, "p d") for writing, by rows, from any number of threads and processes.

    One process calls `create`; then all open it. Rows are written to the file with `pwrite`, not through a memory map:
    two hosts may write rows of the same page, which shared storage would not merge.
    """

    def __init__(self, path: Path, count: int, dim: int):
        self.shape = count, dim
        self._file = path.open("r+b", buffering=0)
        np.lib.format.read_magic(self._file)
        np.lib.format.read_array_header_1_0(self._file)
        self._data_offset = self._file.tell()  # bytes

    @classmethod
    def create(cls, path: Path, count: int, dim: int) -> "VectorFile":
        """Creates and allocates the file: a full disk is an OSError now, not later."""
        with path.open("wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": (count, dim)}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            allocate(file.fileno(), file.tell() + 2 * count * dim)
        return cls(path, count, dim)

    def __setitem__(self, rows: slice, values: np.ndarray) -> None:
        """Writes consecutive rows; ValueError if `values` has another shape than they."""
        start, stop, _ = rows.indices(self.shape[0])
        vectors = np.ascontiguousarray(values, np.float16)
        if vectors.shape != (stop - start, self.shape[1]):
            raise ValueError(f"{vectors.shape} for rows {start} to {stop} of {self.shape}")
        data, offset = vectors.data.cast("B"), self._data_offset + 2 * start * self.shape[1]
        while len(data):
            written = os.pwrite(self._file.fileno(), data, offset)
            data, offset = data[written:], offset + written

    def sync(self) -> None:
        """Calls fsync: afterwards other hosts can read the rows written here."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def allocate(file: int, size: int) -> None:
    """Sets the size of an open file in bytes, and reserves the disk space where the system can.

    Elsewhere it checks that there is room now: OSError as for a full disk.
    """
    try:
        return os.posix_fallocate(file, 0, size)
    except AttributeError:  # macOS
        pass
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
    disk = os.fstatvfs(file)
    if size - os.fstat(file).st_blocks * 512 > disk.f_bavail * disk.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(file, size)
