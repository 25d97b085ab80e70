"""A scratch folder is private to its process while it lives, and is removed after its end, however that came."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from atlas_jax.storage import process_id
from atlas_jax.storage.shared_files import shared_scratch

KILLED = """
import os, pathlib, signal, sys
from atlas_jax.storage.shared_files import shared_scratch
with shared_scratch(pathlib.Path(sys.argv[1]), ".scratch-x-") as scratch:
    (scratch / "index").mkdir()
    print(scratch, flush=True)
    if sys.argv[2] == "wait":
        sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def start(folder: Path, end: str) -> tuple[subprocess.Popen, Path]:
    """Starts a process that makes a scratch folder, and kills itself, with "wait" once its stdin ends."""
    command = [sys.executable, "-c", KILLED, str(folder), end]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


@pytest.mark.parametrize("elsewhere", [False, True])
def test_only_the_scratch_of_dead_processes_is_removed(tmp_path, monkeypatch, elsewhere):
    """That of a process that lives stays, on this machine and, by its lock, on another one; other folders stay too."""
    killed, dead = start(tmp_path, "kill")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    running, live = start(tmp_path, "wait")
    (tmp_path / ".scratch-y-1").mkdir()
    if elsewhere:
        monkeypatch.setattr(process_id, "machine_id", lambda: "01234567")
    try:
        with shared_scratch(tmp_path, ".scratch-x-") as own:
            assert sorted(tmp_path.iterdir()) == sorted([live, own, tmp_path / ".scratch-y-1"])
            assert dead not in (live, own)
            assert (live / "index").is_dir()
    finally:
        running.communicate("")
    with pytest.raises(KeyboardInterrupt), shared_scratch(tmp_path, ".scratch-x-"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [tmp_path / ".scratch-y-1"]


def test_two_scratch_folders_of_one_process_differ(tmp_path):
    """The second leaves the first alone."""
    with shared_scratch(tmp_path, "x-") as first, shared_scratch(tmp_path, "x-") as second:
        assert first != second
        assert first.is_dir()
    assert os.listdir(tmp_path) == []
