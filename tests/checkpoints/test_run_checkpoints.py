"""A run's checkpoints: the newest whole one is found again, whatever became of the process, the disk or the files."""

import dataclasses
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.checkpoints import store
from atlas_jax.checkpoints.run_checkpoints import RunCheckpoints
from atlas_jax.checkpoints.store import ResumeState, Weights
from atlas_jax.errors import UserError
from atlas_jax.models.atlas import AtlasConfig


def at(weights: Weights, step: int) -> tuple[Weights, ResumeState]:
    """Weights and memory that tell their step in every number."""
    params = {path: np.full_like(array, step) for path, array in weights.params.items()}
    moments = {f"mu/{path}": np.full_like(array, -step) for path, array in weights.params.items()}
    return dataclasses.replace(weights, params=params), ResumeState(moments, {"position": step * 64})


def read(folder: Path) -> int:
    """The step of a checkpoint, all of which agrees on it."""
    weights, resume_state = store.load(folder), store.load_resume_state(folder)
    assert resume_state
    assert folder.name == f"step-{weights.step}"
    assert resume_state.about == {"position": weights.step * 64}
    assert all((array == weights.step).all() for array in weights.params.values())
    assert all((array.read() == -weights.step).all() for array in resume_state.arrays.values())
    return weights.step


def flip(folder: Path) -> None:
    """One bit of step 10's position, from 640 to 641."""
    path = folder / "training.json"
    path.write_bytes(path.read_bytes().replace(b"640", b"641"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="session")
def weights(tiny_weights) -> Weights:
    """The retriever alone, which is soon written."""
    params = {path: array for path, array in tiny_weights.params.items() if path.startswith("retriever/")}
    return dataclasses.replace(tiny_weights, params=params, cfg=AtlasConfig(None, tiny_weights.cfg.retriever))


@pytest.fixture(scope="session")
def three(tmp_path_factory, weights) -> Path:
    """A run's folder with steps 2, 4 and 10."""
    folder = tmp_path_factory.mktemp("three") / "checkpoint"
    with RunCheckpoints(folder) as checkpoints:
        assert checkpoints.restore(read) is None
        for step in (2, 4, 10):
            checkpoints.save(step, *at(weights, step))
    return folder


@pytest.fixture
def run(three, tmp_path) -> Path:
    """One to damage."""
    return Path(shutil.copytree(three, tmp_path / "checkpoint", symlinks=True))


def test_the_newest_comes_back(run):
    """By its number, not its name: 10 is after 4; `latest` names it relatively; strangers are left alone."""
    assert names(run) == ["latest", "step-10", "step-2", "step-4"]
    assert os.readlink(run / "latest") == "step-10"
    (run / "step-99.txt").write_text("")
    (run / "step-new").mkdir()
    assert RunCheckpoints(run).restore(read) == (10, run / "step-10")
    assert {"step-99.txt", "step-new"} < {*names(run)}


def test_a_damaged_one_gives_way_to_the_one_before(run, caplog):
    """A flipped bit in the newest and a missing file in the next: both are named with the reason and what is tried."""
    flip(run / "step-10")
    (run / "step-4" / "training.json").unlink()
    assert RunCheckpoints(run).restore(read) == (2, run / "step-2")
    first, second = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert first.startswith("step-10 is damaged, step-4 is tried next: ")
    assert f"{run}/step-10/training.json is not what was saved; " in first
    assert second == (
        f"step-4 is damaged, step-2 is tried next: {run}/step-4/training.json: missing; copy the checkpoint again"
    )


def test_all_damaged(run):
    """The newest is named and why; the run does not begin anew by itself."""
    for step in (2, 4, 10):
        (run / f"step-{step}" / "atlas.json").unlink()
    message = f"{run}: none of its checkpoints can be read; the newest: {run}/step-10/atlas.json: cannot be read"
    with pytest.raises(UserError) as error:
        RunCheckpoints(run).restore(read)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("step", [10, 7])
def test_after_a_fallback_the_run_goes_on(run, weights, step, caplog):
    """A step saved again replaces the damaged one; with `keep`, one that is known as damaged takes no place."""
    flip(run / "step-10")
    with RunCheckpoints(run, keep=2) as checkpoints:
        assert checkpoints.restore(read) == (4, run / "step-4")
        checkpoints.save(step, *at(weights, step))
    assert names(run) == sorted(["latest", "step-4", f"step-{step}"])
    assert RunCheckpoints(run).restore(read) == (step, run / f"step-{step}")


def test_only_the_newest_are_kept(tmp_path, weights):
    """Two of four, and broken ones count for nothing; without `keep` all stay; the one just written always does."""
    with RunCheckpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, *at(weights, step))
        assert checkpoints.wait()
        assert names(tmp_path) == ["latest", "step-2", "step-3"]
        (tmp_path / "step-3" / "atlas.json").unlink()
        checkpoints.save(4, *at(weights, 4))
        assert checkpoints.wait()
        assert names(tmp_path) == ["latest", "step-2", "step-4"]
        checkpoints.save(1, *at(weights, 1))
    assert names(tmp_path) == ["latest", "step-1", "step-2", "step-4"]
    assert os.readlink(tmp_path / "latest") == "step-1"


def test_the_older_one_goes_only_when_the_new_one_is_there(run, weights, monkeypatch):
    """While the new one is written nothing is gone and `latest` names the old one; `save` itself does not wait."""
    writing, goes_on = threading.Event(), threading.Event()
    fsync = store.fsync

    def slow(*paths: Path) -> None:
        writing.set()
        assert goes_on.wait(60)
        fsync(*paths)

    monkeypatch.setattr(store, "fsync", slow)
    with RunCheckpoints(run, keep=1) as checkpoints:
        checkpoints.save(11, *at(weights, 11))
        assert writing.wait(60)
        visible = [name for name in names(run) if name[0] != "."]
        assert visible == ["latest", "step-10", "step-2", "step-4"]
        assert os.readlink(run / "latest") == "step-10"
        goes_on.set()
    assert names(run) == ["latest", "step-11"]
    assert read(run / "latest" / ".." / "step-11") == 11


def test_an_error_of_ours_is_raised(tmp_path, weights):
    """What is no fault of the disk is not passed over: the next call raises it."""
    checkpoints = RunCheckpoints(tmp_path)
    checkpoints.save(1, weights, ResumeState({}, {"position": object()}))
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(2, weights)
    with pytest.raises(TypeError):
        checkpoints.close()
    assert names(tmp_path) == []


def test_what_killed_processes_left_is_swept(run):
    """Drafts go; a checkpoint that was moved aside comes back, unless the new one is in its place."""
    shutil.copytree(run / "step-4", run / ".step-12.0123abcd.draft")
    shutil.copytree(run / "step-4", run / ".step-4.0123abcd.old")
    (run / "step-10").rename(run / ".step-10.0123abcd.old")
    (run / ".latest.0123abcd.draft").symlink_to("step-12")
    (run / ".mine").write_text("")
    assert RunCheckpoints(run).restore(read) == (10, run / "step-10")
    assert names(run) == [".mine", "latest", "step-10", "step-2", "step-4"]


def child(program: str, *arguments: object) -> subprocess.Popen:
    """A process with the names of this file."""
    code = f"from tests.checkpoints.test_run_checkpoints import *\n{program}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},
    )


SAVE_FOREVER = """
folder = Path(sys.argv[1])
checkpoints = RunCheckpoints(folder, keep=2)
step, place = checkpoints.restore(read)
weights = store.load(place)
print(step, flush=True)
while True:
    for again in (False, True):  # the second replaces the first
        checkpoints.save(step + 1, *at(weights, step + 1))
        checkpoints.wait()
    step += 1
    print(step, flush=True)
"""


def test_killed_while_saving(run):
    """SIGKILL at random moments of a process that does nothing but save: a complete step is found, none is lost."""
    rng = random.Random()
    least = 10
    for _ in range(3):
        process = child(SAVE_FOREVER, run)
        assert process.stdout
        for _ in range(2):  # it has begun, and has saved
            line = process.stdout.readline()
            assert line, process.communicate()
            assert int(line) >= least
            least = int(line)
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        reached, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
        least = max(least, *map(int, reached.split()), 0)
        found = RunCheckpoints(run).restore(read)
        assert found
        assert least <= found[0] <= least + 1
        assert [name for name in names(run) if name[0] == "."] == []
        least = found[0]
    assert least >= 13


DISK_FULL = """
import resource
folder = Path(sys.argv[1])
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s", force=True)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with RunCheckpoints(folder, keep=1) as checkpoints:
    step, place = checkpoints.restore(read)
    weights = store.load(place)
    for limit in (20_000, 200, resource.RLIM_INFINITY):
        step += 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        checkpoints.save(step, *at(weights, step))
        succeeded = checkpoints.wait()
        assert (checkpoints.failed is None) == succeeded
        print(succeeded, names(folder), flush=True)
"""


def test_a_full_disk_does_not_stop_the_run(run):
    """Twice it cannot write: the old ones stay, no draft does, the log says so; then it can, and it goes on."""
    process = child(DISK_FULL, run)
    printed, said = process.communicate()
    assert process.returncode == 0, said
    old = ["latest", "step-10", "step-2", "step-4"]
    expected = [
        line
        for step in (11, 12)
        for line in (
            f"ERROR step {step} was not saved: {run}/step-{step}: cannot be written (File too large); free some space "
            "there or choose a folder that can be written; the older checkpoints stay and the run goes on",
            f"False {old}",
        )
    ]
    assert printed.splitlines() == [*expected, f"True {['latest', 'step-13']}"]
    assert "Traceback" not in said  # of Orbax's threads
    assert RunCheckpoints(run).restore(read) == (13, run / "step-13")
