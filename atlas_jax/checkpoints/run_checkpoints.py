"""Checkpoints of a training run: saves in a background thread and restores the newest complete one."""

import dataclasses
import functools
import itertools
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from atlas_jax.checkpoints import store
from atlas_jax.checkpoints.store import ResumeState, Weights
from atlas_jax.config.run_weights import CHECKPOINT_FILE, follow_link, is_whole, saved_step, step_folders
from atlas_jax.errors import UserError
from atlas_jax.runtime.process_group import process_group
from atlas_jax.storage.files import remove_tree

logger = logging.getLogger(__name__)

T = TypeVar("T")

LINKS = ("latest", "best")


class DifferentRun(UserError):
    """The checkpoint is complete but belongs to a different run, as do older ones, so this run cannot resume."""


class RunCheckpoints:
    """Manages the checkpoints `step-N` in a folder that only this run writes, and links to the `latest` and the `best`.

    On a file system without symbolic links, a link is a file with the name of the checkpoint.

    All processes of a run call the same methods in the same order and get the same results. Kept are the best and, with
    `keep`, that many of the newest complete ones; without it only a former best is removed, if its step is no multiple
    of `every`. `save_error`: the message of the last save if it failed, else None.
    """

    def __init__(self, folder: Path, keep: int | None = None, every: int = 1):
        self.folder, self.keep, self.every = folder, keep, every
        self.save_error: str | None = None
        self._damaged: set[Path] = set()  # checkpoints that failed to load; their file sizes may still be right
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        process_group().run_on_first(lambda: _clean_up(folder))
        best = follow_link(folder / "best")
        self._best = None if best == folder / "best" else best

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

        names = process_group().run_on_first(lambda: [folder.name for folder in step_folders(self.folder)])
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
        for folder in step_folders(self.folder):
            shutil.rmtree(folder, ignore_errors=True)
        for name in LINKS:
            _unlink(self.folder / name)

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
        _link(self.folder / "latest", folder)
        if self.keep is not None:
            self._remove(set(step_folders(self.folder)) - {folder})

    def _link_best(self, folder: Path | None) -> None:
        if folder is None or not self._is_whole(folder):
            _unlink(self.folder / "best")
            return
        former, self._best = self._best, folder
        _link(self.folder / "best", folder)
        if former:
            self._remove([former])

    def _remove(self, folders: Iterable[Path]) -> None:
        """Removes those of the checkpoints that need not be kept."""
        for folder in set(folders) - {self._best, *self._kept_anyway()}:
            shutil.rmtree(folder, ignore_errors=True)

    def _kept_anyway(self) -> list[Path]:
        """The checkpoints that are kept whether or not they are the best."""
        folders = step_folders(self.folder)
        newest = list(itertools.islice(filter(self._is_whole, folders), self.keep or 1))
        return newest if self.keep is not None else newest + [f for f in folders if _step(f) % self.every == 0]

    def _is_whole(self, folder: Path) -> bool:
        return folder not in self._damaged and is_whole(folder)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _link(link: Path, checkpoint: Path) -> None:
    """Replaces a link by one to a checkpoint beside it."""
    draft = link.with_name(f".{link.name}.{uuid.uuid4().hex[:8]}.draft")
    try:
        try:
            draft.symlink_to(checkpoint.name)
        except OSError as error:
            _warn_without_links(link.parent, error.strerror)
            draft.write_text(f"{checkpoint.name}\n")
        os.replace(draft, link)
    except OSError as error:
        logger.warning("%s is saved, but %s cannot be written (%s)", checkpoint, link, error.strerror)
    finally:
        _unlink(draft)


@functools.cache  # once for each folder
def _warn_without_links(folder: Path, reason: str) -> None:
    logger.warning(
        "%s: no symbolic links there (%s); latest and best are files with a checkpoint's name", folder, reason
    )


def _unlink(link: Path) -> None:
    if link.is_symlink() or link.is_file():
        link.unlink()


def _clean_up(folder: Path) -> None:
    """Removes what saves of killed processes left, and renames a checkpoint back that was being replaced.

    Where `latest` or `best` is a copy, made by a program that follows links, it becomes a link again.
    """
    for retired in folder.glob(".step-*.old"):
        target = folder / retired.name.split(".")[1]
        if not target.exists():
            os.rename(retired, target)
    for leftover in [*folder.glob(".step-*.old"), *folder.glob(".step-*.draft")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for link in [*folder.glob(".latest.*.draft"), *folder.glob(".best.*.draft")]:
        link.unlink()
    for copy in [folder / name for name in LINKS]:
        if copy.is_dir() and not copy.is_symlink() and is_whole(copy):
            own = folder / f"step-{saved_step(copy)}"
            if not own.exists():
                os.rename(copy, own)
            elif is_whole(own) and (own / CHECKPOINT_FILE).read_bytes() == (copy / CHECKPOINT_FILE).read_bytes():
                remove_tree(copy)
            if not copy.exists():
                _link(copy, own)
