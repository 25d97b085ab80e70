"""Files that are made once and found again by later runs: where they are kept, and how they are recognised."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from atlas_jax.errors import UserError
from atlas_jax.storage.file_lock import exclusive
from atlas_jax.storage.files import WriteError
from atlas_jax.storage.paths import expand_home

logger = logging.getLogger(__name__)

VARIABLE = "ATLAS_CACHE"  # the environment variable with the default of --cache_dir
GIGABYTE = 1e9
BLOCK = 2**16  # bytes of a block of `sample_digest`


def cache_folder(cache_dir: str | None) -> Path:
    """The folder of --cache_dir: the flag, else $ATLAS_CACHE, else `atlas_jax` in the user's cache folder.

    For a user without a home, as in some containers, it is in the folder for temporary files.
    """
    if folder := cache_dir or os.environ.get(VARIABLE):
        return Path(os.path.abspath(expand_home(folder, "" if cache_dir else f"{VARIABLE}=")))
    try:
        user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no HOME, and a user id that the system does not know
        return _temporary_cache()
    return Path(user) / "atlas_jax"


@functools.cache
def _temporary_cache() -> Path:
    """A folder that only this user can write, since programs are loaded from it: an earlier run's, or a new one."""
    folder = Path(tempfile.gettempdir()) / f"atlas_jax-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700)
    owned = folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid()
    if not owned or folder.stat().st_mode & 0o022:
        folder = Path(tempfile.mkdtemp(prefix="atlas_jax-"))
    logger.info("no home folder: later runs look for what this one keeps in %s, or in $%s", folder, VARIABLE)
    return folder


def fingerprint_files(paths: Iterable[Path], **others: Any) -> str:
    """12 hexadecimal digits of the names, times of change and samples of files, and of other values.

    A file that is written again has another time; archives may give all files the same one, so samples are read too.
    """
    stats = [(path.name, path.stat().st_mtime_ns, sample_digest(path, 4)) for path in paths]
    return hashlib.sha256(json.dumps([sorted(stats), others], sort_keys=True).encode()).hexdigest()[:12]


def sample_digest(path: Path, blocks: int = 16) -> str:
    """A hash of the size of a file and of that many blocks, spread over it: of all of a small file."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in range(0, size, max(BLOCK, -(-size // blocks))):
            file.seek(start)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def find_or_make(
    places: Sequence[Path], bytes_needed: int, what: str, find: Callable[[], Path | None], make: Callable[[Path], None]
) -> Path:
    """Returns what `find` finds among `places`, or makes it at the first that can be written and has room.

    Of processes that start together one makes it, and the others wait and find it. UserError if there is no place, with
    the size and the reasons.
    """
    problems = []
    if found := find():
        return found
    for place in places:
        if not _can_write(place.parent):
            problems.append(f"{place.parent} cannot be written")
            continue
        with exclusive(place):
            if found := find():  # another process has made it in the meantime
                return found
            free = shutil.disk_usage(place.parent).free
            if free < bytes_needed:
                problems.append(f"{place.parent} has {free / GIGABYTE:.3g} GB of room")
                continue
            try:
                make(place)
                return place
            except WriteError as error:  # such as a quota, which shows while writing only
                problems.append(str(error).partition("; ")[0])
    size = f"{what} takes {bytes_needed / GIGABYTE:.3g} GB"
    raise UserError(f"{size}, but {' and '.join(problems)}; name a folder with --cache_dir")


def _can_write(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
