"""One process at a time writes in a folder, and nobody is refused because the file system has no locks."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from atlas_jax.errors import UserError
from atlas_jax.storage.file_lock import sole_writer
from atlas_jax.storage.process_id import is_alive, machine_id, process_id


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without flock."""

    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


def ended_process() -> str:
    """The `process_id` of a process of this machine that has ended."""
    code = "from atlas_jax.storage.process_id import process_id; print(process_id())"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, check=True)
    return done.stdout.decode().strip()


def test_a_second_writer_is_refused_until_the_first_has_left(tmp_path):
    """The refusal is the caller's; an error in the block frees the folder as well."""
    with sole_writer(tmp_path, "taken"), pytest.raises(UserError, match="taken"), sole_writer(tmp_path, "taken"):
        pytest.fail("two writers")
    with pytest.raises(ValueError, match="x"), sole_writer(tmp_path, "taken"):
        raise ValueError("x")
    with sole_writer(tmp_path, "taken"):
        pass


@pytest.mark.usefixtures("no_locks")
def test_without_locks_only_a_live_process_of_this_machine_is_refused(tmp_path, caplog):
    """One warning; the folder is free after its process has ended, and if the other is on a machine unknown here."""
    with sole_writer(tmp_path, "taken"):
        assert (tmp_path / ".lock").read_text() == process_id()
    for other in (ended_process(), "01234567-1", ""):
        (tmp_path / ".lock").write_text(other)
        with sole_writer(tmp_path, "taken"):
            pass
    (tmp_path / ".lock").write_text(f"{machine_id()}-{os.getppid()}")
    with pytest.raises(UserError, match="taken"), sole_writer(tmp_path, "taken"):
        pytest.fail("two writers")
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        f"{tmp_path}: no locks on this file system"
    ]


def test_liveness_is_known_of_processes_of_this_machine():
    """This process lives, one that has ended does not; of another machine nothing is known."""
    assert is_alive(process_id()) is True
    assert is_alive(ended_process()) is False
    assert is_alive(f"01234567-{os.getpid()}") is None
    assert is_alive("") is None
