"""Files as arrays: views of a mapped file, of which `read_view` reads many pages at once instead of faulting for each."""

import mmap
import os
from typing import Any

import numpy as np

from atlas_jax.errors import UserError

ALIGNMENT = 64  # bytes; the kernel copies three times as slowly to where malloc puts arrays


class MappedFile(mmap.mmap):
    """A file's bytes, read-only. Raises what opening raises, and `ValueError` if it is empty."""

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

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def read_view(view: np.ndarray, *, keep: bool = True) -> np.ndarray:
    """The same numbers in memory, with the axes in memory as they are in the file.

    A view that is not of a MappedFile, or has gaps there, is returned as it is. Unless `keep`, the pages need not stay
    in the kernel's memory. UserError if the file cannot be read, or was cut short since.
    """
    file = _owner(view)
    low, high = np.lib.array_utils.byte_bounds(view)
    whole = view.size and high - low == view.nbytes and min(view.strides, default=0) >= 0
    if not (isinstance(file, MappedFile) and whole):
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
    if not keep:
        drop_page_cache(file.descriptor, start, len(buffer))
    return np.ndarray(view.shape, view.dtype, buffer.data, 0, view.strides)


def release_pages(array: np.ndarray) -> None:
    """Pages of a mapped file that were read no longer count as this process's memory; to read them again is no harm."""
    owner = _owner(array)
    if isinstance(owner, mmap.mmap):
        owner.madvise(mmap.MADV_DONTNEED)


def drop_page_cache(descriptor: int, start: int = 0, size: int = 0) -> None:
    """These bytes (all, if no size is given) leave the kernel's memory, as far as they are on the disk and unused."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


def _owner(array: np.ndarray) -> Any:
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return owner.obj if isinstance(owner, memoryview) else owner
