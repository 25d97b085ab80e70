"""Shared by the prepare_*.py scripts: find or download a data set's original files, read archives, exit on errors."""

import contextlib
import gzip
import json
import logging
import lzma
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from downloads import HttpClient, fetch

from atlas_jax.errors import UserError
from atlas_jax.runtime.interrupts import Interrupted, Interrupts
from atlas_jax.runtime.progress import progress
from atlas_jax.runtime.streams import discard_unwritable_stdout, prepare_streams

DAMAGED_ARCHIVE_ERRORS = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


@contextlib.contextmanager
def exit_on_error(name: str) -> Iterator[None]:
    """Logs progress to stderr; exits with one line on stderr after bad input, status 2, and after a signal."""
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    prepare_streams()
    try:
        with Interrupts():
            yield
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout has exited
        message, status = "", 141
    except UserError as error:
        message, status = str(error), 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message, status = f"{where}{error.strerror or error}; check the path, its permissions and the disk", 2
    except (Interrupted, KeyboardInterrupt) as stop:  # the latter after a second Ctrl-C
        message = f"{str(stop) or 'interrupted'}; the same command starts again, a download where it was"
        status = getattr(stop, "status", 130)
    else:
        return
    if message:
        print(f"{name}: {' '.join(message.splitlines())}", file=sys.stderr)
    discard_unwritable_stdout()
    sys.exit(status)


def find_original(given: Path | None, flag: str, url: str, target: Path, *, overwrite: bool = False) -> Path:
    """Returns `given`, the value of `flag`; without one `target`, downloaded if it is missing or to be overwritten."""
    if given is not None:
        if not given.is_file():
            raise UserError(f"{given}: no such file; correct {flag}, or leave it out to download {url}")
        return given
    if overwrite or not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            download(url, target)
        except UserError as error:
            problem = str(error).partition("; ")[0]
            raise UserError(f"{problem}; get {url} where there is a network, and name the file with {flag}") from None
    return target


def download(url: str, target: Path) -> None:
    folder, _, name = url.rpartition("/")
    client = HttpClient(folder, timeout=60, retries=8)
    version = client.head(name)
    with progress(f"downloading {url}", "bytes", version.size) as advance:
        fetch(client, name, target, version, None, advance)


@contextlib.contextmanager
def tar_files(archive: Path) -> Iterator[Iterator[tuple[PurePosixPath, IO[bytes]]]]:
    """Yields an iterator over the (path, open file) of an archive's files, in order; extracts nothing to the disk.

    A member with an absolute path or `..`, a link, a device, and a damaged or truncated archive are `UserError`s. The
    iterator raises them when it gets there: use nothing of an archive before its end.
    """
    try:
        with tarfile.open(archive) as tar:
            yield _members(archive, tar)
    except DAMAGED_ARCHIVE_ERRORS as error:
        problem = str(error).partition("\n")[0].rstrip(":") or "it ends too early"
        raise UserError(
            f"{archive}: no tar archive, or a damaged one ({problem}); delete it and fetch it again"
        ) from None


def _members(archive: Path, tar: tarfile.TarFile) -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
    for member in tar:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise _refused(archive, member, "would be written outside of the folder")
        if member.isfile():
            file = tar.extractfile(member)
            assert file is not None
            yield path, file
        elif not member.isdir():
            raise _refused(archive, member, "is a link or a device")
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)  # tarfile takes an invalid header for the end of the archive
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end is missing")
    while tar.fileobj.read(2**20):  # a compressed archive is checked against its checksum at its end
        pass


def _refused(archive: Path, member: tarfile.TarInfo, why: str) -> UserError:
    return UserError(f"{archive}: refused, member {member.name!r} {why}; take the official archive")


def json_line(row: Any, *, ascii_only: bool = True) -> str:
    return json.dumps(row, ensure_ascii=ascii_only) + "\n"


def parse_integers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a new file in UTF-8, and creates its folder; the lines bring their own line ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)
