#!/usr/bin/env python3
"""Score MMLU predictions: the published accuracy table, from the prediction file of one run or of one run per domain.

    evaluate_mmlu_predictions.py --predictions_path runs/demo/mmlu-step-1.jsonl --gold_path mmlu.jsonl
    evaluate_mmlu_predictions.py --predictions_path runs/full --step best --gold_path combined_test.jsonl

`Acc` scores the option with the highest logit in the original order of the options; `Debias Acc` the option with the
highest mean probability over all permutations. Both are micro averages: every question of a category counts the same.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

CATEGORIES = {
    "humanities": (
        *("formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history"),
        *("international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy"),
        *("prehistory", "professional_law", "world_religions"),
    ),
    "Soc Sci.": (
        *("econometrics", "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics"),
        *("high_school_microeconomics", "high_school_psychology", "human_sexuality", "professional_psychology"),
        *("public_relations", "security_studies", "sociology", "us_foreign_policy"),
    ),
    "STEM": (
        *("abstract_algebra", "astronomy", "college_biology", "college_chemistry", "college_computer_science"),
        *("college_mathematics", "college_physics", "computer_security", "conceptual_physics"),
        *("electrical_engineering", "elementary_mathematics", "high_school_biology", "high_school_chemistry"),
        *("high_school_computer_science", "high_school_mathematics", "high_school_physics", "high_school_statistics"),
        *("machine_learning",),
    ),
    "other": (
        *("anatomy", "business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging"),
        *("management", "marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting"),
        *("professional_medicine", "virology"),
    ),
}
DOMAINS = frozenset(domain for domains in CATEGORIES.values() for domain in domains)
SPLITS = {"test": ("test",), "val": ("val", "valid"), "valid": ("valid", "val")}  # --split: its spellings in file names
Step = int | Literal["best"]  # best: the step that the best.json of each run names
GZIP = b"\x1f\x8b"  # the first bytes of a gzip file
SUFFIXES = ("_test", "_valid", "_val", "_dev")

QuestionKey = tuple[str, str, tuple[tuple[str, str], ...]]  # (domain, question, sorted options) identify a question


@dataclasses.dataclass(frozen=True)
class Question:
    """One line of the gold file."""

    key: QuestionKey
    answer: str
    line: int


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The options predicted for a question: from its original order of options, and averaged over all permutations."""

    key: QuestionKey
    original: str
    debiased: str


@dataclasses.dataclass
class Counts:
    """Numbers of questions and of correct answers: one line of the table."""

    questions: int = 0
    correct: int = 0
    debiased_correct: int = 0

    def add(self, question: Question, prediction: Prediction) -> None:
        self.questions += 1
        self.correct += prediction.original == question.answer
        self.debiased_correct += prediction.debiased == question.answer

    def report(self) -> dict[str, Any]:
        """Returns the accuracies in percent with their 95 % intervals; None if there are no questions."""
        return {
            "questions": self.questions,
            "accuracy": 100 * self.correct / self.questions if self.questions else None,
            "accuracy_interval": wilson(self.correct, self.questions),
            "debiased_accuracy": 100 * self.debiased_correct / self.questions if self.questions else None,
            "debiased_accuracy_interval": wilson(self.debiased_correct, self.questions),
        }


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see --help")


def fail(message: str) -> NoReturn:
    """Prints one line to stderr and exits with status 2."""
    print(f"evaluate_mmlu_predictions: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)


def user_path(text: str) -> Path:
    """A path that a person typed: `~` is expanded, which the shell does not do in `--flag=~/x`."""
    path = os.path.expanduser(text)
    if path.startswith("~"):
        fail(f"{text}: no home folder for {text.split('/')[0]}; write ./{text} if it is called so")
    return Path(path)


def wilson(correct: int, questions: int, z: float = 1.959963984540054) -> tuple[float, float] | None:
    """Wilson score interval of a proportion, in percent; `z` is the 97.5 % quantile of the normal distribution."""
    if questions == 0:
        return None
    rate, spread = correct / questions, z * z / questions
    centre = (rate + spread / 2) / (1 + spread)
    radius = z * math.sqrt((rate * (1 - rate) + spread / 4) / questions) / (1 + spread)
    low = 0.0 if correct == 0 else 100 * (centre - radius)
    high = 100.0 if correct == questions else 100 * (centre + radius)
    return low, high


def read_rows(path: Path, remedy: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of a jsonl file and skips blank lines; errors end the program and name `remedy`."""
    try:
        with path.open("rb") as file:
            for line, text in enumerate(file, start=1):
                if line == 1 and text.startswith(GZIP):
                    fail(f"{path}: is compressed with gzip; unpack it with gunzip first")
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except ValueError as error:
                    fail(f"{path}:{line}: not JSON in UTF-8 ({error}); {remedy}")
                if not isinstance(row, dict):
                    fail(f"{path}:{line}: a JSON {type(row).__name__} where an object is expected; {remedy}")
                yield line, row
    except OSError as error:
        fail(f"{path}: {error.strerror}; {remedy}")


def question_key(row: Mapping[str, Any]) -> QuestionKey:
    """Returns the key of the question in `row`; raises KeyError, TypeError or ValueError if `row` holds no question."""
    question, options, domain = row["question"], row["options"], row["dataset"]
    if not isinstance(question, str) or not isinstance(domain, str):
        raise TypeError("`question` and `dataset` are not both strings")
    if not isinstance(options, dict) or not options:
        raise TypeError("`options` is not an object of letters and texts")
    for suffix in SUFFIXES:
        if domain.endswith(suffix):
            domain = domain.removesuffix(suffix)
            break
    return domain, question, tuple(sorted((letter, str(text)) for letter, text in options.items()))


def describe(error: Exception) -> str:
    return f"no field {error}" if isinstance(error, KeyError) else str(error)


def read_gold(path: Path) -> list[Question]:
    """Reads the questions to score, in file order."""
    remedy = "--gold_path wants a jsonl file of MMLU questions, the one that was evaluated"
    questions = []
    for line, row in read_rows(path, remedy):
        try:
            key, answer = question_key(row), row["answer"]
            if answer not in row["options"]:
                raise ValueError(f"the answer {answer!r} is no letter of the options")
            if key[0] not in DOMAINS:
                raise ValueError(f"the dataset {row['dataset']!r} is none of MMLU's 57 domains")
        except (KeyError, TypeError, ValueError) as error:
            fail(f"{path}:{line}: {describe(error)}; {remedy}")
        questions.append(Question(key, answer, line))
    if not questions:
        fail(f"{path}: no question in it; {remedy}")
    return questions


def read_prediction(row: Mapping[str, Any]) -> Prediction:
    """Parses one row of a prediction file; raises KeyError, TypeError or ValueError if it is malformed."""
    key = question_key(row["metadata"])
    # Reference: older prediction files misspell the field.
    permutations = row["permuatations"] if "permuatations" in row else row["permutations"]
    # Two equal option texts mark a second permutation as original; the first one marked is the original.
    original = next((p for p in permutations if p["metadata"]["is_original"]), None)
    if original is None:
        raise ValueError("no permutation with `is_original`")
    logits, debiased = original["choice_logits"], row["generation"]
    if not logits or any(math.isnan(logit) for logit in logits.values()):
        raise ValueError(f"`choice_logits` {logits} cannot be compared")
    if not isinstance(debiased, str):
        raise TypeError("`generation` is not a letter")
    return Prediction(key, max(logits, key=logits.__getitem__), debiased)


def read_predictions(paths: Sequence[Path]) -> dict[QuestionKey, list[Prediction]]:
    """Reads the predictions of each question, in file order; a question that was asked twice has two."""
    remedy = "evaluate again with --task multiple_choice --write_results"
    predictions = collections.defaultdict(list)
    for path in paths:
        for line, row in read_rows(path, remedy):
            try:
                prediction = read_prediction(row)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                fail(f"{path}:{line}: {describe(error)}; {remedy}")
            predictions[prediction.key].append(prediction)
    return predictions


def run_step(run: Path, step: Step) -> int | None:
    """Returns `step`; for "best" the one that the run's best.json names, None if there is no such file."""
    if step != "best":
        return step
    path = run / "best.json"
    try:
        best = json.loads(path.read_bytes())["step"]
        if not isinstance(best, int):
            raise TypeError(f"the step is {best!r}")
        return best
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        fail(f"{path}: {error.strerror}; give the --step by number")
    except (ValueError, KeyError, TypeError) as error:
        fail(f"{path}: not what a training run writes ({describe(error)}); give the --step by number")


def run_file(run: Path, gold_path: Path, step: Step) -> tuple[Path, int] | None:
    """Returns the run's predictions for the gold file and their step; None if there are none, or `run` is no run."""
    number = run_step(run, step)
    path = run / f"{gold_path.stem}-step-{number}.jsonl"
    if path.is_file() and number is not None:
        return path, number
    if step == "best" and number is not None:
        fail(f"{path}: no such file of the best step; train with --eval_data {gold_path} --write_results")
    if step == "best" and run.is_dir() and not any(run.glob("*/best.json")):
        fail(f"{run}: no best.json, nor {{domain}}/best.json; a training run with --eval_data writes it")
    return None


def domain_files(folder: Path, domains: Sequence[str], step: Step, split: str) -> tuple[list[Path], list[str]]:
    """Returns the files {folder}/{domain}/{domain}.{split}-step-{step}.jsonl that exist, and the domains with none."""
    found, missing = [], []
    for domain in domains:
        number = run_step(folder / domain, step)
        names = (folder / domain / f"{domain}.{name}-step-{number}.jsonl" for name in SPLITS[split])
        path = next((path for path in names if path.is_file()), None)
        if path is not None:
            found.append(path)
        else:
            missing.append(domain if (folder / domain).is_dir() else f"{domain} (no folder)")
    return found, missing


def find_files(folder: Path, domains: Sequence[str], step: Step, split: str | None) -> tuple[list[Path], str]:
    """Returns the prediction file of each domain and the split: `split`, or else the only one whose files all exist."""
    choices = {name: domain_files(folder, domains, step, name) for name in ([split] if split else ["val", "test"])}
    complete = [name for name, (_, missing) in choices.items() if not missing]
    if len(complete) > 1:
        fail(f"{folder}: step {step} has predictions for {' and '.join(complete)}; choose with --split")
    best = complete[0] if complete else max(choices, key=lambda name: len(choices[name][0]))
    found, missing = choices[best]
    if missing:
        pattern = f"{{domain}}/{{domain}}.{best if found or split else '{split}'}-step-{step}.jsonl"
        fail(
            f"{folder}: no {pattern} for {len(missing)} of {len(domains)} domains: {', '.join(missing)}; "
            "evaluate them with --write_results, or correct --step or --split"
        )
    return found, best


def score(
    questions: Sequence[Question],
    predictions: Mapping[QuestionKey, Sequence[Prediction]],
    gold_path: Path,
    predictions_path: Path,
) -> dict[str, Counts]:
    """Counts the questions and correct answers of each domain that has questions.

    A question that occurs twice in a domain takes its predictions in file order, then the last one again.
    """
    unanswered = [question.line for question in questions if question.key not in predictions]
    if unanswered:
        more = f" (nor for {len(unanswered) - 1} more)" if len(unanswered) > 1 else ""
        fail(
            f"{gold_path}:{unanswered[0]}: no prediction for this question{more} in {predictions_path}; "
            "give the --gold_path that was evaluated, or evaluate it to its end"
        )
    counts_by_domain: dict[str, Counts] = collections.defaultdict(Counts)
    occurrences: collections.Counter[QuestionKey] = collections.Counter()
    for question in questions:
        candidates = predictions[question.key]
        counts_by_domain[question.key[0]].add(question, candidates[min(occurrences[question.key], len(candidates) - 1)])
        occurrences[question.key] += 1
    return counts_by_domain


def summarize(counts_by_domain: Mapping[str, Counts]) -> dict[str, Counts]:
    """Sums the domains into the lines of the table: four categories, then all."""
    table = {category: Counts() for category in (*CATEGORIES, "all")}
    for category, members in CATEGORIES.items():
        for counts in (counts_by_domain[domain] for domain in members if domain in counts_by_domain):
            for total in (table[category], table["all"]):
                total.questions += counts.questions
                total.correct += counts.correct
                total.debiased_correct += counts.debiased_correct
    return table


def format_table(table: Mapping[str, Counts], details: bool) -> str:
    """Formats the published table; `details` adds the number of questions and both 95 % intervals."""
    header = ["category", "Acc(%)", "Debias Acc(%)"]
    lines = [header + ["questions", "Acc 95%", "Debias Acc 95%"] * details]
    for category, counts in table.items():
        report = counts.report()
        cells = [category, format_percent(report["accuracy"]), format_percent(report["debiased_accuracy"])]
        if details:
            intervals = (report["accuracy_interval"], report["debiased_accuracy_interval"])
            cells += [
                str(counts.questions),
                *(f"{format_percent(i[0])}-{format_percent(i[1])}" if i else "-" for i in intervals),
            ]
        lines.append(cells)
    text = ["\t".join(f"{cell:>15}" for cell in cells) for cells in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def format_percent(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the scores; returns the exit status: 0, or 2, 130 or 141 if they cannot be written."""
    try:
        print_scores(argv)
        print(end="", flush=True)
        return 0
    except KeyboardInterrupt:
        status, problem = 130, "interrupted"
    except BrokenPipeError:
        status, problem = 141, ""  # 128 + SIGPIPE, as a shell reports it
    except OSError as error:
        status, problem = 2, f"{error.filename or 'standard output'}: {error.strerror}; check it, and the disk"
    if problem:
        print(f"evaluate_mmlu_predictions: {problem}", file=sys.stderr)
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter would complain when it flushes stdout
    return status


def print_scores(argv: Sequence[str] | None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--predictions_path",
        required=True,
        type=user_path,
        help="prediction file, a run's folder with {gold file's stem}-step-{step}.jsonl, or a folder of runs: "
        "{domain}/{domain}.{split}-step-{step}.jsonl",
    )
    gold_help = "jsonl file of the questions that were evaluated"
    parser.add_argument("--gold_path", required=True, type=user_path, help=gold_help)
    parser.add_argument(
        "--step",
        type=lambda text: text if text == "best" else int(text),
        default=16,
        help="step of the files in a folder, or best: the one that a run's best.json names (default: 16)",
    )
    parser.add_argument(
        "--split", choices=SPLITS, help="split of the files in a folder of runs (default: the one that exists)"
    )
    parser.add_argument("--details", action="store_true", help="also print the questions and 95 %% intervals (Wilson)")
    parser.add_argument("--json", action="store_true", help="print everything, domains too, as one JSON object instead")
    args = parser.parse_args(argv)

    questions = read_gold(args.gold_path)
    paths, step, split = [args.predictions_path], None, None
    if found := run_file(args.predictions_path, args.gold_path, args.step):
        paths, step = [found[0]], found[1]
    elif args.predictions_path.is_dir():
        domains, step = sorted({question.key[0] for question in questions}), args.step
        paths, split = find_files(args.predictions_path, domains, step, args.split)
    scores = score(questions, read_predictions(paths), args.gold_path, args.predictions_path)
    table = summarize(scores)
    if args.json:
        everything = {
            "predictions_path": str(args.predictions_path),
            "gold_path": str(args.gold_path),
            "step": step,
            "split": split,
            "categories": {name: counts.report() for name, counts in table.items()},
            "domains": {name: counts.report() for name, counts in sorted(scores.items())},
        }
        print(json.dumps(everything, indent=1))
    else:
        print(format_table(table, args.details))


if __name__ == "__main__":
    sys.exit(main())
