"""Files of the hub, from a local server: cached, resumed, checked, shared by processes, and refused in one line."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from atlas_jax.errors import UserError
from atlas_jax.storage import hub
from atlas_jax.storage.hub import cached_file, has_file, hub_file, is_hub_name
from tests.preprocessing.download_server import Fault
from tests.storage.hub_server import COMMIT, environment, path_of, run_hub, stop, use_hub

NAME, FILE = "someone/model", "weights.bin"
PATH = path_of(NAME, FILE)
CONTENT = np.random.default_rng(0).bytes(300_000)
SCRIPT = f"from atlas_jax.storage.hub import hub_file; print(hub_file('{NAME}', ['{FILE}'], 'give up'))"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub with one repository, and an empty cache; interruptions are not waited for."""
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    with run_hub() as started:
        started.files = {PATH: CONTENT, path_of(NAME, "config.json"): b"{}"}
        use_hub(monkeypatch, started, tmp_path / "cache")
        yield started


def fetch(*files: str, name: str = NAME, **options) -> Path | None:
    return hub_file(name, files or [FILE], "name a folder", **options)


def ranges(server) -> list[str | None]:
    """The range of each GET of FILE."""
    return [byte_range for path, byte_range in server.gets() if path == PATH]


def test_a_file_is_downloaded_once(server):
    """The bytes of the hub; a second call asks for nothing and needs no hub; `has_file` downloads nothing."""
    assert cached_file(NAME, [FILE]) is None
    assert has_file(NAME, [FILE], "")
    assert ranges(server) == []
    path = fetch()
    assert path
    assert path.read_bytes() == CONTENT
    assert path.parent.name == COMMIT
    requests = len(server.requests)
    stop(server)
    assert fetch() == path == cached_file(NAME, [FILE])
    assert len(server.requests) == requests
    assert ranges(server) == [None]


def test_the_first_file_that_the_repository_has_is_taken(server, monkeypatch):
    """In the order that is asked for, with its companions; one in the cache comes first; None if there is none."""
    assert fetch("absent", "absent too") is None
    path = fetch("absent", FILE, "config.json", companions=["config.json", "tokens.json"])
    assert path
    assert path.name == FILE
    assert sorted(file.name for file in path.parent.iterdir()) == ["config.json", FILE]
    server.files[path_of(NAME, "better")] = b"better"
    assert fetch("better", FILE) == path
    assert fetch("better") == path.with_name("better")
    stop(server)
    assert fetch("absent") is None  # noted when it was asked for
    with pytest.raises(UserError, match="cannot be reached"):
        fetch("other")


def test_an_interrupted_download_is_resumed_where_it_was_cut_off(server):
    """By a range request, within a process and by the next one; a server without ranges sends it all again."""
    server.faults["GET", PATH] = [Fault(stop_after=1000), *[Fault(stop_after=0)] * hub.ATTEMPTS]
    with pytest.raises(UserError, match=f"{NAME}: .*cannot be reached") as caught:
        fetch()
    assert "\n" not in str(caught.value)
    assert ranges(server) == [None] + ["bytes=1000-"] * hub.ATTEMPTS
    assert cached_file(NAME, [FILE]) is None
    server.requests.clear()
    server.faults["GET", PATH] = [Fault(stop_after=2000), Fault(start=0, stop_after=5000)]
    path = fetch()
    assert path
    assert path.read_bytes() == CONTENT
    assert ranges(server) == ["bytes=1000-", "bytes=3000-", "bytes=5000-"]
    assert not list(path.resolve().parent.glob("*.incomplete"))


def test_a_damaged_file_is_refused(server):
    """Bytes whose SHA-256 or number is not the hub's do not get into the cache, and are not resumed from."""
    for content in (CONTENT[:-1] + b"?", CONTENT + b"?"):
        server.faults["GET", PATH] = [Fault(content=content)]
        with pytest.raises(UserError, match="arrived damaged"):
            fetch()
        assert cached_file(NAME, [FILE]) is None
    path = fetch()
    assert path
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(404, {"X-Error-Code": "RepoNotFound"}), "no such repository on the hub .*hf auth login"),
        (Fault(401), "no such repository on the hub .*hf auth login"),
        (Fault(401, {"X-Error-Code": "GatedRepo"}), f"is gated on the hub; accept its terms at .*/{NAME}, .*HF_TOKEN"),
        (Fault(403, {"X-Error-Code": "GatedRepo"}), "is gated on the hub"),
        (Fault(403), "answers 403; try again, or name a folder"),
        (Fault(503), "answers 503; try again, or name a folder"),
        (Fault(headers={"X-Repo-Commit": None}), "no hub: it names no commit"),
    ],
)
def test_what_the_hub_refuses_is_one_line(server, fault, message):
    """Missing, private, gated, broken, and a server that is no hub: at once, before anything is downloaded."""
    server.faults["HEAD", PATH] = [fault]
    start = time.monotonic()
    with pytest.raises(UserError, match=f"^{NAME}: .*{message}") as caught:
        fetch()
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 5
    assert ranges(server) == []
    assert fetch()


def test_without_a_network_the_remedy_is_named(server, monkeypatch):
    """HF_HUB_OFFLINE, and a hub that is not there: at once, with what to run elsewhere and what to set."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"HF_HUB_OFFLINE is set; .*hf download {NAME}`.*HF_HOME.*or name a folder"):
        fetch()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        has_file(NAME, [FILE], "")
    assert server.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    stop(server)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"the hub http://.* cannot be reached \(.*refused\); .*HF_HOME"):
        fetch()
    assert time.monotonic() - start < 5


def test_a_cache_that_cannot_hold_the_file_is_named(server, monkeypatch, tmp_path):
    """A disk without room, or a folder that cannot be made: named with HF_HOME, before anything is downloaded."""
    disk = hub.shutil.disk_usage("/")
    with monkeypatch.context() as patch:
        patch.setattr(hub.shutil, "disk_usage", lambda folder: disk._replace(free=1000))
        with pytest.raises(UserError, match=r"0\.0 GB are to be downloaded to .*; free some, or set HF_HOME"):
            fetch()
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file cannot be written \(Not a directory\); set HF_HOME"):
        fetch()
    assert ranges(server) == []


def test_names_of_the_hub(tmp_path, monkeypatch):
    """One or two words and no folder; paths are none."""
    for name in ("t5-small", "google/t5-v1_1-xxl", "facebook/contriever"):
        assert is_hub_name(name)
    for name in ("", ".", "/t5", "./t5", "~/t5", "a/b/c", "a/", "../t5", "a--b/c", "a b"):
        assert not is_hub_name(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t5-small").mkdir()
    assert not is_hub_name("t5-small")


# -- Processes, which read HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE -----------------------------------------------------


def start(server, home: Path, **changes: str) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT]
    return subprocess.Popen(
        command, env=environment(server, home, **changes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_processes_share_one_download(server, tmp_path):
    """Three processes on one empty cache: all get the file, which is sent once; offline, a fourth has it too."""
    started = [start(server, tmp_path / "home") for _ in range(3)]
    outputs = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    paths = {Path(output.strip()) for output, _ in outputs}
    assert len(paths) == 1
    assert paths.pop().read_bytes() == CONTENT
    assert server.bytes_sent[PATH] == len(CONTENT)
    offline = start(server, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert offline.communicate(timeout=100)[0] == outputs[0][0]
    elsewhere = start(server, tmp_path / "other", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in elsewhere.communicate(timeout=100)[1]


def test_a_killed_download_is_resumed(server, tmp_path):
    """A process that is killed leaves what it has; the next one asks for the rest alone."""
    sent, killed = threading.Event(), threading.Event()

    def wait_for_the_kill():
        sent.set()
        killed.wait(60)

    server.faults["GET", PATH] = [Fault(stop_after=200_000, action=wait_for_the_kill)]
    process = start(server, tmp_path / "home")
    assert sent.wait(60)
    partial = next(iter((tmp_path / "home").rglob("*.incomplete")))
    end = time.monotonic() + 30
    while partial.stat().st_size < 100_000:
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed.set()
    process = start(server, tmp_path / "home")
    output, _ = process.communicate(timeout=100)
    assert Path(output.strip()).read_bytes() == CONTENT
    assert server.bytes_sent[PATH] <= len(CONTENT) + 100_000
    assert str(ranges(server)[1]).startswith("bytes=")


def test_without_a_home_the_cache_is_asked_for(monkeypatch, tmp_path):
    """The library would make a folder named `~` in the working directory; HF_HOME is named instead."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"a/b: no such folder, and no home folder .* set HF_HOME, or name a folder"):
        hub_file("a/b", ["config.json"], "name a folder")
    assert list(tmp_path.iterdir()) == []
