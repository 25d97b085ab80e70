"""Paths as a person types them: `~` and `~user` are expanded, also where the shell leaves them alone (`--flag=~/x`)."""

import os
import stat
from pathlib import Path

from atlas_jax.errors import UserError

GZIP = b"\x1f\x8b"  # the first bytes of a gzip file


def expand_home(path: str, name: str = "") -> str:
    """Replaces a leading `~` or `~user` by the home folder; UserError, which begins with `name`, if there is none."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{name}{path}: no home folder for {path.split('/')[0]}; write ./{path} if it is called so")
    return expanded


def user_path(text: str) -> Path:
    """A path that a person typed: the `type` of a flag of the scripts."""
    return Path(expand_home(text))


def check_text_file(path: str, name: str, *, seekable: bool = True) -> None:
    """UserError, which begins with `name`, unless the file exists and is not compressed.

    With `seekable` it is read by line number, from any place: a pipe, as `<(command)` makes it, is refused too.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        why = "no such file" if isinstance(error, FileNotFoundError | NotADirectoryError) else error.strerror
        raise UserError(f"{name}{path}: {why}; check the path") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{name}{path}: no such file, it is a folder; name a .jsonl file in it")
    if not stat.S_ISREG(mode):
        if seekable:
            raise UserError(f"{name}{path}: is a pipe or a device, and read by line number; write it to a file first")
        return
    try:
        with open(path, "rb") as file:
            start = file.read(len(GZIP))
    except OSError as error:
        raise UserError(f"{name}{path}: cannot be read ({error.strerror}); check its permissions") from None
    if start == GZIP:
        raise UserError(f"{name}{path}: is compressed with gzip; unpack it with gunzip first")
