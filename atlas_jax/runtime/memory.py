"""Memory of this process that is free but not given back."""

import contextlib
import ctypes


def return_freed_memory() -> None:
    """Gives freed memory back to the operating system, of which glibc keeps blocks below 32 MB for later."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
