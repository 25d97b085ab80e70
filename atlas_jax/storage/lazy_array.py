"""Arrays that stay in their files until they are read, a part at a time: a model need not fit into memory."""

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

PART = 24 << 20  # bytes that are read and written at a time; malloc keeps what is smaller than 32 MB for the next
SPREAD_PART = 4 << 20  # the same of what is split over devices: who reads a layer of it reads chunks of many layers
AHEAD = 2  # arrays that are read while one is written
TILE = (256, 64)  # elements of a matrix that are transposed together

Slices = tuple[slice, ...]  # of the leading axes, each with start and stop


class LazyArray(abc.ABC):
    """An array that is not in memory; `read` brings it, or a part of it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abc.abstractmethod
    def read(self, index: Slices = ()) -> np.ndarray:
        """What numpy gives for the same index, in C order and not shared with anyone."""

    def take(self, index: Slices = ()) -> np.ndarray:
        """`read` for the last time: the file's pages need not stay in the kernel's memory."""
        return self.read(index)

    def read_shard(self, index: Slices, owned: Sequence[Slices]) -> np.ndarray:
        """The same for one of several processes that read it; each element is in what one of them has `owned`."""
        return self.read(index)

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes, once it is read."""
        return self.size * self.dtype.itemsize

    @property
    def chunk(self) -> tuple[int, ...]:
        """The shape of parts that are good to read."""
        return chunk_shape(self.shape, self.dtype.itemsize)


class StackedViews(LazyArray):
    """Views, mostly of mapped files, as one array of `dtype`: a single one, or, `stacked`, along a new first axis."""

    def __init__(self, views: list[np.ndarray], dtype: np.dtype[Any], *, stacked: bool):
        self.views, self.dtype, self.stacked = views, dtype, stacked
        self.shape = (len(views), *views[0].shape) if stacked else views[0].shape

    @property
    def chunk(self) -> tuple[int, ...]:
        """Parts that lie in the file without gaps: the axis that goes first there is the one to divide."""
        inner = sorted(range(self.views[0].ndim), key=lambda axis: -self.views[0].strides[axis])
        axes = [0, *(axis + 1 for axis in inner)] if self.stacked else inner
        steps = chunk_shape(tuple(self.shape[axis] for axis in axes), self.dtype.itemsize)
        return tuple(steps[axes.index(axis)] for axis in range(len(axes)))

    def read(self, index: Slices = ()) -> np.ndarray:
        return self._copy(index, keep=True)

    def take(self, index: Slices = ()) -> np.ndarray:
        return self._copy(index, keep=False)

    def _copy(self, index: Slices, *, keep: bool) -> np.ndarray:
        if not self.stacked:
            return contiguous(self.views[0], index, self.dtype, keep=keep)
        views = self.views[index[0]] if index else self.views
        parts = [view[index[1:]] for view in views]
        whole = np.empty((len(parts), *parts[0].shape), self.dtype)
        for target, part in zip(whole, parts, strict=True):
            _bring(target, part, keep=keep)
        return whole


class LocalShards(LazyArray):
    """Copies of what this process has to write of a `jax.Array` that lies spread over the devices of all of them."""

    def __init__(self, array: Any):
        self.shape, self.dtype = array.shape, np.dtype(array.dtype)
        self.piece: tuple[int, ...] = array.sharding.shard_shape(array.shape)  # the shape of each piece
        self.pieces: list[tuple[Slices, np.ndarray]] = [  # each place is some process's, once
            (
                tuple(slice(*part.indices(n)[:2]) for part, n in zip(shard.index, array.shape, strict=True)),
                np.array(shard.data),
            )
            for shard in array.addressable_shards
            if shard.replica_id == 0
        ]

    def read(self, index: Slices = ()) -> np.ndarray:
        """Of a process that has all the pieces; anything else is a `ValueError`."""
        if sum(piece.size for _, piece in self.pieces) < self.size:
            raise ValueError("other processes have pieces of this array")
        whole = np.empty(self.shape, self.dtype)
        for place, piece in self.pieces:
            whole[place] = piece
        return whole[index]


ArrayLike = np.ndarray | LazyArray


def read(array: ArrayLike, index: Slices = ()) -> np.ndarray:
    """A part of an array, wherever it is; of one in memory it is a view."""
    if isinstance(array, LazyArray):
        return array.read(index)
    return array[index] if index else array  # a number stays an array


def take(array: ArrayLike, index: Slices = ()) -> np.ndarray:
    """The same for the last time, see `LazyArray.take`."""
    return array.take(index) if isinstance(array, LazyArray) else read(array, index)


def stream(arrays: Iterable[ArrayLike], file: IO[bytes], tell: Callable[[int], object]) -> Iterator[memoryview]:
    """The bytes of each array, taken while the one before is written into this file; `tell` hears when one was."""
    drain = WritebackLimiter(file)
    with contextlib.closing(map_in_order(take, arrays, AHEAD)) as made:
        for array in made:
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            drain.wrote(array.nbytes)
            tell(array.nbytes)


def contiguous(
    view: np.ndarray, index: Slices = (), dtype: np.dtype[Any] | None = None, *, keep: bool = True
) -> np.ndarray:
    """A part of a view as an array of its own, in C order; `keep` as for `read_view`."""
    part = view[index]
    whole = np.empty(part.shape, dtype or view.dtype)
    _bring(whole, part, keep=keep)
    return whole


def _bring(target: np.ndarray, view: np.ndarray, *, keep: bool) -> None:
    fetched = read_view(view, keep=keep)
    copy_into(target, fetched)
    if fetched is view:
        release_pages(view)


def copy_into(target: np.ndarray, view: np.ndarray) -> None:
    """`target[...] = view`; if its axes lie the other way round in memory, tile by tile, as a cache likes it."""
    if view.ndim < 2 or view.strides[-1] == view.itemsize:
        target[...] = view
    elif view.strides[0] == view.itemsize:
        _transpose(target.reshape(len(target), -1), view.reshape(len(view), -1))
    else:
        for row, part in zip(target, view, strict=True):
            copy_into(row, part)


def _transpose(target: np.ndarray, view: np.ndarray) -> None:
    rows, columns = TILE
    for row in range(0, len(view), rows):
        for column in range(0, view.shape[1], columns):
            tile = slice(row, row + rows), slice(column, column + columns)
            target[tile] = view[tile].T.copy().T  # in the order of memory first, then transposed within the cache


def arrays_equal(one: np.ndarray, other: np.ndarray) -> bool:
    """`np.array_equal`, of which only a part is in memory at a time."""
    if one.shape != other.shape:
        return False
    if one.__array_interface__ == other.__array_interface__:  # the same bytes of the same file
        return True
    for index in parts(one.shape, chunk_shape(one.shape, one.itemsize)):
        if not np.array_equal(read_view(one[index]), read_view(other[index])):
            return False
    return True


def chunk_shape(shape: tuple[int, ...], itemsize: int, part: int = 0) -> tuple[int, ...]:
    """Equal parts of about `part`, else `PART`, bytes: rows of the first axis, or, if one is larger, rows of it."""
    if not shape:
        return ()
    part = part or PART
    row = math.prod(shape[1:]) * itemsize
    if row > part and len(shape) > 1:
        return 1, *chunk_shape(shape[1:], itemsize, part)
    count = max(1, -(-shape[0] * row // part))
    return max(1, -(-shape[0] // count)), *(max(1, n) for n in shape[1:])


def piece_chunk(piece: tuple[int, ...], shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Chunks of a whole of which no two equal pieces share one: so several processes can write at a time."""
    if piece == shape:
        return chunk_shape(shape, itemsize)
    fits = chunk_shape(piece, itemsize, SPREAD_PART)
    return tuple(step if n == whole else _divisor(n, step) for n, whole, step in zip(piece, shape, fits, strict=True))


def _divisor(n: int, about: int) -> int:
    """The largest divisor of n that is not above `about`, unless it is far below: then n."""
    found = next(step for step in range(about, 0, -1) if n % step == 0)
    return found if 4 * found >= about else n


def parts(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Slices]:
    """The index of each chunk; nothing of an empty array."""
    ranges = [range(0, n, step) for n, step in zip(shape, chunk, strict=True)]
    for corner in itertools.product(*ranges):
        stops = (min(start + step, n) for start, step, n in zip(corner, chunk, shape, strict=True))
        yield tuple(map(slice, corner, stops))


def relative_slices(index: Slices, box: Slices) -> Slices:
    """The index, counted from where the box begins that contains it."""
    return tuple(slice(i.start - b.start, i.stop - b.start) for i, b in zip(index, box, strict=True))


def start_indices(index: Slices) -> tuple[int, ...]:
    """Where a part begins."""
    return tuple(axis.start or 0 for axis in index)
