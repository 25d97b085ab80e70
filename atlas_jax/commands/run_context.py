"""Context managers around a run: its connected hosts, its folder, a log handler."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from atlas_jax.errors import UserError

if TYPE_CHECKING:
    from atlas_jax.config import Config


@contextlib.contextmanager
def connected_hosts(config: "Config") -> Iterator[None]:
    """Connects the processes of the run and checks that they share its folder; all but process 0 log only warnings."""
    from atlas_jax.config.run_weights import newest_checkpoint, use_checkpoint
    from atlas_jax.runtime.cluster import connect
    from atlas_jax.storage.shared_files import check_shared

    with connect(config.run) as group:
        if group.index:
            logging.getLogger("atlas_jax").setLevel(logging.WARNING)
        check_shared(config.run_folder, "--checkpoint_dir")
        if group.count > 1:
            folder = config.run_folder / "checkpoint"
            found = group.run_on_first(lambda: str(newest_checkpoint(folder) or ""))
            use_checkpoint(folder, Path(found) if found else None)
        yield


@contextlib.contextmanager
def run_folder(config: "Config") -> Iterator[Path]:
    """Creates the run's folder, with the log in run.log; UserError if it or one of its files is not writable.

    On all processes but process 0 it is a temporary folder instead, which is deleted at the end.
    """
    from atlas_jax.runtime.process_group import process_group

    with contextlib.ExitStack() as stack:
        folder = config.run_folder
        if process_group().index:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="atlas-")))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(folder / "run.log", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written ({error.strerror}); choose another --checkpoint_dir"
            ) from None
        stack.enter_context(log_handler(handler))
        for path in folder.glob("*.json*"):  # scores and predictions are written after hours
            if path.is_dir():
                raise UserError(f"{path}: is a folder, where the run writes a file; move it, or choose another --name")
        yield folder


@contextlib.contextmanager
def log_handler(handler: logging.Handler) -> Iterator[None]:
    """Adds a handler to the root logger for as long as the block lasts, then closes it."""
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
