"""Files and folders appear complete or not at all, also when the writer fails or is killed."""

import ctypes
import errno
import json
import math
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.errors import UserError
from atlas_jax.storage.files import (
    WritebackLimiter,
    atomic_file,
    atomic_folder,
    drop_page_cache,
    fsync,
    json_text,
    write_json,
)


def make(folder: Path, text: str, *, replace: bool = False) -> None:
    with atomic_folder(folder, "choose another", replace=replace) as draft:
        (draft / "a").write_text(text)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EIO, "x", "/elsewhere")])
def test_an_error_in_the_block_leaves_the_old_content(tmp_path, error):
    """The error propagates, the old file and folder stay, and no draft is left."""
    folder, file = tmp_path / "folder", tmp_path / "file"
    make(folder, "old")
    file.write_text("old")
    for draft in (atomic_folder(folder, "choose another", replace=True), atomic_file(file)):
        with pytest.raises(type(error)), draft:
            raise error
    assert sorted(tmp_path.iterdir()) == [file, folder]
    assert (file.read_text(), (folder / "a").read_text()) == ("old", "old")
    make(folder, "new", replace=True)
    write_json(file, {})
    assert sorted(tmp_path.iterdir()) == [file, folder]
    assert (file.read_text(), (folder / "a").read_text()) == ("{}\n", "new")


def test_without_replace_an_existing_folder_is_kept(tmp_path):
    """The second writer of a folder drops its own content, without an error."""
    make(tmp_path / "folder", "first")
    make(tmp_path / "folder", "second")
    assert (tmp_path / "folder" / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_an_interrupt_between_the_two_renames_restores_the_old_folder(tmp_path, monkeypatch):
    """A replacement moves the old folder away, then the new one in; an interrupt in between moves the old one back."""
    make(tmp_path / "folder", "old")
    rename = os.rename

    def interrupted(source: Path, target: Path) -> None:
        if source.suffix == ".draft":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "folder", "new", replace=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
    assert (tmp_path / "folder" / "a").read_text() == "old"


KILLED = """
import os, pathlib, signal, sys
from atlas_jax.storage.files import atomic_file, atomic_folder
folder, file = map(pathlib.Path, sys.argv[1:])
rename = os.rename
def rename_and_die(source, target):
    rename(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
os.rename = rename_and_die  # a replacement renames twice: this dies after moving the old folder away
with atomic_folder(folder, "", replace=True) as draft, atomic_file(file) as other:
    (draft / "a").write_text("half")
    other.write_text("half")
    if not folder.exists():
        os.kill(os.getpid(), signal.SIGKILL)
"""


def kill(folder, file):
    """Runs a process that is killed while it writes both or, if the folder exists, while it replaces the folder."""
    command = [sys.executable, "-c", KILLED, str(folder), str(file)]
    root = Path(__file__).parents[2]
    assert subprocess.run(command, cwd=root, check=False).returncode == -signal.SIGKILL


def test_the_next_writer_removes_the_drafts_of_killed_processes(tmp_path, monkeypatch):
    """Drafts of live processes, of other targets and of other machines, whose pids mean nothing here, stay."""
    folder, file = tmp_path / "folder[1]", tmp_path / "file"  # "[1]" would be a pattern for glob
    for _ in range(2):
        kill(folder, file)
        assert len(list(tmp_path.iterdir())) == 2  # not four
    with atomic_file(tmp_path / "file.b") as longer, atomic_file(file) as first, atomic_file(file) as second:
        for draft in (longer, first, second):
            draft.write_text("whole")
        assert sorted(tmp_path.glob(".file.*")) == sorted([longer, first, second])
    (tmp_path / "file.b").unlink()
    kill(folder, file)
    with monkeypatch.context() as patch:
        patch.setattr("atlas_jax.storage.process_id.machine_id", lambda: "01234567")
        make(folder, "new")
        assert len(list(tmp_path.iterdir())) == 4
    make(folder, "newer", replace=True)
    write_json(file, {})
    assert sorted(tmp_path.iterdir()) == sorted([file, folder])


def test_the_next_writer_restores_a_folder_whose_replacer_was_killed(tmp_path):
    """A process killed between the two renames leaves no folder; the next writer restores it, even if it fails."""
    folder = tmp_path / "folder"
    make(folder, "old")
    kill(folder, tmp_path / "file")
    assert not folder.exists()
    with pytest.raises(ValueError, match="no"), atomic_folder(folder, "choose another", replace=True):
        raise ValueError("no")
    assert (folder / "a").read_text() == "old"
    write_json(tmp_path / "file", {})
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", folder]


def test_a_write_error_names_the_path_and_the_remedy(tmp_path):
    """No space left, or a path below a file: a UserError of one line."""
    full = OSError(errno.ENOSPC, "No space left on device")  # the error of a failing write has no filename
    message = r"new: cannot be written \(No space left on device\); "
    with pytest.raises(UserError, match=message + "free some space"), atomic_file(tmp_path / "new"):
        raise full
    with pytest.raises(UserError, match=message + "buy a disk"), atomic_folder(tmp_path / "new", "buy a disk"):
        raise full
    (tmp_path / "below").write_text("")
    with pytest.raises(UserError, match=r"below/a: cannot be written \(Not a directory\); choose another"):
        make(tmp_path / "below" / "a", "")
    with pytest.raises(UserError, match=r"below/a: cannot be written \(Not a directory\)"):
        write_json(tmp_path / "below" / "a", {})
    assert list(tmp_path.iterdir()) == [tmp_path / "below"]


def cached_pages(path):
    """Returns how many pages of the file are in the page cache."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        start = np.frombuffer(mapped, np.uint8).ctypes.data
        assert not ctypes.CDLL(None).mincore(*map(ctypes.c_void_p, (start, len(mapped), pages.ctypes.data)))
    return int((pages & 1).sum())


def test_writeback_limiter_bounds_the_page_cache(tmp_path):
    """At most about `limit` bytes of an 8 MB file stay cached, all of it under a large limit; both files are complete.

    A file system in memory (tmpfs) keeps every page of both.
    """
    block, pages = os.urandom(1 << 18), (8 << 20) // mmap.PAGESIZE
    for name, limit in (("drained", 1 << 20), ("plain", 1 << 40)):
        with open(tmp_path / name, "wb") as file:
            writeback = WritebackLimiter(file, limit)
            for _ in range(32):
                file.write(block)
                writeback.wrote(len(block))
    assert (tmp_path / "plain").stat().st_size == (tmp_path / "drained").stat().st_size == 8 << 20
    cached = [cached_pages(tmp_path / name) for name in ("plain", "drained")]
    fsync(tmp_path / "plain")
    drop_page_cache(tmp_path / "plain")
    after_drop = cached_pages(tmp_path / "plain")
    assert after_drop in (0, pages)
    assert cached[0] == pages
    assert cached[1] < pages // 4 or after_drop == pages
    for name in ("drained", "plain"):
        assert (tmp_path / name).read_bytes() == block * 32


def test_json_has_no_nan(tmp_path):
    """Numbers that are not finite are null at any depth; finite values are as before."""
    value = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, "x", None)}], "d": {"é": 2}}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=pytest.fail)
    assert found == {"a": None, "b": [1.5, None, {"c": [None, "x", None]}], "d": {"é": 2}}
    assert json_text({"a": [1, 2.5]}) == '{"a": [1, 2.5]}'
