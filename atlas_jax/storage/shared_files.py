"""Files that all processes of a run use: process 0 makes and removes them, on storage that every host has."""

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
    """`files.atomic_folder` for all processes: each may write into it, and it appears when all have come to the end.

    An existing one is replaced. The path is absolute.
    """
    with contextlib.ExitStack() as stack:
        new = atomic_folder(folder, remedy, replace=True)
        yield Path(process_group().run_on_first(lambda: str(stack.enter_context(new).resolve()), channel))
        process_group().run_on_first(stack.close, channel)


@contextlib.contextmanager
def shared_scratch(folder: Path, prefix: str) -> Iterator[Path]:
    """A folder below another one, for as long as the block lasts on any process; what was left there goes first."""

    def make() -> str:
        for left in folder.glob(f"{prefix}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        return tempfile.mkdtemp(prefix=prefix, dir=folder)

    scratch = Path(process_group().run_on_first(make))
    try:
        yield scratch
        process_group().barrier()  # others may have its files open
    finally:
        if not process_group().index:
            shutil.rmtree(scratch, ignore_errors=True)


def check_shared(folder: Path, flag: str) -> None:
    """UserError unless every process sees the same folder there."""

    def mark() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        name = f".{uuid.uuid4().hex}"
        (folder / name).touch()
        return name

    def look() -> None:
        if not (folder / name).exists():
            raise UserError(f"{flag} {folder}: is another folder here than on process 0; all hosts must share it")

    if process_group().count > 1:
        name = process_group().run_on_first(mark)
        try:
            process_group().run_on_all(look)
        finally:
            if not process_group().index:
                (folder / name).unlink(missing_ok=True)
