"""The command line of download_*.py, and what a published folder holds.

Nobody has published hashes of these files, so the first download sets them. When a file has arrived, with the size that
the server announced, its size and SHA-256 are written to `manifest.json` beside it. From then on

- a file that has its size there is left alone, without asking the server;
- `--verify` reads the files, without asking the server, and names those that are no longer what they were;
- a file that is downloaded once more must have its size and hash, or it is not accepted.

So a manifest shows damage and change, not that the first download was right. For that, compare it with somebody else's,
or put theirs in the folder beforehand: the first download is then held to it. A file that is there and not in the
manifest (another program fetched it, or a kill came between the two) is taken up if the server announces its size.
"""

import argparse
import contextlib
import dataclasses
import difflib
import fcntl
import hashlib
import io
import json
import os
import shlex
import shutil
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from downloads import Entry, FileError, More, Server, Version, chunks, fetch, in_parallel, part_of, say
from tqdm import tqdm

from atlas_jax.errors import UserError
from atlas_jax.storage.files import write_json

BASE_URL = "https://dl.fbaipublicfiles.com/atlas"
MANIFEST = "manifest.json"
LINE = "{desc}: {n_fmt}B of {total_fmt}B, {rate_fmt}, {remaining} left"
SECONDS_PER_LINE = 30.0
LINES_SHOWN = 10
MORE_HELP = """\
However a download ends, the same command goes on from there. manifest.json, beside the files, has the size and SHA-256
that each had at first; it shows damage later (--verify), and a file downloaded again must have them.
"""


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Published things of one kind: all have files of the same names."""

    kind: str
    names: Mapping[str, str]  # path, below the base address and below the output directory; what it is
    patterns: tuple[str, ...]  # the files of a shard, {} is its number
    shards: int
    then: str  # how to use it: {folder}, {output}, and of the name {family} and {size}

    def shard(self, number: int) -> list[str]:
        return [pattern.format(number) for pattern in self.patterns]

    @property
    def files(self) -> list[str]:
        """The last shard first: whoever loads the folder too early sees that others are missing."""
        return [file for number in reversed(range(self.shards)) for file in self.shard(number)]


class Manifest:
    """What the files of a folder must be."""

    def __init__(self, folder: Path):
        self._folder, self._path, self._lock = folder, folder / MANIFEST, threading.Lock()
        self.entries: dict[str, Entry] = {}
        with contextlib.suppress(FileNotFoundError):
            try:
                for file, entry in json.loads(self._path.read_bytes()).items():
                    self.entries[file] = Entry(int(entry["size"]), str(entry["sha256"]))
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UserError(f"{self._path}: damaged; delete it, and the files are taken up as they are") from None

    def is_met(self, file: str) -> bool:
        """Whether the file is there, by its size."""
        path, known = self._folder / file, self.entries.get(file)
        return known is not None and path.is_file() and path.stat().st_size == known.size

    def record(self, file: str, entry: Entry) -> None:
        with self._lock:
            self.entries[file] = entry
            write_json(self._path, {name: self.entries[name]._asdict() for name in sorted(self.entries)})


def download(catalogue: Catalogue, name: str, output: Path, server: Server, jobs: int) -> list[FileError]:
    """Everything that is missing; returns what could not be had."""
    folder = output / name
    manifest = Manifest(folder)

    def ask(file: str) -> Version:
        version, known, there = server.head(f"{name}/{file}"), manifest.entries.get(file), folder / file
        if known and version.size != known.size:
            remedy = "try another --base_url, or, if you trust the server, take the file out of manifest.json"
            raise FileError(f"{there}: now has {version.size:,} bytes on the server, {known.size:,} before; {remedy}")
        if not known and there.exists() and version.size != (size := there.stat().st_size):
            raise FileError(f"{there}: has {size:,} bytes, the published file {version.size:,}; move it away")
        return version

    def obtain(file: str) -> None:
        target, known = folder / file, manifest.entries.get(file)
        if not known and target.exists():
            manifest.record(file, entry_of(target, server.stop, more))
        else:
            sha256 = known.sha256 if known else None
            manifest.record(file, fetch(server, f"{name}/{file}", target, todo[file], sha256, more))

    missing = [file for file in catalogue.files if not manifest.is_met(file)]
    if missing:
        say(f"{folder}: asking {server.base_url} for the sizes of {len(missing)} of {len(catalogue.files)} file(s)")
    todo, errors = in_parallel(ask, missing, jobs, server.stop)
    if todo:
        parts = {file: part.stat().st_size for file in todo if (part := part_of(folder / file))}
        new = [file for file in todo if file in manifest.entries or not (folder / file).exists()]
        check_space(folder, sum(max(0, todo[file].size - parts.get(file, 0)) for file in new))
        folder.mkdir(parents=True, exist_ok=True)
        total = sum(version.size for version in todo.values())
        with only_process(folder), bytes_progress("downloading", total, sum(parts.values())) as more:
            errors += in_parallel(obtain, todo, jobs, server.stop)[1]
    if not errors:
        size = sum(manifest.entries[file].size for file in catalogue.files)
        print(f"{folder}: complete, {len(catalogue.files)} file(s), {tqdm.format_sizeof(size, 'B')}")
        family, size_name = name.split("/")[1], name.rpartition("/")[2]
        paths = {"folder": shlex.quote(str(folder)), "output": shlex.quote(str(output))}
        print(catalogue.then.format(**paths, family=family, size=size_name), end="")
    return errors


def verify(catalogue: Catalogue, name: str, output: Path, stop: threading.Event, jobs: int) -> list[FileError]:
    """Reads everything; prints the intact files as `sha256sum` does, returns what is wrong with the others."""
    folder = output / name
    manifest = Manifest(folder)
    if not manifest.entries:
        raise UserError(f"{folder}: has no {MANIFEST} to verify by; the same command without --verify downloads")

    def check(file: str) -> Entry:
        path, known = folder / file, manifest.entries.get(file)
        again = "the same command without --verify"
        if not known or not path.exists():
            raise FileError(f"{path}: not there, or not in {MANIFEST}; {again} completes the folder")
        if not manifest.is_met(file) or entry_of(path, stop, more) != known:
            raise FileError(f"{path}: damaged; delete it, and {again} fetches it")
        return known

    total = sum(entry.size for file, entry in manifest.entries.items() if manifest.is_met(file))
    with bytes_progress("verifying", total) as more:
        intact, errors = in_parallel(check, catalogue.files, jobs, stop)
    for file in reversed(intact):
        print(f"{intact[file].sha256}  {name}/{file}")
    return errors


def show(catalogue: Catalogue, server: Server, jobs: int) -> None:
    """All names, what they are and how large, as far as the server tells; of shards it is asked about the first."""
    asked = [f"{name}/{file}" for name in catalogue.names for file in catalogue.shard(0)]
    try:
        versions, _ = in_parallel(server.head, asked, jobs, server.stop)
    except UserError as error:
        versions = {}
        say(f"sizes are not known: {error}")
    for name, about in catalogue.names.items():
        paths = [f"{name}/{file}" for file in catalogue.shard(0)]
        size = "?"
        if versions.keys() >= set(paths):
            total = catalogue.shards * sum(versions[path].size for path in paths)
            size = ("about " if catalogue.shards > 1 else "") + tqdm.format_sizeof(total, "B")
        print(f"{name:<28}{len(catalogue.files):>4} file(s) {size:>14}   {about}")


def entry_of(path: Path, stop: threading.Event, more: More) -> Entry:
    """Size and hash of a file, read from the disk."""
    size, digest = 0, hashlib.sha256()
    for chunk in chunks(path, stop):
        digest.update(chunk)
        size += len(chunk)
        more(len(chunk))
    return Entry(size, digest.hexdigest())


def check_space(folder: Path, needed: int) -> None:
    """Before anything is written."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        needs, has = tqdm.format_sizeof(needed, "B"), tqdm.format_sizeof(free, "B")
        raise UserError(f"{folder}: needs {needs}, {has} are free; make room, or choose another --output_directory")


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Two would write the same parts. Where the file system knows no locks, nobody is held off."""
    path = folder / ".lock"
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is downloading to it; wait for its end") from None
        except OSError:
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


class Lines(io.TextIOBase):
    """Where there is no terminal: what a bar draws becomes a line."""

    def write(self, text: str) -> int:
        if text.strip():
            say(text.strip())
        return len(text)


@contextlib.contextmanager
def bytes_progress(what: str, total: int, initial: int = 0) -> Iterator[More]:
    """Like `atlas_jax.runtime.progress`, of bytes, some of which are there already, for several threads."""
    look: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True}
    if not sys.stderr.isatty():
        look = {"file": Lines(), "bar_format": LINE, "mininterval": SECONDS_PER_LINE, "maxinterval": SECONDS_PER_LINE}
    lock = threading.Lock()
    with tqdm(total=total, initial=initial, desc=what, unit="B", unit_scale=True, **look) as bar:

        def more(count: int) -> None:
            with lock:
                bar.update(count)

        yield more


class Parser(argparse.ArgumentParser):
    """Wrong flags are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def address(text: str) -> str:
    url = urllib.parse.urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname or url.port == 0 or text.split() != [text]:
        raise argparse.ArgumentTypeError(f"{text}: no http(s) address")
    return text


def at_least(low: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number, {low} or more")
        return int(text)

    return number


def parse_args(catalogue: Catalogue, about: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; of `name` it is known that there is such a thing, unless only a list is asked for."""
    names = "".join(f"\n    {name:<28}{what}" for name, what in catalogue.names.items())
    parser = Parser(
        prog=f"download_{catalogue.kind}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=f"names:{names}\n\n{MORE_HELP}",
    )
    url = os.environ.get("ATLAS_BASE_URL", BASE_URL)
    add = parser.add_argument
    add(f"--{catalogue.kind}", dest="name", metavar="NAME", help="what to download")
    add("--output_directory", type=Path, default=Path("data"), metavar="DIR", help="to DIR/NAME (default: data)")
    add("--list", action="store_true", help="show the names, and the sizes if the server is there to ask; no download")
    add("--verify", action="store_true", help="read the files that are there and name damaged ones; no download")
    add("--jobs", type=at_least(1), default=4, metavar="N", help="files at a time (default: 4)")
    add("--retries", type=at_least(0), default=8, metavar="N", help="in a row without any progress (default: 8)")
    add("--timeout", type=at_least(1), default=60, metavar="SECONDS", help="of silence, then a retry (default: 60)")
    add(
        "--base_url",
        type=address,
        default=url,
        metavar="URL",
        help=f"a mirror (default: $ATLAS_BASE_URL or {BASE_URL})",
    )
    args = parser.parse_args(argv)
    if not args.list and args.name not in catalogue.names:
        name = args.name or ""
        near = [known for known in catalogue.names if name and name in known]
        near = near or difflib.get_close_matches(name, catalogue.names, n=2)
        remedy = f"did you mean {' or '.join(near)}?" if near else "--list shows the names"
        what = f"{name}: no such name" if name else "is missing"
        raise UserError(f"--{catalogue.kind} {what}; {remedy}")
    return args


def run(catalogue: Catalogue, about: str, argv: Sequence[str] | None) -> Sequence[UserError]:
    """What a command line asks for; returns of which files that could not be done."""
    args = parse_args(catalogue, about, argv)
    server = Server(args.base_url, args.timeout, args.retries)
    if args.list:
        show(catalogue, server, args.jobs)
        return []
    if args.verify:
        return verify(catalogue, args.name, args.output_directory, server.stop, args.jobs)
    return download(catalogue, args.name, args.output_directory, server, args.jobs)


def main(catalogue: Catalogue, about: str, argv: Sequence[str] | None = None) -> int:
    """0; or 2, or 130 after Ctrl-C, with a line for each thing that is wrong that says what to do."""
    try:
        wrong: list[object] = [*run(catalogue, about, argv)]
        status = 2 if wrong else 0
    except UserError as error:
        wrong, status = [error], 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        wrong, status = [f"{where}{error.strerror or error}; check the disk and its permissions, and run again"], 2
    except KeyboardInterrupt:
        wrong, status = ["interrupted; what has arrived is kept, and the same command goes on from there"], 130
    lines = sorted(" ".join(str(what).split()) for what in wrong)
    if len(lines) > LINES_SHOWN:
        lines[LINES_SHOWN:] = [f"and {len(lines) - LINES_SHOWN} other files"]
    for line in lines:
        print(f"download_{catalogue.kind}: {line}", file=sys.stderr)
    return status


def exit_while_compiling(status: int) -> NoReturn:
    """Ends the process now: Python would wait for a thread that waits for a byte."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)
