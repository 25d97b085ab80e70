"""A run that was stopped ends like one that was not: parameters bit for bit, and the metrics."""

import json
import random
import shutil
import signal

import pytest

from tests.training import killing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that nobody stopped, its compiled programs, and the seconds that it takes once they are there."""
    folder = killing.compile_for(tmp_path_factory.mktemp("runs"))
    killing.finish("first", folder)
    seconds = killing.finish("whole", folder)
    assert killing.same(folder / "first", folder / "whole")
    return folder, seconds


def test_where_the_time_goes(folder):
    """A line for three steps: saves before each odd step, evaluations before 6 and 11, new indexes before 5 and 9."""
    folder, _ = folder
    rows = [json.loads(line) for line in (folder / "whole/metrics.jsonl").read_text().splitlines()]
    for part, steps in {"save": [3, 6, 9, 12], "evaluate": [6, 12], "refresh_index": [6, 9]}.items():
        assert [row["step"] for row in rows if f"runtime/{part}" in row] == steps, part
    for row in rows:
        parts = [row[f"runtime/{part}"] for part in ("retrieve", "batch", "device")]
        assert min(parts) > 0
        assert sum(parts) < row["runtime/train_step"]


@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGTERM, signal.SIGUSR1]], ids=["kill", "stop"])
def test_a_stopped_run_ends_like_one_that_was_not(folder, signals):
    """Twice, at random moments: loading, compiling, learning, refreshing, evaluating, saving."""
    folder, seconds = folder
    name = "-".join(one.name for one in signals)
    assert killing.killed(name, folder, 2, 0.8 * seconds, random.Random(len(signals)), signals)
    assert killing.same(folder / "whole", folder / name)


def test_a_bit_of_the_index_s_encoder_is_flipped(folder):
    """The newest checkpoint is passed over for the one before, from which the run ends as it did."""
    folder, _ = folder
    run = shutil.copytree(folder / "whole", folder / "flipped", symlinks=True)
    newest = (run / "checkpoint/latest").resolve()
    chunk = max((newest / "training/index/retriever/encoder/words/embedding").glob("0*"))
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    killing.finish("flipped", folder)
    assert f"{newest.name} is damaged" in (folder / "flipped.log").read_text()
    assert killing.same(folder / "whole", folder / "flipped")


def test_another_seed_ends_elsewhere(folder):
    """The counter-case: what `same` compares depends on the run."""
    folder, _ = folder
    killing.finish("other", folder, "--seed", "1")
    assert not killing.same(folder / "whole", folder / "other")


def test_a_finished_run_started_again_does_nothing(folder):
    """The same command: no step, no change, nothing embedded, but for a last evaluation that is missing."""
    folder, _ = folder
    log, scores = folder / "whole.log", folder / "whole" / f"eval-step-{killing.STEPS}.metrics.json"
    before, found = killing.outcome(folder / "whole")[1], json.loads(scores.read_text())
    for missing in (False, True):
        if missing:
            scores.unlink()
        log.unlink()
        killing.finish("whole", folder)
        assert killing.outcome(folder / "whole")[1] == before
        assert f"step {killing.STEPS} of {killing.STEPS}: the run is finished" in log.read_text()
        assert ("embedding" in log.read_text()) == missing
    again = json.loads(scores.read_text())
    assert all(again[name] == found[name] for name in ("exact_match", "f1", "eval_loss"))


def test_another_learning_rate_is_another_run(folder):
    """Refused in one line that names the flag; a flag that does not enter the training is not."""
    folder, _ = folder
    (process,) = killing.start("whole", folder, "--lr", "5e-4")
    assert process.wait(120) == 2
    said = (folder / "whole.log").read_text().splitlines()[-1]
    assert "--lr 0.0005 (was 0.001)" in said
    killing.finish("whole", folder, "--log_freq", "1")
