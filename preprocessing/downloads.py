"""Resumable HTTP downloads with an atomic rename: a target file is complete or absent.

The bytes go to a hidden file beside the target, `.{name}.{version}.part`, which is fsynced and renamed when it is
complete. An interrupted download sends no byte twice: the next attempt requests the remaining range, and appends it if
the response is about the same version of the file (the same size, and the same ETag or else the same Last-Modified). If
the server has another version by then, or does not support ranges, the file starts again from its first byte.
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
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between attempts: doubled after each failure, up to LONGEST_WAIT
SHUTDOWN_SECONDS = 1.0  # how long running threads may take to see `stop`
RETRY_STATUSES = {
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
}

PYTORCH = (b"PK\x03\x04", b"\x80")  # a zip archive, or a pickle
MAGIC = {  # suffix of a file's name to the bytes that such a file begins with
    ".pth.tar": PYTORCH,
    ".pt": PYTORCH,
    ".jsonl": (b"{",),
    ".gz": (b"\x1f\x8b",),
}
PAGE_REMEDY = "open the address in a browser, check the proxy, or try another --base_url"
HTML_TYPES = ("text/html", "application/xhtml+xml")

T = TypeVar("T")
R = TypeVar("R")
Advance = Callable[[int], object]  # called with the number of bytes received; negative for bytes that are discarded


class FileError(UserError):
    """An error of one file; other files may still be downloaded."""


class RetryableError(Exception):
    """A failure that may pass: try again after at least `wait` seconds."""

    def __init__(self, what: object, *, status: int = 0, wait: float = 0.0):
        super().__init__(str(what) or type(what).__name__)
        self.status, self.wait = status, wait


class ServerUnreachable(RetryableError):
    """The server answered before and cannot be reached now."""


class Stopped(Exception):
    """Another thread set the `stop` event."""


class ManifestEntry(NamedTuple):
    """Size in bytes and SHA-256 of a complete file, as manifest.json holds them."""

    size: int
    sha256: str


class Version(NamedTuple):
    """The version of a file on the server: its size in bytes, and its ETag or else its Last-Modified date."""

    size: int
    tag: str

    @classmethod
    def from_response(cls, response: http.client.HTTPResponse) -> "Version":
        """Reads the version of the whole file, also from a response that holds only a range of it."""
        headers = response.headers
        if "Content-Type" in headers and headers.get_content_type() in HTML_TYPES:
            raise FileError(f"{response.url}: is a web page, such as a login, and not the file; {PAGE_REMEDY}")
        size = headers.get("Content-Length", "")
        if response.status == HTTPStatus.PARTIAL_CONTENT:
            size = headers.get("Content-Range", "").rpartition("/")[2]
        if not size.isdecimal():
            raise FileError(f"{response.url}: the server does not say how large it is; try another --base_url")
        return cls(int(size), headers.get("ETag") or headers.get("Last-Modified") or "")

    @property
    def key(self) -> str:
        """Eight hex digits of a hash of the version, for the name of the part file."""
        return hashlib.sha256(f"{self.size} {self.tag}".encode()).hexdigest()[:8]


class SafeRedirectHandler(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s), but never from https to http; HEAD stays HEAD (Python before 3.13 sent GET)."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> Any:
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme != "https" and (scheme != "http" or req.type == "https"):
            fp.close()
            raise FileError(f"{req.full_url}: redirects to {newurl}, which is not safe; try another --base_url")
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None:
            new.method = req.get_method()
        return new


class HttpClient:
    """HTTP client for the files below one address, with retries. Threads share one; setting `stop` ends their waits."""

    def __init__(self, base_url: str, timeout: float, retries: int):
        self.base_url, self.timeout, self.retries = base_url.rstrip("/"), timeout, retries
        self.stop = threading.Event()
        self._has_answered = False
        self._opener = urllib.request.build_opener(SafeRedirectHandler)
        self._opener.addheaders = [("User-Agent", "atlas-jax")]

    def open(self, path: str, *, method: str = "GET", start: int = 0) -> http.client.HTTPResponse:
        """Requests a file or, if the server supports ranges, the bytes from `start` on."""
        url = f"{self.base_url}/{path}"
        headers = {"Range": f"bytes={start}-"} if start else {}
        try:
            request = urllib.request.Request(url, headers=headers, method=method)
            response = self._opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            self._has_answered = True
            error.close()
            what = f"HTTP {error.code} {str(error.reason).partition(chr(10))[0]}"
            if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR or error.code in RETRY_STATUSES:
                raise RetryableError(what, status=error.code, wait=retry_after(error.headers)) from None
            raise FileError(f"{url}: {what}; check --base_url, it may be no mirror of all files") from None
        except urllib.error.URLError as error:
            if self._has_answered:
                raise ServerUnreachable(error.reason) from None
            raise UserError(
                f"{self.base_url}: cannot be reached ({error.reason}); if this machine is offline, download on another "
                "and copy the folder; behind a proxy set https_proxy; a mirror is named with --base_url"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise RetryableError(error) from None
        self._has_answered = True
        return response

    def head(self, path: str) -> Version:
        """Returns the version of a file on the server, by a HEAD request."""

        def attempt() -> Version:
            with self.open(path, method="HEAD") as response:
                return Version.from_response(response)

        return self.retry(path, attempt)

    def retry(self, path: str, attempt: Callable[[], T], bytes_received: Callable[[], int] = lambda: 0) -> T:
        """Calls `attempt` until it succeeds, or until `retries` retries in a row get no further than those before."""
        failures, furthest = 0, bytes_received()
        while True:
            try:
                return attempt()
            except RetryableError as error:
                failures = 1 if bytes_received() > furthest else failures + 1
                furthest = max(bytes_received(), furthest)
                if failures > self.retries:
                    # Without a server the other files would fail as well: a UserError ends them too.
                    kind = UserError if isinstance(error, ServerUnreachable) else FileError
                    remedy = f"gave up (--retries {self.retries}), the same command goes on from there"
                    raise kind(f"{path}: {error}; {remedy}") from None
                backoff = min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT) * random.uniform(0.5, 1)
                seconds = max(backoff, error.wait)
                log_line(f"{path}: {error}; retry {failures} of {self.retries} in {seconds:.0f} s")
                if self.stop.wait(seconds):
                    raise Stopped from None


def retry_after(headers: Message) -> float:
    """Seconds to wait by the header Retry-After, a number or a date; 0 without a valid one."""
    text = headers.get("Retry-After", "")
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def check_magic(name: str, path: Path, target: Path) -> None:
    """`FileError` about `target` unless the file `path` begins as a file of this name does."""
    with path.open("rb") as file:
        start = file.read(64)
    expected = next((magic for suffix, magic in MAGIC.items() if name.endswith(suffix)), ())
    is_page = start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml"))
    if is_page or (expected and not start.startswith(expected)):
        what = "is a web page, such as a login" if is_page else f"begins with {start[:8]!r}"
        raise FileError(f"{target}: {what}, so it is not {name.rpartition('/')[2]}; {PAGE_REMEDY}")


def find_part(target: Path) -> Path | None:
    """Returns the part file that an earlier attempt left beside `target`, if any."""
    return next(target.parent.glob(f".{target.name}.*.part"), None)


class PartFile:
    """The part file of a download: the first `size` bytes of one version of the file, and their SHA-256."""

    def __init__(self, target: Path, version: Version, stop: threading.Event, advance: Advance):
        self._target, self._advance = target, advance
        self._path = find_part(target) or self._name(version)
        self._path.touch()
        self.size, self._hash = 0, hashlib.sha256()
        for chunk in read_chunks(self._path, stop):
            self._hash.update(chunk)
            self.size += len(chunk)
        self._file = self._path.open("ab")

    def _name(self, version: Version) -> Path:
        return self._target.with_name(f".{self._target.name}.{version.key}.part")

    def belongs_to(self, version: Version) -> bool:
        """Returns whether the bytes are the beginning of this version."""
        return self._path == self._name(version)

    def write(self, chunk: bytes) -> None:
        """Appends bytes; once it returns, they survive a kill of the process (not a power cut)."""
        self._file.write(chunk)
        self._file.flush()
        self._hash.update(chunk)
        self.size += len(chunk)
        self._advance(len(chunk))

    def restart(self, version: Version) -> None:
        """Discards all bytes and starts a part file of `version`."""
        self.discard()
        self._path = self._name(version)
        self._file = self._path.open("ab")

    def discard(self) -> None:
        self._advance(-self.size)
        self.size, self._hash = 0, hashlib.sha256()
        self.close()

    def finish(self, name: str, sha256: str | None) -> ManifestEntry:
        """Syncs the part file and renames it to the target.

        Discards it, `FileError`, if its hash is not `sha256`, or else if a file of this name does not begin so.
        """
        entry = ManifestEntry(self.size, self._hash.hexdigest())
        if sha256 is None:
            try:
                check_magic(name, self._path, self._target)
            except FileError:
                self.discard()
                raise
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
        """Closes the part file: kept for the next attempt if it has bytes, deleted if it is empty."""
        self._file.close()
        if not self.size:
            self._path.unlink(missing_ok=True)


def fetch(
    client: HttpClient, path: str, target: Path, version: Version, sha256: str | None, advance: Advance
) -> ManifestEntry:
    """Downloads `path` to `target`; `version` comes from `client.head`. `FileError` if the hash is not `sha256`."""

    def attempt() -> None:
        nonlocal version
        if part.belongs_to(version) and part.size == version.size:
            return
        try:
            response = client.open(path, start=part.size)
        except RetryableError as error:
            if error.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.restart(version)
            raise
        with response:
            sent = Version.from_response(response)
            if sent.size != version.size and sent.size != (version := client.head(path)).size:
                raise RetryableError(f"the server announces {version.size:,} bytes and sends {sent.size:,}")
            version = sent
            if response.status != HTTPStatus.PARTIAL_CONTENT:
                part.restart(sent)
            elif not part.belongs_to(sent) or not response.headers["Content-Range"].startswith(f"bytes {part.size}-"):
                part.restart(sent)
                raise RetryableError("the server has another version by now")
            receive(response)

    def receive(response: http.client.HTTPResponse) -> None:
        while part.size < version.size:
            try:
                chunk = response.read1(min(CHUNK, version.size - part.size))
            except (OSError, http.client.HTTPException) as error:
                raise RetryableError(f"{error} after {part.size:,} of {version.size:,} bytes") from None
            if client.stop.is_set():
                raise Stopped
            if not chunk:
                raise RetryableError(f"the connection broke after {part.size:,} of {version.size:,} bytes")
            part.write(chunk)

    with contextlib.closing(PartFile(target, version, client.stop, advance)) as part:
        client.retry(path, attempt, lambda: part.size)
        return part.finish(path, sha256)


def in_parallel(
    work: Callable[[T], R], items: Iterable[T], jobs: int, stop: threading.Event
) -> tuple[dict[T, R], list[FileError]]:
    """Maps `work` over `items` in threads; returns the results by item, and the `FileError`s of the other items.

    Any other exception, Ctrl-C included, sets `stop` and is raised.
    """
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
        wait([future for future in futures if future.running()], SHUTDOWN_SECONDS)
        raise
    pool.shutdown()
    return results, errors


def read_chunks(path: Path, stop: threading.Event) -> Iterator[bytes]:
    """Yields the content of a file in chunks; raises `Stopped` once `stop` is set."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            if stop.is_set():
                raise Stopped
            yield chunk


def log_line(text: str) -> None:
    """Writes a line with the time to stderr, above a progress bar."""
    tqdm.write(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr)
