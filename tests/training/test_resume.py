"""A run that was stopped and resumed ends with the parameters, bit for bit, and the metrics of one that was not."""

import dataclasses
import json
import random
import re
import shutil
import signal

import pytest

from atlas_jax.checkpoints import store
from atlas_jax.checkpoints.run_checkpoints import DifferentRun
from atlas_jax.config import resume_rules, to_dict
from atlas_jax.training.resume import RunStart, check_same_run
from atlas_jax.training.step import Averaging
from tests.training import killing

MODEL, LATEST = ["--model_path"], "checkpoint/latest"

pytestmark = pytest.mark.usefixtures("quick_compiler_in_subprocesses")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of an uninterrupted run with its compilation cache, and the seconds of a run with a warm cache."""
    folder = killing.prepare(tmp_path_factory.mktemp("runs"))
    killing.finish("first", folder)
    seconds = killing.finish("whole", folder)
    assert killing.same(folder / "first", folder / "whole")
    return folder, seconds


def test_metrics_hold_the_seconds_of_each_part(folder):
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
def test_a_stopped_run_ends_like_an_uninterrupted_one(folder, signals):
    """Stopped twice at random moments: while loading, training, refreshing, evaluating or saving."""
    folder, seconds = folder
    name = "-".join(signum.name for signum in signals)
    assert killing.run_with_kills(name, folder, 2, 0.8 * seconds, random.Random(len(signals)), signals)
    assert killing.same(folder / "whole", folder / name)


def test_a_flipped_bit_makes_the_run_resume_from_an_older_checkpoint(folder):
    """The damaged newest checkpoint is skipped for the one before, and the run ends as it did."""
    folder, _ = folder
    run = shutil.copytree(folder / "whole", folder / "flipped", symlinks=True)
    newest = (run / "checkpoint/latest").resolve()
    chunk = max((newest / "training/index/retriever/encoder/words/embedding").glob("0*"))
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    killing.finish("flipped", folder)
    assert f"{newest.name} is damaged" in (folder / "flipped.log").read_text()
    assert killing.same(folder / "whole", folder / "flipped")


def test_the_comparison_of_runs_notices_differences(folder):
    """The counter-case: parameters of another step differ, and so do runs with another loss in metrics.jsonl."""
    folder, _ = folder
    params, earlier = (store.load(folder / f"whole/checkpoint/step-{step}").params for step in (killing.STEPS, 10))
    assert any(array.tobytes() != earlier[path].tobytes() for path, array in params.items())
    run = shutil.copytree(folder / "whole", folder / "changed", symlinks=True)
    assert killing.same(folder / "whole", run)
    lines = (run / "metrics.jsonl").read_text()
    loss = json.loads(lines.splitlines()[0])["loss/reader_loss"]
    (run / "metrics.jsonl").write_text(lines.replace(str(loss), str(loss + 1e-6)))
    assert not killing.same(folder / "whole", run)


def test_an_evaluation_of_a_run_has_its_step_and_leaves_its_flags(folder):
    """`atlas evaluate --name RUN` writes scores of the last step; config.json stays that of the training.

    A resume that is refused leaves it as well. The counter-case: with --model_path the same scores are those of step 1.
    """
    folder, _ = folder
    run = shutil.copytree(folder / "whole", folder / "evaluated", symlinks=True)
    flags, scores = (run / "config.json").read_bytes(), run / f"eval-step-{killing.STEPS}.metrics.json"
    scores.unlink()
    train = killing.command("evaluated", folder)
    evaluate = [{"train": "evaluate", str(killing.GOLDEN / "checkpoint_initial"): "none"}.get(x, x) for x in train]
    for command, status in ((evaluate, 0), ([*train, "--lr", "0.5"], 2), ([*evaluate, *MODEL, str(run / LATEST)], 0)):
        [process] = killing.start_processes(command, folder / "evaluated.log", 1)
        assert process.wait() == status
    assert (run / "config.json").read_bytes() == flags
    assert json.loads(flags)["loss_group"] == 5
    assert json.loads((run / "config-evaluate.json").read_text())["n_context"] == 2
    found, zero_shot = (json.loads(path.read_text()) for path in (scores, run / "eval-step-1.metrics.json"))
    assert all(found[name] == zero_shot[name] for name in ("exact_match", "f1", "eval_loss"))


def test_a_finished_run_that_is_started_again_only_evaluates_what_is_missing(folder):
    """No step, no change and no embedding; if the last evaluation is missing, it alone is repeated."""
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
    repeated = json.loads(scores.read_text())
    assert all(repeated[name] == found[name] for name in ("exact_match", "f1", "eval_loss"))


def array_bytes(folder) -> int:
    """Bytes of the array files of all checkpoints."""
    trees = [path for tree in ("params", "training") for path in folder.glob(f"step-*/{tree}/**/*")]
    return sum(path.stat().st_size for path in trees if path.is_file())


def files_of(checkpoints) -> dict[str, bool]:
    """The names in a run's checkpoint folder, and which of them hold moments."""
    return {path.name: store.has_optimizer(path) for path in checkpoints.iterdir()}


def test_the_best_step_is_kept_beside_the_newest(folder):
    """With --keep 1 and equal scores everywhere, the first evaluated step stays beside the last; the log names it.

    The checkpoints take what the run said. Without --save_optimizer the best holds weights only once the run has
    finished. Nothing else of the run changes. The counter-case: with --keep 0 nothing stays but best.json.
    """
    folder, _ = folder
    run, log = folder / "best", folder / "best.log"
    flags = ("--select_by", f"{folder / 'eval.jsonl'}:f1", "--keep")
    for save_optimizer in (["--save_optimizer"], []):
        killing.finish("best", folder, *flags, "1", *save_optimizer)
        best, last = bool(save_optimizer), True
        assert files_of(run / "checkpoint") == {"best": best, "step-5": best, "latest": last, "step-12": last}
        assert log.read_text().splitlines()[-1].endswith("best step: 5, with 0.000 f1 of eval.jsonl")
        if save_optimizer:
            said = float(re.search(r"and ([\d.]+) MB once the run has finished", log.read_text())[1])
            assert said < array_bytes(run / "checkpoint") / 1e6 < 1.05 * said  # and the arrays' metadata
    assert killing.outcome(run)[1] == killing.outcome(folder / "whole")[1]
    killing.finish("none", folder, *flags, "0")
    assert not list((folder / "none/checkpoint").iterdir())
    assert (folder / "none/best.json").read_text() == (run / "best.json").read_text()
    assert "0.0 MB once the run has finished" in (folder / "none.log").read_text()


def test_another_select_by_selects_another_step(folder):
    """A finished run that is started again compares its evaluations by it; a step without checkpoint has no link."""
    folder, _ = folder
    run = shutil.copytree(folder / "whole", folder / "selected", symlinks=True)
    killing.finish("selected", folder, "--select_by", "eval:exact_match")
    best = json.loads((run / "best.json").read_text())
    assert (best["step"], best["metric"], best["value"]) == (5, "exact_match", 0.0)
    assert not (run / "checkpoint/best").is_symlink()
    assert not (run / "checkpoint/step-5").exists()  # superseded by step 10
    killing.finish("selected", folder)
    assert killing.same(folder / "whole", run)


def test_an_older_checkpoint_does_not_know_later_evaluations(folder):
    """A run that goes on from step 4 or 6, as if later checkpoints were lost, ends like the uninterrupted one."""
    folder, _ = folder
    run = shutil.copytree(folder / "whole", folder / "older", symlinks=True)
    for step in (8, 10, 12):
        shutil.rmtree(run / f"checkpoint/step-{step}")
    (run / "checkpoint/latest").unlink()
    scores = run / "eval-step-10.metrics.json"
    scores.write_text(scores.read_text().replace('"eval_loss": ', '"eval_loss": -'))  # would be the best
    killing.finish("older", folder)
    assert killing.same(folder / "whole", run)


RULES = [
    ({"lr": 5e-4}, "a run with other flags: --lr 0.0005 (was 0.0001)"),
    ({"seed": 1, "lr": 5e-4}, "--seed 1 (was 0)"),
    ({"total_steps": 2000}, None),
    ({"log_freq": 1, "mesh": "data=1", "eval_data": ("other.jsonl",)}, None),
]


@pytest.mark.parametrize(("changes", "refusal"), RULES)
def test_flags_may_change_on_resume_as_config_says(tiny_config, tiny_weights, tmp_path, caplog, changes, refusal):
    """A flag that affects what is learnt is refused by name; `warned` flags are logged, `changeable` ones are not."""
    metadata = json.loads(json.dumps({"progress": {}, "flags": to_dict(tiny_config), "queries": 4}))
    start = RunStart(tiny_weights, store.ResumeState({}, metadata))
    config = tiny_config
    for group in ("run", "optim"):
        names = {field.name for field in dataclasses.fields(getattr(config, group))}
        changed = dataclasses.replace(getattr(config, group), **{k: v for k, v in changes.items() if k in names})
        config = dataclasses.replace(config, **{group: changed})
    if refusal:
        with pytest.raises(DifferentRun) as error:
            check_same_run(start, config, tmp_path, 4)
        assert refusal in str(error.value)
    else:
        check_same_run(start, config, tmp_path, 4)
    warned = [flag for flag in changes if resume_rules()[flag] == "warned"]
    assert [record.args[0] for record in caplog.records] == warned
    with pytest.raises(DifferentRun, match="a run of 4 queries a step, not 5"):
        check_same_run(start, tiny_config, tmp_path, 5)
    metadata["flags"]["of_a_later_version"] = 1
    with pytest.raises(DifferentRun, match="another version, which has --of_a_later_version"):
        check_same_run(start, tiny_config, tmp_path, 4)


@pytest.mark.parametrize(
    ("saved", "flags", "expected"),
    [
        ({"loss_group": 1, "separate_clip": True}, {}, Averaging(1, True)),
        ({"loss_group": 1, "separate_clip": True}, {"loss_group": 1}, Averaging(1, True)),
        ({"loss_group": 1, "separate_clip": True}, {"loss_group": 2}, "--loss_group 2 (was 1)"),
        ({}, {}, Averaging(4, False)),  # an older version's run of four questions a step
        ({}, {"loss_group": 1}, "--loss_group 1 (was 4)"),
    ],
)
def test_a_resumed_run_averages_and_clips_as_it_did(tiny_config, tiny_weights, tmp_path, saved, flags, expected):
    """On other devices too, with another --per_gpu_batch_size; another --loss_group is refused."""
    config = dataclasses.replace(
        tiny_config,
        optim=dataclasses.replace(tiny_config.optim, shard_optim=True, **flags),
        run=dataclasses.replace(tiny_config.run, per_gpu_batch_size=2),
    )
    metadata = json.loads(json.dumps({"progress": {}, "flags": to_dict(config), "queries": 4} | saved))
    start = RunStart(tiny_weights, store.ResumeState({}, metadata))
    if isinstance(expected, str):
        with pytest.raises(DifferentRun, match=re.escape(expected)):
            check_same_run(start, config, tmp_path, 4)
    else:
        check_same_run(start, config, tmp_path, 4)
        assert start.averaging(config, 4) == expected
    assert RunStart(tiny_weights, None).averaging(config, 4) == Averaging(flags.get("loss_group", 2), True)
