"""Folders that all processes of a run use: process 0 creates and removes them, on storage that all hosts share."""

import contextlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from atlas_jax.errors import UserError
from atlas_jax.runtime.process_group import process_group
from atlas_jax.storage.file_lock import try_lock
from atlas_jax.storage.files import atomic_folder, remove_tree
from atlas_jax.storage.process_id import is_alive, process_id

LOCK = ".lock"  # in a scratch folder, locked while its process lives


@contextlib.contextmanager
def atomic_shared_folder(
    folder: Path, remedy: str, channel: str = "main", check: Callable[[], object] | None = None
) -> Iterator[Path]:
    """`files.atomic_folder` for all processes: each may write into it, and it appears once all have left the block.

    Replaces an existing folder. Yields an absolute path.
    """
    with contextlib.ExitStack() as stack:
        draft = atomic_folder(folder, remedy, replace=True, check=check)
        yield Path(process_group().run_on_first(lambda: str(stack.enter_context(draft).resolve()), channel))
        process_group().run_on_first(stack.close, channel)


@contextlib.contextmanager
def shared_scratch(folder: Path, prefix: str) -> Iterator[Path]:
    """Yields a temporary folder inside `folder`, the same on all processes, removed once all have left the block.

    First removes those with this prefix whose processes have ended, on whichever machine.
    """
    with contextlib.ExitStack() as stack:
        made = _scratch(folder, prefix)
        yield Path(process_group().run_on_first(lambda: str(stack.enter_context(made))))
        process_group().barrier()  # other processes may have its files open


@contextlib.contextmanager
def _scratch(folder: Path, prefix: str) -> Iterator[Path]:
    """`shared_scratch` for one process."""
    for leftover in folder.glob(f"{prefix}*"):
        if _is_abandoned(leftover, leftover.name.removeprefix(prefix)):
            remove_tree(leftover)
    scratch = folder / f"{prefix}{process_id()}-{uuid.uuid4().hex[:8]}"
    try:
        scratch.mkdir()
        with (scratch / LOCK).open("w") as lock:
            try_lock(lock)
            yield scratch
    finally:
        remove_tree(scratch)


def _is_abandoned(scratch: Path, name: str) -> bool:
    """Whether the process that made a scratch folder has ended: by its id, on another machine by its lock."""
    lives = is_alive(name.rpartition("-")[0])
    if lives is not None:
        return not lives
    try:
        with (scratch / LOCK).open("r+") as lock:
            return try_lock(lock) is True
    except OSError:  # without a lock: being made or removed now, or by an older version
        return False


def check_shared(folder: Path, flag: str) -> None:
    """Raises UserError unless all processes see the same folder; `flag`: the flag that sets the folder."""

    def create_marker() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        name = f".{uuid.uuid4().hex}"
        (folder / name).touch()
        return name

    def check_marker() -> None:
        if not (folder / name).exists():
            raise UserError(f"{flag} {folder}: is another folder here than on process 0; all hosts must share it")

    if process_group().count > 1:
        name = process_group().run_on_first(create_marker)
        try:
            process_group().run_on_all(check_marker)
        finally:
            if not process_group().index:
                (folder / name).unlink(missing_ok=True)
