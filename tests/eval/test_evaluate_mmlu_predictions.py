"""The MMLU scorer: the reference's table byte for byte, folders of runs, and one line for every bad input."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval import evaluate_mmlu_predictions as scorer

OPTIONS = {"A": "one", "B": "two", "C": "three", "D": "four"}


class Run(NamedTuple):
    """Exit status and output of one call of the scorer."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys) -> Callable[..., Run]:
    """Calls the scorer with arguments, in this process."""

    def call(*args: str | Path) -> Run:
        status = 0
        try:
            status = scorer.main([str(arg) for arg in args])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return Run(status, *capsys.readouterr())

    return call


@pytest.fixture
def reference_args(golden, tmp_path) -> tuple[str | Path, ...]:
    """Arguments that score the reference's prediction file."""
    predictions = tmp_path / "mmlu_eval-step-1.jsonl"
    predictions.write_bytes(gzip.decompress((golden / "exp/mmlu/mmlu_eval-step-1.jsonl.gz").read_bytes()))
    return "--predictions_path", predictions, "--gold_path", golden / "mmlu_eval.jsonl"


def gold_row(text: str, domain: str = "anatomy", answer: str = "A", split: str = "test") -> dict[str, Any]:
    return {"question": text, "options": OPTIONS, "answer": answer, "dataset": f"{domain}_{split}"}


def prediction_row(gold: Mapping[str, Any], original: str, debiased: str) -> dict[str, Any]:
    """A row of a prediction file; its permutation that is not original has its highest logits at the other letters."""
    logits = {letter: 1.0 if letter == original else -1.0 for letter in OPTIONS}
    return {
        "generation": debiased,
        "metadata": {**gold, "is_original": True},
        "permutations": [
            {"metadata": {**gold, "is_original": False}, "choice_logits": {k: -v for k, v in logits.items()}},
            {"metadata": {**gold, "is_original": True}, "choice_logits": logits},
        ],
    }


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def accuracies(result: Run) -> dict[str, tuple[str, str]]:
    assert result.status == 0, result.err
    return {cells[0]: (cells[1], cells[2]) for line in result.out.splitlines()[2:] for cells in [line.split()]}


def error_line(result: Run) -> str:
    """Returns stderr after bad input; asserts status 2, an empty stdout, and one line without a traceback."""
    assert result.status == 2
    assert result.out == ""
    assert result.err.count("\n") == 1
    return result.err


def test_the_table_equals_the_reference_byte_for_byte(reference_args, golden):
    """Run as a program on the reference's predictions, the scorer prints the reference's table, byte for byte."""
    out = subprocess.run([sys.executable, scorer.__file__, *reference_args], check=True, capture_output=True)
    assert out.stdout == (golden / "mmlu_table.txt").read_bytes()
    assert out.stderr == b""


def test_there_are_57_domains_in_four_categories():
    """13 + 12 + 18 + 14 domains, none of them twice."""
    assert {name: len(domains) for name, domains in scorer.CATEGORIES.items()} == {
        "humanities": 13,
        "Soc Sci.": 12,
        "STEM": 18,
        "other": 14,
    }
    assert len(scorer.DOMAINS) == 57


def test_a_folder_of_runs_gives_the_table_of_one_file(reference_args, golden, run, tmp_path):
    """Split into 57 runs, one a domain, with unrelated files beside them, the predictions give the same table."""
    folder = tmp_path / "runs"
    domains: dict[str, list[dict[str, Any]]] = {}
    for line in Path(reference_args[1]).read_text().splitlines():
        row = json.loads(line)
        domains.setdefault(row["metadata"]["dataset"].removesuffix("_test"), []).append(row)
    for domain, rows in domains.items():
        write_jsonl(folder / domain / f"{domain}.test-step-16.jsonl", rows)
        write_jsonl(folder / domain / f"{domain}.test-step-8.jsonl", [])
    write_jsonl(folder / "notes.jsonl", [{"not": "ours"}])
    write_jsonl(folder / "checkpoint/anatomy.test-step-16.jsonl", [{"not": "ours"}])
    table = (golden / "mmlu_table.txt").read_text()
    arguments = ("--predictions_path", folder, "--gold_path", golden / "mmlu_eval.jsonl")
    assert run(*arguments).out == table
    assert run(*arguments, "--split", "test", "--step", "16").out == table
    assert "no prediction" in error_line(run(*arguments, "--step", "8"))


@pytest.mark.parametrize("name", ["val", "valid"])
@pytest.mark.parametrize("split", [None, "val", "valid"])
def test_val_and_valid_name_the_same_split(run, tmp_path, name, split):
    """A file with either name is found without --split and with either value of --split, but not with another split."""
    gold = gold_row("?", split=name)
    write_jsonl(tmp_path / f"p/anatomy/anatomy.{name}-step-16.jsonl", [prediction_row(gold, "A", "B")])
    arguments = ("--predictions_path", tmp_path / "p", "--gold_path", write_jsonl(tmp_path / "gold.jsonl", [gold]))
    chosen = ("--split", split) if split else ()
    assert accuracies(run(*arguments, *chosen))["all"] == ("100.00", "0.00")
    assert "{domain}.test-step-16.jsonl" in error_line(run(*arguments, "--split", "test"))


def test_two_complete_splits_require_a_choice(run, tmp_path):
    """Complete predictions of both splits are an error without --split; if one is incomplete, the other is scored."""
    golds = [gold_row("?"), gold_row("?", "virology")]
    for gold, domain in zip(golds, ("anatomy", "virology"), strict=True):
        for split in ("test", "val"):
            right = "A" if split == "test" else "B"
            write_jsonl(tmp_path / f"p/{domain}/{domain}.{split}-step-16.jsonl", [prediction_row(gold, right, right)])
    arguments = ("--predictions_path", tmp_path / "p", "--gold_path", write_jsonl(tmp_path / "gold.jsonl", golds))
    assert "choose with --split" in error_line(run(*arguments))
    assert accuracies(run(*arguments, "--split", "test"))["all"] == ("100.00", "100.00")
    assert accuracies(run(*arguments, "--split", "val"))["all"] == ("0.00", "0.00")
    (tmp_path / "p/virology/virology.val-step-16.jsonl").unlink()
    assert accuracies(run(*arguments))["all"] == ("100.00", "100.00")


def test_every_missing_domain_is_named_at_once(run, tmp_path):
    """One line names the domain without a folder and the domain without the file, but not the complete domain."""
    golds = [gold_row("?", domain) for domain in ("anatomy", "virology", "sociology")]
    write_jsonl(tmp_path / "p/anatomy/anatomy.test-step-16.jsonl", [prediction_row(golds[0], "A", "A")])
    (tmp_path / "p/virology").mkdir()
    gold_path = write_jsonl(tmp_path / "gold.jsonl", golds)
    line = error_line(run("--predictions_path", tmp_path / "p", "--gold_path", gold_path))
    assert "for 2 of 3 domains: sociology (no folder), virology;" in line
    assert "--step" in line
    assert "anatomy" not in line


def test_the_step_of_a_run_is_a_number_or_the_best(run, tmp_path):
    """A run's folder has predictions named after the gold file; `--step best` takes the step that best.json names."""
    gold = gold_row("?")
    gold_path = write_jsonl(tmp_path / "test.jsonl", [gold])
    for step, letter in ((8, "A"), (16, "B")):
        write_jsonl(tmp_path / f"p/test-step-{step}.jsonl", [prediction_row(gold, letter, "A")])
        write_jsonl(tmp_path / f"p/valid-step-{step}.jsonl", [{"not": "read"}])
    arguments = ("--predictions_path", tmp_path / "p", "--gold_path", gold_path)
    assert accuracies(run(*arguments))["all"] == ("0.00", "100.00")  # step 16
    assert accuracies(run(*arguments, "--step", "8"))["all"] == ("100.00", "100.00")
    (tmp_path / "p/best.json").write_text('{"step": 8}')
    assert accuracies(run(*arguments, "--step", "best"))["all"] == ("100.00", "100.00")
    assert json.loads(run(*arguments, "--step", "best", "--json").out)["step"] == 8
    (tmp_path / "p/best.json").write_text('{"step": 4}')
    line = error_line(run(*arguments, "--step", "best"))
    assert f"p/test-step-4.jsonl: no such file of the best step; train with --eval_data {gold_path} --write" in line


def test_the_best_steps_of_a_folder_of_runs(run, tmp_path):
    """Each domain has a best step of its own; a domain without best.json is named."""
    golds = [gold_row("?", domain) for domain in ("anatomy", "virology")]
    for gold, best in zip(golds, (8, 16), strict=True):
        domain = gold["dataset"].removesuffix("_test")
        for step in (8, 16):
            right = prediction_row(gold, *("AA" if step == best else "BB"))
            write_jsonl(tmp_path / f"p/{domain}/{domain}.test-step-{step}.jsonl", [right])
        (tmp_path / f"p/{domain}/best.json").write_text(json.dumps({"step": best, "metric": "debiased_accuracy"}))
    gold_path = write_jsonl(tmp_path / "gold.jsonl", golds)
    arguments = ("--predictions_path", tmp_path / "p", "--gold_path", gold_path)
    assert accuracies(run(*arguments, "--step", "best"))["all"] == ("100.00", "100.00")
    assert accuracies(run(*arguments, "--step", "16"))["all"] == ("50.00", "50.00")
    (tmp_path / "p/anatomy/best.json").unlink()
    assert "for 1 of 2 domains: anatomy;" in error_line(run(*arguments, "--step", "best"))
    (tmp_path / "p/virology/best.json").unlink()
    assert f"{tmp_path}/p: no best.json, nor {{domain}}/best.json;" in error_line(run(*arguments, "--step", "best"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{", "Expecting"), ("[]", "list indices"), ("{}", "no field 'step'"), ('{"step": "8"}', "'8'")],
)
def test_a_damaged_best_json_is_named(run, tmp_path, text, problem):
    """One line with the file, what is wrong, and the remedy."""
    gold_path = write_jsonl(tmp_path / "gold.jsonl", [gold_row("?")])
    (tmp_path / "best.json").write_text(text)
    line = error_line(run("--predictions_path", tmp_path, "--gold_path", gold_path, "--step", "best"))
    assert f"{tmp_path}/best.json: not what a training run writes" in line
    assert problem in line
    assert "give the --step by number" in line


def test_identical_questions_are_matched_in_order(run, tmp_path):
    """The second of two identical questions takes the second prediction, or the first again if there is only one."""
    golds = [gold_row("?", answer="A"), gold_row("?", answer="B")]
    gold_path = write_jsonl(tmp_path / "gold.jsonl", golds)
    both = [prediction_row(golds[0], "A", "A"), prediction_row(golds[1], "B", "C")]
    for rows, expected in ((both, ("100.00", "50.00")), (both[::-1], ("0.00", "0.00")), (both[:1], ("50.00", "50.00"))):
        predictions = write_jsonl(tmp_path / "p.jsonl", rows)
        assert accuracies(run("--predictions_path", predictions, "--gold_path", gold_path))["all"] == expected


def test_a_question_in_two_domains_is_two_questions(run, tmp_path):
    """A question that occurs in two domains is matched with the prediction of its own domain."""
    golds = [gold_row("?", "anatomy"), gold_row("?", "sociology")]
    predictions = write_jsonl(
        tmp_path / "p.jsonl", [prediction_row(golds[1], "B", "B"), prediction_row(golds[0], "A", "A")]
    )
    scores = accuracies(
        run("--predictions_path", predictions, "--gold_path", write_jsonl(tmp_path / "gold.jsonl", golds))
    )
    assert scores["other"] == ("100.00", "100.00")
    row = json.loads(
        run("--predictions_path", predictions, "--gold_path", tmp_path / "gold.jsonl", "--json").out,
    )
    assert row["domains"]["sociology"]["accuracy"] == 0


def test_the_first_permutation_marked_original_is_scored(run, tmp_path):
    """Equal option texts mark two permutations as original; the first is scored. The old key `permuatations` works."""
    gold = gold_row("?")
    row = prediction_row(gold, "A", "A")
    row["permutations"].append(prediction_row(gold, "B", "A")["permutations"][1])
    row["permuatations"] = row.pop("permutations")
    arguments = (
        "--gold_path",
        write_jsonl(tmp_path / "gold.jsonl", [gold]),
        "--predictions_path",
        tmp_path / "p.jsonl",
    )
    write_jsonl(tmp_path / "p.jsonl", [row])
    assert accuracies(run(*arguments))["all"] == ("100.00", "100.00")
    row["permuatations"].reverse()
    write_jsonl(tmp_path / "p.jsonl", [row])
    assert accuracies(run(*arguments))["all"] == ("0.00", "100.00")


def test_averages_weight_questions_not_domains(run, tmp_path):
    """Three correct answers in one domain and one wrong in another give 75 %; the mean over domains would be 50 %."""
    golds = [gold_row(f"{n}?", "anatomy") for n in range(3)] + [gold_row("?", "virology")]
    letters = ["A", "A", "A", "B"]
    rows = [prediction_row(gold, letter, letter) for gold, letter in zip(golds, letters, strict=True)]
    arguments = ("--gold_path", write_jsonl(tmp_path / "gold.jsonl", golds), "--predictions_path", tmp_path / "p.jsonl")
    write_jsonl(tmp_path / "p.jsonl", rows)
    scores = accuracies(run(*arguments))
    assert scores["other"] == scores["all"] == ("75.00", "75.00")
    assert scores["STEM"] == ("-", "-")  # no questions


@pytest.mark.parametrize(
    ("correct", "questions", "low", "high"),
    [
        (5, 10, 23.659, 76.341),
        (1, 10, 1.788, 40.415),
        (0, 10, 0.0, 27.753),
        (10, 10, 72.247, 100.0),
        (81, 263, 25.53, 36.62),
    ],
)
def test_the_wilson_interval_equals_published_values(correct, questions, low, high):
    """Textbook values, the last from Newcombe 1998 (0.2553 to 0.3662)."""
    assert scorer.wilson(correct, questions) == pytest.approx((low, high), abs=6e-3)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_wilson_interval_contains_the_rate_and_is_symmetric(counts):
    """The interval contains the rate, stays within 0 and 100, and is mirrored when correct and wrong are exchanged."""
    correct, questions = counts
    low, high = scorer.wilson(correct, questions)
    assert 0 <= low <= 100 * correct / questions <= high <= 100
    assert scorer.wilson(questions - correct, questions) == pytest.approx((100 - high, 100 - low), abs=1e-9)


def test_details_are_added_after_the_published_columns(reference_args, golden, run):
    """`--details` adds three columns and leaves the first three unchanged."""
    lines = run(*reference_args, "--details").out.splitlines()
    assert ["\t".join(line.split("\t")[:3]) for line in lines[:1] + lines[2:]] == [
        line for line in (golden / "mmlu_table.txt").read_text().splitlines() if not line.startswith("-")
    ]
    low, high = scorer.wilson(23, 114)
    assert lines[-1].split()[3:5] == ["114", f"{low:.2f}-{high:.2f}"]


def test_json_holds_unrounded_figures_and_every_domain(reference_args, golden, run):
    """`--json` prints one object: unrounded accuracies, intervals, and every domain; the domains' questions add up."""
    result = json.loads(run(*reference_args, "--json").out)
    everything = result["categories"]["all"]
    assert everything["questions"] == sum(row["questions"] for row in result["domains"].values()) == 114
    assert everything["accuracy"] == pytest.approx(100 * 23 / 114)
    assert everything["accuracy_interval"] == pytest.approx(scorer.wilson(23, 114))
    assert set(result["domains"]) == scorer.DOMAINS
    for line in (golden / "mmlu_table.txt").read_text().splitlines()[2:]:
        name, accuracy, debiased = (cell.strip() for cell in line.split("\t"))
        row = result["categories"][name]
        assert (f"{row['accuracy']:.2f}", f"{row['debiased_accuracy']:.2f}") == (accuracy, debiased)


def test_a_question_without_prediction_is_named(reference_args, run, tmp_path):
    """The error names the gold file, its first line without a prediction and how many more; extra rows are ignored."""
    predictions = Path(reference_args[1])
    rows = predictions.read_text().splitlines(keepends=True)
    predictions.write_text("".join(rows[:4] + rows[7:]))
    line = error_line(run(*reference_args))
    assert "mmlu_eval.jsonl:5: no prediction" in line
    assert "(nor for 2 more)" in line
    gold = tmp_path / "gold.jsonl"
    gold.write_text(Path(reference_args[3]).read_text().splitlines(keepends=True)[0])
    assert accuracies(run(*reference_args[:3], gold))["STEM"] != ("-", "-")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda row: "{", "not JSON"),
        (lambda row: "\udcff", "not JSON"),
        (lambda row: "[]", "a JSON list where an object"),
        (lambda row: json.dumps({**row, "metadata": {"question": "?"}}), "no field 'options'"),
        (lambda row: json.dumps({k: v for k, v in row.items() if k != "generation"}), "no field 'generation'"),
        (lambda row: json.dumps({**row, "permutations": row["permutations"][:1]}), "no permutation with `is_original`"),
        (lambda row: json.dumps({**row, "permutations": 3}), "not iterable"),
        (lambda row: json.dumps(row).replace("-1.0", "NaN"), "cannot be compared"),
    ],
)
def test_a_malformed_prediction_is_named(run, tmp_path, damage, complaint):
    """The error names file, line, problem and remedy; without the malformed row the file is scored with blank lines."""
    gold = gold_row("?")
    row = prediction_row(gold, "A", "A")
    predictions = tmp_path / "p.jsonl"
    arguments = ("--predictions_path", predictions, "--gold_path", write_jsonl(tmp_path / "gold.jsonl", [gold]))
    predictions.write_text(f"{json.dumps(row)}\n\n{damage(row)}\n", errors="surrogateescape")
    line = error_line(run(*arguments))
    assert f"{predictions}:3: " in line
    assert complaint in line
    assert "evaluate again" in line
    predictions.write_text(f"{json.dumps(row)}\n\n")
    assert accuracies(run(*arguments))["all"] == ("100.00", "100.00")


@pytest.mark.parametrize(
    ("gold", "complaint"),
    [
        (gold_row("?", "alchemy"), "none of MMLU's 57 domains"),
        (gold_row("?", answer="E"), "'E' is no letter of the options"),
        ({"question": "?"}, "no field 'options'"),
        ({**gold_row("?"), "options": ["one"]}, "`options` is not an object"),
    ],
)
def test_a_malformed_gold_question_is_named(run, tmp_path, gold, complaint):
    """The error names file, line, problem and remedy."""
    gold_path = write_jsonl(tmp_path / "gold.jsonl", [gold_row("?"), gold])
    line = error_line(run("--predictions_path", tmp_path / "p.jsonl", "--gold_path", gold_path))
    assert f"{gold_path}:2: " in line
    assert complaint in line
    assert "--gold_path wants" in line


def test_missing_and_empty_files_are_named(run, tmp_path):
    """A missing gold file, an empty one and a missing prediction file give one line each."""
    gold_path = tmp_path / "gold.jsonl"
    arguments = ("--predictions_path", tmp_path / "p.jsonl", "--gold_path", gold_path)
    assert f"{gold_path}: No such file" in error_line(run(*arguments))
    assert f"{gold_path}: no question" in error_line(run(*arguments[:2], "--gold_path", write_jsonl(gold_path, [])))
    write_jsonl(gold_path, [gold_row("?")])
    assert "p.jsonl: No such file" in error_line(run(*arguments))


NAME = "evaluate_mmlu_predictions"
UNPACK = f"{NAME}: g: is compressed with gzip; unpack it with gunzip first\n"


@pytest.mark.parametrize(
    ("shell", "status", "err"),
    [
        ('"$@" >&-', 0, ""),
        ('"$@" 2>&-', 0, ""),
        ('set -o pipefail; "$@" | true', 141, ""),
        ('"$@" >/dev/full', 2, f"{NAME}: standard output: No space left on device; check it, and the disk\n"),
        ('LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 "$@"', 0, ""),
        ('"$@" --step many', 2, None),
        ('"$@" --gold_path "~nobody-here/x"', 2, None),
        ('gzip -c "$4" >g; "$@" --gold_path g', 2, UNPACK),
        ('"$1" "$2" --gold_path <(cat "$4") "$5" "$6"', 0, ""),
    ],
)
def test_a_hostile_environment_gives_one_line(reference_args, tmp_path, shell, status, err):
    """Streams that are closed, full or not read to their end, another locale, gzip, a pipe: no traceback."""
    predictions, gold = reference_args[1], reference_args[3]
    argv = [sys.executable, scorer.__file__, "--gold_path", gold, "--predictions_path", predictions]
    command = ["bash", "-c", shell, "bash", *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == (status == 2)
    assert err in (None, done.stderr)
