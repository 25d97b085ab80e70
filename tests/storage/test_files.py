"""Files and folders appear complete or not at all."""

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.errors import UserError
from atlas_jax.storage.files import WritebackLimiter, atomic_file, atomic_folder, drop_page_cache, fsync, write_json


def make(folder: Path, text: str, *, replace: bool = False) -> None:
    with atomic_folder(folder, "choose another", replace=replace) as draft:
        (draft / "a").write_text(text)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EIO, "x", "/elsewhere")])
def test_a_block_that_fails_leaves_what_was_there(tmp_path, error):
    """The error goes through, the old file and folder stay, and no draft does."""
    folder, file = tmp_path / "folder", tmp_path / "file"
    make(folder, "old")
    file.write_text("old")
    for new in (atomic_folder(folder, "choose another", replace=True), atomic_file(file)):
        with pytest.raises(type(error)), new:
            raise error
    assert sorted(tmp_path.iterdir()) == [file, folder]
    assert (file.read_text(), (folder / "a").read_text()) == ("old", "old")
    make(folder, "new", replace=True)
    write_json(file, {})
    assert sorted(tmp_path.iterdir()) == [file, folder]
    assert (file.read_text(), (folder / "a").read_text()) == ("{}\n", "new")


def test_the_first_writer_wins_unless_replaced(tmp_path):
    """A folder that has appeared meanwhile is kept."""
    make(tmp_path / "folder", "first")
    make(tmp_path / "folder", "second")
    assert (tmp_path / "folder" / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_an_interrupted_exchange_brings_the_old_folder_back(tmp_path, monkeypatch):
    """Between the two renames of a replacement there is no folder: an interruption there puts the old one back."""
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
def last(source, target):
    rename(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
os.rename = last  # of two: the first makes room for the second
with atomic_folder(folder, "", replace=True) as draft, atomic_file(file) as other:
    (draft / "a").write_text("half")
    other.write_text("half")
    if not folder.exists():
        os.kill(os.getpid(), signal.SIGKILL)
"""


def kill(folder, file):
    """A process that dies while it writes both, or, where there is a folder, while it replaces that."""
    command = [sys.executable, "-c", KILLED, str(folder), str(file)]
    root = Path(__file__).parents[2]
    assert subprocess.run(command, cwd=root, check=False).returncode == -signal.SIGKILL


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path, monkeypatch):
    """And nothing of a process that lives, of other targets, or of another machine, whose processes nobody knows."""
    folder, file = tmp_path / "folder[1]", tmp_path / "file"  # a name with a pattern in it
    for _ in range(2):
        kill(folder, file)
        assert len(list(tmp_path.iterdir())) == 2  # not four
    with atomic_file(tmp_path / "file.b") as longer, atomic_file(file) as mine, atomic_file(file) as other:
        for one in (longer, mine, other):
            one.write_text("whole")
        assert sorted(tmp_path.glob(".file.*")) == sorted([longer, mine, other])
    (tmp_path / "file.b").unlink()
    kill(folder, file)
    with monkeypatch.context() as patch:
        patch.setattr("atlas_jax.storage.files._machine", lambda: "01234567")
        make(folder, "new")
        assert len(list(tmp_path.iterdir())) == 4
    make(folder, "newer", replace=True)
    write_json(file, {})
    assert sorted(tmp_path.iterdir()) == sorted([file, folder])


def test_the_next_writer_brings_back_what_a_killed_one_was_replacing(tmp_path):
    """Between the two renames of a replacement there is no folder; even if the next writer fails there is one again."""
    folder = tmp_path / "folder"
    make(folder, "old")
    kill(folder, tmp_path / "file")
    assert not folder.exists()
    with pytest.raises(ValueError, match="no"), atomic_folder(folder, "choose another", replace=True):
        raise ValueError("no")
    assert (folder / "a").read_text() == "old"
    write_json(tmp_path / "file", {})
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", folder]


def test_what_cannot_be_written_is_said(tmp_path):
    """No space, or a path below a file: one line with the path and the remedy."""
    full = OSError(errno.ENOSPC, "No space left on device")  # a failing write knows no name
    said = r"new: cannot be written \(No space left on device\); "
    with pytest.raises(UserError, match=said + "free some space"), atomic_file(tmp_path / "new"):
        raise full
    with pytest.raises(UserError, match=said + "buy a disk"), atomic_folder(tmp_path / "new", "buy a disk"):
        raise full
    (tmp_path / "below").write_text("")
    with pytest.raises(UserError, match=r"below/a: cannot be written \(Not a directory\); choose another"):
        make(tmp_path / "below" / "a", "")
    with pytest.raises(UserError, match=r"below/a: cannot be written \(Not a directory\)"):
        write_json(tmp_path / "below" / "a", {})
    assert list(tmp_path.iterdir()) == [tmp_path / "below"]


def cached(path):
    """How many of the file's pages are in the kernel's memory."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        start = np.frombuffer(mapped, np.uint8).ctypes.data
        assert not ctypes.CDLL(None).mincore(*map(ctypes.c_void_p, (start, len(mapped), pages.ctypes.data)))
    return int((pages & 1).sum())


def test_a_long_file_does_not_stay_in_memory(tmp_path):
    """Of 8 MB what `room` allows stays there, and with much room all of it; both files are whole.

    A file system that is memory itself keeps all of either.
    """
    block, pages = os.urandom(1 << 18), (8 << 20) // mmap.PAGESIZE
    for name, room in (("drained", 1 << 20), ("plain", 1 << 40)):
        with open(tmp_path / name, "wb") as file:
            drain = WritebackLimiter(file, room)
            for _ in range(32):
                file.write(block)
                drain.wrote(len(block))
    assert (tmp_path / "plain").stat().st_size == (tmp_path / "drained").stat().st_size == 8 << 20
    kept = [cached(tmp_path / name) for name in ("plain", "drained")]
    fsync(tmp_path / "plain")
    drop_page_cache(tmp_path / "plain")
    always = cached(tmp_path / "plain")
    assert always in (0, pages)
    assert kept[0] == pages
    assert kept[1] < pages // 4 or always == pages
    for name in ("drained", "plain"):
        assert (tmp_path / name).read_bytes() == block * 32
