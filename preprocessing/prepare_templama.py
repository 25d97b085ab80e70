#!/usr/bin/env python3
"""Make the questions of TempLAMA whose answer changed between two years, to see whether an index is up to date.

    prepare_templama.py --output_directory $DATA_DIR                     download the files that are missing
    prepare_templama.py --output_directory $DATA_DIR --train train.json --valid val.json \\
        --test test.json                                                 without a network

makes, below $DATA_DIR/data/templama_data, for `--task qa --qa_prompt_format "{question}"`,

    temp_lama.{train,valid,test}.{2017,2020}.jsonl

A line is {"question": ".. <extra_id_0> ..", "answers": ["..", ..], "metadata": {"original_instance": {..}}}. A question
keeps its first row of these years and the later rows that share no answer with it; without such a later row, it is left
out. The files appear together and replace those of an earlier run; downloaded originals are kept beside them as
{split}.original.jsonl.
"""

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from originals import exit_on_error, find_original, json_line, write_lines

from atlas_jax.commands.flags import Parser
from atlas_jax.data.jsonl import read_rows
from atlas_jax.errors import UserError
from atlas_jax.storage.files import atomic_file
from atlas_jax.storage.paths import user_path

URL = "https://storage.googleapis.com/gresearch/templama/"
ORIGINALS = {"train": "train.json", "valid": "val.json", "test": "test.json"}
YEARS = ("2017", "2020")


def changed_questions(path: Path) -> dict[str, list[str]]:
    """Returns {year: lines}: the questions of an original file whose answer changed, in order of first occurrence."""
    rows_by_query: dict[str, list[dict[str, Any]]] = {}
    for line, row in read_rows(path):
        check_row(row, f"{path}:{line}")
        if row["date"] in YEARS:
            rows_by_query.setdefault(row["query"], []).append(row)

    lines: dict[str, list[str]] = {year: [] for year in YEARS}
    for first, *later in rows_by_query.values():
        changed = [row for row in later if not {*answer_names(row)} & {*answer_names(first)}]
        for row in [first, *changed] if changed else []:
            lines[row["date"]].append(json_line(question_row(row)))
    return lines


def check_row(row: Mapping[str, Any], where: str) -> None:
    try:
        valid = all(isinstance(text, str) for text in (row["query"], row["date"], *answer_names(row)))
    except (LookupError, TypeError):
        valid = False
    if not valid:
        raise UserError(f"{where}: not TempLAMA's `query`, `date` and `answer` names; give the original, {URL}")


def answer_names(row: Mapping[str, Any]) -> list[str]:
    """Returns the distinct answers in their order. Reference: its order changes from run to run."""
    return list(dict.fromkeys(answer["name"] for answer in row["answer"]))


def question_row(row: Mapping[str, Any]) -> dict[str, Any]:
    text = row["query"].replace("_X_", "<extra_id_0>")
    return {"question": text, "answers": answer_names(row), "metadata": {"original_instance": row}}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--output_directory", type=user_path, metavar="DIR", default=Path("data"), help="your DATA_DIR (default: data)"
    )
    for split, name in ORIGINALS.items():
        parser.add_argument(f"--{split}", type=user_path, metavar="FILE", help=f"instead of downloading {URL}{name}")
    with exit_on_error("prepare_templama"):
        prepare(parser.parse_args(argv))


def prepare(args: argparse.Namespace) -> None:
    folder = args.output_directory / "data/templama_data"
    with contextlib.ExitStack() as stack:
        lines_by_path = {}
        for split, name in ORIGINALS.items():
            path = find_original(getattr(args, split), f"--{split}", URL + name, folder / f"{split}.original.jsonl")
            for year, lines in changed_questions(path).items():
                lines_by_path[folder / f"temp_lama.{split}.{year}.jsonl"] = lines
        for target, lines in lines_by_path.items():
            write_lines(stack.enter_context(atomic_file(target)), lines)
    for target, lines in lines_by_path.items():
        print(f"{target}: {len(lines):,} questions")
    train = folder / f"temp_lama.train.{YEARS[0]}.jsonl"
    print(f'use them: atlas train --task qa --qa_prompt_format "{{question}}" --train_data {train}')


if __name__ == "__main__":
    main()
