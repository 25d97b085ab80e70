#!/usr/bin/env python3
"""Make MMLU's training, validation and test files from its official archive, for launch/mmlu/*.sh.

    prepare_mmlu.py --output_directory $DATA_DIR                        download data.tar if it is missing
    prepare_mmlu.py --output_directory $DATA_DIR --data_tar data.tar    without a network

makes, below $DATA_DIR/data/mmlu_data,

    5-shot/             one model per domain, trained on five questions of the domain
        individual_train/{domain}.5-shot-train.jsonl
    5-shot-multitask/   one model, trained on the five questions of every domain; zero-shot uses its evaluation files
        train.jsonl
    full/               one model, trained on MMLU's auxiliary questions and the five of every domain
        train.jsonl
        auxillary_valid.jsonl                       5,000 auxiliary questions held out, after a shuffle with seed 10

and, in each of the three,

        individual_valid/{domain}.val.jsonl         combined_valid.jsonl
        individual_test/{domain}.test.jsonl         combined_test.jsonl

A line is {"question": "..", "options": {"A": "..", .., "D": ".."}, "answer": "A", "dataset": "anatomy_test"}. Domains
are in sorted order, so the files are the same on every machine. The three folders appear when all files are written,
and replace those of an earlier run as a whole. The archive is not extracted to the disk.
"""

import argparse
import contextlib
import csv
import io
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from originals import exit_on_error, find_original, json_line, tar_files, write_lines

from atlas_jax.commands.flags import Parser
from atlas_jax.errors import UserError
from atlas_jax.storage.files import atomic_folder
from atlas_jax.storage.paths import user_path

URL = "https://people.eecs.berkeley.edu/~hendrycks/data.tar"
SPLITS = ("auxiliary_train", "dev", "val", "test")
LETTERS = ("A", "B", "C", "D")
HELD_OUT = 5000  # auxiliary questions for validation
SEED = 10

Lines = list[str]


def read_archive(archive: Path) -> dict[str, dict[str, Lines]]:
    """Returns {split: {domain: lines}}, domains in sorted order; a line is one question in JSON."""
    data: dict[str, dict[str, Lines]] = {split: {} for split in SPLITS}
    with tar_files(archive) as files:
        for path, file in files:
            match path.parts:
                case ["data", split, name] if split in data and path.suffix == ".csv" and not name.startswith("."):
                    where = f"{archive}: {path}"
                    data[split][domain_of(path.stem, split, where)] = read_csv(file, path.stem, where)
    for split, domains in data.items():
        if not domains:
            raise UserError(f"{archive}: has no data/{split}/*.csv; give MMLU's official archive, {URL}")
    return {split: dict(sorted(domains.items())) for split, domains in data.items()}


def domain_of(stem: str, split: str, where: str) -> str:
    """Domain of a file: `anatomy_test` is of anatomy; the domain of an auxiliary file is its whole name."""
    if split == "auxiliary_train":
        return stem
    domain = stem.removesuffix(f"_{split}")
    if domain in ("", stem):
        raise UserError(f"{where}: no name of a domain; it must be data/{split}/{{domain}}_{split}.csv")
    return domain


def read_csv(file: IO[bytes], dataset: str, where: str) -> Lines:
    rows = csv.reader(text_lines(file, where))
    lines: Lines = []
    start = 1
    try:
        for row in rows:
            if row:
                lines.append(json_line(question_row(row, dataset)))
            start = rows.line_num + 1
    except (csv.Error, ValueError) as error:
        remedy = "a row is question, A, B, C, D, answer, and quotes come in pairs"
        raise UserError(f"{where}:{start}: {error}; {remedy}") from None
    return lines


def text_lines(file: IO[bytes], where: str) -> Iterator[str]:
    for number, raw in enumerate(file, 1):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{where}:{number}: invalid UTF-8; save the file as UTF-8, or fetch it again") from None
        yield from io.StringIO(text, newline=None)  # Reference: every line end, also within fields, becomes \n


def question_row(row: Sequence[str], dataset: str) -> dict[str, object]:
    if len(row) != 2 + len(LETTERS):
        raise ValueError(f"{len(row)} columns")
    text, *options, answer = row
    if answer not in LETTERS:
        raise ValueError(f"the answer is {answer!r:.50}")
    options_by_letter = dict(zip(LETTERS, options, strict=True))
    return {"question": text, "options": options_by_letter, "answer": answer, "dataset": dataset}


def split_into_settings(data: Mapping[str, Mapping[str, Lines]]) -> dict[str, dict[str, Lines]]:
    """Returns {setting: {path: lines}}, the content of every output file."""
    auxiliary, train, valid, test = ([line for lines in data[split].values() for line in lines] for split in SPLITS)
    random.Random(SEED).shuffle(auxiliary)
    evaluation = {
        **{f"individual_valid/{domain}.val.jsonl": lines for domain, lines in data["val"].items()},
        **{f"individual_test/{domain}.test.jsonl": lines for domain, lines in data["test"].items()},
        "combined_valid.jsonl": valid,
        "combined_test.jsonl": test,
    }
    individual = {f"individual_train/{domain}.5-shot-train.jsonl": lines for domain, lines in data["dev"].items()}
    held_out, rest = auxiliary[-HELD_OUT:], auxiliary[:-HELD_OUT]
    return {
        "5-shot": {**individual, **evaluation},
        "5-shot-multitask": {"train.jsonl": train, **evaluation},
        "full": {"train.jsonl": rest + train, "auxillary_valid.jsonl": held_out, **evaluation},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--output_directory",
        type=user_path,
        metavar="DIR",
        default=Path("data"),
        help="the DATA_DIR of launch/mmlu (default: data)",
    )
    text = f"MMLU's archive, instead of downloading {URL}"
    parser.add_argument("--data_tar", type=user_path, metavar="FILE", help=text)
    with exit_on_error("prepare_mmlu"):
        args = parser.parse_args(argv)
        root = args.output_directory / "data/mmlu_data"
        archive = find_original(args.data_tar, "--data_tar", URL, root / "data.tar")
        data = read_archive(archive)
        files_by_setting = split_into_settings(data)
        with contextlib.ExitStack() as stack:
            for setting, files in files_by_setting.items():
                folder = atomic_folder(root / setting, "choose another --output_directory", replace=True)
                draft = stack.enter_context(folder)
                for name, lines in files.items():
                    write_lines(draft / name, lines)
        print(f"{root}: {len(data['test'])} domains, from {archive}")
        for setting, files in files_by_setting.items():
            sizes = ", ".join(f"{name} {len(lines):,}" for name, lines in files.items() if "/" not in name)
            print(f"  {setting}/: {len(files)} files; {sizes}")
        print(f"use them: DATA_DIR={args.output_directory} SIZE=base launch/mmlu/5-shot.sh, or its neighbours")


if __name__ == "__main__":
    main()
