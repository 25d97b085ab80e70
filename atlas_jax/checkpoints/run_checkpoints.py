"""Checkpoints of a training run: saves in a background thread and restores the newest complete one."""

import dataclasses
import functools
import itertools
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
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
    """Manages the checkpoints `step-N` in a folder that only this run writes, and links to the `latest` and the `best`.

    All processes of a run call the same methods in the same order and get the same results. Kept are the best and, with
    `keep`, that many of the newest complete ones; without it only a former best is removed, if its step is no multiple
    of `every`. `save_error`: the message of the last save if it failed, else None.
    """

    def __init__(self, folder: Path, keep: int | None = None, every: int = 1):
        self.folder, self.keep, self.every = folder, keep, every
        self.save_error: str | None = None
        link = folder / "best"
        self._best = folder / link.readlink() if link.is_symlink() else None
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

    def link_best(self, step: int | None) -> None:
        """Once the last save has ended: links `best` to a step's checkpoint and drops the former best.

        There is no such link if the step is None or has no checkpoint, nor with `keep` 0.
        """
        saving = self._saving

        def link() -> None:
            if saving:
                saving.result()
            if not process_group().index:
                self._link_best(None if step is None or self.keep == 0 else self.folder / f"step-{step}")

        self._saving = self._pool.submit(link)

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
        for name in ("latest", "best"):
            (self.folder / name).unlink(missing_ok=True)

    def remove_best_optimizer(self) -> None:
        """Removes the moments of the best checkpoint if it is kept only because it is the best."""
        self.wait()
        if not process_group().index and self._best and self._best not in self._kept_anyway():
            store.remove_moments(self._best)

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
        self._link("latest", folder)
        if self.keep is not None:
            self._remove(set(self._newest_first()) - {folder})

    def _link_best(self, folder: Path | None) -> None:
        if folder is None or not self._is_whole(folder):
            (self.folder / "best").unlink(missing_ok=True)
            return
        former, self._best = self._best, folder
        self._link("best", folder)
        if former:
            self._remove([former])

    def _link(self, name: str, folder: Path) -> None:
        try:
            with atomic_file(self.folder / name) as link:
                link.symlink_to(folder.name)
        except UserError as error:  # a file system without symbolic links
            logger.warning("%s is saved, but %s", folder, error)

    def _remove(self, folders: Iterable[Path]) -> None:
        """Removes those of the checkpoints that need not be kept."""
        for folder in set(folders) - {self._best, *self._kept_anyway()}:
            shutil.rmtree(folder, ignore_errors=True)

    def _kept_anyway(self) -> list[Path]:
        """The checkpoints that are kept whether or not they are the best."""
        folders = self._newest_first()
        newest = list(itertools.islice(filter(self._is_whole, folders), self.keep or 1))
        return newest if self.keep is not None else newest + [f for f in folders if _step(f) % self.every == 0]

    def _is_whole(self, folder: Path) -> bool:
        return folder not in self._damaged and store.is_complete(folder)

    def _newest_first(self) -> list[Path]:
        folders = [path for path in self.folder.glob("step-*") if re.fullmatch(STEP_FOLDER, path.name)]
        return sorted(folders, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _clean_up_killed_saves(folder: Path) -> None:
    """Removes what saves of killed processes left, and renames a checkpoint back that was being replaced."""
    for retired in folder.glob(".step-*.old"):
        target = folder / retired.name.split(".")[1]
        if not target.exists():
            os.rename(retired, target)
    for leftover in [*folder.glob(".step-*.old"), *folder.glob(".step-*.draft")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for link in [*folder.glob(".latest.*.draft"), *folder.glob(".best.*.draft")]:
        link.unlink()
