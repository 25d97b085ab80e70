"""What both kinds of index share: the question, the answer, and what is refused."""

import os
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Float32, Int64

from atlas_jax.errors import UserError

REBUILD = "copy the index again, or build it again"


class SearchResult(NamedTuple):
    """The best passages of each query, best first; equal scores are ordered by the smaller number."""

    scores: Float32[np.ndarray, "q k"]  # inner products
    numbers: Int64[np.ndarray, "q k"]  # passage numbers


@runtime_checkable
class Index(Protocol):
    """Vectors of passages, numbered as they were given, searched by inner product."""

    kind: str
    count: int
    dim: int

    def search(self, queries: Float[np.ndarray | Array, "q d"], k: int) -> SearchResult: ...


def check_queries(index: Index, queries: Float[np.ndarray | Array, "q d"], k: int) -> None:
    """Refuses queries that do not fit the index, and more passages than it has."""
    if queries.shape[1] != index.dim:
        raise UserError(
            f"the queries are {queries.shape[1]} wide but the index holds vectors of {index.dim}: "
            "build the index with the retriever that embeds the queries"
        )
    if not 0 < k <= index.count:
        raise UserError(
            f"{k} passages asked for but the index holds {index.count}: "
            f"ask for 1 to {index.count} (--n_context and what multiplies it), or index more passages"
        )


def checked_queries(index: Index, queries: Float[np.ndarray | Array, "q d"], k: int) -> Float32[np.ndarray, "q d"]:
    """The queries on the host in float32, once they are known to fit the index."""
    check_queries(index, queries, k)
    return np.ascontiguousarray(queries, np.float32)


def checked_result(scores: Float32[np.ndarray, "q k"], numbers: Int64[np.ndarray, "q k"]) -> SearchResult:
    """A score that is not finite has no order, so the numbers beside it mean nothing (faiss gives -1)."""
    if not np.isfinite(scores).all() or (numbers < 0).any():
        raise UserError(
            "a search score is not finite: the query encoder has diverged (lower --lr_retriever), "
            "or the index was built by one that had (build it again)"
        )
    return SearchResult(scores, numbers)


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
