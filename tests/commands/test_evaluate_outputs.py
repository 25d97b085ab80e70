"""The files that `atlas evaluate` writes, and inputs that must not change them."""

import json
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.commands.main import main
from tests.commands.sample_evaluation import ROWS, evaluate_argv, to_jsonl, write_file


def predictions(folder: Path) -> list[dict]:
    text = (folder / "runs" / "run" / "eval-step-1.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_writes_its_files_and_no_others(finished_run):
    """Predictions, scores, the log, the resolved flags and the index are there; no temporary file or folder is."""
    assert sorted(path.name for path in (finished_run / "runs" / "run").iterdir()) == [
        *("config.json", "eval-step-1.jsonl", "eval-step-1.metrics.json", "run.log"),
    ]
    assert sorted(path.name for path in (finished_run / "index").iterdir()) == [
        "embeddings.npy",
        "index.json",
        "passages",
    ]
    assert len(predictions(finished_run)) == 2
    assert json.loads((finished_run / "runs/run/config.json").read_text())["n_context"] == 2
    assert "eval.jsonl: 2 rows at" in (finished_run / "runs/run/run.log").read_text()
    assert {path.name for path in finished_run.iterdir()} == {"runs", "index", "eval.jsonl", "passages.jsonl"}


def test_bom_crlf_and_blank_lines_do_not_change_predictions(finished_run, tmp_path):
    """Rows with a byte order mark, CRLF and blank lines, read with the saved index, have the predictions of the run."""
    messy = b"\xef\xbb\xbf\r\n" + to_jsonl(ROWS[:1], "\r\n") + b"\r\n  \r\n" + to_jsonl(ROWS[1:], "\r\n").rstrip()
    argv = evaluate_argv(
        tmp_path, eval_data=write_file(tmp_path / "eval.jsonl", messy), load_index_path=finished_run / "index"
    )
    assert messy != (finished_run / "eval.jsonl").read_bytes()
    assert main(argv) == 0
    assert predictions(tmp_path) == predictions(finished_run)


def test_options_of_equal_text_keep_their_own_probability(finished_run):
    """B and D have the same text; D's probability is the mean over the permutations of that of D's place in each."""
    row = predictions(finished_run)[1]
    assert row["metadata"]["options"] == ROWS[1]["options"]
    assert row["metadata"]["answer"] == "D"
    permutations = row["permutations"]
    assert [permutation["metadata"]["answer"] for permutation in permutations] == ["D", "A", "B", "C"]
    assert set(row["choice_probs"]) == set("ABCD")
    probabilities = []
    for permutation in permutations:
        logits = permutation["choice_logits"]
        weights = {letter: np.exp(logits[letter] - max(logits.values())) for letter in "ABCD"}
        probabilities.append(weights[permutation["metadata"]["answer"]] / sum(weights.values()))
    np.testing.assert_allclose(row["choice_probs"]["D"], np.mean(probabilities), rtol=1e-6)
    assert row["choice_probs"]["B"] != row["choice_probs"]["D"]


def test_rows_without_an_answer_are_read_but_in_no_score(finished_run, tmp_path, caplog):
    """Their predictions are written, the scores are those of the other rows, and how many they are is in the log."""
    questions = [ROWS[0], {name: value for name, value in ROWS[1].items() if name != "answer"}]
    index = finished_run / "index"
    for name, rows in (("both", questions), ("first", ROWS[:1]), ("second", questions[1:])):
        data = write_file(tmp_path / "eval.jsonl", to_jsonl(rows))
        assert main(evaluate_argv(tmp_path, name=name, eval_data=data, load_index_path=index)) == 0
    both, first, second = (
        json.loads((tmp_path / "runs" / name / "eval-step-1.metrics.json").read_text())
        for name in ("both", "first", "second")
    )
    for metric in ("debiased_accuracy", "accuracy"):
        assert both[metric] == first[metric]
    assert both["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)
    assert (both["examples"], both["unscored"], first["unscored"], second["unscored"]) == (2, 1, 0, 1)
    assert "eval_loss" not in second
    assert "eval.jsonl: 1 of 2 rows have no answer and are in no score" in caplog.text
    lines = (tmp_path / "runs/both/eval-step-1.jsonl").read_text().splitlines()
    generations = [json.loads(line)["generation"] for line in lines]
    assert generations == [row["generation"] for row in predictions(finished_run)]
    assert json.loads(lines[1])["answers"] == []


def test_retrieve_only_writes_a_line_for_each_order_of_the_options(finished_run, tmp_path):
    """As the reference: the passages of each prompt that an evaluation reads, in its order, with its metadata."""
    flags = {"retrieve_only": True, "load_index_path": finished_run / "index"}
    assert main(evaluate_argv(tmp_path, **flags)) == 0
    found, read = predictions(tmp_path), [row for p in predictions(finished_run) for row in p["permutations"]]
    assert len(found) == 2 * 4
    for line, permutation in zip(found, read, strict=True):
        assert line == {name: permutation[name] for name in ("query", "answers", "passages", "metadata")}
    assert len({line["query"] for line in found}) == 8
