"""The best step of a run: chosen by --select_by among the evaluations that the run has made."""

import dataclasses
import json
import math

import pytest

from atlas_jax.commands.main import main
from atlas_jax.config import RunConfig, TaskConfig
from atlas_jax.data.jsonl import JsonlRows
from atlas_jax.errors import UserError
from atlas_jax.tasks import make_task
from atlas_jax.training.best_step import BestStep, select_criterion

FILES = ("data/dev.jsonl", "data/test.jsonl", "other/hard.json")
QA = ("exact_match", "f1", "eval_loss")


@pytest.mark.parametrize(
    ("task", "metric"), [("multiple_choice", "debiased_accuracy"), ("qa", "exact_match"), ("base", "accuracy")]
)
def test_the_first_file_and_the_main_metric_of_the_task_are_the_default(task, metric):
    """Without --eval_data no file is named, and that is no error."""
    metrics = make_task(TaskConfig(task)).metrics
    assert select_criterion(RunConfig(eval_data=FILES), metrics) == ("dev.jsonl", metric)
    assert select_criterion(RunConfig(), metrics) == ("", metric)


@pytest.mark.parametrize("file", ["data/test.jsonl", "test.jsonl", "test"])
def test_a_file_is_named_by_path_name_or_stem(file):
    """All three name the same file; the metric is that after the last colon."""
    assert select_criterion(RunConfig(eval_data=FILES, select_by=f"{file}:f1"), QA) == ("test.jsonl", "f1")


@pytest.mark.parametrize("text", ["test", "test:", "tset:f1", "test:accuracy", "f1", "test.jsonl:f1:f1", "same:f1"])
def test_a_wrong_selection_is_refused_with_the_choices(text):
    """No such file, no such metric, or a stem of two files: one line names the value and all choices."""
    with pytest.raises(UserError) as error:
        select_criterion(RunConfig(eval_data=(*FILES, "same.jsonl", "same.json"), select_by=text), QA)
    names = "dev.jsonl, test.jsonl, hard.json, same.jsonl, same.json"
    choices = f"FILE one of {names}; METRIC one of exact_match, f1, eval_loss"
    assert str(error.value) == f"--select_by {text}: expected FILE:METRIC, {choices}"
    with pytest.raises(UserError, match="FILE one of --eval_data, which is missing"):
        select_criterion(RunConfig(select_by="dev:f1"), QA)


def test_atlas_train_refuses_a_wrong_selection_before_it_reads_weights(tmp_path, flags, capsys):
    """Exit status 2 and one line; nothing is restored."""
    rows = flags[flags.index("--train_data") + 1]
    selection = ["--eval_data", rows, "--select_by", "qa:accuracy"]
    assert main(["train", "--checkpoint_dir", str(tmp_path), *flags, *selection]) == 2
    line = "atlas: --select_by qa:accuracy: expected FILE:METRIC, FILE one of qa.jsonl; METRIC one of exact_match, f1, "
    assert capsys.readouterr().err.splitlines()[-1] == f"{line}eval_loss"
    assert "parameters" not in (tmp_path / "experiment_name/run.log").read_text()


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("f1", {2: 10.0, 4: 30.0, 6: 20.0}, 4),
        ("eval_loss", {2: 1.0, 4: 3.0, 6: 0.5}, 6),  # less is better
        ("f1", {2: 10.0, 10: 30.0, 4: 30.0}, 4),  # equal scores: the earlier step, by number
        ("eval_loss", {4: 1.0, 2: 1.0}, 2),
        ("f1", {2: math.nan, 4: 0.0, 6: math.nan}, 4),
        ("eval_loss", {2: math.inf, 4: 7.0, 6: -math.inf}, 4),
        ("f1", {2: math.nan}, None),
        ("f1", {}, None),
    ],
)
def test_the_best_step_of_some_scores(tmp_path, metric, values, best):
    """More or less is better as the metric has it; best.json names step, score and all scores of the step."""
    tracker = BestStep(tmp_path, RunConfig(eval_data=FILES, select_by=f"dev:{metric}"), QA)
    for step, value in values.items():
        tracker.add(step, "dev.jsonl", {"exact_match": math.nan, metric: value})
        tracker.add(step, "test.jsonl", {metric: float(-step)})
    tracker.write()
    assert tracker.step == best
    path = tmp_path / "best.json"
    if best is None:
        assert not path.exists()
        return
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "step": best,
        "file": "dev.jsonl",
        "metric": metric,
        "value": values[best],
        "scores": {"dev.jsonl": {"exact_match": None, metric: values[best]}, "test.jsonl": {metric: float(-best)}},
    }


@pytest.fixture
def folder(tmp_path):
    """The folder of a run that evaluates every 2 steps, with scores of steps 1 to 8; the f1 of step s is s."""
    for step in range(1, 9):
        scores = {"exact_match": 0.0, "f1": float(step), "eval_loss": 1.0, "examples": 3, "prompts": 3}
        (tmp_path / f"dev-step-{step}.metrics.json").write_text(json.dumps(scores))
    (tmp_path / "dev.jsonl").write_text("{}\n")
    (tmp_path / "best.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("step", "saved", "best"),
    [
        (0, {}, None),  # a new run in the folder of another
        (6, {2: 9.0, 4: 3.0}, 2),  # step 6 was evaluated after its checkpoint was saved
        (6, {2: 1.0, 4: 3.0}, 6),
        (6, {2: 1.0, 4: 3.0, 6: 2.0}, 4),  # before: the checkpoint's own scores count
        (7, {}, 6),  # a checkpoint of an older version: steps 1, 3, 5 and 7 were not evaluated by this run
        (8, {2: 1.0}, 8),
    ],
)
def test_a_resumed_run_knows_the_evaluations_up_to_its_step(folder, tiny_config, step, saved, best):
    """Those of its checkpoint, else those of the folder; later ones, of a run that went further, do not count."""
    run = dataclasses.replace(tiny_config.run, eval_data=(str(folder / "dev.jsonl"),), eval_freq=2, select_by="dev:f1")
    tracker = BestStep(folder, run, QA)
    scores = {str(number): {"dev.jsonl": {"f1": value}} for number, value in saved.items()}
    eval_rows = {"dev": JsonlRows(str(folder / "dev.jsonl"))}
    tracker.restore(dataclasses.replace(tiny_config, run=run), step, json.loads(json.dumps(scores)), eval_rows)
    assert tracker.step == best
    assert (folder / "best.json").exists() == (best is not None)
    if best is not None:
        assert json.loads((folder / "best.json").read_text())["step"] == best


@pytest.mark.parametrize(
    ("scores", "line"),
    [
        ({"f1": 12.34567}, "best step: 4, with 12.346 f1 of dev.jsonl"),
        ({"f1": math.nan}, "no best step: no evaluation of dev.jsonl has a finite f1"),
    ],
)
def test_the_log_names_the_best_step(tmp_path, caplog, scores, line):
    """One line, also if there is no best step; none without --eval_data."""
    caplog.set_level("INFO", logger="atlas_jax")
    tracker = BestStep(tmp_path, RunConfig(eval_data=FILES, select_by="dev:f1"), QA)
    tracker.add(4, "dev.jsonl", scores)
    tracker.log()
    BestStep(tmp_path, RunConfig(), QA).log()
    assert caplog.messages == [line]
