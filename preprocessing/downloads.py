"""Files from an HTTP server, each whole or not there.

A file grows in a hidden sibling, `.{name}.{version}.part`, and gets its name once every byte is there and on the disk.
Whatever stops it, no byte comes twice: the next attempt asks for the rest, and takes it if the answer is about the same
version of the file (its size, and its ETag or else its date). A server that has another version by now, or cannot send
a rest, starts the file again.
"""

import contextlib
import email.utils
import hashlib
import http.client
import os
import random
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from email.message import Message
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from atlas_jax.errors import UserError
from atlas_jax.storage.files import fsync

CHUNK = 1 << 20
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between attempts: doubled after each, up to the longest
SECONDS_TO_END = 1.0  # what threads have when all shall end
BUSY = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE}

T = TypeVar("T")
R = TypeVar("R")
More = Callable[[int], object]  # hears of each byte that came, and of those thrown away as a negative number


class FileError(UserError):
    """One file cannot be had; others perhaps can."""


class Temporary(Exception):
    """What another attempt may mend, after `wait` seconds at least."""

    def __init__(self, what: object, *, status: int = 0, wait: float = 0.0):
        super().__init__(str(what) or type(what).__name__)
        self.status, self.wait = status, wait


class Unreachable(Temporary):
    """No server answers."""


class Stopped(Exception):
    """The work was ended from another thread."""


class Entry(NamedTuple):
    """What a file must be."""

    size: int
    sha256: str


class Version(NamedTuple):
    """What a server says that a file is."""

    size: int
    tag: str

    @classmethod
    def of(cls, response: http.client.HTTPResponse) -> "Version":
        """That of the whole file, also where the answer holds a part of it."""
        headers = response.headers
        size = headers.get("Content-Length", "")
        if response.status == HTTPStatus.PARTIAL_CONTENT:
            size = headers.get("Content-Range", "").rpartition("/")[2]
        if not size.isdecimal():
            raise FileError(f"{response.url}: the server does not say how large it is; try another --base_url")
        return cls(int(size), headers.get("ETag") or headers.get("Last-Modified") or "")

    @property
    def key(self) -> str:
        """Short enough for a file name."""
        return hashlib.sha256(f"{self.size} {self.tag}".encode()).hexdigest()[:8]


class Redirects(urllib.request.HTTPRedirectHandler):
    """They stay with http(s) and never leave https; HEAD stays HEAD, which before Python 3.13 became GET."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> Any:
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme != "https" and (scheme != "http" or req.type == "https"):
            fp.close()
            raise FileError(f"{req.full_url}: redirects to {newurl}, which is not safe; try another --base_url")
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None:
            new.method = req.get_method()
        return new


class Server:
    """The files below one address, asked for with patience. Threads share it; `stop` ends their waiting."""

    def __init__(self, base_url: str, timeout: float, retries: int):
        self.base_url, self.timeout, self.retries = base_url.rstrip("/"), timeout, retries
        self.stop = threading.Event()
        self._has_answered = False
        self._opener = urllib.request.build_opener(Redirects)
        self._opener.addheaders = [("User-Agent", "atlas-jax")]

    def open(self, path: str, *, method: str = "GET", start: int = 0) -> http.client.HTTPResponse:
        """The whole file or, if the server can, what follows its first `start` bytes."""
        url = f"{self.base_url}/{path}"
        headers = {"Range": f"bytes={start}-"} if start else {}
        try:
            request = urllib.request.Request(url, headers=headers, method=method)
            response = self._opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            self._has_answered = True
            error.close()
            what = f"HTTP {error.code} {str(error.reason).partition(chr(10))[0]}"
            if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR or error.code in BUSY:
                raise Temporary(what, status=error.code, wait=retry_after(error.headers)) from None
            raise FileError(f"{url}: {what}; check --base_url, it may be no mirror of all files") from None
        except urllib.error.URLError as error:
            if self._has_answered:
                raise Unreachable(error.reason) from None
            raise UserError(
                f"{self.base_url}: cannot be reached ({error.reason}); if this machine is offline, download on another "
                "and copy the folder; behind a proxy set https_proxy; a mirror is named with --base_url"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise Temporary(error) from None
        self._has_answered = True
        return response

    def head(self, path: str) -> Version:
        """What the server says of a file, without the file."""

        def attempt() -> Version:
            with self.open(path, method="HEAD") as response:
                return Version.of(response)

        return self.insist(path, attempt)

    def insist(self, path: str, attempt: Callable[[], T], reached: Callable[[], int] = lambda: 0) -> T:
        """Tries until it works, or has failed `retries` times more without getting further than ever before."""
        failures, furthest = 0, reached()
        while True:
            try:
                return attempt()
            except Temporary as error:
                failures = 1 if reached() > furthest else failures + 1
                furthest = max(reached(), furthest)
                if failures > self.retries:
                    kind = UserError if isinstance(error, Unreachable) else FileError  # the others would fail as well
                    remedy = f"gave up (--retries {self.retries}), the same command goes on from there"
                    raise kind(f"{path}: {error}; {remedy}") from None
                backoff = min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT) * random.uniform(0.5, 1)
                seconds = max(backoff, error.wait)
                say(f"{path}: {error}; retry {failures} of {self.retries} in {seconds:.0f} s")
                if self.stop.wait(seconds):
                    raise Stopped from None


def retry_after(headers: Message) -> float:
    """How many seconds a server asks to wait; it gives the number or a date."""
    text = headers.get("Retry-After", "")
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def part_of(target: Path) -> Path | None:
    """What an earlier attempt left of a file."""
    return next(target.parent.glob(f".{target.name}.*.part"), None)


class Part:
    """The beginning of a file: how many bytes of which version, and their hash."""

    def __init__(self, target: Path, version: Version, stop: threading.Event, more: More):
        self._target, self._more = target, more
        self._path = part_of(target) or self._name(version)
        self._path.touch()
        self.size, self._hash = 0, hashlib.sha256()
        for chunk in chunks(self._path, stop):
            self._hash.update(chunk)
            self.size += len(chunk)
        self._file = self._path.open("ab")

    def _name(self, version: Version) -> Path:
        return self._target.with_name(f".{self._target.name}.{version.key}.part")

    def is_of(self, version: Version) -> bool:
        """Whether the bytes are the beginning of this version."""
        return self._path == self._name(version)

    def write(self, chunk: bytes) -> None:
        """Once this returns, the bytes survive a kill."""
        self._file.write(chunk)
        self._file.flush()
        self._hash.update(chunk)
        self.size += len(chunk)
        self._more(len(chunk))

    def restart(self, version: Version) -> None:
        """Begins again, with this version."""
        self.discard()
        self._path = self._name(version)
        self._file = self._path.open("ab")

    def discard(self) -> None:
        self._more(-self.size)
        self.size, self._hash = 0, hashlib.sha256()
        self.close()

    def finish(self, sha256: str | None) -> Entry:
        """It becomes the file, unless that is known to have another hash."""
        entry = Entry(self.size, self._hash.hexdigest())
        if sha256 not in (None, entry.sha256):
            self.discard()
            raise FileError(
                f"{self._target}: came with SHA-256 {entry.sha256}, not manifest.json's {sha256}, and was thrown away; "
                "run again, and if it stays so and you trust the server, take the file out of manifest.json"
            )
        fsync(self._path)
        os.replace(self._path, self._target)
        fsync(self._target.parent)
        return entry

    def close(self) -> None:
        """Bytes stay for the next start; without any, nothing does."""
        self._file.close()
        if not self.size:
            self._path.unlink(missing_ok=True)


def fetch(server: Server, path: str, target: Path, version: Version, sha256: str | None, more: More) -> Entry:
    """Downloads what `server.head` said is of this version; with `sha256`, nothing else is accepted."""

    def attempt() -> None:
        nonlocal version
        if part.is_of(version) and part.size == version.size:
            return
        try:
            response = server.open(path, start=part.size)
        except Temporary as error:
            if error.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.restart(version)
            raise
        with response:
            sent = Version.of(response)
            if sent.size != version.size and sent.size != (version := server.head(path)).size:
                raise Temporary(f"the server announces {version.size:,} bytes and sends {sent.size:,}")
            version = sent
            if response.status != HTTPStatus.PARTIAL_CONTENT:
                part.restart(sent)
            elif not part.is_of(sent) or not response.headers["Content-Range"].startswith(f"bytes {part.size}-"):
                part.restart(sent)
                raise Temporary("the server has another version by now")
            receive(response)

    def receive(response: http.client.HTTPResponse) -> None:
        while part.size < version.size:
            try:
                chunk = response.read1(min(CHUNK, version.size - part.size))
            except (OSError, http.client.HTTPException) as error:
                raise Temporary(f"{error} after {part.size:,} of {version.size:,} bytes") from None
            if server.stop.is_set():
                raise Stopped
            if not chunk:
                raise Temporary(f"the connection broke after {part.size:,} of {version.size:,} bytes")
            part.write(chunk)

    with contextlib.closing(Part(target, version, server.stop, more)) as part:
        server.insist(path, attempt, lambda: part.size)
        return part.finish(sha256)


def in_parallel(
    work: Callable[[T], R], items: Iterable[T], jobs: int, stop: threading.Event
) -> tuple[dict[T, R], list[FileError]]:
    """What `work` makes of each item, and where it cannot. Any other error, and Ctrl-C, ends the work on all."""
    results, errors = {}, []
    pool = ThreadPoolExecutor(jobs)
    futures = {pool.submit(work, item): item for item in items}
    try:
        for future in as_completed(futures):
            try:
                results[futures[future]] = future.result()
            except FileError as error:
                errors.append(error)
    except BaseException:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        wait([future for future in futures if future.running()], SECONDS_TO_END)
        raise
    pool.shutdown()
    return results, errors


def chunks(path: Path, stop: threading.Event) -> Iterator[bytes]:
    """The content of a file, until `stop`."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            if stop.is_set():
                raise Stopped
            yield chunk


def say(text: str) -> None:
    """A line on stderr, above the bar."""
    tqdm.write(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr)
