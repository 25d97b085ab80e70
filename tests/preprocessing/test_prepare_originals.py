"""Shared by the prepare_*.py scripts: reading archives, finding or downloading originals, errors in one line."""

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
    """Exit status and output of one call of a script."""

    status: int
    out: str
    err: str

    def failed_with(self, *parts: object) -> bool:
        """Asserts status 2 and one line on stderr that holds `parts` in order; returns whether it has a remedy."""
        assert (self.status, self.err.count("\n")) == (2, 1), self
        start = 0
        for part in map(str, parts):
            start = self.err.find(part, start)
            assert start >= 0, (part, self.err)
        return ";" in self.err


def load_script(name: str) -> ModuleType:
    """Imports a script of preprocessing/ with that folder on sys.path, as when it is started as a program."""
    with mock.patch.object(sys, "path", [str(SCRIPTS), *sys.path]):
        return importlib.import_module(name)


def run_script(name: str, *args: object) -> Run:
    """Calls the main function of a script with arguments, in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            load_script(name).main([str(arg) for arg in args])
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Run(status, out.getvalue(), err.getvalue())


def write_tar(path: Path, members: Mapping[str, bytes], *others: tarfile.TarInfo) -> Path:
    """Writes an archive of files and then of other members; with the suffix .gz compressed."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in others:
            tar.addfile(info)
    return path


def tar_member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """An archive member of any type, without content."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read_tree(folder: Path) -> dict[str, bytes]:
    """Contents of all files below a folder, hidden ones too, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


HOSTILE = {
    "absolute": tar_member("/etc/x.csv", tarfile.REGTYPE),
    "parent": tar_member("data/../../x.csv", tarfile.REGTYPE),
    "parent folder": tar_member("..", tarfile.DIRTYPE),
    "symbolic link": tar_member("data/link", tarfile.SYMTYPE, "/etc"),
    "hard link": tar_member("data/link", tarfile.LNKTYPE, "data/dev/a.csv"),
    "device": tar_member("data/null", tarfile.CHRTYPE),
    "pipe": tar_member("data/pipe", tarfile.FIFOTYPE),
}


def read_all(archive: Path) -> dict[str, bytes]:
    with load_script("originals").tar_files(archive) as files:
        return {str(path): file.read() for path, file in files}


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_archive_files_are_read_without_extraction(tmp_path, name):
    """Each file is read by its path without `./`; folders are skipped; nothing is extracted to the disk."""
    archive = write_tar(tmp_path / name, {"./data/a": b"1", "data/b..c": b"2"}, tar_member("data", tarfile.DIRTYPE))
    assert read_all(archive) == {"data/a": b"1", "data/b..c": b"2"}
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_members_are_refused_by_name(tmp_path, case):
    """A member with an absolute path or `..`, a link or a device is a `UserError` with its name."""
    archive = write_tar(tmp_path / "a.tar", {"data/a": b"1"}, HOSTILE[case])
    with pytest.raises(UserError, match=f"^{archive}: refused, member '{HOSTILE[case].name}'.*; "):
        read_all(archive)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
@pytest.mark.parametrize("damage", ["in a file", "between files", "in a header", "no archive", "empty"])
def test_damaged_archives_are_refused(tmp_path, name, damage):
    """Damage is an error, also a cut between two files or an invalid header, which tarfile takes for the end."""
    whole = write_tar(tmp_path / "whole.tar", {"data/a": b"1" * 600, "data/b": b"2"}).read_bytes()
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
    """A .tar.gz cut at any byte is an error, as after an interrupted download."""
    archive = write_tar(tmp_path / "a.tar.gz", {"data/a": os.urandom(5000), "data/b": b"2"})
    whole = archive.read_bytes()
    for size in (5, 100, 3000, len(whole) - 1):
        archive.write_bytes(whole[:size])
        with pytest.raises(UserError, match="damaged"):
            read_all(archive)


@pytest.mark.parametrize("name", ["prepare_mmlu", "prepare_qa", "prepare_fever", "prepare_templama"])
def test_help_works_from_any_folder_and_names_outputs_and_flags(tmp_path, name):
    """`--help` names the output files, and the flags that replace the downloads."""
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    for part in ("--output_directory", "without a network", "train", ".jsonl", "instead of downloading http"):
        assert part in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture
def served(tmp_path, monkeypatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the address of a local server of its files."""

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


def test_an_original_is_given_or_found_or_downloaded(tmp_path, served):
    """A given file wins over an existing one, and that over a download, which is kept; a missing given file fails."""
    find_original = load_script("originals").find_original
    folder, url = served[0], f"{served[1]}/a.json"
    given, target = tmp_path / "given.json", tmp_path / "new" / "a.json"
    given.write_text("given")
    (folder / "a.json").write_text("served")
    assert find_original(given, "--flag", url, target) == given
    assert not target.exists()
    assert find_original(None, "--flag", url, target).read_text() == "served"
    (folder / "a.json").write_text("changed")
    assert find_original(None, "--flag", url, target).read_text() == "served"
    assert find_original(None, "--flag", url, target, overwrite=True).read_text() == "changed"
    assert list(target.parent.iterdir()) == [target]
    with pytest.raises(UserError, match=r"gone\.json: no such file; correct --flag"):
        find_original(tmp_path / "gone.json", "--flag", url, target)


def test_a_failed_download_is_named_with_its_flag(tmp_path, served):
    """A file missing on the server, and an unreachable server, are an error with address and flag; no file is left."""
    find_original = load_script("originals").find_original
    for url in (f"{served[1]}/gone.json", "http://127.0.0.1:1/gone.json"):
        with pytest.raises(UserError, match=f"; get {url} where there is a network, and name the file with --flag$"):
            find_original(None, "--flag", url, tmp_path / "gone.json")
    assert list(tmp_path.iterdir()) == [served[0]]
