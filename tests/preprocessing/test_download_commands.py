"""The download commands: published names, flags, manifest, exit status and interruption."""

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atlas_jax.commands.flags import GROUPS
from atlas_jax.errors import UserError
from tests.preprocessing.download_server import Fault, run_server

sys.path.insert(0, str(Path(__file__).parents[2] / "preprocessing"))
import download_corpus
import download_index
import download_model
import published

SCRIPTS = Path(published.__file__).parent
SIZES = ("xxl", "xl", "large", "base")
BASE = "models/atlas/base"
FILE = f"{BASE}/model.pth.tar"
CONTENT = (b"PK\x03\x04" + bytes(range(256)) * 1000)[:256_000]


@pytest.fixture
def server(monkeypatch):
    """A server with CONTENT as the base model."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with run_server() as server:
        server.files[FILE] = CONTENT
        yield server


@pytest.fixture
def run(server, tmp_path, capsys):
    """Downloads the base model to `tmp_path`; returns status, stdout, and the stderr lines with the command's name."""

    def call(*flags: str, catalogue=download_model.CATALOGUE) -> tuple[int, str, list[str]]:
        name = next(name for name in reversed(catalogue.names) if "_nq" not in name)
        argv = [f"--{catalogue.kind}", name, "--output_directory", str(tmp_path), "--base_url", server.url, *flags]
        status = published.main(catalogue, "", argv)
        out, err = capsys.readouterr()
        return status, out, [line for line in err.splitlines() if line.startswith("download_")]

    return call


def start_script(*argv: str | Path, **environment: str) -> subprocess.Popen:
    """Starts a script in a subprocess."""
    env = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)} | environment
    argv = (sys.executable, "-W", "error", SCRIPTS / argv[0], *argv[1:])
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell inherits SIG_IGN
    try:
        return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, handler)


def test_eight_models_of_one_file_are_published():
    """Two families of four sizes; a model is one file."""
    catalogue = download_model.CATALOGUE
    assert list(catalogue.names) == [f"models/{family}/{size}" for family in ("atlas", "atlas_nq") for size in SIZES]
    assert catalogue.files == ["model.pth.tar"]


def test_eight_indexes_of_128_shards_are_published():
    """Two families of four sizes; an index is 128 shards of two files, the last shard first in the download order."""
    catalogue = download_index.CATALOGUE
    assert list(catalogue.names) == [f"indices/{f}/wiki/{size}" for f in ("atlas", "atlas_nq") for size in SIZES]
    assert sorted(catalogue.files) == sorted(
        f"{kind}.{n}.pt" for n in range(128) for kind in ("embeddings", "passages")
    )
    assert {file.split(".")[1] for file in catalogue.files[:2]} == {"127"}


def test_five_corpora_of_two_files_are_published():
    """Five dumps of Wikipedia; a corpus is two files."""
    catalogue = download_corpus.CATALOGUE
    months = ("dec2017", "dec2018", "aug2019", "dec2020", "dec2021")
    assert list(catalogue.names) == [f"corpora/wiki/enwiki-{month}" for month in months]
    assert catalogue.files == ["text-list-100-sec.jsonl", "infobox.jsonl"]


@pytest.mark.parametrize("script", [download_model, download_index, download_corpus])
def test_the_printed_next_step_has_existing_paths_and_flags(run, server, tmp_path, script):
    """Files are stored below the published name; the printed next step has flags of `atlas` and paths that exist."""
    catalogue = script.CATALOGUE
    name = next(name for name in reversed(catalogue.names) if "_nq" not in name)
    start = b'{"' if script is download_corpus else b"\x80\x04"
    server.files |= {f"{name}/{file}": start + file.encode() for file in catalogue.files}
    status, out, errors = run(catalogue=catalogue)
    assert (status, errors) == (0, [])
    for file in catalogue.files:
        assert (tmp_path / name / file).read_bytes() == server.files[f"{name}/{file}"]
    assert {path.name for path in (tmp_path / name).iterdir()} == {*catalogue.files, "manifest.json"}
    flags = set(re.findall(r"--(\w+)", out))
    assert flags
    assert flags <= {"output"} | {field.name for group in GROUPS.values() for field in dataclasses.fields(group)}
    paths = re.findall(rf"{tmp_path / name}\S*\b", out)
    assert len(paths) >= 2
    assert all(Path(path).exists() for path in paths)


def test_scripts_run_from_any_folder_and_list_all_names(tmp_path):
    """Each script's --help works in a subprocess and prints all published names."""
    scripts = {module.__name__: module.CATALOGUE for module in (download_model, download_index, download_corpus)}
    processes = {script: start_script(f"{script}.py", "--help") for script in scripts}
    for script, process in processes.items():
        out, err = process.communicate()
        assert (process.returncode, err) == (0, "")
        assert all(name in out for name in scripts[script].names)
        assert "manifest.json" in out


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--model", "xxl"], "--model xxl: no such name; did you mean models/atlas/xxl or models/atlas_nq/xxl?"),
        (["--model", "models/atlas/lrage"], "did you mean models/atlas/large"),
        (["--model", "../../etc"], "--model ../../etc: no such name; --list shows the names"),
        ([], "--model is missing; --list shows the names"),
        (["--model", BASE, "--jobs", "0"], "--jobs: 0: must be a whole number, 1 or more; see download_model --help"),
        (["--model", BASE, "--base_url", "ftp://a/b"], "--base_url: ftp://a/b: no http(s) address; see download_model"),
        (["--model", BASE, "--base_url", "http://a:b"], "--base_url: invalid address value: 'http://a:b'"),
        (["--model", BASE, "--base_url", "http://a/b c"], "--base_url: http://a/b c: no http(s) address"),
        (["--modell", BASE], "unrecognized arguments: --modell"),
    ],
)
def test_wrong_flags_give_one_line_and_status_2(capsys, flags, what):
    """Wrong flags print one line with the remedy; the status is 2."""
    assert published.main(download_model.CATALOGUE, "", flags) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert what in err


def test_the_published_commands_are_accepted():
    """Flags as the reference's READMEs and scripts type them, `download_index.py --model` among them; no other does."""
    commands = [
        (download_corpus, "--corpus corpora/wiki/enwiki-dec2018 --output_directory data"),
        (download_model, "--model models/atlas_nq/xl --output_directory data"),
        (download_index, "--index indices/atlas_nq/wiki/xl --output_directory data"),
        (download_index, "--model indices/atlas/wiki/xxl --output_directory data"),
    ]
    for script, flags in commands:
        args = published.parse_args(script.CATALOGUE, "", flags.split())
        assert (args.name, args.output_directory) == (flags.split()[1], Path("data"))
    with pytest.raises(UserError, match="unrecognized arguments: --model"):
        published.parse_args(download_corpus.CATALOGUE, "", ["--model", "corpora/wiki/enwiki-dec2018"])
    with pytest.raises(UserError, match="--index models/atlas/xxl: no such name"):
        published.parse_args(download_index.CATALOGUE, "", ["--model", "models/atlas/xxl"])


def test_progress_without_a_terminal_logs_each_position_once(monkeypatch, capsys):
    """The first and the last line among them, also where redraws are more frequent than bytes."""
    monkeypatch.setattr(published, "SECONDS_PER_LINE", 0.0)
    with published.bytes_progress("downloading", 1000, 100) as advance:
        for count in (400, 0, 500):
            advance(count)
    lines = [line.partition("] ")[2].partition(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == [f"downloading: {done} of 1.00kB" for done in ("100B", "500B", "1.00kB")]


def test_list_prints_names_and_sizes(run, server, capsys):
    """--list prints the sizes that the server knows, of an index by its first shard, and `?` without a server."""
    status, out, _ = run("--list")
    rows = out.splitlines()
    assert (status, len(rows), len(server.requests)) == (0, 8, 8)
    assert re.fullmatch(r"models/atlas/base +1 file\(s\) +256kB +Atlas base, pretrained", rows[3])
    assert re.fullmatch(r"models/atlas/xxl +1 file\(s\) +\? +Atlas XXL, pretrained", rows[0])
    server.files |= {f"indices/atlas/wiki/xl/{kind}.0.pt": CONTENT for kind in ("embeddings", "passages")}
    _, out, _ = run("--list", catalogue=download_index.CATALOGUE)
    assert re.fullmatch(r"indices/atlas/wiki/xl +256 file\(s\) +about 65.5MB +wiki-dec2018 .*", out.splitlines()[1])
    status, out, _ = run("--list", "--base_url", "http://127.0.0.1:9")
    assert status == 0
    assert [row.split()[3] for row in out.splitlines()] == ["?"] * 8


def test_verify_prints_intact_files_and_finds_damage(run, server, tmp_path):
    """Intact files are printed as `sha256sum -c` reads them; only --verify finds a flipped bit; no request is sent."""
    assert run("--verify")[2][0].endswith(
        "has no manifest.json to verify by; the same command without --verify downloads"
    )
    assert run()[0] == 0
    num_requests = len(server.requests)
    status, out, _ = run("--verify")
    assert (status, out) == (0, f"{hashlib.sha256(CONTENT).hexdigest()}  {FILE}\n")
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict"], input=out, text=True, check=True, cwd=tmp_path, stdout=-3)
    damaged = bytearray(CONTENT)
    damaged[1234] ^= 1
    (tmp_path / FILE).write_bytes(damaged)
    assert run()[0] == 0
    status, out, (line,) = run("--verify")
    assert (status, out) == (2, "")
    assert f"{tmp_path / FILE}: damaged; delete it, and the same command without --verify fetches it" in line
    assert len(server.requests) == num_requests
    (tmp_path / FILE).unlink()
    assert "not there" in run("--verify")[2][0]
    assert run()[0] == run("--verify")[0] == 0
    (tmp_path / FILE).write_bytes(CONTENT[:-1])
    assert run("--verify")[0] == 2
    assert run()[0] == run("--verify")[0] == 0


def test_a_file_that_contradicts_the_manifest_is_refused(run, server, tmp_path):
    """A file that changed on the server is refused: before the download if its size differs, after it by its hash."""
    assert run()[0] == 0
    (tmp_path / FILE).unlink()
    server.files[FILE] = CONTENT[::-1]
    status, _, (line,) = run()
    assert status == 2
    assert re.search(r"came with SHA-256 \w{64}, not manifest.json's \w{64}, and was thrown away; run again", line)
    assert {path.name for path in (tmp_path / BASE).iterdir()} == {"manifest.json"}
    server.files[FILE] = CONTENT + b"more"
    before = len(server.gets())
    status, _, (line,) = run()
    assert status == 2
    assert "now has 256,004 bytes on the server, 256,000 before; try another --base_url" in line
    assert len(server.gets()) == before
    (tmp_path / BASE / "manifest.json").write_text("{}")
    assert run()[0] == 0


def test_an_existing_manifest_is_enforced(run, server, tmp_path):
    """A manifest that exists before the first download is enforced; a malformed manifest is named."""
    (tmp_path / BASE).mkdir(parents=True)
    path = tmp_path / BASE / "manifest.json"
    path.write_text(json.dumps({"model.pth.tar": {"size": len(CONTENT), "sha256": "0" * 64}}))
    assert run()[0] == 2
    path.write_text(
        json.dumps({"model.pth.tar": {"size": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}})
    )
    assert run()[0] == 0
    for text in ("{", "[]", '{"model.pth.tar": 1}', '{"model.pth.tar": {"size": 1}}'):
        path.write_text(text)
        status, _, (line,) = run()
        assert status == 2
        assert f"{path}: damaged; delete it" in line


def test_an_existing_file_of_the_published_size_is_kept(run, server, tmp_path):
    """A file of the published size is added to the manifest without a download; one of another size is an error."""
    (tmp_path / BASE).mkdir(parents=True)
    (tmp_path / FILE).write_bytes(CONTENT[:-1])
    status, _, (line,) = run()
    assert status == 2
    assert f"{tmp_path / FILE}: has 255,999 bytes, the published file 256,000; move it away" in line
    assert (tmp_path / FILE).read_bytes() == CONTENT[:-1]
    (tmp_path / FILE).write_bytes(CONTENT)
    assert run()[0] == run("--verify")[0] == 0
    assert server.gets() == []


def test_a_second_process_is_refused(run, tmp_path):
    """While a process holds the folder's lock, another is refused."""
    (tmp_path / BASE).mkdir(parents=True)
    with (tmp_path / BASE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, _, (line,) = run()
        assert status == 2
        assert "another process is downloading to it; wait for its end" in line
    assert run()[0] == 0


def test_a_folder_that_cannot_be_created_is_named(run, tmp_path):
    """The error is one line with the folder."""
    (tmp_path / "models").write_text("")
    status, _, (line,) = run()
    assert status == 2
    assert str(tmp_path / "models") in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_resumes_at_its_last_byte(run, server, tmp_path, number):
    """The part is kept and resumed without sending a byte again; Ctrl-C works while the server is silent."""
    server.faults["GET", FILE] = [Fault(stop_after=100, action=server.finished.wait)]
    flags = ("--model", BASE, "--output_directory", tmp_path)
    with start_script("download_model.py", *flags, ATLAS_BASE_URL=server.url) as process:
        deadline = time.monotonic() + 10
        while not any(path.stat().st_size == 100 for path in (tmp_path / BASE).glob(".*.part")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=10)
    if number == signal.SIGINT:
        assert process.returncode == 130
        what = "interrupted by SIGINT; what has arrived is kept, and the same command goes on from there"
        assert err.splitlines()[-1] == f"download_model: {what}"
        assert "Traceback" not in err
    assert not (tmp_path / FILE).exists()
    assert run()[0] == 0
    assert (tmp_path / FILE).read_bytes() == CONTENT
    assert server.gets()[-1] == (FILE, "bytes=100-")
    assert server.bytes_sent[FILE] == len(CONTENT)


PAGE = b"<html>Please log in</html>"


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "application/octet-stream", None])
def test_a_login_page_is_not_the_file(run, server, tmp_path, content_type):
    """A page with status 200 is refused by its content type, or else by its first bytes; nothing is recorded or left.

    Afterwards the file itself is downloaded as if nothing had been.
    """
    server.files[FILE] = PAGE
    for method in ("HEAD", "GET"):
        server.faults[method, FILE] = [Fault(headers={"Content-Type": content_type})]
    status, out, (line,) = run()
    assert (status, out) == (2, "")
    assert "is a web page, such as a login" in line
    assert "try another --base_url" in line
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    server.faults.clear()
    server.files[FILE] = CONTENT
    assert run()[0] == 0


@pytest.mark.parametrize("content", [b'{"error": "log in"}', b"\x1f\x8b\x08", b"PK\x05\x06"])
def test_a_file_of_another_kind_is_refused(run, server, tmp_path, content):
    """An error in JSON, something compressed, an empty archive: the first bytes are named, and nothing is left."""
    server.files[FILE] = content
    status, _, (line,) = run()
    assert status == 2
    assert f"begins with {content[:8]!r}, so it is not model.pth.tar" in line
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_page_that_is_there_already_is_named(run, server, tmp_path):
    """As a browser or an earlier version saved it: neither adopted nor, if manifest.json has it, called complete."""
    (tmp_path / BASE).mkdir(parents=True)
    (tmp_path / FILE).write_bytes(PAGE)
    server.files[FILE] = PAGE
    assert "is a web page" in run()[2][0]
    assert not (tmp_path / BASE / "manifest.json").exists()
    entry = {"size": len(PAGE), "sha256": hashlib.sha256(PAGE).hexdigest()}
    (tmp_path / BASE / "manifest.json").write_text(json.dumps({"model.pth.tar": entry}))
    for flags in ([], ["--verify"]):
        status, out, (line,) = run(*flags)
        assert (status, out) == (2, "")
        assert "is a web page, such as a login, so it is not model.pth.tar; delete it" in line


def test_a_tilde_in_the_output_directory_is_the_home_folder(run, tmp_path, monkeypatch):
    """`--output_directory=~/x`, which a shell leaves alone; the home of nobody is refused."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run("--output_directory=~/home")[0] == 0
    assert (tmp_path / "home" / FILE).read_bytes() == CONTENT
    assert "~nobody-here/x: no home folder" in run("--output_directory=~nobody-here/x")[2][0]
    assert not list(tmp_path.glob("~*"))
