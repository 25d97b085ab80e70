"""What the prepare_*.py scripts share: archives read in place, originals found or fetched, errors in one line."""

import contextlib
import gzip
import http.server
import importlib
import io
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import pytest

from atlas_jax.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "preprocessing"


class Run(NamedTuple):
    """What a run of a script left behind."""

    status: int
    out: str
    err: str

    def said(self, *parts: object) -> bool:
        """Whether it ended with status 2 and one line that holds the parts, in their order, and a remedy."""
        assert (self.status, self.err.count("\n")) == (2, 1), self
        at = 0
        for part in map(str, parts):
            at = self.err.find(part, at)
            assert at >= 0, (part, self.err)
        return ";" in self.err


def load(name: str) -> ModuleType:
    """A script of preprocessing/, which finds its neighbours because it is started from there."""
    with mock.patch.object(sys, "path", [str(SCRIPTS), *sys.path]):
        return importlib.import_module(name)


def run(name: str, *args: object) -> Run:
    """Calls a script with arguments, in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            load(name).main([str(arg) for arg in args])
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Run(status, out.getvalue(), err.getvalue())


def put_tar(path: Path, members: Mapping[str, bytes], *others: tarfile.TarInfo) -> Path:
    """An archive of files, then of other members; compressed if its name says so."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in others:
            tar.addfile(info)
    return path


def other(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A member that is no file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def tree(folder: Path) -> dict[str, bytes]:
    """All files, hidden ones too, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


HOSTILE = {
    "absolute": other("/etc/x.csv", tarfile.REGTYPE),
    "parent": other("data/../../x.csv", tarfile.REGTYPE),
    "parent folder": other("..", tarfile.DIRTYPE),
    "symbolic link": other("data/link", tarfile.SYMTYPE, "/etc"),
    "hard link": other("data/link", tarfile.LNKTYPE, "data/dev/a.csv"),
    "device": other("data/null", tarfile.CHRTYPE),
    "pipe": other("data/pipe", tarfile.FIFOTYPE),
}


def read_all(archive: Path) -> dict[str, bytes]:
    with load("originals").tar_files(archive) as files:
        return {str(path): file.read() for path, file in files}


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_the_files_of_an_archive_are_read_in_place(tmp_path, name):
    """Every file by its path, folders and `./` aside; nothing is extracted."""
    archive = put_tar(tmp_path / name, {"./data/a": b"1", "data/b..c": b"2"}, other("data", tarfile.DIRTYPE))
    assert read_all(archive) == {"data/a": b"1", "data/b..c": b"2"}
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize("case", HOSTILE)
def test_members_that_leave_the_folder_are_refused_by_name(tmp_path, case):
    """Absolute paths, `..`, links and devices."""
    archive = put_tar(tmp_path / "a.tar", {"data/a": b"1"}, HOSTILE[case])
    with pytest.raises(UserError, match=f"^{archive}: refused, member '{HOSTILE[case].name}'.*; "):
        read_all(archive)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
@pytest.mark.parametrize("damage", ["in a file", "between files", "in a header", "no archive", "empty"])
def test_damaged_archives_are_refused(tmp_path, name, damage):
    """Also one that was cut between two files, or whose second header is garbage, which tarfile takes for the end."""
    whole = put_tar(tmp_path / "whole.tar", {"data/a": b"1" * 600, "data/b": b"2"}).read_bytes()
    content = {
        "in a file": whole[:1000],
        "between files": whole[: 512 + 1024],
        "in a header": whole[:1536] + b"x" * 512 + whole[2048:],
        "no archive": b"<html>" * 500,
        "empty": b"",
    }[damage]
    archive = tmp_path / name
    if name.endswith("gz"):
        content = gzip.compress(content)
    archive.write_bytes(content)
    with pytest.raises(UserError, match=f"^{archive}: no tar archive, or a damaged one .*; "):
        read_all(archive)
    archive.write_bytes(whole)
    assert read_all(archive) == {"data/a": b"1" * 600, "data/b": b"2"}


def test_a_truncated_gzip_stream_is_refused(tmp_path):
    """An interrupted download of a .tar.gz, wherever it ends."""
    archive = put_tar(tmp_path / "a.tar.gz", {"data/a": os.urandom(5000), "data/b": b"2"})
    whole = archive.read_bytes()
    for size in (5, 100, 3000, len(whole) - 1):
        archive.write_bytes(whole[:size])
        with pytest.raises(UserError, match="damaged"):
            read_all(archive)


@pytest.mark.parametrize("name", ["prepare_mmlu", "prepare_qa", "prepare_fever", "prepare_templama"])
def test_a_script_started_from_anywhere_explains_itself(tmp_path, name):
    """`--help` names what is made and the flags that make it work without a network."""
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    for part in ("--output_directory", "without a network", "train", ".jsonl", "instead of downloading http"):
        assert part in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture
def served(tmp_path, monkeypatch) -> Iterator[tuple[Path, str]]:
    """A folder and the address at which a server on this machine serves it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            del args

    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Quiet(*a, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield folder, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_an_original_is_given_found_or_fetched(tmp_path, served):
    """In this order, and a fetched one stays; a given one that is not there is an error."""
    original = load("originals").original
    folder, url = served[0], f"{served[1]}/a.json"
    given, place = tmp_path / "given.json", tmp_path / "new" / "a.json"
    given.write_text("given")
    (folder / "a.json").write_text("served")
    assert original(given, "--flag", url, place) == given
    assert not place.exists()
    assert original(None, "--flag", url, place).read_text() == "served"
    (folder / "a.json").write_text("changed")
    assert original(None, "--flag", url, place).read_text() == "served"
    assert original(None, "--flag", url, place, again=True).read_text() == "changed"
    assert list(place.parent.iterdir()) == [place]
    with pytest.raises(UserError, match=r"gone\.json: no such file; correct --flag"):
        original(tmp_path / "gone.json", "--flag", url, place)


def test_what_cannot_be_fetched_is_named_with_its_flag(tmp_path, served):
    """A file that the server does not have, and no server: one line with the address, and nothing is left."""
    original = load("originals").original
    for url in (f"{served[1]}/gone.json", "http://127.0.0.1:1/gone.json"):
        with pytest.raises(UserError, match=f"; get {url} where there is a network, and name the file with --flag$"):
            original(None, "--flag", url, tmp_path / "gone.json")
    assert list(tmp_path.iterdir()) == [served[0]]
