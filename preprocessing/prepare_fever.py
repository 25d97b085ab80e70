#!/usr/bin/env python3
"""Download FEVER's claims for `--task fever`, and make the paper's 64-shot subset of the training claims.

    prepare_fever.py --output_directory $DATA_DIR/data              download the files that are missing
    prepare_fever.py --output_directory $DATA_DIR/data --train train.jsonl --dev shared_task_dev.jsonl \\
        --test shared_task_test.jsonl                               without a network

makes, below --output_directory,

    fever_data/
        train.jsonl   dev.jsonl   test.jsonl      the originals, unchanged: "claim", "label" (test has none) and more
        train-64.jsonl                            64 of the training claims, in the order of train.jsonl

An existing file is kept, unless --overwrite; train-64.jsonl is always made again from that train.jsonl.
"""

import argparse
import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from originals import exit_on_error, find_original, json_line, parse_integers, write_lines

from atlas_jax.commands.flags import Parser
from atlas_jax.data.jsonl import read_rows
from atlas_jax.errors import UserError
from atlas_jax.storage.files import atomic_file
from atlas_jax.storage.paths import user_path

URL = "https://fever.ai/download/fever/"
ORIGINALS = {"train": "train.jsonl", "dev": "shared_task_dev.jsonl", "test": "shared_task_test.jsonl"}
LABELS = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")
FEW_SHOT_INDICES = parse_integers(  # 0-based line numbers in train.jsonl; blank lines count
    """
    23236 131610 70907 110333 83874 121714 17355 115320 9907 42725 43614 139489 30589 76963 5916 7241 68848 59902
    113855 110886 102332 79223 24359 105929 131435 118883 8152 119911 28803 111318 29503 43420 39533 15214 29807
    29242 10288 111860 77451 102160 77982 132435 2875 47721 92378 128574 24721 83985 41521 97851 137243 74916 85056
    135 130085 19233 2887 124345 91769 63969 50865 135928 143220 124300
    """
)


def read_claims(path: Path, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (0-based line number, row) of an original file; `UserError` if it is not FEVER's."""
    for line, row in read_rows(path):
        if not isinstance(row.get("claim"), str):
            raise UserError(f"{path}:{line}: `claim` is no text; give FEVER's {ORIGINALS[split]}")
        if row.get("label") not in LABELS and (split != "test" or "label" in row):
            raise UserError(f"{path}:{line}: `label` is none of {', '.join(LABELS)}; give FEVER's {ORIGINALS[split]}")
        yield line - 1, row


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output_directory", type=user_path, metavar="DIR", default=Path("data"), help="default: data")
    for split, name in ORIGINALS.items():
        parser.add_argument(f"--{split}", type=user_path, metavar="FILE", help=f"instead of downloading {URL}{name}")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    with exit_on_error("prepare_fever"):
        prepare(parser.parse_args(argv))


def prepare(args: argparse.Namespace) -> None:
    folder = args.output_directory / "fever_data"
    few_shot_path = folder / "train-64.jsonl"
    with contextlib.ExitStack() as stack:
        sources, messages = {}, []
        for split, name in ORIGINALS.items():
            target = folder / f"{split}.jsonl"
            kept = target.is_file() and not args.overwrite
            given = None if kept else getattr(args, split)
            sources[target] = find_original(given, f"--{split}", URL + name, target, overwrite=args.overwrite)
            count = sum(1 for _ in read_claims(sources[target], split))
            messages.append(f"{target}: {count:,} claims{', kept; --overwrite brings it anew' if kept else ''}")
        train = sources[folder / "train.jsonl"]
        few_shot = [json_line(row) for number, row in read_claims(train, "train") if number in FEW_SHOT_INDICES]
        write_lines(stack.enter_context(atomic_file(few_shot_path)), few_shot)
        for target, source in sources.items():
            if source != target:
                shutil.copyfile(source, stack.enter_context(atomic_file(target)))
    absent = len(FEW_SHOT_INDICES) - len(few_shot)
    messages.append(
        f"{few_shot_path}: {len(few_shot)} claims{f'; {train} ends before the other {absent}' if absent else ''}"
    )
    messages.append(f"use them: atlas train --task fever --train_data {few_shot_path} --eval_data {folder}/dev.jsonl")
    print(*messages, sep="\n")


if __name__ == "__main__":
    main()
