"""What a run leaves, and what does not disturb it."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.commands.main import main
from tests.commands.sample_run import ROWS, command, lines, put


def predictions(folder: Path) -> list[dict]:
    text = (folder / "runs" / "run" / "eval-step-1.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_leaves_its_files_and_nothing_else(done):
    """Predictions, scores, the log, the resolved flags and the index; no draft, no scratch folder."""
    assert sorted(path.name for path in (done / "runs" / "run").iterdir()) == [
        *("config.json", "eval-step-1.jsonl", "eval-step-1.metrics.json", "run.log"),
    ]
    assert sorted(path.name for path in (done / "index").iterdir()) == ["embeddings.npy", "index.json", "passages"]
    assert len(predictions(done)) == 2
    assert json.loads((done / "runs/run/config.json").read_text())["n_context"] == 2
    assert "eval.jsonl: 2 rows at" in (done / "runs/run/run.log").read_text()
    assert {path.name for path in done.iterdir()} == {"runs", "index", "eval.jsonl", "passages.jsonl"}


def test_bom_crlf_and_blank_lines_change_nothing(done, tmp_path):
    """A byte order mark, CRLF and blank lines give the predictions of the clean file; so does the saved index."""
    messy = b"\xef\xbb\xbf\r\n" + lines(ROWS[:1], "\r\n") + b"\r\n  \r\n" + lines(ROWS[1:], "\r\n").rstrip()
    folder = tmp_path
    argv = command(folder, eval_data=put(folder / "eval.jsonl", messy), load_index_path=done / "index")
    assert messy != (done / "eval.jsonl").read_bytes()
    assert main(argv) == 0
    assert predictions(folder) == predictions(done)


def test_two_equal_options_keep_their_letters(done):
    """B and D have one text; D, the right one, keeps a probability of its own, that of its place in every order."""
    line = predictions(done)[1]
    assert line["metadata"]["options"] == ROWS[1]["options"]
    assert line["metadata"]["answer"] == "D"
    orders = line["permutations"]
    assert [order["metadata"]["answer"] for order in orders] == ["D", "A", "B", "C"]
    assert set(line["choice_probs"]) == set("ABCD")
    shares = []
    for order in orders:
        logits = order["choice_logits"]
        weights = {letter: np.exp(logits[letter] - max(logits.values())) for letter in "ABCD"}
        shares.append(weights[order["metadata"]["answer"]] / sum(weights.values()))
    np.testing.assert_allclose(line["choice_probs"]["D"], np.mean(shares), rtol=1e-6)
    assert line["choice_probs"]["B"] != line["choice_probs"]["D"]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["evaluate", "--help"], ["convert", "--help"]])
def test_help(capsys, argv):
    """Help goes to stdout with status 0; it names the commands, or the flags."""
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for word in ("evaluate", "convert") if len(argv) < 2 else ("--model_path", "--reader_model_type"):
        assert word in captured.out


def test_nothing_stays_behind_in_the_process(capsys, tmp_path):
    """After a command its log handlers are gone: a second one in the process logs once, and not into its file."""
    before = list(logging.getLogger().handlers)
    for name in ("one", "two"):
        assert main(command(tmp_path, name=name, n_context=31, max_passages=3, load_index_path=tmp_path)) == 2
        assert logging.getLogger().handlers == before
        assert capsys.readouterr().err.count("million parameters") == 1
    assert "million" in (tmp_path / "runs/one/run.log").read_text()
    assert (tmp_path / "runs/one/run.log").read_text().count("million") == 1
