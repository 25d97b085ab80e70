"""Arrays that stay in their files until they are read, a chunk at a time: a model need not fit into memory."""

import abc
import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from atlas_jax.runtime.prefetch import map_in_order
from atlas_jax.storage.files import WritebackLimiter
from atlas_jax.storage.mapped_file import read_view, release_pages

CHUNK_BYTES = 24 << 20  # bytes read and written at a time; malloc keeps freed blocks below 32 MB for the next chunk
SHARDED_CHUNK_BYTES = (
    4 << 20
)  # bytes of a chunk of a sharded array; smaller, as reading one layer reads chunks of many layers
READ_AHEAD = 2  # arrays that are read while one is written
TILE = (256, 64)  # rows and columns of a matrix that are transposed together

Slices = tuple[slice, ...]  # an index of the leading axes; each slice has start and stop


class LazyArray(abc.ABC):
    """An array that is not in memory; `read` loads all or a part of it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abc.abstractmethod
    def read(self, index: Slices = ()) -> np.ndarray:
        """Returns what NumPy returns for the index, as a C-contiguous copy that the caller owns."""

    def read_once(self, index: Slices = ()) -> np.ndarray:
        """Like `read`, for a part that is not read again: its file pages may leave the page cache."""
        return self.read(index)

    def read_shard(self, index: Slices, to_verify: Sequence[Slices]) -> np.ndarray:
        """Like `read`, called by several processes that each read a part of the array and together read all of it.

        `to_verify` are the slices whose checksum this process computes; those of all processes cover each element once.
        """
        return self.read(index)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array in memory."""
        return self.size * self.dtype.itemsize

    @property
    def chunk(self) -> tuple[int, ...]:
        """Shape of the chunks in which the array is read efficiently."""
        return chunk_shape(self.shape, self.dtype.itemsize)


class StackedViews(LazyArray):
    """NumPy views, mostly of mapped files, as one array of `dtype`: stacked along a new first axis, or a single view.

    With `stacked=False`, `views` has one element.
    """

    def __init__(self, views: list[np.ndarray], dtype: np.dtype[Any], *, stacked: bool):
        self.views, self.dtype, self.stacked = views, dtype, stacked
        self.shape = (len(views), *views[0].shape) if stacked else views[0].shape

    @property
    def chunk(self) -> tuple[int, ...]:
        """Shape of chunks that are contiguous in the file: the axis with the largest stride there is divided first."""
        inner = sorted(range(self.views[0].ndim), key=lambda axis: -self.views[0].strides[axis])
        axes = [0, *(axis + 1 for axis in inner)] if self.stacked else inner
        steps = chunk_shape(tuple(self.shape[axis] for axis in axes), self.dtype.itemsize)
        return tuple(steps[axes.index(axis)] for axis in range(len(axes)))

    def read(self, index: Slices = ()) -> np.ndarray:
        return self._copy(index, keep_cached=True)

    def read_once(self, index: Slices = ()) -> np.ndarray:
        return self._copy(index, keep_cached=False)

    def _copy(self, index: Slices, *, keep_cached: bool) -> np.ndarray:
        if not self.stacked:
            return contiguous(self.views[0], index, self.dtype, keep_cached=keep_cached)
        views = self.views[index[0]] if index else self.views
        parts = [view[index[1:]] for view in views]
        stack = np.empty((len(parts), *parts[0].shape), self.dtype)
        for target, part in zip(stack, parts, strict=True):
            _read_into(target, part, keep_cached=keep_cached)
        return stack


class LocalShards(LazyArray):
    """Host copies of the shards of a sharded `jax.Array` that this process writes to a checkpoint.

    These are the addressable shards with replica id 0, so that over all processes each element is written once.
    """

    def __init__(self, array: Any):
        self.shape, self.dtype = array.shape, np.dtype(array.dtype)
        self.shard_shape: tuple[int, ...] = array.sharding.shard_shape(array.shape)  # the shape of each shard
        self.shards: list[tuple[Slices, np.ndarray]] = [  # the index of each shard in the array, and its values
            (
                tuple(slice(*part.indices(n)[:2]) for part, n in zip(shard.index, array.shape, strict=True)),
                np.array(shard.data),
            )
            for shard in array.addressable_shards
            if shard.replica_id == 0
        ]

    def read(self, index: Slices = ()) -> np.ndarray:
        """Reads a part if this process has all shards; otherwise raises `ValueError`."""
        if sum(shard.size for _, shard in self.shards) < self.size:
            raise ValueError("other processes have pieces of this array")
        array = np.empty(self.shape, self.dtype)
        for shard_index, shard in self.shards:
            array[shard_index] = shard
        return array[index]


ArrayLike = np.ndarray | LazyArray


def read(array: ArrayLike, index: Slices = ()) -> np.ndarray:
    """Returns a part of an array: a view of one in memory, a copy of a lazy one."""
    if isinstance(array, LazyArray):
        return array.read(index)
    return array[index] if index else array  # indexing a 0-d array by () would give a NumPy scalar


def read_once(array: ArrayLike, index: Slices = ()) -> np.ndarray:
    """Like `read`, for a part that is not read again, see `LazyArray.read_once`."""
    return array.read_once(index) if isinstance(array, LazyArray) else read(array, index)


def stream(arrays: Iterable[ArrayLike], file: IO[bytes], on_bytes: Callable[[int], object]) -> Iterator[memoryview]:
    """Yields the bytes of each array for the caller to write to `file`, while the next `READ_AHEAD` arrays are read.

    Calls `on_bytes(count)` after each array was written, and keeps the page cache of `file` small.
    """
    writeback = WritebackLimiter(file)
    with contextlib.closing(map_in_order(read_once, arrays, READ_AHEAD)) as loaded:
        for array in loaded:
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            writeback.wrote(array.nbytes)
            on_bytes(array.nbytes)


def contiguous(
    view: np.ndarray, index: Slices = (), dtype: np.dtype[Any] | None = None, *, keep_cached: bool = True
) -> np.ndarray:
    """Copies a part of a view into a new C-contiguous array of `dtype`; `keep_cached` as for `read_view`."""
    part = view[index]
    copy = np.empty(part.shape, dtype or view.dtype)
    _read_into(copy, part, keep_cached=keep_cached)
    return copy


def _read_into(target: np.ndarray, view: np.ndarray, *, keep_cached: bool) -> None:
    loaded = read_view(view, keep_cached=keep_cached)
    copy_into(target, loaded)
    if loaded is view:
        release_pages(view)


def copy_into(target: np.ndarray, view: np.ndarray) -> None:
    """Does `target[...] = view`; a view that is transposed in memory is copied in tiles that fit into the CPU cache."""
    if view.ndim < 2 or view.strides[-1] == view.itemsize:
        target[...] = view
    elif view.strides[0] == view.itemsize:
        _copy_transposed(target.reshape(len(target), -1), view.reshape(len(view), -1))
    else:
        for row, part in zip(target, view, strict=True):
            copy_into(row, part)


def _copy_transposed(target: np.ndarray, view: np.ndarray) -> None:
    rows, columns = TILE
    for row in range(0, len(view), rows):
        for column in range(0, view.shape[1], columns):
            tile = slice(row, row + rows), slice(column, column + columns)
            target[tile] = view[tile].T.copy().T  # reads in memory order, then transposes within the cache


def arrays_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Compares like `np.array_equal`, with one chunk of each array in memory at a time."""
    if a.shape != b.shape:
        return False
    if a.__array_interface__ == b.__array_interface__:  # the same memory: equal even where NaN
        return True
    for index in chunk_slices(a.shape, chunk_shape(a.shape, a.itemsize)):
        if not np.array_equal(read_view(a[index]), read_view(b[index])):
            return False
    return True


def chunk_shape(shape: tuple[int, ...], itemsize: int, target_bytes: int = 0) -> tuple[int, ...]:
    """Returns the shape of equal chunks of about `target_bytes` (default `CHUNK_BYTES`).

    A chunk is some rows of the first axis; where one such row is larger than that, a chunk of this row.
    """
    if not shape:
        return ()
    target_bytes = target_bytes or CHUNK_BYTES
    row = math.prod(shape[1:]) * itemsize
    if row > target_bytes and len(shape) > 1:
        return 1, *chunk_shape(shape[1:], itemsize, target_bytes)
    count = max(1, -(-shape[0] * row // target_bytes))
    return max(1, -(-shape[0] // count)), *(max(1, n) for n in shape[1:])


def shard_chunk_shape(shard_shape: tuple[int, ...], shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Returns the chunk shape of an array of `shape` that is sharded into shards of the shape `shard_shape`.

    No two shards share a chunk, so several processes can write at the same time.
    """
    if shard_shape == shape:
        return chunk_shape(shape, itemsize)
    fits = chunk_shape(shard_shape, itemsize, SHARDED_CHUNK_BYTES)
    return tuple(
        step if n == whole else _divisor(n, step) for n, whole, step in zip(shard_shape, shape, fits, strict=True)
    )


def _divisor(n: int, limit: int) -> int:
    """Returns the largest divisor of n that is at most `limit`, or n where that is less than a quarter of `limit`."""
    divisor = next(step for step in range(limit, 0, -1) if n % step == 0)
    return divisor if 4 * divisor >= limit else n


def chunk_slices(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Slices]:
    """Yields the index of each chunk of an array, in C order; none for an empty array."""
    ranges = [range(0, n, step) for n, step in zip(shape, chunk, strict=True)]
    for corner in itertools.product(*ranges):
        stops = (min(start + step, n) for start, step, n in zip(corner, chunk, shape, strict=True))
        yield tuple(map(slice, corner, stops))


def relative_slices(index: Slices, box: Slices) -> Slices:
    """Converts an index of an array into an index of its part `array[box]`, where `box` contains `index`."""
    return tuple(slice(i.start - b.start, i.stop - b.start) for i, b in zip(index, box, strict=True))


def start_indices(index: Slices) -> tuple[int, ...]:
    """Returns the index of the first element of a part."""
    return tuple(axis.start or 0 for axis in index)
