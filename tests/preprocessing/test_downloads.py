"""Downloads: a file is complete or absent, whatever the server does, and no byte is sent twice."""

import errno
import hashlib
import json
import random
import re
import sys
import threading
import time
import types
import urllib.request
from collections.abc import Callable
from email.message import Message
from email.utils import formatdate
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.preprocessing.download_server import Fault, etag, run_server

sys.path.insert(0, str(Path(__file__).parents[2] / "preprocessing"))
import downloads
import published

NAME, FILE = "things/one", "things/one/a.bin"
CONTENT = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)


class Run(NamedTuple):
    """Exit status and output of one command."""

    status: int
    out: str
    errors: list[str]  # lines of stderr with the command's name
    log: str  # the other lines of stderr


@pytest.fixture
def server():
    """A server with CONTENT as `FILE`."""
    with run_server() as server:
        server.files[FILE] = CONTENT
        yield server


@pytest.fixture
def run(server, tmp_path, capsys, monkeypatch) -> Callable[..., Run]:
    """Downloads `NAME`, which has the given files (.bin) and number of shards, from the server to `tmp_path`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(downloads, "FIRST_WAIT", 0.01)

    def call(*flags: str, files: str = "a", num_shards: int = 1) -> Run:
        catalogue = published.Catalogue(
            kind="thing",
            names={NAME: "a thing", "things/two": "another"},
            patterns=tuple(f"{name}.bin" for name in files),
            num_shards=num_shards,
            next_steps="use {folder}\n",
        )
        argv = ["--thing", NAME, "--output_directory", str(tmp_path), "--base_url", server.url, *flags]
        status = published.main(catalogue, "", argv)
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("download_thing: ")]
        return Run(status, out, errors, "\n".join(line for line in err.splitlines() if line not in errors))

    return call


@pytest.fixture
def target(tmp_path) -> Path:
    """Path that `FILE` is downloaded to."""
    return tmp_path / FILE


def manifest(target: Path) -> dict:
    return json.loads((target.parent / "manifest.json").read_bytes())


def entry(content: bytes) -> dict:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def names(target: Path) -> set[str]:
    return {path.name for path in target.parent.iterdir()}


def test_a_download_leaves_file_and_manifest(run, server, target):
    """The folder holds the file and the manifest, nothing else; the next run sends no request."""
    first = run()
    assert (first.status, first.errors) == (0, [])
    assert target.read_bytes() == CONTENT
    assert names(target) == {"a.bin", "manifest.json"}
    assert manifest(target) == {"a.bin": entry(CONTENT)}
    assert first.out.splitlines() == [f"{target.parent}: complete, 1 file(s), 300kB", f"use {target.parent}"]
    requests = list(server.requests)
    assert run() == (0, first.out, [], "")
    assert server.requests == requests


def test_a_file_is_synced_before_its_rename(run, server, target, monkeypatch):
    """The part is synced before its rename, the folder after it; a failed rename loses no byte."""
    synced = []
    monkeypatch.setattr(downloads, "fsync", lambda path: synced.append((path.name, target.exists())))
    with monkeypatch.context() as patch:
        patch.setattr(downloads.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        assert run().errors == ["download_thing: broken; check the disk and its permissions, and run again"]
    (part,) = target.parent.glob(".*.part")
    assert run().status == 0
    assert len(server.gets()) == 1
    assert synced == [(part.name, False)] * 2 + [("one", True)]


@pytest.mark.parametrize("where", [0, 1, 70_000, len(CONTENT) - 1])
def test_a_broken_connection_is_resumed_at_its_last_byte(run, server, target, where):
    """The next request is for the remaining range, so every byte is sent once."""
    server.faults["GET", FILE] = [Fault(stop_after=where)]
    done = run()
    assert done.status == 0
    assert f"the connection broke after {where:,} of 300,000 bytes; retry 1 of 8" in done.log
    assert target.read_bytes() == CONTENT
    assert server.gets() == [(FILE, None), (FILE, f"bytes={where}-" if where else None)]
    assert server.bytes_sent[FILE] == len(CONTENT)


def test_progress_resets_the_number_of_retries(run, server, target):
    """With --retries 1, six breaks with progress pass, and one without ends the command; the next one resumes there."""
    server.faults["GET", FILE] = [Fault(stop_after=9)] * 6 + [Fault(stop_after=0)]
    failed = run("--retries", "1")
    assert failed.status == 2
    (line,) = failed.errors
    assert FILE in line
    assert "broke after 54 of 300,000 bytes; gave up (--retries 1), the same command goes on" in line
    assert len(server.gets()) == 7
    assert not target.exists()
    assert run().status == 0
    assert server.gets()[-1] == (FILE, "bytes=54-")
    assert server.bytes_sent[FILE] == len(CONTENT)
    assert target.read_bytes() == CONTENT
    assert manifest(target) == {"a.bin": entry(CONTENT)}


def test_without_ranges_the_file_starts_again(run, server, target):
    """Responses without range start from byte 0; one that breaks before the furthest byte so far is no progress."""
    server.faults["GET", FILE] = [Fault(stop_after=1000, start=0)] * 2
    done = run()
    assert done.status == 0
    assert "300kB of 300kB" in done.log.splitlines()[-1]  # discarded bytes are not counted
    assert target.read_bytes() == CONTENT
    target.unlink()
    server.faults["GET", FILE] = [Fault(stop_after=where, start=0) for where in (2000, 1000) * 5]
    assert run("--retries", "2").status == 2
    assert len(server.faults["GET", FILE]) == 10 - 3


@pytest.mark.parametrize("again", ["other", "longer", "shorter", "same"])
def test_two_versions_are_never_spliced(run, server, target, again):
    """If the file changes between two commands or within one, it starts again; the same version is resumed."""
    new = {"other": OTHER, "longer": OTHER + b"more", "shorter": OTHER[:1000], "same": CONTENT}[again]
    server.faults["GET", FILE] = [Fault(stop_after=70_000)]
    assert run("--retries", "0").status == 2
    server.files[FILE] = new
    done = run()
    assert done.status == 0
    assert target.read_bytes() == new
    assert names(target) == {"a.bin", "manifest.json"}
    assert again != "same" or server.bytes_sent[FILE] == len(CONTENT)

    (target.parent / "manifest.json").unlink()
    target.unlink()
    server.faults["GET", FILE] = [Fault(stop_after=500, content=CONTENT)]
    assert run().status == 0
    assert target.read_bytes() == new


def test_a_response_with_the_wrong_range_is_discarded(run, server, target):
    """A 206 response that starts at another byte than requested starts the file again."""
    server.faults["GET", FILE] = [Fault(stop_after=1000), Fault(start=999)]
    done = run()
    assert done.status == 0
    assert "another version" in done.log
    assert target.read_bytes() == CONTENT


def test_status_416_starts_the_file_again(run, server, target):
    """After status 416 for a range, the file is requested from its first byte."""
    server.faults["GET", FILE] = [Fault(stop_after=1000), Fault(status=416)]
    assert run().status == 0
    assert [wanted for _, wanted in server.gets()] == [None, "bytes=1000-", None]
    assert target.read_bytes() == CONTENT


def test_contradictory_and_missing_sizes_are_refused(run, server, target):
    """Contradictory sizes are refused with both numbers, as is a missing size; the target does not appear."""
    server.faults["GET", FILE] = [Fault(content=CONTENT[:-1])] * 3
    refused = run("--retries", "2")
    assert refused.status == 2
    assert "announces 300,000 bytes and sends 299,999" in refused.errors[0]
    assert not target.exists()
    server.faults["HEAD", FILE] = [Fault(headers={"Content-Length": None})]
    refused = run()
    assert refused.status == 2
    assert "does not say how large" in refused.errors[0]
    assert not target.exists()
    server.faults["HEAD", FILE] = [Fault(content=CONTENT[:-1])]  # another version, for one request
    assert run().status == 0
    assert target.read_bytes() == CONTENT


def test_a_longer_body_is_cut_and_a_shorter_one_refused(run, server, target):
    """A longer body is read up to the file's size; after a shorter one the missing range is requested, and denied."""
    rest = {"Content-Range": "bytes 1000-299999/300000", "ETag": etag(CONTENT)}
    server.faults["GET", FILE] = [Fault(stop_after=1000), Fault(content=CONTENT + b"more", headers=rest)]
    assert run().status == 0
    assert target.read_bytes() == CONTENT
    target.unlink()
    wrong_size = {"Content-Length": "300100", "Content-Range": "bytes 0-300099/300100"}
    (target.parent / "manifest.json").unlink()
    server.faults["HEAD", FILE] = [Fault(headers=wrong_size)]
    server.faults["GET", FILE] = [Fault(headers=wrong_size)] + [Fault(status=416)] * 9
    refused = run("--retries", "1")
    assert refused.status == 2
    assert not target.exists()


def test_safe_redirects_are_followed(run, server, target):
    """Redirects of GET and HEAD are followed; loops and redirects to other protocols are refused."""
    away = Fault(status=302, headers={"Location": "/elsewhere?signed=1"})
    server.files["elsewhere?signed=1"] = CONTENT
    server.faults["GET", FILE], server.faults["HEAD", FILE] = [away], [away]
    assert run().status == 0
    assert target.read_bytes() == CONTENT
    assert [method for method, path, _ in server.requests if path.startswith("elsewhere")] == ["HEAD", "GET"]

    for location, what in ((f"/{FILE}", "HTTP 302"), ("ftp://127.0.0.1/a", "not safe"), ("file:///etc/passwd", "302")):
        target.unlink(missing_ok=True)
        server.faults["HEAD", FILE] = [Fault(status=302, headers={"Location": location})] * 20
        refused = run()
        assert refused.status == 2
        assert len(refused.errors) == 1
        assert what in refused.errors[0]


@pytest.mark.parametrize("start", ["http", "https"])
@pytest.mark.parametrize("end", ["http", "https"])
def test_only_the_redirect_from_https_to_http_is_refused(start, end):
    """One of the four combinations of http and https is refused; HEAD stays HEAD in the others."""

    def redirect():
        request = urllib.request.Request(f"{start}://one/a", method="HEAD")
        with open(__file__, "rb") as body:
            return downloads.SafeRedirectHandler().redirect_request(request, body, 302, "", Message(), f"{end}://two/a")

    if (start, end) == ("https", "http"):
        with pytest.raises(downloads.FileError, match="not safe"):
            redirect()
    else:
        assert (redirect().full_url, redirect().get_method()) == (f"{end}://two/a", "HEAD")


def test_a_silent_connection_is_resumed_after_the_timeout(run, server, target):
    """After --timeout seconds without a byte, the remaining range is requested on a new connection."""
    server.faults["GET", FILE] = [Fault(stop_after=1000, action=server.finished.wait)]
    start = time.monotonic()
    done = run("--timeout", "1")
    assert done.status == 0
    assert 1 <= time.monotonic() - start < 5
    assert re.search(r"timed out after 1,000 of 300,000 bytes; retry 1 of 8", done.log)
    assert server.gets()[-1] == (FILE, "bytes=1000-")
    assert target.read_bytes() == CONTENT


def test_temporary_statuses_are_retried_and_others_final(run, server, target):
    """Requests are retried after 408, 429 and 5xx; the other 4xx are final."""
    for method in ("HEAD", "GET"):
        server.faults[method, FILE] = [Fault(status=status) for status in (500, 503, 408, 429)]
    assert run("--retries", "4").status == 0
    assert len(server.requests) == 10
    target.unlink()
    server.requests.clear()
    server.faults["HEAD", FILE] = [Fault(status=403)]
    refused = run()
    assert refused.status == 2
    assert refused.errors == [
        f"download_thing: {server.url}/{FILE}: HTTP 403 Forbidden; check --base_url, it may be no mirror of all files"
    ]
    assert len(server.requests) == 1


def test_waits_double_unless_retry_after_is_longer(monkeypatch):
    """Waits double up to LONGEST_WAIT, with jitter; Retry-After, a number or a date, makes them longer."""
    client = downloads.HttpClient("http://127.0.0.1", timeout=1, retries=9)
    waits: list[float] = []
    monkeypatch.setattr(client.stop, "wait", waits.append)

    def fail(wait: float = 0.0):
        raise downloads.RetryableError("broken", wait=wait)

    with pytest.raises(downloads.FileError, match=r"a file: broken; gave up \(--retries 9\)"):
        client.retry("a file", fail)
    for wait, doubled in zip(waits, (1, 2, 4, 8, 16, 32, 60, 60, 60), strict=True):
        assert doubled / 2 <= wait <= doubled
    assert len({wait / doubled for wait, doubled in zip(waits, (1, 2, 4, 8, 16, 32, 60, 60, 60), strict=True)}) > 5
    waits.clear()
    with pytest.raises(downloads.FileError):
        client.retry("a file", lambda: fail(7.5))
    assert waits[:3] == [7.5, 7.5, 7.5]

    def delay(text: str) -> float:
        headers = Message()
        headers["Retry-After"] = text
        return downloads.retry_after(headers)

    assert delay("120") == 120
    assert 50 < delay(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert delay(formatdate(time.time() - 60, usegmt=True)) == delay("soon") == downloads.retry_after(Message()) == 0


def test_retry_after_delays_the_next_request(run, server, target):
    """With Retry-After the wait is 1 s; without, it would be 0.01 s."""
    server.faults["GET", FILE] = [Fault(status=429, headers={"Retry-After": "1"})]
    start = time.monotonic()
    assert "429 Too Many Requests; retry 1 of 8 in 1 s" in run().log
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize("jobs", [1, 3])
def test_jobs_files_are_downloaded_at_a_time(run, server, target, jobs):
    """Exactly --jobs requests are pending at once: a barrier holds each response until then."""
    all_pending = threading.Barrier(jobs)
    for name in "abcdef":
        server.files[f"{NAME}/{name}.bin"] = CONTENT
        server.faults["GET", f"{NAME}/{name}.bin"] = [Fault(before=lambda: all_pending.wait(10))]
    assert run("--jobs", str(jobs), files="abcdef").status == 0
    assert server.max_pending == jobs
    assert len(manifest(target)) == 6
    assert not all_pending.broken


def test_a_failed_file_does_not_stop_the_others(run, server, target):
    """The other files are downloaded, and the failed one is named; of many failed files the first ten are."""
    server.files[f"{NAME}/c.bin"] = OTHER
    failed = run(files="abc")
    assert failed.status == 2
    assert failed.out == ""
    (line,) = failed.errors
    assert f"{NAME}/b.bin: HTTP 404 Not Found; check --base_url" in line
    assert names(target) == {"a.bin", "c.bin", "manifest.json"}
    many = run(files="abcdefghijklmnop")
    assert len(many.errors) == 11
    assert "and 4 other files" in many.errors[-1]


def test_an_unreachable_server_gives_one_line(run, server, tmp_path):
    """One line for all files, and no folder; if the server goes away in between, one line too, and the part is kept."""
    refused = run("--base_url", "http://127.0.0.1:9", files="abcdefgh")
    assert refused.status == 2
    (line,) = refused.errors
    assert re.search(
        r"http://127.0.0.1:9: cannot be reached \(.*Connection refused\); if this machine is offline", line
    )
    assert not list(tmp_path.iterdir())

    server.files |= {f"{NAME}/{name}.bin": CONTENT for name in "abcdefgh"}
    server.faults["GET", FILE] = [Fault(stop_after=1000, action=server.stop_listening)]
    gone = run("--retries", "1", "--jobs", "1", files="abcdefgh")
    assert gone.status == 2
    (line,) = gone.errors
    assert re.search(rf"{FILE}: .*Connection refused; gave up \(--retries 1\)", line)
    (part,) = (tmp_path / NAME).glob(".*.part")
    assert part.read_bytes() == CONTENT[:1000]


def test_a_full_disk_keeps_the_part(run, server, target, monkeypatch):
    """A download that does not fit is not started; if the disk fills up during one, one line says so."""
    with monkeypatch.context() as patch:
        patch.setattr(published.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=199_999))
        refused = run()
    assert refused.status == 2
    assert "needs 300kB, 200kB are free; make room" in refused.errors[0]
    assert not target.parent.exists()

    write = downloads.PartFile.write

    def write_some(part: downloads.PartFile, chunk: bytes):
        write(part, chunk[: 1000 - part.size])
        if part.size == 1000:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(downloads.PartFile, "write", write_some)
        full = run()
    assert full.status == 2
    assert "No space left on device; check the disk" in full.errors[0]
    with monkeypatch.context() as patch:
        # enough for the remaining bytes
        patch.setattr(published.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=299_000))
        assert run().status == 0
    assert target.read_bytes() == CONTENT
    assert server.gets()[-1] == (FILE, "bytes=1000-")


def test_progress_is_of_all_files_together(run, server):
    """Without a terminal, progress is lines; they count the bytes of all files, those of an earlier run included."""
    server.files[f"{NAME}/b.bin"] = OTHER
    server.faults["GET", FILE] = [Fault(stop_after=100_000)]
    run("--retries", "0")
    lines = re.findall(r"\[\d\d:\d\d:\d\d\] downloading: (\w+) of (\w+)", run(files="ab").log)
    assert lines[0] == ("100kB", "600kB")
    assert lines[-1] == ("600kB", "600kB")
