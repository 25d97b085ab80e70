"""A run restores its newest complete checkpoint after a killed process, a full disk or damaged files."""

import dataclasses
import errno
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
from atlas_jax.config.run_weights import is_whole, newest_checkpoint
from atlas_jax.errors import UserError
from atlas_jax.models.atlas import AtlasConfig


def weights_at_step(weights: Weights, step: int) -> tuple[Weights, ResumeState]:
    """Returns weights and a resume state in which every number depends on the step."""
    params = {path: np.full_like(array, step) for path, array in weights.params.items()}
    moments = {f"mu/{path}": np.full_like(array, -step) for path, array in weights.params.items()}
    return dataclasses.replace(weights, params=params), ResumeState(moments, {"position": step * 64})


def read_step(folder: Path) -> int:
    """Returns a checkpoint's step, after checking that all of its contents are those of that step."""
    weights, resume_state = store.load(folder), store.load_resume_state(folder)
    assert resume_state
    assert folder.name == f"step-{weights.step}"
    assert resume_state.metadata == {"position": weights.step * 64}
    assert all((array == weights.step).all() for array in weights.params.values())
    assert all((array.read() == -weights.step).all() for array in resume_state.arrays.values())
    return weights.step


def corrupt_position(folder: Path) -> None:
    """Flips one bit of step 10's position: 640 becomes 641."""
    path = folder / "training.json"
    path.write_bytes(path.read_bytes().replace(b"640", b"641"))


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="session")
def weights(tiny_weights) -> Weights:
    """The retriever's weights only, which are written fast."""
    params = {path: array for path, array in tiny_weights.params.items() if path.startswith("retriever/")}
    return dataclasses.replace(tiny_weights, params=params, cfg=AtlasConfig(None, tiny_weights.cfg.retriever))


@pytest.fixture(scope="session")
def run_with_three_steps(tmp_path_factory, weights) -> Path:
    """Returns a run's folder with checkpoints of the steps 2, 4 and 10."""
    folder = tmp_path_factory.mktemp("three") / "checkpoint"
    with RunCheckpoints(folder) as checkpoints:
        assert checkpoints.restore(read_step) is None
        for step in (2, 4, 10):
            checkpoints.save(step, *weights_at_step(weights, step))
    return folder


@pytest.fixture
def folder(run_with_three_steps, tmp_path) -> Path:
    """Returns a copy of the run's folder, to damage."""
    return Path(shutil.copytree(run_with_three_steps, tmp_path / "checkpoint", symlinks=True))


def test_the_newest_checkpoint_is_restored(folder):
    """The newest is the one with the largest number; `latest` is a relative link to it; other files are ignored."""
    assert file_names(folder) == ["latest", "step-10", "step-2", "step-4"]
    assert os.readlink(folder / "latest") == "step-10"
    (folder / "step-99.txt").write_text("")
    (folder / "step-new").mkdir()
    assert RunCheckpoints(folder).restore(read_step) == (10, folder / "step-10")
    assert {"step-99.txt", "step-new"} < {*file_names(folder)}


def test_damaged_checkpoints_are_skipped(folder, caplog):
    """Checkpoints with a flipped bit and a missing file are skipped; a warning names each, the reason and the next."""
    corrupt_position(folder / "step-10")
    (folder / "step-4" / "training.json").unlink()
    assert RunCheckpoints(folder).restore(read_step) == (2, folder / "step-2")
    first, second = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert first.startswith("step-10 is damaged, step-4 is tried next: ")
    assert f"{folder}/step-10/training.json is not what was saved; " in first
    assert second == (
        f"step-4 is damaged, step-2 is tried next: {folder}/step-4/training.json: missing; copy the checkpoint again"
    )


def test_only_damaged_checkpoints_are_an_error(folder):
    """If all checkpoints are damaged, UserError names the newest, instead of starting from scratch."""
    for step in (2, 4, 10):
        (folder / f"step-{step}" / "atlas.json").unlink()
    message = f"{folder}: none of its checkpoints can be read; the newest: {folder}/step-10/atlas.json: cannot be read"
    with pytest.raises(UserError) as error:
        RunCheckpoints(folder).restore(read_step)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("step", [10, 7])
def test_saving_after_a_fallback_replaces_the_damaged_one(folder, weights, step, caplog):
    """Saving the step again replaces the damaged checkpoint; one that is known as damaged does not count for `keep`."""
    corrupt_position(folder / "step-10")
    with RunCheckpoints(folder, keep=2) as checkpoints:
        assert checkpoints.restore(read_step) == (4, folder / "step-4")
        checkpoints.save(step, *weights_at_step(weights, step))
    assert file_names(folder) == sorted(["latest", "step-4", f"step-{step}"])
    assert RunCheckpoints(folder).restore(read_step) == (step, folder / f"step-{step}")


def test_keep_leaves_the_newest_complete_ones(tmp_path, weights):
    """keep=2 leaves the two newest complete checkpoints, not counting broken ones, and always the one just written."""
    with RunCheckpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, *weights_at_step(weights, step))
        assert checkpoints.wait()
        assert file_names(tmp_path) == ["latest", "step-2", "step-3"]
        (tmp_path / "step-3" / "atlas.json").unlink()
        checkpoints.save(4, *weights_at_step(weights, 4))
        assert checkpoints.wait()
        assert file_names(tmp_path) == ["latest", "step-2", "step-4"]
        checkpoints.save(1, *weights_at_step(weights, 1))
    assert file_names(tmp_path) == ["latest", "step-1", "step-2", "step-4"]
    assert os.readlink(tmp_path / "latest") == "step-1"


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path, weights):
    """keep=1 leaves the newest and the best; a former best goes when it is superseded; a resumed run knows the best."""
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.link_best(None)
        for step, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4)):
            checkpoints.save(step, *weights_at_step(weights, step))
            checkpoints.link_best(best)
            assert checkpoints.wait()
            kept = sorted({f"step-{best}", f"step-{step}"})
            assert file_names(tmp_path) == ["best", "latest", *kept]
            assert os.readlink(tmp_path / "best") == f"step-{best}"
            assert store.load(tmp_path / "best").step == best
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.restore(read_step) == (5, tmp_path / "step-5")
        checkpoints.save(6, *weights_at_step(weights, 6))
        assert checkpoints.wait()
        assert file_names(tmp_path) == ["best", "latest", "step-4", "step-6"]
        checkpoints.link_best(6)
        assert checkpoints.wait()
        assert file_names(tmp_path) == ["best", "latest", "step-6"]
        checkpoints.remove()
    assert file_names(tmp_path) == []


def test_without_keep_a_former_best_goes_unless_it_was_due(tmp_path, weights):
    """Multiples of `every` stay, and the newest, from which the run would go on; with keep=0 there is no link."""
    with RunCheckpoints(tmp_path, every=2) as checkpoints:
        for step in (1, 2, 3, 4, 5, 6, 7):
            checkpoints.save(step, *weights_at_step(weights, step))
            checkpoints.link_best(step)
        assert checkpoints.wait()
        assert file_names(tmp_path) == ["best", "latest", "step-2", "step-4", "step-6", "step-7"]
        checkpoints.link_best(4)  # as with another --select_by
        assert checkpoints.wait()
        assert file_names(tmp_path) == ["best", "latest", "step-2", "step-4", "step-6", "step-7"]
        assert os.readlink(tmp_path / "best") == "step-4"
    with RunCheckpoints(tmp_path, keep=0) as checkpoints:
        checkpoints.link_best(4)
    assert not (tmp_path / "best").is_symlink()


def test_a_best_step_without_checkpoint_has_no_link(folder, weights):
    """A step that could not be saved, or whose checkpoint is damaged, is not linked, and the former best stays."""
    with RunCheckpoints(folder, keep=1) as checkpoints:
        checkpoints.link_best(2)
        checkpoints.link_best(7)
        assert checkpoints.wait()
        assert file_names(folder) == ["latest", "step-10", "step-2", "step-4"]
        corrupt_position(folder / "step-10")
        assert checkpoints.restore(read_step) == (4, folder / "step-4")
        checkpoints.link_best(10)
        assert checkpoints.wait()
        assert not (folder / "best").is_symlink()
        checkpoints.save(11, *weights_at_step(weights, 11))
        assert checkpoints.wait()
        assert file_names(folder) == ["latest", "step-11", "step-2"]


def test_the_best_checkpoint_of_a_finished_run_holds_weights_only(folder, weights):
    """Its moments go, after which it is complete and loads; not if it is among the newest, which a run goes on from."""
    with RunCheckpoints(folder, keep=2) as checkpoints:
        checkpoints.link_best(4)
        checkpoints.remove_best_optimizer()
        assert (folder / "step-4/training").exists()
        checkpoints.save(12, *weights_at_step(weights, 12))
        for _ in range(2):  # again, as after a kill
            checkpoints.remove_best_optimizer()
    assert file_names(folder / "best") == ["atlas.json", "params", "reader", "retriever", "training.json"]
    assert is_whole(folder / "step-4")
    assert all((array == 4).all() for array in store.load(folder / "best").params.values())
    resume_state = store.load_resume_state(folder / "step-4")
    assert resume_state
    assert (resume_state.arrays, resume_state.metadata) == ({}, {"position": 256})
    assert (folder / "step-12/training").exists()


def test_old_checkpoints_stay_until_the_new_one_is_complete(folder, weights, monkeypatch):
    """While a checkpoint is being written, no old one is removed and `latest` stays; `save` itself returns at once."""
    writing, may_finish = threading.Event(), threading.Event()
    fsync = store.fsync

    def slow_fsync(*paths: Path) -> None:
        writing.set()
        assert may_finish.wait(60)
        fsync(*paths)

    monkeypatch.setattr(store, "fsync", slow_fsync)
    with RunCheckpoints(folder, keep=1) as checkpoints:
        checkpoints.save(11, *weights_at_step(weights, 11))
        assert writing.wait(60)
        visible = [name for name in file_names(folder) if name[0] != "."]
        assert visible == ["latest", "step-10", "step-2", "step-4"]
        assert os.readlink(folder / "latest") == "step-10"
        may_finish.set()
    assert file_names(folder) == ["latest", "step-11"]
    assert read_step(folder / "latest" / ".." / "step-11") == 11


def test_a_programming_error_is_raised_by_the_next_call(tmp_path, weights):
    """An error that is no failure to write is raised by the next call of `save` or `close`."""
    checkpoints = RunCheckpoints(tmp_path)
    checkpoints.save(1, weights, ResumeState({}, {"position": object()}))
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(2, weights)
    with pytest.raises(TypeError):
        checkpoints.close()
    assert file_names(tmp_path) == []


def test_leftovers_of_killed_saves_are_removed(folder):
    """Drafts are removed; a checkpoint that was renamed for its replacement is renamed back if there is none."""
    shutil.copytree(folder / "step-4", folder / ".step-12.0123abcd.draft")
    shutil.copytree(folder / "step-4", folder / ".step-4.0123abcd.old")
    (folder / "step-10").rename(folder / ".step-10.0123abcd.old")
    for name in ("latest", "best"):
        (folder / f".{name}.0123abcd.draft").symlink_to("step-12")
    (folder / ".mine").write_text("")
    assert RunCheckpoints(folder).restore(read_step) == (10, folder / "step-10")
    assert file_names(folder) == [".mine", "latest", "step-10", "step-2", "step-4"]


def start_process(program: str, *arguments: object) -> subprocess.Popen:
    """Starts a Python process that runs `program` with this module's names."""
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
step, place = checkpoints.restore(read_step)
weights = store.load(place)
print(step, flush=True)
while True:
    for again in (False, True):  # the second replaces the first
        checkpoints.save(step + 1, *weights_at_step(weights, step + 1))
        checkpoints.wait()
    step += 1
    print(step, flush=True)
"""


def test_a_killed_save_loses_no_checkpoint(folder):
    """After SIGKILL at random moments of a process that only saves, the last complete step is restored."""
    rng = random.Random()
    min_step = 10
    for _ in range(3):
        process = start_process(SAVE_FOREVER, folder)
        assert process.stdout
        for _ in range(2):  # the restored step, then the first saved one
            line = process.stdout.readline()
            assert line, process.communicate()
            assert int(line) >= min_step
            min_step = int(line)
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        stdout, stderr = process.communicate()
        assert process.returncode == -signal.SIGKILL, stderr
        min_step = max(min_step, *map(int, stdout.split()), 0)
        restored = RunCheckpoints(folder).restore(read_step)
        assert restored
        assert min_step <= restored[0] <= min_step + 1
        assert [name for name in file_names(folder) if name[0] == "."] == []
        min_step = restored[0]
    assert min_step >= 13


DISK_FULL = """
import resource
folder = Path(sys.argv[1])
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s", force=True)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with RunCheckpoints(folder, keep=1) as checkpoints:
    step, place = checkpoints.restore(read_step)
    weights = store.load(place)
    for limit in (20_000, 200, resource.RLIM_INFINITY):
        step += 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        checkpoints.save(step, *weights_at_step(weights, step))
        succeeded = checkpoints.wait()
        assert (checkpoints.save_error is None) == succeeded
        print(succeeded, file_names(folder), flush=True)
"""


def test_a_full_disk_keeps_the_older_checkpoints(folder):
    """After two failed saves, which are logged, the old checkpoints stay and no draft does; the third save succeeds."""
    process = start_process(DISK_FULL, folder)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    old_names = ["latest", "step-10", "step-2", "step-4"]
    expected = [
        line
        for step in (11, 12)
        for line in (
            f"ERROR step {step} was not saved: {folder}/step-{step}: cannot be written (File too large); "
            "free some space there or choose a folder that can be written; "
            "the older checkpoints stay and the run goes on",
            f"False {old_names}",
        )
    ]
    assert stdout.splitlines() == [*expected, f"True {['latest', 'step-13']}"]
    assert "Traceback" not in stderr  # no traceback of Orbax's threads
    assert RunCheckpoints(folder).restore(read_step) == (13, folder / "step-13")


def test_without_symbolic_links_latest_is_a_small_file(tmp_path, weights, monkeypatch, caplog):
    """`latest` and `best` hold a checkpoint's name, a resumed run knows the best by it, and one warning says so."""

    def refuse(source: object, target: object, *_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        for step, best in ((1, 1), (2, 1), (3, 1)):
            checkpoints.save(step, *weights_at_step(weights, step))
            checkpoints.link_best(best)
    assert file_names(tmp_path) == ["best", "latest", "step-1", "step-3"]
    assert (tmp_path / "latest").read_text() == "step-3\n"
    assert newest_checkpoint(tmp_path) == tmp_path / "step-3"
    assert caplog.text.count("no symbolic links there (Operation not permitted)") == 1
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(4, *weights_at_step(weights, 4))
        assert checkpoints.wait()
        assert file_names(tmp_path) == ["best", "latest", "step-1", "step-4"]
        checkpoints.remove()
    assert file_names(tmp_path) == []


def test_copies_in_place_of_links_become_links_again(folder, weights):
    """After `cp -rL`: the copy of a step that is there goes, one of another step gets its name; other folders stay."""
    (folder / "best").symlink_to("step-2")
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "step-2")
    with RunCheckpoints(copy) as checkpoints:
        assert file_names(copy) == ["best", "latest", "step-10", "step-2", "step-4"]
        assert [os.readlink(copy / name) for name in ("latest", "best")] == ["step-10", "step-2"]
        assert checkpoints.restore(read_step) == (10, copy / "step-10")
        checkpoints.save(11, *weights_at_step(weights, 11))
        assert checkpoints.wait()
        assert os.readlink(copy / "latest") == "step-11"
    (copy / "latest").unlink()
    (copy / "latest").mkdir()
    (copy / "latest/own").touch()
    with RunCheckpoints(copy) as checkpoints:
        checkpoints.save(12, *weights_at_step(weights, 12))
        assert checkpoints.wait()
        checkpoints.link_best(None)
        checkpoints.remove()
    assert file_names(copy) == ["latest"]
    assert (copy / "latest/own").exists()
