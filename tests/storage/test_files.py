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
    can_sync_folders,
    can_write,
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


@pytest.fixture
def mount(tmp_path, monkeypatch) -> Path:
    """An empty mount point, which cannot be renamed nor replaced; ext4 keeps a folder of its own in it."""
    folder = tmp_path / "mount"
    (folder / "lost+found").mkdir(parents=True)
    rename = os.rename

    def refuse_mount(source: Path, target: Path) -> None:
        if folder in (source, target):
            raise OSError(errno.EBUSY, "Device or resource busy", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_mount)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == folder)
    return folder


def test_a_mount_point_gets_the_content(mount):
    """What was written is in it, once complete and again when it is replaced; an error leaves the old content."""
    for text in ("first", "second"):
        with atomic_folder(mount, "choose another", replace=True) as draft:
            (draft / "a").write_text(text)
            (draft / "index.json").write_text(text)
            assert draft.parent == mount
        with pytest.raises(KeyboardInterrupt), atomic_folder(mount, "choose another", replace=True):
            raise KeyboardInterrupt
        assert sorted(path.name for path in mount.iterdir()) == ["a", "index.json", "lost+found"]
        assert (mount / "a").read_text() == (mount / "index.json").read_text() == text
    assert list(mount.parent.iterdir()) == [mount]


KILLED_IN_MOUNT = """
import os, pathlib, signal, sys
from atlas_jax.storage import files
folder, last = pathlib.Path(sys.argv[1]), int(sys.argv[2])
files.os.path.ismount = lambda path: path == folder
rename, renames = os.rename, []
def count(source, target):
    rename(source, target)
    renames.append(source)
    if len(renames) == last:
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = count
with files.atomic_folder(folder, "", replace=True) as draft:
    for name in ("a", "b", "index.json"):
        (draft / name).write_text("new")
"""


@pytest.mark.parametrize("renames", range(1, 8))
def test_a_kill_while_a_mount_point_is_replaced_loses_nothing(tmp_path, renames):
    """After a kill between any two renames, the next writer finds the old content or the new one, and no leftover."""
    folder = tmp_path / "mount"
    folder.mkdir()
    for name in ("a", "c", "index.json"):
        (folder / name).write_text("old")
    command = [sys.executable, "-c", KILLED_IN_MOUNT, str(folder), str(renames)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], check=False).returncode
    assert killed == -signal.SIGKILL
    with pytest.raises(ValueError, match="no"), atomic_folder(folder, "choose another", replace=True):
        raise ValueError("no")
    found = {path.name: path.read_text() for path in folder.iterdir()}
    old = dict.fromkeys(["a", "c", "index.json"], "old")
    new = dict.fromkeys(["a", "b", "index.json"], "new")
    assert found == (old if renames < 4 else new)  # the fourth declares the new content complete


def test_a_mounted_folder_of_the_same_file_system_is_recognised(tmp_path):
    """`os.path.ismount` does not see it. The counter-case: a folder beside it, which is no mount point."""
    code = "from pathlib import Path; from atlas_jax.storage.files import _is_fixed; "
    code += "print([_is_fixed(Path(name).absolute()) for name in ('a b', 'c')])"
    (tmp_path / "code.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    shell = f'mkdir "a b" c && mount --bind c "a b" && {sys.executable} code.py'
    command = ["unshare", "-m", "sh", "-c", shell]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr}")
    assert done.stdout == "[True, False]\n"


def test_links_are_followed(tmp_path):
    """A link to a folder or to a file stays, and what it names is replaced, also if it does not exist yet."""
    (tmp_path / "far/folder").mkdir(parents=True)
    (tmp_path / "far/file").touch()
    for name in ("folder", "file", "new", "new.json"):
        (tmp_path / name).symlink_to(Path("far") / name)
    for name in ("folder", "new"):
        make(tmp_path / name, "text", replace=True)
        assert (tmp_path / "far" / name / "a").read_text() == "text"
    for name in ("file", "new.json"):
        write_json(tmp_path / name, {})
        assert (tmp_path / "far" / name).read_text() == "{}\n"
    assert all(path.is_symlink() for path in tmp_path.iterdir() if path.name != "far")
    assert len(list((tmp_path / "far").iterdir())) == 4


def test_content_that_appears_meanwhile_stays(tmp_path):
    """What `check` refuses at the end is not replaced, and what was written is kept; what it accepts is replaced."""
    folder = tmp_path / "folder"

    def check() -> None:
        if (folder / "own").exists():
            raise UserError("holds something else")

    def write(draft: Path) -> None:
        (draft / "a").write_text("after hours")
        (folder / "own").touch()

    for _ in range(2):
        with atomic_folder(folder, "", replace=True, check=check) as draft:
            (draft / "a").write_text("text")
    message = rf"what was written is in {folder}\.new, .*holds something else"
    with pytest.raises(UserError, match=message), atomic_folder(folder, "", replace=True, check=check) as draft:
        write(draft)
    assert (folder / "own").exists()
    assert (tmp_path / "folder.new/a").read_text() == "after hours"
    with pytest.raises(UserError, match=r"^holds something else"), atomic_folder(folder, "", replace=True, check=check):
        pytest.fail("refused at the start")
    assert sorted(tmp_path.iterdir()) == [folder, tmp_path / "folder.new"]


def test_a_folder_that_cannot_be_written_is_seen_at_the_start(tmp_path, monkeypatch):
    """`can_write` judges the folder itself if it cannot be renamed, else the nearest one above it."""
    closed: set[Path] = set()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in closed)
    (tmp_path / "folder").mkdir()
    assert can_write(tmp_path / "folder")
    assert can_write(tmp_path / "new/below")
    closed.add(tmp_path)
    assert can_write(tmp_path / "folder")
    assert not can_write(tmp_path / "new/below")
    closed.add(tmp_path / "folder")
    assert not can_write(tmp_path / "folder")
    (tmp_path / "file").touch()
    assert not can_write(tmp_path / "file/below")


def test_only_folders_may_refuse_to_be_synced(tmp_path, monkeypatch):
    """EINVAL for a folder is no error; for a file it is, as is a failing disk."""
    failing: list[int] = []

    def failing_fsync(descriptor: int) -> None:
        raise OSError(failing[0], "x")

    monkeypatch.setattr(os, "fsync", failing_fsync)
    (tmp_path / "file").touch()
    failing[:] = [errno.EINVAL]
    fsync(tmp_path)
    assert not can_sync_folders(tmp_path)
    with pytest.raises(OSError, match="x"):
        fsync(tmp_path / "file")
    failing[:] = [errno.EIO]
    with pytest.raises(OSError, match="x"):
        fsync(tmp_path)
