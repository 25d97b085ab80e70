"""Finds the checkpoints of a run in its folder `checkpoint`, without reading arrays: `step-N`, `latest` and `best`."""

import json
import os
import re
from pathlib import Path

CHECKPOINT_FILE = "atlas.json"  # the file by which a checkpoint of ours is recognised
STEP_FOLDER = r"step-(0|[1-9][0-9]*)"  # pattern of a checkpoint folder's name

_found_by_process_0: dict[Path, Path | None] = {}


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run: the one that `latest` names, unless a newer one is there.

    `latest` is behind after a kill, and where a program that follows links has made a copy of it, which no run renews.
    """
    if folder in _found_by_process_0:
        return _found_by_process_0[folder]
    latest = folder / "latest"
    named = follow_link(latest)
    newest = next(filter(is_whole, step_folders(folder)), None)
    if newest is None or not is_whole(named):
        return newest or (named if is_whole(named) else None)
    behind = saved_step(newest) - saved_step(named)
    # A run that finds its newest checkpoint damaged goes on from an older one: then a lower step was written later
    written_later = named != latest and _time(named) > _time(newest)
    return named if behind < 0 or (behind and written_later) else newest


def use_checkpoint(folder: Path, found: Path | None) -> None:
    """From now on `newest_checkpoint` returns what process 0 has found, even if the run has saved another meanwhile."""
    _found_by_process_0[folder] = found


def follow_link(path: Path) -> Path:
    """The checkpoint that `latest` or `best` names, as a link or as a small file where there are none; else `path`."""
    try:
        name = os.readlink(path) if path.is_symlink() else ""
        if path.is_file() and path.stat().st_size < 100:
            name = path.read_text().strip()
    except (OSError, ValueError):
        name = ""
    return path.with_name(name) if re.fullmatch(STEP_FOLDER, name) else path


def step_folders(folder: Path) -> list[Path]:
    """The folders `step-N`, the highest step first."""
    folders = [path for path in folder.glob("step-*") if re.fullmatch(STEP_FOLDER, path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def is_whole(folder: Path) -> bool:
    """True if every file of a checkpoint exists with its full size; contents are not read."""
    try:
        metadata = json.loads((folder / CHECKPOINT_FILE).read_bytes())
        sizes = metadata["files"].items()
        return type(metadata["step"]) is int and all((folder / name).stat().st_size == size for name, size in sizes)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def saved_step(folder: Path) -> int:
    """The step of a whole checkpoint, whatever its folder is called."""
    step: int = json.loads((folder / CHECKPOINT_FILE).read_bytes())["step"]
    return step


def _time(folder: Path) -> float:
    return (folder / CHECKPOINT_FILE).stat().st_mtime
