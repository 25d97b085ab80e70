"""Folders that all processes of a run use: process 0 creates and removes them, on storage that all hosts share."""

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from atlas_jax.errors import UserError
from atlas_jax.runtime.process_group import process_group
from atlas_jax.storage.files import atomic_folder


@contextlib.contextmanager
def atomic_shared_folder(folder: Path, remedy: str, channel: str = "main") -> Iterator[Path]:
    """`files.atomic_folder` for all processes: each may write into it, and it appears once all have left the block.

    Replaces an existing folder. Yields an absolute path.
    """
    with contextlib.ExitStack() as stack:
        draft = atomic_folder(folder, remedy, replace=True)
        yield Path(process_group().run_on_first(lambda: str(stack.enter_context(draft).resolve()), channel))
        process_group().run_on_first(stack.close, channel)


@contextlib.contextmanager
def shared_scratch(folder: Path, prefix: str) -> Iterator[Path]:
    """Yields a temporary folder inside `folder`, the same on all processes, removed once all have left the block.

    First removes all entries of `folder` whose names begin with `prefix`: leftovers of processes that were killed.
    """

    def create() -> str:
        for leftover in folder.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return tempfile.mkdtemp(prefix=prefix, dir=folder)

    scratch = Path(process_group().run_on_first(create))
    try:
        yield scratch
        process_group().barrier()  # other processes may have its files open
    finally:
        if not process_group().index:
            shutil.rmtree(scratch, ignore_errors=True)


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
