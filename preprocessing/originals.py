"""What the prepare_*.py scripts share: where an original comes from, archives read in place, how an error ends."""

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

from downloads import Server, fetch

from atlas_jax.errors import UserError
from atlas_jax.runtime.progress import progress

DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


@contextlib.contextmanager
def script(name: str) -> Iterator[None]:
    """Progress goes to stderr; bad input ends the script with one line there and status 2, Ctrl-C with 130."""
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    try:
        yield
    except UserError as error:
        message, status = str(error), 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message, status = f"{where}{error.strerror or error}; check the path, its permissions and the disk", 2
    except KeyboardInterrupt:
        message, status = "interrupted; the same command starts again, a download where it was", 130
    else:
        return
    print(f"{name}: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(status)


def original(given: Path | None, flag: str, url: str, place: Path, *, again: bool = False) -> Path:
    """The file given with a flag; else the one at `place`, downloaded to there if there is none, or `again`."""
    if given is not None:
        if not given.is_file():
            raise UserError(f"{given}: no such file; correct {flag}, or leave it out to download {url}")
        return given
    if again or not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            download(url, place)
        except UserError as error:
            problem = str(error).partition("; ")[0]
            raise UserError(f"{problem}; get {url} where there is a network, and name the file with {flag}") from None
    return place


def download(url: str, place: Path) -> None:
    folder, _, name = url.rpartition("/")
    server = Server(folder, timeout=60, retries=8)
    version = server.head(name)
    with progress(f"downloading {url}", "bytes", version.size) as more:
        fetch(server, name, place, version, None, more)


@contextlib.contextmanager
def tar_files(archive: Path) -> Iterator[Iterator[tuple[PurePosixPath, IO[bytes]]]]:
    """The (path, contents) of an archive's files, one after the other; nothing is ever extracted.

    A member that would leave the folder, a link, a device and a damaged or truncated archive are `UserError`s. They are
    met where they stand: use nothing of an archive before its end.
    """
    try:
        with tarfile.open(archive) as tar:
            yield _files(archive, tar)
    except DAMAGED as error:
        problem = str(error).partition("\n")[0].rstrip(":") or "it ends too early"
        raise UserError(
            f"{archive}: no tar archive, or a damaged one ({problem}); delete it and fetch it again"
        ) from None


def _files(archive: Path, tar: tarfile.TarFile) -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
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
    tar.fileobj.seek(tar.offset)  # tarfile takes whatever is no header for the end
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end is missing")
    while tar.fileobj.read(2**20):  # a compressed one has its checksum last
        pass


def _refused(archive: Path, member: tarfile.TarInfo, why: str) -> UserError:
    return UserError(f"{archive}: refused, member {member.name!r} {why}; take the official archive")


def json_line(row: Any, *, ascii_only: bool = True) -> str:
    return json.dumps(row, ensure_ascii=ascii_only) + "\n"


def integers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a new file, with the folder around it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)
