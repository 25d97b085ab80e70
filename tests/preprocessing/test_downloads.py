"""Downloads: a file is whole or not there, whatever the server does, and no byte comes twice."""

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

from tests.preprocessing.download_server import Fault, etag, running

sys.path.insert(0, str(Path(__file__).parents[2] / "preprocessing"))
import downloads
import published

NAME, FILE = "things/one", "things/one/a.bin"
CONTENT = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)


class Run(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    lines: list[str]  # on stderr, of the command's end
    said: str  # on stderr, on the way there


@pytest.fixture
def server():
    """Has CONTENT as `FILE`."""
    with running() as server:
        server.files[FILE] = CONTENT
        yield server


@pytest.fixture
def run(server, tmp_path, capsys, monkeypatch) -> Callable[..., Run]:
    """Downloads `NAME` from the server to `tmp_path`; `shards` files a, b, .. of it."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(downloads, "FIRST_WAIT", 0.01)

    def call(*flags: str, files: str = "a", shards: int = 1) -> Run:
        catalogue = published.Catalogue(
            kind="thing",
            names={NAME: "a thing", "things/two": "another"},
            patterns=tuple(f"{name}.bin" for name in files),
            shards=shards,
            then="use {folder}\n",
        )
        argv = ["--thing", NAME, "--output_directory", str(tmp_path), "--base_url", server.url, *flags]
        status = published.main(catalogue, "", argv)
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("download_thing: ")]
        return Run(status, out, lines, "\n".join(line for line in err.splitlines() if line not in lines))

    return call


@pytest.fixture
def target(tmp_path) -> Path:
    """Where `FILE` comes to."""
    return tmp_path / FILE


def manifest(target: Path) -> dict:
    return json.loads((target.parent / "manifest.json").read_bytes())


def entry(content: bytes) -> dict:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def names(target: Path) -> set[str]:
    return {path.name for path in target.parent.iterdir()}


def test_a_download(run, server, target):
    """The file, the manifest and nothing else; the next run asks the server for nothing."""
    first = run()
    assert (first.status, first.lines) == (0, [])
    assert target.read_bytes() == CONTENT
    assert names(target) == {"a.bin", "manifest.json"}
    assert manifest(target) == {"a.bin": entry(CONTENT)}
    assert first.out.splitlines() == [f"{target.parent}: complete, 1 file(s), 300kB", f"use {target.parent}"]
    asked = list(server.asked)
    assert run() == (0, first.out, [], "")
    assert server.asked == asked


def test_a_name_is_for_what_is_on_the_disk(run, server, target, monkeypatch):
    """A power cut before the rename finds all bytes; a kill there costs none of them."""
    synced = []
    monkeypatch.setattr(downloads, "fsync", lambda path: synced.append((path.name, target.exists())))
    with monkeypatch.context() as patch:
        patch.setattr(downloads.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        assert run().lines == ["download_thing: broken; check the disk and its permissions, and run again"]
    (part,) = target.parent.glob(".*.part")
    assert run().status == 0
    assert len(server.gets()) == 1
    assert synced == [(part.name, False)] * 2 + [("one", True)]


@pytest.mark.parametrize("where", [0, 1, 70_000, len(CONTENT) - 1])
def test_a_broken_connection(run, server, target, where):
    """The rest is asked for, and every byte was sent once."""
    server.faults["GET", FILE] = [Fault(stop_after=where)]
    done = run()
    assert done.status == 0
    assert f"the connection broke after {where:,} of 300,000 bytes; retry 1 of 8" in done.said
    assert target.read_bytes() == CONTENT
    assert server.gets() == [(FILE, None), (FILE, f"bytes={where}-" if where else None)]
    assert server.sent[FILE] == len(CONTENT)


def test_retries_are_counted_anew_after_progress(run, server, target):
    """Six breaks that got further are fewer than one that did not. The next command goes on where this one gave up."""
    server.faults["GET", FILE] = [Fault(stop_after=9)] * 6 + [Fault(stop_after=0)]
    gave_up = run("--retries", "1")
    assert gave_up.status == 2
    (line,) = gave_up.lines
    assert FILE in line
    assert "broke after 54 of 300,000 bytes; gave up (--retries 1), the same command goes on" in line
    assert len(server.gets()) == 7
    assert not target.exists()
    assert run().status == 0
    assert server.gets()[-1] == (FILE, "bytes=54-")
    assert server.sent[FILE] == len(CONTENT)
    assert target.read_bytes() == CONTENT
    assert manifest(target) == {"a.bin": entry(CONTENT)}


def test_a_server_without_ranges(run, server, target):
    """It starts the file again; one that always breaks there makes no progress, however much it sends."""
    server.faults["GET", FILE] = [Fault(stop_after=1000, start=0)] * 2
    done = run()
    assert done.status == 0
    assert "300kB of 300kB" in done.said.splitlines()[-1]  # what was thrown away is not counted
    assert target.read_bytes() == CONTENT
    target.unlink()
    server.faults["GET", FILE] = [Fault(stop_after=where, start=0) for where in (2000, 1000) * 5]
    assert run("--retries", "2").status == 2
    assert len(server.faults["GET", FILE]) == 10 - 3


@pytest.mark.parametrize("again", ["other", "longer", "shorter", "same"])
def test_a_file_that_changes_on_the_server(run, server, target, again):
    """Between two commands or within one, two versions are never spliced; the same version is gone on with."""
    new = {"other": OTHER, "longer": OTHER + b"more", "shorter": OTHER[:1000], "same": CONTENT}[again]
    server.faults["GET", FILE] = [Fault(stop_after=70_000)]
    assert run("--retries", "0").status == 2
    server.files[FILE] = new
    done = run()
    assert done.status == 0
    assert target.read_bytes() == new
    assert names(target) == {"a.bin", "manifest.json"}
    assert again != "same" or server.sent[FILE] == len(CONTENT)

    (target.parent / "manifest.json").unlink()
    target.unlink()
    server.faults["GET", FILE] = [Fault(stop_after=500, content=CONTENT)]
    assert run().status == 0
    assert target.read_bytes() == new


def test_another_range_than_asked_for(run, server, target):
    """It is not taken: the file starts again."""
    server.faults["GET", FILE] = [Fault(stop_after=1000), Fault(start=999)]
    done = run()
    assert done.status == 0
    assert "another version" in done.said
    assert target.read_bytes() == CONTENT


def test_a_rest_that_the_server_denies(run, server, target):
    """Status 416 starts the file again."""
    server.faults["GET", FILE] = [Fault(stop_after=1000), Fault(status=416)]
    assert run().status == 0
    assert [wanted for _, wanted in server.gets()] == [None, "bytes=1000-", None]
    assert target.read_bytes() == CONTENT


def test_wrong_sizes(run, server, target):
    """Sizes that contradict each other, or none at all, are refused with both numbers, and nothing gets the name."""
    server.faults["GET", FILE] = [Fault(content=CONTENT[:-1])] * 3
    refused = run("--retries", "2")
    assert refused.status == 2
    assert "announces 300,000 bytes and sends 299,999" in refused.lines[0]
    assert not target.exists()
    server.faults["HEAD", FILE] = [Fault(headers={"Content-Length": None})]
    refused = run()
    assert refused.status == 2
    assert "does not say how large" in refused.lines[0]
    assert not target.exists()
    server.faults["HEAD", FILE] = [Fault(content=CONTENT[:-1])]  # by another version that was there for a moment
    assert run().status == 0
    assert target.read_bytes() == CONTENT


def test_a_body_longer_or_shorter_than_announced(run, server, target):
    """Too long: no byte beyond the file's size is taken. Too short: the rest is asked for, and is not there."""
    rest = {"Content-Range": "bytes 1000-299999/300000", "ETag": etag(CONTENT)}
    server.faults["GET", FILE] = [Fault(stop_after=1000), Fault(content=CONTENT + b"more", headers=rest)]
    assert run().status == 0
    assert target.read_bytes() == CONTENT
    target.unlink()
    lie = {"Content-Length": "300100", "Content-Range": "bytes 0-300099/300100"}
    (target.parent / "manifest.json").unlink()
    server.faults["HEAD", FILE] = [Fault(headers=lie)]
    server.faults["GET", FILE] = [Fault(headers=lie)] + [Fault(status=416)] * 9
    refused = run("--retries", "1")
    assert refused.status == 2
    assert not target.exists()


def test_redirects(run, server, target):
    """They are followed, for HEAD too; a loop, an exit to another protocol and the step from https to http are not."""
    away = Fault(status=302, headers={"Location": "/elsewhere?signed=1"})
    server.files["elsewhere?signed=1"] = CONTENT
    server.faults["GET", FILE], server.faults["HEAD", FILE] = [away], [away]
    assert run().status == 0
    assert target.read_bytes() == CONTENT
    assert [method for method, path, _ in server.asked if path.startswith("elsewhere")] == ["HEAD", "GET"]

    for location, what in ((f"/{FILE}", "HTTP 302"), ("ftp://127.0.0.1/a", "not safe"), ("file:///etc/passwd", "302")):
        target.unlink(missing_ok=True)
        server.faults["HEAD", FILE] = [Fault(status=302, headers={"Location": location})] * 20
        refused = run()
        assert refused.status == 2
        assert len(refused.lines) == 1
        assert what in refused.lines[0]


@pytest.mark.parametrize("start", ["http", "https"])
@pytest.mark.parametrize("end", ["http", "https"])
def test_https_is_not_left(start, end):
    """Of the four ways one is refused."""

    def redirect():
        request = urllib.request.Request(f"{start}://one/a", method="HEAD")
        with open(__file__, "rb") as body:
            return downloads.Redirects().redirect_request(request, body, 302, "", Message(), f"{end}://two/a")

    if (start, end) == ("https", "http"):
        with pytest.raises(downloads.FileError, match="not safe"):
            redirect()
    else:
        assert (redirect().full_url, redirect().get_method()) == (f"{end}://two/a", "HEAD")


def test_silence(run, server, target):
    """After --timeout without a byte the connection is given up, and the rest asked for."""
    server.faults["GET", FILE] = [Fault(stop_after=1000, action=server.over.wait)]
    start = time.monotonic()
    done = run("--timeout", "1")
    assert done.status == 0
    assert 1 <= time.monotonic() - start < 5
    assert re.search(r"timed out after 1,000 of 300,000 bytes; retry 1 of 8", done.said)
    assert server.gets()[-1] == (FILE, "bytes=1000-")
    assert target.read_bytes() == CONTENT


def test_a_server_in_trouble(run, server, target):
    """Asked again after 408, 429 and 5xx, later each time; the other 4xx are final."""
    for method in ("HEAD", "GET"):
        server.faults[method, FILE] = [Fault(status=status) for status in (500, 503, 408, 429)]
    assert run("--retries", "4").status == 0
    assert len(server.asked) == 10
    target.unlink()
    server.asked.clear()
    server.faults["HEAD", FILE] = [Fault(status=403)]
    refused = run()
    assert refused.status == 2
    assert refused.lines == [
        f"download_thing: {server.url}/{FILE}: HTTP 403 Forbidden; check --base_url, it may be no mirror of all files"
    ]
    assert len(server.asked) == 1


def test_the_waits(monkeypatch):
    """They double up to the longest, with chance in them; a server may ask for longer ones, with a number or a date."""
    server = downloads.Server("http://127.0.0.1", timeout=1, retries=9)
    waits: list[float] = []
    monkeypatch.setattr(server.stop, "wait", waits.append)

    def fail(wait: float = 0.0):
        raise downloads.Temporary("broken", wait=wait)

    with pytest.raises(downloads.FileError, match=r"a file: broken; gave up \(--retries 9\)"):
        server.insist("a file", fail)
    for wait, doubled in zip(waits, (1, 2, 4, 8, 16, 32, 60, 60, 60), strict=True):
        assert doubled / 2 <= wait <= doubled
    assert len({wait / doubled for wait, doubled in zip(waits, (1, 2, 4, 8, 16, 32, 60, 60, 60), strict=True)}) > 5
    waits.clear()
    with pytest.raises(downloads.FileError):
        server.insist("a file", lambda: fail(7.5))
    assert waits[:3] == [7.5, 7.5, 7.5]

    def asked(text: str) -> float:
        headers = Message()
        headers["Retry-After"] = text
        return downloads.retry_after(headers)

    assert asked("120") == 120
    assert 50 < asked(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert asked(formatdate(time.time() - 60, usegmt=True)) == asked("soon") == downloads.retry_after(Message()) == 0


def test_retry_after_is_kept_to(run, server, target):
    """A second, where otherwise it would be a hundredth."""
    server.faults["GET", FILE] = [Fault(status=429, headers={"Retry-After": "1"})]
    start = time.monotonic()
    assert "429 Too Many Requests; retry 1 of 8 in 1 s" in run().said
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize("jobs", [1, 3])
def test_several_at_a_time(run, server, target, jobs):
    """As many as --jobs: each answer waits for so many questions; and never more."""
    together = threading.Barrier(jobs)
    for name in "abcdef":
        server.files[f"{NAME}/{name}.bin"] = CONTENT
        server.faults["GET", f"{NAME}/{name}.bin"] = [Fault(before=lambda: together.wait(10))]
    assert run("--jobs", str(jobs), files="abcdef").status == 0
    assert server.most_waiting == jobs
    assert len(manifest(target)) == 6
    assert not together.broken


def test_a_failed_file_does_not_hide_the_others(run, server, target):
    """They are downloaded, it is named; of very many only some are."""
    server.files[f"{NAME}/c.bin"] = OTHER
    failed = run(files="abc")
    assert failed.status == 2
    assert failed.out == ""
    (line,) = failed.lines
    assert f"{NAME}/b.bin: HTTP 404 Not Found; check --base_url" in line
    assert names(target) == {"a.bin", "c.bin", "manifest.json"}
    many = run(files="abcdefghijklmnop")
    assert len(many.lines) == 11
    assert "and 4 other files" in many.lines[-1]


def test_no_server(run, server, tmp_path):
    """One line, however many files; nothing is made. So it is when it goes away in between, and the parts are kept."""
    refused = run("--base_url", "http://127.0.0.1:9", files="abcdefgh")
    assert refused.status == 2
    (line,) = refused.lines
    assert re.search(
        r"http://127.0.0.1:9: cannot be reached \(.*Connection refused\); if this machine is offline", line
    )
    assert not list(tmp_path.iterdir())

    server.files |= {f"{NAME}/{name}.bin": CONTENT for name in "abcdefgh"}
    server.faults["GET", FILE] = [Fault(stop_after=1000, action=server.vanish)]
    gone = run("--retries", "1", "--jobs", "1", files="abcdefgh")
    assert gone.status == 2
    (line,) = gone.lines
    assert re.search(rf"{FILE}: .*Connection refused; gave up \(--retries 1\)", line)
    (part,) = (tmp_path / NAME).glob(".*.part")
    assert part.read_bytes() == CONTENT[:1000]


def test_a_full_disk(run, server, target, monkeypatch):
    """What does not fit is not begun; where it gets full on the way, one line says so and the part is kept."""
    with monkeypatch.context() as patch:
        patch.setattr(published.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=199_999))
        refused = run()
    assert refused.status == 2
    assert "needs 300kB, 200kB are free; make room" in refused.lines[0]
    assert not target.parent.exists()

    write = downloads.Part.write

    def write_some(part: downloads.Part, chunk: bytes):
        write(part, chunk[: 1000 - part.size])
        if part.size == 1000:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(downloads.Part, "write", write_some)
        full = run()
    assert full.status == 2
    assert "No space left on device; check the disk" in full.lines[0]
    with monkeypatch.context() as patch:
        patch.setattr(
            published.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=299_000)
        )  # room for the rest
        assert run().status == 0
    assert target.read_bytes() == CONTENT
    assert server.gets()[-1] == (FILE, "bytes=1000-")


def test_progress_of_all_files_together(run, server):
    """In a log it is lines: bytes that are there already are counted, but not in the rate."""
    server.files[f"{NAME}/b.bin"] = OTHER
    server.faults["GET", FILE] = [Fault(stop_after=100_000)]
    run("--retries", "0")
    lines = re.findall(r"\[\d\d:\d\d:\d\d\] downloading: (\w+) of (\w+)", run(files="ab").said)
    assert lines[0] == ("100kB", "600kB")
    assert lines[-1] == ("600kB", "600kB")
