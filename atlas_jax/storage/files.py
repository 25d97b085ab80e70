"""Files and folders that appear complete or not at all (atomic rename), and control of the page cache while writing."""

import contextlib
import errno
import functools
import glob
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from atlas_jax.errors import UserError
from atlas_jax.storage import mapped_file


class WriteError(UserError):
    """A file or a folder cannot be written, for a reason of the system."""


@contextlib.contextmanager
def atomic_folder(folder: Path, remedy: str, *, replace: bool = False) -> Iterator[Path]:
    """Yields a hidden sibling folder to write into; renames it to `folder` when the block ends, removes it on an error.

    First removes such siblings of processes that were killed. Without `replace` a `folder` that exists by the end of
    the block stays, and what the block wrote is dropped. WriteError that ends in `remedy` if it cannot be written.
    """
    _remove_leftovers(folder)
    draft, previous = _sibling(folder, "draft"), _sibling(folder, "old")
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written ({error.strerror}); {remedy}") from None
    try:
        yield draft
        if replace and folder.exists():
            os.rename(folder, previous)
        os.rename(draft, folder)
        shutil.rmtree(previous, ignore_errors=True)
    except OSError as error:
        if not _is_write_error(error, draft):
            raise
        if replace or error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise WriteError(f"{folder}: cannot be written ({error.strerror}); {remedy}") from None
    finally:
        if previous.exists() and not folder.exists():
            os.rename(previous, folder)
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a hidden sibling path to write; renames it to `path` when the block ends, removes it on an error.

    First removes such siblings of processes that were killed. UserError if it cannot be written.
    """
    _remove_leftovers(path)
    draft = _sibling(path, "draft")
    try:
        yield draft
        os.replace(draft, path)
    except OSError as error:
        if not _is_write_error(error, draft):
            raise
        remedy = "free some space there, or choose another folder"
        raise UserError(f"{path}: cannot be written ({error.strerror}); {remedy}") from None
    finally:
        with contextlib.suppress(OSError):  # the file is gone, or the error that stopped the writing stops this too
            draft.unlink()


def _sibling(path: Path, kind: str) -> Path:
    """Returns a new hidden path beside `path`, whose name holds the machine id and the pid of its writer."""
    return path.with_name(f".{path.name}.{_machine_id()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.{kind}")


def _remove_leftovers(path: Path) -> None:
    """Removes the siblings that killed processes of this machine left beside `path`, which may be large.

    If such a process was killed between the two renames of a replacement, `path` is missing: its old content is
    renamed back.
    """
    with contextlib.suppress(OSError):  # the caller writes here next and reports the error
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
            match = re.fullmatch(r"(\w{8})-(\d+)-\w{8}\.(draft|old)", leftover.name.removeprefix(f".{path.name}."))
            if not match or match[1] != _machine_id() or _is_alive(int(match[2])):
                continue
            if match[3] == "old" and not path.exists():  # killed between the two renames
                os.rename(leftover, path)
            elif leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()


@functools.cache
def _machine_id() -> str:
    """Returns 8 hexadecimal digits that identify the pid namespace of this process.

    They differ between hosts, boots and containers of one host, so that equal pids mean the same process.
    """
    try:
        boot_id, namespace = Path("/proc/sys/kernel/random/boot_id").read_text(), os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux: random, so that no other process's files are taken for leftovers of this machine
        boot_id, namespace = uuid.uuid4().hex, 0
    return hashlib.blake2b(f"{boot_id} {namespace}".encode(), digest_size=4).hexdigest()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # no permission: another user's process
        return True
    return True


def fsync(*paths: Path) -> None:
    """Flushes files and folders to the disk, so that they survive a power cut; for a folder, the names in it."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def drop_page_cache(*paths: Path) -> None:
    """Drops files from the page cache, except for pages that are not yet on the disk."""
    for path in paths:
        with open(path, "rb") as file:
            mapped_file.fadvise_dontneed(file.fileno())


class WritebackLimiter:
    """Keeps at most about `limit` bytes of a long file in the page cache while it is written."""

    def __init__(self, file: IO[bytes], limit: int = 64 << 20):
        self.file, self.limit = file, limit
        self.unsynced = 0  # bytes written since the last fsync

    def wrote(self, count: int) -> None:
        """Counts bytes that were just written; at `limit`, syncs the file and drops it from the page cache."""
        self.unsynced += count
        if self.unsynced >= self.limit:
            self.file.flush()
            os.fsync(self.file.fileno())
            mapped_file.fadvise_dontneed(self.file.fileno())
            self.unsynced = 0


def _is_write_error(error: OSError, draft: Path) -> bool:
    """Returns whether an error came from writing to `draft`: its file name is in there or, as for `write`, missing."""
    is_named = error.filename is None or draft.name in str(error.filename)
    return error.errno is not None and not isinstance(error, BrokenPipeError) and is_named


def json_text(value: Any, indent: int | None = None) -> str:
    """Returns JSON, in which a number that is not finite is null, as JSON has no name for it."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented, as an `atomic_file`."""
    with atomic_file(path) as draft:
        text = json_text(value, indent=2) + "
"
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")  # a file name need not be UTF-8


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; UserError if the file cannot be read or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); is this the right folder?") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); restore the file") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no object; restore the file")
    return value
