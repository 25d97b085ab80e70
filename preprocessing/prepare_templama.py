#!/usr/bin/env python3
"""Make the questions of TempLAMA whose answer changed between two years, to see whether an index is up to date.

    prepare_templama.py --output_directory $DATA_DIR                     download what is not there
    prepare_templama.py --output_directory $DATA_DIR --train train.json --valid val.json \\
        --test test.json                                                 without a network

makes, below $DATA_DIR/data/templama_data, for `--task qa --qa_prompt_format "{question}"`,

    temp_lama.{train,valid,test}.{2017,2020}.jsonl

A line is {"question": ".. <extra_id_0> ..", "answers": ["..", ..], "metadata": {"original_instance": {..}}}. A question
is taken if it has answers in both years and none of a later one's is among those of the first. The files appear
together and replace those of an earlier run; downloaded originals are kept beside them as {split}.original.jsonl.
"""

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from originals import json_line, original, script, write_lines

from atlas_jax.data.jsonl import read_rows
from atlas_jax.errors import UserError
from atlas_jax.storage.files import atomic_file

URL = "https://storage.googleapis.com/gresearch/templama/"
ORIGINALS = {"train": "train.json", "valid": "val.json", "test": "test.json"}
YEARS = ("2017", "2020")


def changed_questions(path: Path) -> dict[str, list[str]]:
    """The lines of each year's file."""
    group_by_query: dict[str, list[dict[str, Any]]] = {}
    for line, row in read_rows(path):
        check(row, f"{path}:{line}")
        if row["date"] in YEARS:
            group_by_query.setdefault(row["query"], []).append(row)

    lines: dict[str, list[str]] = {year: [] for year in YEARS}
    for first, *later in group_by_query.values():
        changed = [row for row in later if not {*names(row)} & {*names(first)}]
        for row in [first, *changed] if changed else []:
            lines[row["date"]].append(json_line(question(row)))
    return lines


def check(row: Mapping[str, Any], where: str) -> None:
    try:
        fit = all(isinstance(text, str) for text in (row["query"], row["date"], *names(row)))
    except (LookupError, TypeError):
        fit = False
    if not fit:
        raise UserError(f"{where}: not TempLAMA's `query`, `date` and `answer` names; give the original, {URL}")


def names(row: Mapping[str, Any]) -> list[str]:
    """The different names of the answers. Reference: their order was another in each run."""
    return list(dict.fromkeys(answer["name"] for answer in row["answer"]))


def question(row: Mapping[str, Any]) -> dict[str, Any]:
    text = row["query"].replace("_X_", "<extra_id_0>")
    return {"question": text, "answers": names(row), "metadata": {"original_instance": row}}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--output_directory", type=Path, metavar="DIR", default=Path("data"), help="your DATA_DIR (default: data)"
    )
    for split, name in ORIGINALS.items():
        parser.add_argument(f"--{split}", type=Path, metavar="FILE", help=f"instead of downloading {URL}{name}")
    args = parser.parse_args(argv)

    folder = args.output_directory / "data/templama_data"
    with script("prepare_templama"), contextlib.ExitStack() as drafts:
        made = {}
        for split, name in ORIGINALS.items():
            path = original(getattr(args, split), f"--{split}", URL + name, folder / f"{split}.original.jsonl")
            for year, lines in changed_questions(path).items():
                made[folder / f"temp_lama.{split}.{year}.jsonl"] = lines
        for place, lines in made.items():
            write_lines(drafts.enter_context(atomic_file(place)), lines)
    for place, lines in made.items():
        print(f"{place}: {len(lines):,} questions")
    train = folder / f"temp_lama.train.{YEARS[0]}.jsonl"
    print(f'use them: atlas train --task qa --qa_prompt_format "{{question}}" --train_data {train}')


if __name__ == "__main__":
    main()
