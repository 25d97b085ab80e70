#!/usr/bin/env python3
"""Make the sample that ships with the package, atlas_jax/sample/, from its sources: the same bytes every time.

    make_sample.py --wikipedia wikipedia-vital.jsonl --mmlu data.tar --reader assets/reader \
        --retriever assets/retriever --checkpoint checkpoint/step-0/model.pth.tar --output atlas_jax/sample

`passages.jsonl`: passages drawn evenly over Wikipedia's topics. `mmlu.jsonl`: two test questions from each of MMLU's 57
domains. `reader/`, `retriever/`: configuration and tokenizer. `model/`: a checkpoint with tiny random weights for both.
The content and license of the files are in `README.md` beside them, which is written by hand.
"""

import argparse
import collections
import csv
import io
import json
import random
import shutil
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

PASSAGE_FIELDS = ("id", "title", "section", "text")
LETTERS = "ABCD"
TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")  # the only files that AutoTokenizer reads


def even_shares(available: Mapping[str, int], total: int) -> dict[str, int]:
    """Returns how many to draw of each kind: `total` in all, spread evenly, and at most `available` of a kind."""
    if sum(available.values()) < total:
        raise ValueError(f"{total} are wanted and {sum(available.values())} there")
    shares, remaining = {}, total
    for i, (kind, count) in enumerate(sorted(available.items(), key=lambda item: (item[1], item[0]))):
        shares[kind] = min(count, remaining // (len(available) - i))
        remaining -= shares[kind]
    return shares


def sample_passages(path: Path, count: int, seed: int) -> list[dict[str, str]]:
    """Draws `count` passages, spread evenly over the topics; returns them in file order."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    topics: dict[str, list[int]] = collections.defaultdict(list)
    for number, row in enumerate(rows):
        topics[row["topic"]].append(number)
    shares = even_shares({topic: len(numbers) for topic, numbers in topics.items()}, count)
    rng = random.Random(seed)
    chosen = sorted(number for topic in sorted(topics) for number in rng.sample(topics[topic], shares[topic]))
    return [{field: rows[number][field] for field in PASSAGE_FIELDS} for number in chosen]


def sample_questions(archive: Path, count: int, max_characters: int, seed: int) -> list[dict[str, Any]]:
    """Draws `count` test questions per domain, among those with four distinct options and at most `max_characters`."""
    rng = random.Random(seed)
    sample = []
    with tarfile.open(archive) as tar:
        members = {PurePosixPath(member.name): member for member in tar if member.isfile()}
        for path in sorted(path for path in members if path.match("data/test/*_test.csv")):
            file = tar.extractfile(members[path])
            assert file is not None
            rows = list(csv.reader(io.TextIOWrapper(file, encoding="utf-8", newline="")))
            eligible = [row for row in rows if len(set(row[1:5])) == 4 and sum(map(len, row[:5])) <= max_characters]
            for row in (eligible[number] for number in sorted(rng.sample(range(len(eligible)), count))):
                options = dict(zip(LETTERS, row[1:5], strict=True))
                sample.append({"question": row[0], "options": options, "answer": row[5], "dataset": path.stem})
    return sample


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(text.encode())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikipedia", type=Path, required=True, help="jsonl: id, title, section, text, topic")
    parser.add_argument("--mmlu", type=Path, required=True, help="MMLU's archive, with data/test/*_test.csv in it")
    parser.add_argument("--reader", type=Path, required=True, help="folder with the reader's config and tokenizer")
    parser.add_argument(
        "--retriever", type=Path, required=True, help="folder with the retriever's config and tokenizer"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a model.pth.tar of both")
    parser.add_argument("--output", type=Path, default=Path("atlas_jax/sample"), help="default: atlas_jax/sample")
    parser.add_argument("--passages", type=int, default=2000, help="how many passages (default: 2000)")
    parser.add_argument("--questions", type=int, default=2, help="how many questions a domain (default: 2)")
    parser.add_argument("--longest", type=int, default=1199, help="characters of question and options (default: 1199)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    args = parser.parse_args(argv)

    for folder in ("reader", "retriever", "model"):
        (args.output / folder).mkdir(parents=True, exist_ok=True)
    try:
        write_jsonl(args.output / "passages.jsonl", sample_passages(args.wikipedia, args.passages, args.seed))
        questions = sample_questions(args.mmlu, args.questions, args.longest, args.seed)
        write_jsonl(args.output / "mmlu.jsonl", questions)
        for source, folder in ((args.reader, "reader"), (args.retriever, "retriever")):
            for name in TOKENIZER_FILES:
                shutil.copyfile(source / name, args.output / folder / name)
        shutil.copyfile(args.checkpoint, args.output / "model/model.pth.tar")
    except (OSError, tarfile.TarError, ValueError, KeyError) as error:
        what = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else repr(error)
        print(f"make_sample: {what}; --help says what each source must be", file=sys.stderr)
        sys.exit(2)
    files = sorted(path for path in args.output.rglob("*") if path.is_file())
    print(f"{args.output}: {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes")


if __name__ == "__main__":
    main()
