"""Files and folders that appear complete or not at all."""

import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from atlas_jax.errors import UserError
from atlas_jax.storage import mapped_file


@contextlib.contextmanager
def atomic_folder(folder: Path, remedy: str, *, replace: bool = False) -> Iterator[Path]:
    """Yields a hidden sibling to write into, renamed to `folder` when the block ends and removed when it fails.

    The siblings of processes that were killed go first. When `folder` has appeared meanwhile the first writer wins,
    unless `replace`. Not being able to write is a `UserError` that ends in `remedy`.
    """
    _sweep(folder)
    draft, retired = _sibling(folder, "draft"), _sibling(folder, "old")
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); {remedy}") from None
    try:
        yield draft
        if replace and folder.exists():
            os.rename(folder, retired)
        os.rename(draft, folder)
        shutil.rmtree(retired, ignore_errors=True)
    except OSError as error:
        if not _is_about(error, draft):
            raise
        if replace or error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise UserError(f"{folder}: cannot be written ({error.strerror}); {remedy}") from None
    finally:
        if retired.exists() and not folder.exists():
            os.rename(retired, folder)
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a hidden sibling to write, renamed to `path` when the block ends and removed when it fails.

    The siblings of processes that were killed go first. Not being able to write is a `UserError`.
    """
    _sweep(path)
    draft = _sibling(path, "draft")
    try:
        yield draft
        os.replace(draft, path)
    except OSError as error:
        if not _is_about(error, draft):
            raise
        remedy = "free some space there, or choose another folder"
        raise UserError(f"{path}: cannot be written ({error.strerror}); {remedy}") from None
    finally:
        with contextlib.suppress(OSError):  # there is none, or what stopped the writing stops this too
            draft.unlink()


def _sibling(path: Path, kind: str) -> Path:
    """A new hidden name beside a path, which tells whose it is."""
    return path.with_name(f".{path.name}.{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.{kind}")


def _sweep(path: Path) -> None:
    """Such siblings, which may be large, of processes that were killed on this machine: they go, or take its place."""
    with contextlib.suppress(OSError):  # who comes to write here will say what is wrong
        for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
            its = re.fullmatch(r"(\w{8})-(\d+)-\w{8}\.(draft|old)", left.name.removeprefix(f".{path.name}."))
            if not its or its[1] != _machine() or _lives(int(its[2])):
                continue
            if its[3] == "old" and not path.exists():  # killed just before the new one came
                os.rename(left, path)
            elif left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


@functools.cache
def _machine() -> str:
    """One name wherever the same number is the same process: neither on another host nor in a container of this one."""
    try:
        boot, numbers = Path("/proc/sys/kernel/random/boot_id").read_text(), os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux: nobody's
        boot, numbers = uuid.uuid4().hex, 0
    return hashlib.blake2b(f"{boot} {numbers}".encode(), digest_size=4).hexdigest()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def fsync(*paths: Path) -> None:
    """Files and folders outlive a power cut from here on; of a folder that is the names in it."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def drop_page_cache(*paths: Path) -> None:
    """What is on the disk leaves the kernel's memory, as far as the kernel can do so."""
    for path in paths:
        with open(path, "rb") as file:
            mapped_file.drop_page_cache(file.fileno())


class WritebackLimiter:
    """Of a long file that is being written, sees to it that the kernel's memory never holds more than `room` bytes."""

    def __init__(self, file: IO[bytes], room: int = 64 << 20):
        self.file, self.room = file, room
        self.since = 0  # bytes written since it last was on the disk

    def wrote(self, count: int) -> None:
        """Is told of bytes, and now and then waits until they are on the disk."""
        self.since += count
        if self.since >= self.room:
            self.file.flush()
            os.fsync(self.file.fileno())
            mapped_file.drop_page_cache(self.file.fileno())
            self.since = 0


def _is_about(error: OSError, draft: Path) -> bool:
    """Whether writing below `draft` failed: a failing `write` knows no name."""
    named = error.filename is None or draft.name in str(error.filename)
    return error.errno is not None and not isinstance(error, BrokenPipeError) and named


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object, indented."""
    with atomic_file(path) as draft:
        draft.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file; UserError if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); is this the right folder?") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); restore the file") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no object; restore the file")
    return found
