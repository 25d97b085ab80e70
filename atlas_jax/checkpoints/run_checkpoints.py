"""Checkpoints of a training run: saves in a background thread and restores the newest complete one."""

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

STEP_FOLDER = r"step-(0|[1-9][0-9]*)"  # pattern of a checkpoint folder's name


class DifferentRun(UserError):
    """The checkpoint is complete but belongs to a different run, as do older ones, so this run cannot resume."""


class RunCheckpoints:
    """Manages the checkpoints `step-N` in a folder that only this run writes, and the link `latest` to the last one.

    All processes of a run call the same methods in the same order and get the same results. With `keep`, only that many
    of the newest complete checkpoints are kept. `save_error`: the message of the last save if it failed, else None.
    """

    def __init__(self, folder: Path, keep: int | None = None):
        self.folder = folder
        self.keep = keep
        self.save_error: str | None = None
        self._damaged: set[Path] = set()  # checkpoints that failed to load; their file sizes may still be right
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        process_group().run_on_first(lambda: _clean_up_killed_saves(folder))

    def restore(
        self, read: Callable[[Path], T], verify: Callable[[T], None] = lambda result: None
    ) -> tuple[T, Path] | None:
        """Reads the newest readable checkpoint; returns the result of `read` and the folder, None without checkpoints.

        A checkpoint is skipped if `read`, on any process, or `verify`, a collective call on that result, raises OSError
        or UserError; but `DifferentRun` is raised at once. UserError if every checkpoint is skipped.
        """
        results: list[T] = []

        def read_checkpoint(folder: Path) -> None:
            results.append(read(folder))

        names = process_group().run_on_first(lambda: [folder.name for folder in self._newest_first()])
        errors = []
        for name, older in itertools.zip_longest(names, names[1:]):
            folder = self.folder / name
            try:
                process_group().run_on_all(functools.partial(read_checkpoint, folder))
                verify(results[-1])
                return results[-1], folder
            except DifferentRun:
                raise
            except (OSError, UserError) as error:
                results.clear()  # frees the memory of what was read
                errors.append(error)
                self._damaged.add(folder)
                if older:
                    logger.warning("%s is damaged, %s is tried next: %s", name, older, error)
        if errors:
            raise UserError(f"{self.folder}: none of its checkpoints can be read; the newest: {errors[0]}")
        return None

    def save(self, step: int, weights: Weights, resume_state: ResumeState | None = None) -> None:
        """Waits for the previous save, then starts to write `step-{step}` in the background.

        The arrays must not change until `wait` returns. A failure to write is logged, and older checkpoints are kept.
        """
        self.wait()
        self._saving = self._pool.submit(self._save, dataclasses.replace(weights, step=step), resume_state)

    def wait(self) -> bool:
        """Waits for the last save and returns whether it succeeded; raises errors other than a failure to write."""
        if self._saving:
            self._saving.result()
        return self.save_error is None

    def remove(self) -> None:
        """Removes all checkpoints of the run."""
        self.wait()
        if process_group().index:
            return
        for folder in self._newest_first():
            shutil.rmtree(folder, ignore_errors=True)
        (self.folder / "latest").unlink(missing_ok=True)

    def close(self) -> None:
        """Waits for the last save and accepts no more."""
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
            self.save_error = f"step {weights.step} was not saved: {error}"
            logger.error("%s; the older checkpoints stay and the run goes on", self.save_error)
            return
        self.save_error = None
        self._damaged.discard(folder)
        if process_group().index:
            return
        try:
            with atomic_file(self.folder / "latest") as link:
                link.symlink_to(folder.name)
        except UserError as error:  # a file system without symbolic links
            logger.warning("%s is saved, but %s", folder, error)
        if self.keep is not None:
            self._remove_old_checkpoints(folder, max(self.keep, 1))

    def _remove_old_checkpoints(self, just_written: Path, keep: int) -> None:
        """Removes all checkpoints but the one just written and the `keep` newest complete ones."""
        folders = self._newest_first()
        whole = [folder for folder in folders if folder not in self._damaged and store.is_complete(folder)]
        for folder in set(folders) - {just_written, *whole[:keep]}:
            shutil.rmtree(folder, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        steps = [
            int(match[1]) for path in self.folder.glob("step-*") if (match := re.fullmatch(STEP_FOLDER, path.name))
        ]
        return [self.folder / f"step-{step}" for step in sorted(steps, reverse=True)]


def _clean_up_killed_saves(folder: Path) -> None:
    """Removes what saves of killed processes left, and renames a checkpoint back that was being replaced."""
    for retired in folder.glob(".step-*.old"):
        target = folder / retired.name.split(".")[1]
        if not target.exists():
            os.rename(retired, target)
    for leftover in [*folder.glob(".step-*.old"), *folder.glob(".step-*.draft")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for link in folder.glob(".latest.*.draft"):
        link.unlink()
