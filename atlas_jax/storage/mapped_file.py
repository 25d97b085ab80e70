"""Files as arrays: views of a memory map, and `read_view`, which reads one in a few calls instead of page faults."""

import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from atlas_jax.errors import UserError

ALIGNMENT = 64  # bytes; the kernel copies three times as slowly into the addresses that malloc gives to arrays


class MappedFile(mmap.mmap):
    """A read-only memory map of a file. Raises the `OSError` of `os.open`, and `ValueError` if the file is empty.

    The file descriptor stays open as long as the map, so that `read_view` can read through it.
    """

    path: str | os.PathLike[str]
    descriptor = -1

    def __new__(cls, path: str | os.PathLike[str]) -> "MappedFile":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            file = super().__new__(cls, descriptor, 0, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(descriptor)
            raise
        file.path, file.descriptor = path, descriptor
        return file

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at exit the module `os` may be gone
        if self.descriptor >= 0:
            close(self.descriptor)


def read_view(view: np.ndarray, *, keep_cached: bool = True) -> np.ndarray:
    """Reads a view of a MappedFile into memory; the copy has the strides of the view.

    A view that is not of a MappedFile, or whose bytes are not contiguous in the file, is returned unchanged. With
    `keep_cached=False` the pages that were read may leave the page cache. UserError if the file cannot be read, or has
    been cut short since it was mapped.
    """
    file = _buffer_owner(view)
    low, high = np.lib.array_utils.byte_bounds(view)
    gapless = view.size and high - low == view.nbytes and min(view.strides, default=0) >= 0
    if not (isinstance(file, MappedFile) and gapless):
        return view
    start = low - np.frombuffer(file, np.uint8).ctypes.data
    buffer = np.empty(view.nbytes + ALIGNMENT, np.uint8)
    buffer = buffer[-buffer.ctypes.data % ALIGNMENT :][: view.nbytes]
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(file.descriptor, [buffer.data[done:]], start + done)
        except OSError as error:
            raise UserError(f"{os.fspath(file.path)}: cannot be read ({error.strerror})") from None
        if not count:
            raise UserError(f"{os.fspath(file.path)}: was cut short while it was read; copy or download it again")
        done += count
    if not keep_cached:
        fadvise_dontneed(file.descriptor, start, len(buffer))
    return np.ndarray(view.shape, view.dtype, buffer.data, 0, view.strides)


def release_pages(array: np.ndarray) -> None:
    """Drops the resident pages of the map that an array views (`MADV_DONTNEED`); a later access maps them again.

    Without this, each page that was read counts as memory of this process.
    """
    owner = _buffer_owner(array)
    if isinstance(owner, mmap.mmap):
        owner.madvise(mmap.MADV_DONTNEED)


def fadvise_dontneed(descriptor: int, start: int = 0, size: int = 0) -> None:
    """Drops a byte range of a file (all of it if `size` is 0) from the page cache (`POSIX_FADV_DONTNEED`).

    Pages that are not yet on the disk, or in use, stay. Does nothing on macOS.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


def _buffer_owner(array: np.ndarray) -> Any:
    """Returns the object whose memory an array views, through any chain of views and memoryviews."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return owner.obj if isinstance(owner, memoryview) else owner
