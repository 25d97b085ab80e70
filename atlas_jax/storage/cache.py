"""Files that are made once and found again by later runs: where they are kept, and how only one process makes them."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from atlas_jax.errors import UserError

logger = logging.getLogger(__name__)

VARIABLE = "ATLAS_CACHE"  # the environment variable with the default of --cache_dir
GIGABYTE = 1e9


def cache_folder(cache_dir: str | None) -> Path:
    """The folder of --cache_dir: the flag, else $ATLAS_CACHE, else `atlas_jax` in the user's cache folder."""
    if folder := cache_dir or os.environ.get(VARIABLE):
        return Path(os.path.abspath(folder))
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "atlas_jax"


def fingerprint_files(paths: Iterable[Path], **others: Any) -> str:
    """12 hexadecimal digits of the names, sizes and times of change of files, and of other values.

    Reads no file, so it is quick for an index of hundreds of GB. A file that is written again has another time.
    """
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps([sorted(stats), others], sort_keys=True).encode()).hexdigest()[:12]


def choose_place(places: Iterable[Path], bytes_needed: int, what: str) -> Path:
    """The first of these paths whose folder can be written and has room; UserError with the reasons if none has."""
    problems = []
    for place in places:
        free = _free_bytes(place.parent)
        if free is not None and free >= bytes_needed:
            return place
        problem = "cannot be written" if free is None else f"has {free / GIGABYTE:.3g} GB of room"
        problems.append(f"{place.parent} {problem}")
    raise UserError(
        f"{what} takes {bytes_needed / GIGABYTE:.3g} GB, but {' and '.join(problems)}; name a folder with --cache_dir"
    )


def _free_bytes(folder: Path) -> int | None:
    """Free bytes on the disk of a folder, which is made if it is missing; None if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return shutil.disk_usage(folder).free
    except OSError:
        return None


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
