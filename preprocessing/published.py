"""The command line of download_*.py, and the manifest of a downloaded folder.

No hashes of these files are published, so the first download sets them. When a file is complete, with the size that the
server announced, its size and SHA-256 are written to `manifest.json` beside it. From then on

- a file whose size is the manifest's is not downloaded again, and the server gets no request for it;
- `--verify` reads the files, without any request to the server, and names those whose hash has changed;
- a file that is downloaded again is rejected unless it has the size and hash of the manifest.

So a manifest detects damage and changes, but not a first download that was wrong already. For that, compare it with the
manifest of somebody else, or copy theirs to the folder before the first download, which must then agree with it. A file
that exists but is not in the manifest (another program downloaded it, or the process was killed between file and
manifest) is added to the manifest if it has the size that the server announces.
"""

import argparse
import contextlib
import dataclasses
import difflib
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

from downloads import (
    Advance,
    FileError,
    HttpClient,
    ManifestEntry,
    Version,
    check_magic,
    fetch,
    find_part,
    in_parallel,
    log_line,
    read_chunks,
)
from tqdm import tqdm

from atlas_jax.commands.flags import Parser
from atlas_jax.errors import UserError
from atlas_jax.runtime.interrupts import Interrupted, Interrupts
from atlas_jax.runtime.streams import prepare_streams
from atlas_jax.storage.file_lock import sole_writer
from atlas_jax.storage.files import write_json
from atlas_jax.storage.paths import user_path

BASE_URL = "https://dl.fbaipublicfiles.com/atlas"
MANIFEST = "manifest.json"
LOG_LINE_FORMAT = "{n}|{desc}: {n_fmt}B of {total_fmt}B, {rate_fmt}, {remaining} left"
SECONDS_PER_LINE = 30.0
MAX_ERROR_LINES = 10
EPILOG = """\
However a download ends, the same command goes on from there. manifest.json, beside the files, has the size and SHA-256
that each had at first; it shows damage later (--verify), and a file downloaded again must have them.
"""


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """The published models, indexes or corpora; all of one kind have the same file names."""

    kind: str
    names: Mapping[str, str]  # path below the base address and the output directory -> description
    patterns: tuple[str, ...]  # file names of a shard; {} is its number
    num_shards: int
    next_steps: str  # text printed after a download, a format string with {folder}, {output}, {family} and {size}
    aliases: tuple[str, ...] = ()  # other flags for the name, besides --{kind}

    def shard_files(self, number: int) -> list[str]:
        return [pattern.format(number) for pattern in self.patterns]

    @property
    def files(self) -> list[str]:
        """All file names, the last shard first: a load of the incomplete folder then fails, as shards are missing."""
        return [file for number in reversed(range(self.num_shards)) for file in self.shard_files(number)]


class Manifest:
    """The manifest.json of a folder: size and SHA-256 of each file. Threads may share one."""

    def __init__(self, folder: Path):
        self._folder, self._path, self._lock = folder, folder / MANIFEST, threading.Lock()
        self.entries: dict[str, ManifestEntry] = {}
        with contextlib.suppress(FileNotFoundError):
            try:
                for file, entry in json.loads(self._path.read_bytes()).items():
                    self.entries[file] = ManifestEntry(int(entry["size"]), str(entry["sha256"]))
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UserError(f"{self._path}: damaged; delete it, and the files are taken up as they are") from None

    def is_complete(self, file: str) -> bool:
        """Returns whether the file exists with the size in the manifest; does not read it."""
        path, expected = self._folder / file, self.entries.get(file)
        return expected is not None and path.is_file() and path.stat().st_size == expected.size

    def record(self, file: str, entry: ManifestEntry) -> None:
        with self._lock:
            self.entries[file] = entry
            write_json(self._path, {name: self.entries[name]._asdict() for name in sorted(self.entries)})


def download(catalogue: Catalogue, name: str, output: Path, client: HttpClient, jobs: int) -> list[FileError]:
    """Downloads the files that are missing; returns the errors of files that failed."""
    folder = output / name
    manifest = Manifest(folder)

    def check_version(file: str) -> Version:
        version, expected, path = client.head(f"{name}/{file}"), manifest.entries.get(file), folder / file
        if expected and version.size != expected.size:
            remedy = "try another --base_url, or, if you trust the server, take the file out of manifest.json"
            raise FileError(f"{path}: now has {version.size:,} bytes on the server, {expected.size:,} before; {remedy}")
        if not expected and path.exists() and version.size != (size := path.stat().st_size):
            raise FileError(f"{path}: has {size:,} bytes, the published file {version.size:,}; move it away")
        return version

    def fetch_or_adopt(file: str) -> None:
        target, expected = folder / file, manifest.entries.get(file)
        if not expected and target.exists():
            check_magic(file, target, target)
            manifest.record(file, hash_file(target, client.stop, advance))
        else:
            sha256 = expected.sha256 if expected else None
            manifest.record(file, fetch(client, f"{name}/{file}", target, versions[file], sha256, advance))

    missing = [file for file in catalogue.files if not manifest.is_complete(file)]
    for file in set(catalogue.files) - set(missing):
        check_recorded(file, folder)
    if missing:
        log_line(
            f"{folder}: asking {client.base_url} for the sizes of {len(missing)} of {len(catalogue.files)} file(s)"
        )
    versions, errors = in_parallel(check_version, missing, jobs, client.stop)
    if versions:
        parts = {file: part.stat().st_size for file in versions if (part := find_part(folder / file))}
        to_download = [file for file in versions if file in manifest.entries or not (folder / file).exists()]
        check_free_space(folder, sum(max(0, versions[file].size - parts.get(file, 0)) for file in to_download))
        folder.mkdir(parents=True, exist_ok=True)
        total = sum(version.size for version in versions.values())
        with exclusive_lock(folder), bytes_progress("downloading", total, sum(parts.values())) as advance:
            errors += in_parallel(fetch_or_adopt, versions, jobs, client.stop)[1]
    if not errors:
        size = sum(manifest.entries[file].size for file in catalogue.files)
        print(f"{folder}: complete, {len(catalogue.files)} file(s), {tqdm.format_sizeof(size, 'B')}")
        family, size_name = name.split("/")[1], name.rpartition("/")[2]
        paths = {"folder": shlex.quote(str(folder)), "output": shlex.quote(str(output))}
        print(catalogue.next_steps.format(**paths, family=family, size=size_name), end="")
    return errors


def check_recorded(file: str, folder: Path) -> None:
    """`FileError` if what an earlier download recorded in the manifest does not begin as such a file does."""
    try:
        check_magic(file, folder / file, folder / file)
    except FileError as error:
        problem = str(error).partition("; ")[0]
        raise FileError(f"{problem}; delete it, take it out of {MANIFEST}, and run again") from None


def verify(catalogue: Catalogue, name: str, output: Path, stop: threading.Event, jobs: int) -> list[FileError]:
    """Hashes all files; prints the intact ones in the format of `sha256sum`, returns the errors of the others."""
    folder = output / name
    manifest = Manifest(folder)
    if not manifest.entries:
        raise UserError(f"{folder}: has no {MANIFEST} to verify by; the same command without --verify downloads")

    def check(file: str) -> ManifestEntry:
        path, expected = folder / file, manifest.entries.get(file)
        remedy = "the same command without --verify"
        if path.exists():
            check_recorded(file, folder)
        if not expected or not path.exists():
            raise FileError(f"{path}: not there, or not in {MANIFEST}; {remedy} completes the folder")
        if not manifest.is_complete(file) or hash_file(path, stop, advance) != expected:
            raise FileError(f"{path}: damaged; delete it, and {remedy} fetches it")
        return expected

    total = sum(entry.size for file, entry in manifest.entries.items() if manifest.is_complete(file))
    with bytes_progress("verifying", total) as advance:
        intact, errors = in_parallel(check, catalogue.files, jobs, stop)
    for file in reversed(intact):
        print(f"{intact[file].sha256}  {name}/{file}")
    return errors


def print_names(catalogue: Catalogue, client: HttpClient, jobs: int) -> None:
    """Prints the names with description and size: `?` without a server, for an index estimated from its first shard."""
    first_files = [f"{name}/{file}" for name in catalogue.names for file in catalogue.shard_files(0)]
    try:
        versions, _ = in_parallel(client.head, first_files, jobs, client.stop)
    except UserError as error:
        versions = {}
        log_line(f"sizes are not known: {error}")
    for name, description in catalogue.names.items():
        paths = [f"{name}/{file}" for file in catalogue.shard_files(0)]
        size = "?"
        if versions.keys() >= set(paths):
            total = catalogue.num_shards * sum(versions[path].size for path in paths)
            size = ("about " if catalogue.num_shards > 1 else "") + tqdm.format_sizeof(total, "B")
        print(f"{name:<28}{len(catalogue.files):>4} file(s) {size:>14}   {description}")


def hash_file(path: Path, stop: threading.Event, advance: Advance) -> ManifestEntry:
    """Reads a file and returns its size and SHA-256."""
    size, digest = 0, hashlib.sha256()
    for chunk in read_chunks(path, stop):
        digest.update(chunk)
        size += len(chunk)
        advance(len(chunk))
    return ManifestEntry(size, digest.hexdigest())


def check_free_space(folder: Path, needed: int) -> None:
    """Raises a `UserError` if `needed` bytes exceed the free disk space; `folder` need not exist."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        needs, has = tqdm.format_sizeof(needed, "B"), tqdm.format_sizeof(free, "B")
        raise UserError(f"{folder}: needs {needs}, {has} are free; make room, or choose another --output_directory")


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Locks the folder: two processes would write the same part files."""
    with sole_writer(folder, f"{folder}: another process is downloading to it; wait for its end"):
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)


class LogLines(io.TextIOBase):
    """Output stream of a progress bar without a terminal: a redraw `{n}|{line}` becomes a line if it has a new `n`."""

    def __init__(self) -> None:
        self._n = ""

    def write(self, text: str) -> int:
        n, _, line = text.strip().partition("|")
        if line and n != self._n:
            log_line(line)
            self._n = n
        return len(text)


@contextlib.contextmanager
def bytes_progress(what: str, total: int, initial: int = 0) -> Iterator[Advance]:
    """Like `atlas_jax.runtime.progress`, for bytes and several threads; `initial` bytes are done at the start."""
    options: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True}
    if not sys.stderr.isatty():
        options = {
            "file": LogLines(),
            "bar_format": LOG_LINE_FORMAT,
            "mininterval": SECONDS_PER_LINE,
            "maxinterval": SECONDS_PER_LINE,
        }
    lock = threading.Lock()
    with tqdm(total=total, initial=initial, desc=what, unit="B", unit_scale=True, **options) as bar:

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        yield advance


def address(text: str) -> str:
    """Type of a flag: an http(s) URL. Its name appears in argparse's error messages."""
    url = urllib.parse.urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname or url.port == 0 or text.split() != [text]:
        raise argparse.ArgumentTypeError(f"{text}: no http(s) address")
    return text


def at_least(low: int) -> Callable[[str], int]:
    """Type of a flag: a whole number of at least `low`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number, {low} or more")
        return int(text)

    return number


def parse_args(catalogue: Catalogue, description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags; `UserError` if they are wrong or, without --list, the name is not in the catalogue."""
    names = "".join(f"\n    {name:<28}{what}" for name, what in catalogue.names.items())
    parser = Parser(
        prog=f"download_{catalogue.kind}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=f"names:{names}\n\n{EPILOG}",
    )
    url = os.environ.get("ATLAS_BASE_URL", BASE_URL)
    add = parser.add_argument
    add(f"--{catalogue.kind}", *catalogue.aliases, dest="name", metavar="NAME", help="what to download")
    add("--output_directory", type=user_path, default=Path("data"), metavar="DIR", help="to DIR/NAME (default: data)")
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


def run(catalogue: Catalogue, description: str, argv: Sequence[str] | None) -> Sequence[UserError]:
    """Runs the command that the flags choose: list, verify or download; returns the errors of single files."""
    args = parse_args(catalogue, description, argv)
    client = HttpClient(args.base_url, args.timeout, args.retries)
    if args.list:
        print_names(catalogue, client, args.jobs)
        return []
    if args.verify:
        return verify(catalogue, args.name, args.output_directory, client.stop, args.jobs)
    return download(catalogue, args.name, args.output_directory, client, args.jobs)


def main(catalogue: Catalogue, description: str, argv: Sequence[str] | None = None) -> int:
    """Runs a download command; returns its status: 0, 2 after errors (lines on stderr), 128 + N after signal N."""
    prepare_streams()
    try:
        with Interrupts():
            errors: list[object] = [*run(catalogue, description, argv)]
        status = 2 if errors else 0
    except UserError as error:
        errors, status = [error], 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        errors, status = [f"{where}{error.strerror or error}; check the disk and its permissions, and run again"], 2
    except (Interrupted, KeyboardInterrupt) as stop:  # the latter after a second Ctrl-C
        errors = [f"{str(stop) or 'interrupted'}; what has arrived is kept, and the same command goes on from there"]
        status = getattr(stop, "status", 130)
    lines = sorted(" ".join(str(error).split()) for error in errors)
    if len(lines) > MAX_ERROR_LINES:
        lines[MAX_ERROR_LINES:] = [f"and {len(lines) - MAX_ERROR_LINES} other files"]
    for line in lines:
        print(f"download_{catalogue.kind}: {line}", file=sys.stderr)
    return status


def exit_without_joining_threads(status: int) -> NoReturn:
    """Exits at once: a normal exit would join the download threads, which may be blocked in a read from the network."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)
