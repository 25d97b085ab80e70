"""The checkpoints of a training run: written behind its back, the newest whole one read."""

import dataclasses
import functools
import itertools
import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from atlas_jax.checkpoints import store
from atlas_jax.checkpoints.store import ResumeState, Weights
from atlas_jax.errors import UserError
from atlas_jax.runtime.process_group import process_group
from atlas_jax.storage.files import atomic_file

logger = logging.getLogger(__name__)

T = TypeVar("T")

STEP = r"step-(0|[1-9][0-9]*)"  # the name of a checkpoint


class DifferentRun(UserError):
    """A checkpoint is whole, but the run cannot go on from it, and not from an older one either."""


class RunCheckpoints:
    """The folders `step-N` below one that only this run writes, and the link `latest` to the last one written.

    The processes of a run call the same methods in the same order, and each has the same answers. With `keep`, only so
    many of the newest whole ones stay. `failed` says why the last save came to nothing.
    """

    def __init__(self, folder: Path, keep: int | None = None):
        self.folder = folder
        self.keep = keep
        self.failed: str | None = None
        self._damaged: set[Path] = set()  # found by reading; the sizes of files may not tell
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        process_group().run_on_first(lambda: _sweep(folder))

    def restore(
        self, read: Callable[[Path], T], verify: Callable[[T], None] = lambda found: None
    ) -> tuple[T, Path] | None:
        """What `read` makes of the newest checkpoint that it does not refuse with a UserError; None if there is none.

        Nor may `verify` refuse it, in which the processes take part together. UserError if there are some but all are
        refused, or one of them with `DifferentRun`.
        """
        found: list[T] = []

        def keep(folder: Path) -> None:
            found.append(read(folder))

        names = process_group().run_on_first(lambda: [folder.name for folder in self._newest_first()])
        refusals = []
        for name, older in itertools.zip_longest(names, names[1:]):
            folder = self.folder / name
            try:
                process_group().run_on_all(functools.partial(keep, folder))
                verify(found[-1])
                return found[-1], folder
            except DifferentRun:
                raise
            except (OSError, UserError) as error:
                found.clear()  # it may be large
                refusals.append(error)
                self._damaged.add(folder)
                if older:
                    logger.warning("%s is damaged, %s is tried next: %s", name, older, error)
        if refusals:
            raise UserError(f"{self.folder}: none of its checkpoints can be read; the newest: {refusals[0]}")
        return None

    def save(self, step: int, weights: Weights, resume_state: ResumeState | None = None) -> None:
        """Starts to write `step-{step}`, once the save before is done; the arrays must not change until `wait`.

        Not being able to write is logged, and the older checkpoints stay.
        """
        self.wait()
        self._saving = self._pool.submit(self._save, dataclasses.replace(weights, step=step), resume_state)

    def wait(self) -> bool:
        """Whether the last save, which has ended now, succeeded."""
        if self._saving:
            self._saving.result()
        return self.failed is None

    def remove(self) -> None:
        """Removes all of them."""
        self.wait()
        if process_group().index:
            return
        for folder in self._newest_first():
            shutil.rmtree(folder, ignore_errors=True)
        (self.folder / "latest").unlink(missing_ok=True)

    def close(self) -> None:
        """Waits for the last save; there can be no more."""
        self._pool.shutdown()
        self.wait()

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _save(self, weights: Weights, resume_state: ResumeState | None) -> None:
        folder = self.folder / f"step-{weights.step}"
        try:
            store.save(folder, weights, resume_state)
        except (OSError, UserError) as error:
            self.failed = f"step {weights.step} was not saved: {error}"
            logger.error("%s; the older checkpoints stay and the run goes on", self.failed)
            return
        self.failed = None
        self._damaged.discard(folder)
        if process_group().index:
            return
        try:
            with atomic_file(self.folder / "latest") as link:
                link.symlink_to(folder.name)
        except UserError as error:  # a file system without links
            logger.warning("%s is saved, but %s", folder, error)
        if self.keep is not None:
            self._remove_older(folder, max(self.keep, 1))

    def _remove_older(self, written: Path, keep: int) -> None:
        folders = self._newest_first()
        whole = [folder for folder in folders if folder not in self._damaged and store.is_whole(folder)]
        for folder in set(folders) - {written, *whole[:keep]}:
            shutil.rmtree(folder, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        steps = [int(found[1]) for path in self.folder.glob("step-*") if (found := re.fullmatch(STEP, path.name))]
        return [self.folder / f"step-{step}" for step in sorted(steps, reverse=True)]


def _sweep(folder: Path) -> None:
    """Removes what killed processes left behind; a checkpoint that was just being replaced comes back."""
    for retired in folder.glob(".step-*.old"):
        place = folder / retired.name.split(".")[1]
        if not place.exists():
            os.rename(retired, place)
    for left in [*folder.glob(".step-*.old"), *folder.glob(".step-*.draft")]:
        shutil.rmtree(left, ignore_errors=True)
    for link in folder.glob(".latest.*.draft"):
        link.unlink()
