"""Paths as people type them: `~`, and files that cannot be read as text."""

import gzip
import os
import re
from pathlib import Path

import pytest

from atlas_jax.errors import UserError
from atlas_jax.storage.cache import cache_folder
from atlas_jax.storage.paths import check_text_file, expand_home, user_path


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    """`~` and `~user` at the start, and nowhere else."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home("~/a b") == f"{tmp_path}/a b"
    assert user_path("~") == tmp_path
    assert expand_home("~root").startswith("/")
    for path in ("a/~/b", "./~", "", "a~"):
        assert expand_home(path) == path


def test_the_home_of_nobody_is_refused():
    """The message names the flag, the value, and how such a folder is written."""
    with pytest.raises(UserError, match=r"--output ~nobody-here/x: no home folder for ~nobody-here; write \./~nobod"):
        expand_home("~nobody-here/x", "--output ")


def test_a_tilde_in_the_cache_variable_is_expanded(monkeypatch, tmp_path):
    """$ATLAS_CACHE, which a script may have set in quotes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ATLAS_CACHE", "~/cache")
    assert cache_folder(None) == tmp_path / "cache"


def test_without_a_home_the_cache_is_a_private_temporary_folder(monkeypatch, tmp_path):
    """The same one again, but never one that others can write, or that is a link of theirs."""

    def unknown(*_: object) -> None:
        raise KeyError("uid not found")

    def folder() -> Path:
        cache._temporary_cache.cache_clear()
        return cache_folder(None)

    from atlas_jax.storage import cache

    for variable in ("HOME", "XDG_CACHE_HOME", "ATLAS_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first = folder()
    assert first == tmp_path / f"atlas_jax-{os.getuid()}"
    assert first.stat().st_mode & 0o777 == 0o700
    assert folder() == first
    first.chmod(0o777)
    other = folder()
    assert (other.parent, other != first) == (tmp_path, True)
    first.rmdir()
    first.symlink_to(other)
    assert folder() not in (first, other)
    cache._temporary_cache.cache_clear()


def test_what_is_no_text_file_is_named(tmp_path):
    """A missing file, a folder, gzip, and a pipe where the file is read by line number; a text file passes."""
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "rows.gz").write_bytes(gzip.compress(b"{}"))
    os.mkfifo(tmp_path / "pipe")
    check_text_file(str(tmp_path / "rows.jsonl"), "--x ")
    check_text_file(str(tmp_path / "pipe"), "--x ", seekable=False)
    for name, text in (
        ("none", "no such file"),
        ("rows.jsonl/x", "no such file"),
        (".", "no such file, it is a folder"),
        ("rows.gz", "is compressed with gzip; unpack it with gunzip first"),
        ("pipe", "is a pipe or a device, and read by line number; write it to a file first"),
    ):
        with pytest.raises(UserError, match=f"^--x {re.escape(str(tmp_path / name))}.*: {text}"):
            check_text_file(str(tmp_path / name), "--x ")
