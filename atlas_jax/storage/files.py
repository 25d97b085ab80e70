"""Files and folders that appear complete or not at all (atomic rename), and control of the page cache while writing."""

import contextlib
import errno
import glob
import itertools
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from atlas_jax.errors import UserError
from atlas_jax.storage import mapped_file
from atlas_jax.storage.process_id import is_alive, process_id

HIDDEN = r"(\w{8}-\d+)-\w{8}\.(?:draft|old|new)"  # the end of the names of hidden files and folders
NO_FOLDER_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR)


class WriteError(UserError):
    """A file or a folder cannot be written, for a reason of the system."""


@contextlib.contextmanager
def atomic_folder(
    folder: Path, remedy: str, *, replace: bool = False, check: Callable[[], object] | None = None
) -> Iterator[Path]:
    """Yields a hidden folder to write into, which becomes `folder` when the block ends, or is removed on an error.

    Links are followed. The hidden folder is a sibling, which is renamed; for a `folder` that cannot be renamed, such as
    a mount point, it is inside, and its content is moved. First removes hidden folders of processes that were killed.

    Without `replace` a `folder` with content by the end of the block stays, and what the block wrote is dropped.
    `check` raises UserError if the content of `folder` must not be replaced: it is called before and after the block,
    and what the block wrote is then kept under another name if it cannot be put in place, which the error says.
    WriteError that ends in `remedy` if it cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    _remove_leftovers(folder)
    _check_content(folder, check)
    draft = _hidden(folder if _is_fixed(folder) else folder.parent, folder.name)
    try:
        try:
            draft.mkdir(parents=True)
        except OSError as error:
            raise WriteError(f"{folder}: cannot be written ({error.strerror}); {remedy}") from None
        yield draft
        try:
            if replace or is_empty(folder) or not folder.exists():
                _check_content(folder, check)
                _put_in_place(draft, folder)
        except (OSError, UserError) as error:
            if not replace and isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return
            if not check:
                raise
            raise _kept_error(draft, folder, error) from None
    except OSError as error:
        if not _is_write_error(error, draft):
            raise
        raise WriteError(f"{folder}: cannot be written ({error.strerror}); {remedy}") from None
    finally:
        remove_tree(draft)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a hidden sibling path to write; renames it to `path` when the block ends, removes it on an error.

    A link is followed. First removes such siblings of processes that were killed. UserError if it cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise UserError(f"{path}: is a folder; remove it, or choose another name")
    _remove_leftovers(path)
    draft = _hidden(path.parent, path.name)
    try:
        yield draft
        try:
            os.replace(draft, path)
        except OSError as error:
            if error.errno != errno.EBUSY:  # a file that is mounted cannot be replaced
                raise
            shutil.copyfile(draft, path)
    except OSError as error:
        if not _is_write_error(error, draft):
            raise
        remedy = "free some space there, or choose another folder"
        raise UserError(f"{path}: cannot be written ({error.strerror}); {remedy}") from None
    finally:
        with contextlib.suppress(OSError):  # the file is gone, or the error that stopped the writing stops this too
            draft.unlink()


def is_empty(folder: Path) -> bool:
    """Whether a folder exists and holds nothing, or only what file systems and unfinished writers keep in it."""
    return folder.is_dir() and not any(_content(folder))


def can_write(folder: Path) -> bool:
    """Whether `atomic_folder` may make or replace a folder, by permissions and the kind of file system."""
    folder = Path(os.path.realpath(folder))
    home = folder if _is_fixed(folder) else next(path for path in folder.parents if path.exists())
    return home.is_dir() and os.access(home, os.W_OK | os.X_OK)


def remove_tree(path: Path) -> None:
    """Removes a folder or a file if it exists, as far as possible. A signal meanwhile raises when it is gone."""
    try:
        _remove(path)
    except BaseException:
        _remove(path)
        raise


def copy_tree(
    source: Path,
    target: Path,
    copy: Callable[[Path, Path], object] = shutil.copyfile,
) -> None:
    """Copies a folder with `copy` for each file, without permissions and times, which some file systems refuse."""
    target.mkdir()
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            copy_tree(entry, target / entry.name, copy)
        else:
            copy(entry, target / entry.name)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _hidden(home: Path, name: str) -> Path:
    """Returns a new hidden path in the folder `home`, for what is to be called `name`, with the id of this process."""
    return home / f".{name}.{process_id()}-{uuid.uuid4().hex[:8]}.draft"


def _content(folder: Path) -> Iterator[Path]:
    """The entries of a folder without `_hidden` ones and those of the file system itself."""
    for entry in folder.iterdir():
        if entry.name != "lost+found" and not re.fullmatch(rf"\..+\.{HIDDEN}", entry.name):
            yield entry


def _is_fixed(folder: Path) -> bool:
    """Whether a folder exists that cannot be renamed: a mount point, or one in a folder that cannot be written."""
    if not folder.is_dir():
        return False
    if os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK):
        return True
    try:  # a mounted folder of the same file system
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:  # not Linux
        return False
    escaped = re.sub(rb"[ \t\n\\]", lambda character: b"\\%03o" % ord(character[0]), os.fsencode(folder))
    return any(line.split()[4] == escaped for line in mounts)


def _check_content(folder: Path, check: Callable[[], object] | None) -> None:
    if check:
        check()
    if folder.exists() and not folder.is_dir():
        raise WriteError(f"{folder}: is a file; choose another folder")


def _put_in_place(draft: Path, folder: Path) -> None:
    """Replaces `folder` by the draft beside it, or its content by that of the draft inside.

    After an error the former content is there. A process that is killed leaves what `_settle` completes or undoes.
    """
    old = draft.with_suffix(".old")
    try:
        if draft.parent == folder:
            old.mkdir()
            _move_content(folder, old)
            os.rename(draft, draft.with_suffix(".new"))
        else:
            if folder.exists() and any(folder.iterdir()):
                os.rename(folder, old)
            os.rename(draft, folder)
    finally:
        _settle(old, folder)


def _settle(old: Path, folder: Path) -> None:
    """Ends a replacement, wherever it was interrupted, and removes the former content or puts it back."""
    draft, new = old.with_suffix(".draft"), old.with_suffix(".new")
    if new.exists():  # inside, and the former content is out of the way
        _move_content(new, folder)
        new.rmdir()
    elif old.parent == folder:
        if old.exists() and draft.exists():
            _move_content(old, folder)
    elif old.exists() and not folder.exists():
        os.rename(old, folder)
    remove_tree(old)


def _move_content(source: Path, target: Path) -> None:
    """Renames the entries of one folder into another; what is without JSON files, which come last, is not yet whole."""
    entries = sorted(_content(source), key=lambda entry: entry.suffix == ".json", reverse=target.suffix == ".old")
    for entry in entries:
        os.rename(entry, target / entry.name)


def _kept_error(draft: Path, folder: Path, error: OSError | UserError) -> WriteError:
    """Gives a draft that cannot be put in place a visible name; returns the error that says so."""
    paths = (draft.with_name(f"{folder.name}.new{number or ''}") for number in itertools.count())
    kept = next(path for path in paths if not path.exists())
    os.rename(draft, kept)
    reason = error.strerror if isinstance(error, OSError) else error
    return WriteError(f"what was written is in {kept}, as it cannot be put in place ({reason}); move it where you like")


def _remove_leftovers(path: Path) -> None:
    """Removes what killed processes of this machine left of `path`, beside and inside, which may be large.

    A replacement that was interrupted is completed or undone.
    """
    with contextlib.suppress(OSError):  # the caller writes here next and reports the error
        for home in (path.parent, path):
            leftovers = []
            for entry in home.glob(f".{glob.escape(path.name)}.*"):
                match = re.fullmatch(HIDDEN, entry.name.removeprefix(f".{path.name}."))
                if match and is_alive(match[1]) is False:
                    leftovers.append(entry)
            for leftover in leftovers:
                if leftover.suffix != ".draft":
                    _settle(leftover.with_suffix(".old"), path)
            for leftover in leftovers:
                remove_tree(leftover)


def fsync(*paths: Path) -> None:
    """Flushes files and folders to the disk, so that they survive a power cut; for a folder, the names in it.

    Does nothing for folders on a file system that cannot do so.
    """
    for path in paths:
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if not (path.is_dir() and error.errno in NO_FOLDER_SYNC):
                raise


def can_sync_folders(folder: Path) -> bool:
    """Whether the file system of a folder flushes folders."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        return error.errno not in NO_FOLDER_SYNC
    finally:
        os.close(descriptor)
    return True


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
        text = json_text(value, indent=2) + "\n"
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
