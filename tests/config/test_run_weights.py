"""The weights of a run are those of its newest whole checkpoint, whatever has become of the link to it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from atlas_jax.config.run_weights import CHECKPOINT_FILE, follow_link, is_whole, newest_checkpoint


def checkpoint(folder: Path, step: int, time: int, link: str = "") -> Path:
    """Makes a whole checkpoint of a step, written at a time, and a link to it."""
    made = folder / f"step-{step}"
    made.mkdir(parents=True)
    (made / "array").write_bytes(b"1234")
    (made / CHECKPOINT_FILE).write_text(json.dumps({"step": step, "files": {"array": 4}}))
    os.utime(made / CHECKPOINT_FILE, (time, time))
    if link:
        (folder / link).unlink(missing_ok=True)
        (folder / link).symlink_to(made.name)
    return made


def replace_link(text: str) -> Callable[[Path], object]:
    return lambda latest: (latest.unlink(), latest.write_text(text))


def copy_over_link(latest: Path) -> None:
    """What `cp -L` and `aws s3 sync` make of a link."""
    checkpoint = latest.resolve()
    latest.unlink()
    shutil.copytree(checkpoint, latest)


@pytest.mark.parametrize(
    "change",
    [
        lambda latest: None,
        Path.unlink,
        copy_over_link,
        replace_link("step-3\n"),
        replace_link("step-1"),
        replace_link("no step"),
        lambda latest: (latest.unlink(), latest.symlink_to("step-7")),
        lambda latest: (latest.unlink(), latest.symlink_to("step-1")),
        lambda latest: (latest.unlink(), shutil.copytree(latest.parent / "step-1", latest)),
    ],
)
def test_the_newest_whole_step_is_found(tmp_path, change):
    """With a link, a file in its place, a copy in its place; also if it is missing, dangling or behind."""
    checkpoint(tmp_path, 1, 100)
    newest = checkpoint(tmp_path, 3, 300, link="latest")
    (checkpoint(tmp_path, 10, 200) / "array").write_bytes(b"123")  # not whole
    change(tmp_path / "latest")
    assert newest_checkpoint(tmp_path) == newest


def test_a_link_to_a_lower_step_that_was_written_later_counts(tmp_path):
    """A run that found its step 10 damaged went on from an older one. The counter-case: step 10 is written again."""
    checkpoint(tmp_path, 10, 200)
    later = checkpoint(tmp_path, 7, 300, link="latest")
    assert newest_checkpoint(tmp_path) == later
    os.utime(tmp_path / "step-10" / CHECKPOINT_FILE, (400, 400))
    assert newest_checkpoint(tmp_path) == tmp_path / "step-10"


def test_a_copy_is_found_where_there_is_no_step(tmp_path):
    """A run's folder with nothing but a copy in place of `latest`; without it, or if it is not whole, nothing."""
    assert newest_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 3, 300).rename(tmp_path / "latest")
    assert newest_checkpoint(tmp_path) == tmp_path / "latest"
    (tmp_path / "latest/array").unlink()
    assert not is_whole(tmp_path / "latest")
    assert newest_checkpoint(tmp_path) is None


def test_other_paths_are_no_links(tmp_path):
    """Folders, links of a user's own, long and binary files stay as they are."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "own").symlink_to("folder")
    (tmp_path / "long").write_text("step-1" + " " * 200)
    (tmp_path / "binary").write_bytes(b"\xff")
    for name in ("folder", "own", "long", "binary", "missing"):
        assert follow_link(tmp_path / name) == tmp_path / name
