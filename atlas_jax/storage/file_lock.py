"""Locks among processes on the same storage: one makes a file or a folder, one writes in it, a live one keeps its own.

Only a lock that is held by another process (BlockingIOError) is one: some file systems have no locks.
"""

import contextlib
import fcntl
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from atlas_jax.errors import UserError
from atlas_jax.storage.process_id import is_alive, process_id

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
                locked = try_lock(lock)
                if locked is None:
                    break
                if not locked:
                    logger.info("%s: another process makes it now; waiting for that", place)
                    fcntl.flock(lock, fcntl.LOCK_EX)
                with contextlib.suppress(FileNotFoundError):  # removed by the process that held it before
                    if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                        break
            stack.callback(path.unlink, missing_ok=True)
        yield


@contextlib.contextmanager
def sole_writer(folder: Path, refusal: str) -> Iterator[None]:
    """Only one process is in this block for a folder, by `.lock` in it; UserError `refusal` in all others.

    On a file system without locks a warning says so, and only a live process of this machine is found.
    """
    with (folder / ".lock").open("a+") as file:
        locked = try_lock(file)
        if locked is None:
            file.seek(0)
            holder = file.read()
            locked = holder == process_id() or not is_alive(holder)
            if locked:
                _warn_without_locks(folder)
                file.truncate(0)
                file.write(process_id())
                file.flush()
        if not locked:
            raise UserError(refusal)
        try:
            yield
        finally:
            file.truncate(0)


def try_lock(file: IO[Any]) -> bool | None:
    """Locks an open file until it is closed: False if another process holds it, None without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@functools.cache  # once for each folder
def _warn_without_locks(folder: Path) -> None:
    logger.warning("%s: no locks on this file system; let no process on another machine write there", folder)
