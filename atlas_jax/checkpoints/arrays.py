"""Arrays that stay in their files until they are read, a part at a time: a model need not fit into memory."""

import abc
import itertools
import math
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np

PART = 24 << 20  # bytes that are read and written at a time; malloc keeps what is smaller than 32 MB for the next
TILE = (256, 64)  # elements of a matrix that are transposed together

Index = tuple[slice, ...]  # of the leading axes, each with start and stop


class Lazy(abc.ABC):
    """An array that is not in memory; `read` brings it, or a part of it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abc.abstractmethod
    def read(self, index: Index = ()) -> np.ndarray:
        """What numpy gives for the same index, in C order and not shared with anyone."""

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes, once it is read."""
        return self.size * self.dtype.itemsize


Either = np.ndarray | Lazy


class Linked(Lazy):
    """Views, mostly of mapped files, as one array of `dtype`: a single one, or, `stacked`, along a new first axis."""

    def __init__(self, views: list[np.ndarray], dtype: np.dtype[Any], *, stacked: bool):
        self.views, self.dtype, self.stacked = views, dtype, stacked
        self.shape = (len(views), *views[0].shape) if stacked else views[0].shape

    def expect(self, index: Index) -> None:
        """This part will be read soon: the disk may bring it nearer meanwhile."""
        if self.stacked and index:
            parts = [view[index[1:]] for view in self.views[index[0]]]
        else:
            parts = [view[index] for view in self.views]
        for part in parts:
            advise(part, mmap.MADV_WILLNEED)

    def read(self, index: Index = ()) -> np.ndarray:
        if not self.stacked:
            return contiguous(self.views[0], index, self.dtype)
        views = self.views[index[0]] if index else self.views
        parts = [view[index[1:]] for view in views]
        whole = np.empty((len(parts), *parts[0].shape), self.dtype)
        for target, view, part in zip(whole, views, parts, strict=True):
            advise(view, mmap.MADV_WILLNEED)
            copy_into(target, part)
            advise(view, mmap.MADV_DONTNEED)
        return whole


def read(array: Either, index: Index = ()) -> np.ndarray:
    """A part of an array, wherever it is; of one in memory it is a view."""
    if isinstance(array, Lazy):
        return array.read(index)
    return array[index] if index else array  # a number stays an array


def contiguous(view: np.ndarray, index: Index = (), dtype: np.dtype[Any] | None = None) -> np.ndarray:
    """A part of a view as an array of its own, in C order."""
    part = view[index]
    whole = np.empty(part.shape, dtype or view.dtype)
    advise(view, mmap.MADV_WILLNEED)
    copy_into(whole, part)
    advise(view, mmap.MADV_DONTNEED)
    return whole


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


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """`np.array_equal`, of which only a part is in memory at a time."""
    if one.shape != other.shape:
        return False
    if one.__array_interface__ == other.__array_interface__:  # the same bytes of the same file
        return True
    for _, index in parts(one.shape, chunk_shape(one.shape, one.itemsize)):
        equal = np.array_equal(one[index], other[index])
        advise(one[index], mmap.MADV_DONTNEED)
        advise(other[index], mmap.MADV_DONTNEED)
        if not equal:
            return False
    return True


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Equal parts of about `PART` bytes at most: rows of the first axis, or, if one is larger, rows of it."""
    if not shape:
        return ()
    row = math.prod(shape[1:]) * itemsize
    if row > PART and len(shape) > 1:
        return 1, *chunk_shape(shape[1:], itemsize)
    count = max(1, -(-shape[0] * row // PART))
    return max(1, -(-shape[0] // count)), *(max(1, n) for n in shape[1:])


def parts(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[int, Index]]:
    """The index of each chunk, and the number of its first element in C order; nothing of an empty array."""
    ranges = [range(0, n, step) for n, step in zip(shape, chunk, strict=True)]
    for corner in itertools.product(*ranges):
        stops = (min(start + step, n) for start, step, n in zip(corner, chunk, shape, strict=True))
        yield first(corner, shape), tuple(map(slice, corner, stops))


def first(corner: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The number of an element in C order; axes that `corner` leaves out are at 0."""
    number = 0
    for axis, n in enumerate(shape):
        number = number * n + (corner[axis] if axis < len(corner) else 0)
    return number


def advise(array: np.ndarray, advice: int) -> None:
    """Tells the kernel what comes of the pages of an array that lies in a mapped file; any other is left alone."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    if not isinstance(owner, mmap.mmap) or not array.size:
        return
    start = np.frombuffer(owner, np.uint8).ctypes.data
    low, high = np.lib.array_utils.byte_bounds(array)
    page = (low - start) // mmap.PAGESIZE * mmap.PAGESIZE
    owner.madvise(advice, page, high - start - page)
