"""The files that `atlas evaluate` writes, and inputs that must not change them."""

import json
from pathlib import Path

import numpy as np

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
