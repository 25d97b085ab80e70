"""Locks by which only one process at a time, of any run on the same storage, makes a file or a folder."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def exclusive(place: Path) -> Iterator[None]:
    """Only one process at a time makes `place`; the others wait in front of the block, and then find it made.

    On a file system without locks nobody waits: several processes may then make the same, and one of them stays.
    """
    path = place.with_name(f".{place.name}.lock")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # who writes there next reports the error
            while True:
                lock = stack.enter_context(path.open("w"))
                if not _lock(lock, place):
                    break
                with contextlib.suppress(FileNotFoundError):  # removed by the process that held it before
                    if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                        break
            stack.callback(path.unlink, missing_ok=True)
        yield


def _lock(file: IO[str], place: Path) -> bool:
    """Locks the file, if necessary after another process; False on a file system without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("%s: another process makes it now; waiting for that", place)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True
