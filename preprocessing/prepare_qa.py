#!/usr/bin/env python3
"""Make the questions of NaturalQuestions and TriviaQA from their originals, with the paper's 64-shot subsets.

    prepare_qa.py --output_directory $DATA_DIR/data                 download the missing originals (TriviaQA is large)
    prepare_qa.py --output_directory $DATA_DIR/data --dataset nq --nq_train NQ-open.train.jsonl \\
        --nq_dev NQ-open.dev.jsonl --index_tar dataindex.tar.gz     without a network; TriviaQA: --triviaqa_tar

makes, below --output_directory, for `--task qa`,

    nq_data/, triviaqa_data/
        train.jsonl   train.64-shot.jsonl   dev.jsonl   test.jsonl

A line is {"question": "..", "answers": ["..", ..]}; in TriviaQA it also has a "target", the answer to train on. The
splits are those usual in open-domain question answering: dev is held out from the original's training questions, test
is the original's dev file. The index archive holds the numbers of their questions in the originals. An existing folder
is kept, unless --overwrite.

Archives are not extracted to the disk, and originals are read one question at a time. Downloads are kept for the next
run, as index.tar, triviaqa_data.tar and original_naturalquestions/; delete them as you like.
"""

import argparse
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from originals import exit_on_error, find_original, json_line, parse_integers, tar_files, write_lines

from atlas_jax.commands.flags import Parser
from atlas_jax.data.jsonl import read_rows
from atlas_jax.errors import UserError
from atlas_jax.runtime.progress import progress
from atlas_jax.storage.files import atomic_folder
from atlas_jax.storage.paths import user_path

INDEX_URL = "https://dl.fbaipublicfiles.com/FiD/data/dataindex.tar.gz"
NQ_URL = "https://raw.githubusercontent.com/google-research-datasets/natural-questions/master/nq_open/"
TRIVIAQA_URL = "http://nlp.cs.washington.edu/triviaqa/data/triviaqa-unfiltered.tar.gz"

INDEX_NAMES = {"nq": "NQ", "triviaqa": "TQA"}
FILES = {"train": "train", "train.64-shot": "train", "dev": "train", "test": "dev"}  # file -> split of its originals
FEW_SHOT_INDICES = {  # the paper's 64 training questions, in its order: 0-based numbers in the original's training file
    "nq": parse_integers(
        """
        27144 14489 49702 38094 6988 60660 65643 48249 48085 52629 48431 7262 34659 24332 44839 17721 50819 62279 37021
        77405 52556 23802 40974 64678 69673 77277 18419 25635 1513 11930 5542 13453 52754 65663 67400 42409 74541 33159
        65445 28572 74069 7162 19204 63509 12244 48532 72778 37507 70300 29927 18186 27579 58411 63559 4347 59383 57392
        42014 77920 45592 32321 3422 61041 34051
        """
    ),
    "triviaqa": parse_integers(
        """
        75927 38807 452 68095 44621 34592 36091 65286 56484 48197 34692 28011 16670 62641 37865 6658 45724 37527 17740
        31133 8010 48573 53670 15514 25996 54404 10739 55105 66122 73324 41202 71253 41258 51344 60092 50455 65078
        36169 33408 55106 40526 65582 66337 39766 77174 17289 7367 50930 21151 21809 52804 26110 54414 73358 11459
        66019 41084 13349 39059 6626 25540 15110 53320 61313
        """
    ),
}

QuestionLines = dict[int, str]  # number of a question in an original -> its line of JSON


def read_index(archive: Path, dataset: str) -> dict[str, list[int]]:
    """Returns {split: numbers of its questions in the originals}; `UserError` if a split is missing."""
    members = {f"{INDEX_NAMES[dataset]}.{split}.idx.json": split for split in ("train", "dev", "test")}
    index = {}
    with tar_files(archive) as files:
        for path, file in files:
            if path.name in members:
                index[members[path.name]] = parse_numbers(file.read(), f"{archive}: {path}")
    missing = [name for name, split in members.items() if split not in index]
    if missing:
        raise UserError(f"{archive}: has no {', '.join(missing)}; give the index archive, {INDEX_URL}")
    return index


def parse_numbers(raw: bytes, where: str) -> list[int]:
    """Parses a JSON list of whole numbers >= 0; `where` names it in error messages."""
    try:
        numbers = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}); fetch the archive again") from None
    if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
        raise UserError(f"{where}: not a list of numbers; fetch the archive again")
    return numbers


def read_nq(originals: Mapping[str, Path], wanted: Mapping[str, set[int]]) -> dict[str, QuestionLines]:
    """Returns {split: lines of the wanted questions} of NaturalQuestions."""
    return {
        split: select_rows(((f"{path}:{line}", row) for line, row in read_rows(path)), wanted[split], nq_row, str(path))
        for split, path in originals.items()
    }


def read_triviaqa(archive: Path, wanted: Mapping[str, set[int]]) -> dict[str, QuestionLines]:
    """Returns {split: lines of the wanted questions} of TriviaQA, read from the archive in one pass."""
    lines = {}
    with tar_files(archive) as files:
        for path, file in files:
            for split in wanted:
                if path.name == f"unfiltered-web-{split}.json":
                    where = f"{archive}: {path}"
                    lines[split] = select_rows(
                        data_elements(JsonStream(file, where)), wanted[split], triviaqa_row, where
                    )
    for split in wanted.keys() - lines:
        raise UserError(f"{archive}: has no unfiltered-web-{split}.json; give the unfiltered archive, {TRIVIAQA_URL}")
    return lines


def nq_row(row: Any) -> dict[str, Any]:
    return {"question": require_text(row["question"]), "answers": require_texts(row["answer"])}


def triviaqa_row(row: Any) -> dict[str, Any]:
    target = require_text(row["Answer"]["Value"])
    return {
        "question": require_text(row["Question"]),
        "answers": require_texts(row["Answer"]["Aliases"]),
        "target": target.title() if target.isupper() else target,
    }


def require_text(value: Any) -> str:
    """Returns `value` if it is valid text; otherwise raises TypeError or UnicodeEncodeError."""
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # fails for half of a surrogate pair
    return value


def require_texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise TypeError
    return [require_text(text) for text in value]


def select_rows(
    rows: Iterable[tuple[str, Any]], wanted: set[int], convert: Callable[[Any], dict[str, Any]], file_name: str
) -> QuestionLines:
    """Converts the rows with the wanted numbers; `rows` yields (its place for error messages, row) of an original."""
    lines: QuestionLines = {}
    count = 0
    with progress(file_name, "questions") as advance:
        for where, row in rows:
            if count in wanted:
                try:
                    lines[count] = json_line(convert(row), ascii_only=False)
                except (LookupError, TypeError, UnicodeEncodeError):
                    raise UserError(f"{where}: not a question as in the original; fetch it again") from None
            count += 1
            advance(1)
    if count <= max(wanted, default=-1):
        raise UserError(f"{file_name}: {count:,} questions, and number {max(wanted):,} is asked for; give the original")
    return lines


WHITESPACE = re.compile(r"[ \t\r\n]*")
VALUE_ENDS = frozenset(" \t\r\n,:]}")  # the characters that may follow a value


class JsonStream:
    """Pull parser of a JSON text of any size: reads and keeps only the part that it parses."""

    CHUNK = 2**20  # characters a read
    MAX_VALUE_LENGTH = 2**24  # characters, after which an incomplete value is an error

    def __init__(self, file: IO[bytes], where: str):
        self._file, self._where, self._line = io.TextIOWrapper(file, encoding="utf-8-sig"), where, 1
        self._text, self._position = "", 0

    @property
    def where(self) -> str:
        """Archive, member and line of the parser, for error messages."""
        return f"{self._where}:{self._line}"

    def expect(self, expected: str) -> str:
        """Skips whitespace, then one of the expected characters, which it returns; `UserError` at any other."""
        self._skip_whitespace()
        character = self._text[self._position : self._position + 1]
        if not character or character not in expected:
            raise self._error(f"{character or 'the end'} stands where {' or '.join(expected)} is due")
        self._position += 1
        return character

    def read_value(self) -> Any:
        """Skips whitespace, then parses and returns a value; `UserError` if it is invalid or too long."""
        self._skip_whitespace()
        while True:
            problem, end = None, self._position
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._position)
            except (ValueError, RecursionError) as error:
                problem = getattr(error, "msg", error)
            complete = self._text[end : end + 1] in VALUE_ENDS and not problem  # a number may go on in the next chunk
            if complete or len(self._text) - self._position > self.MAX_VALUE_LENGTH or not self._read_chunk():
                break
        if problem:
            raise self._error(problem)
        self._advance(end)
        return value

    def _skip_whitespace(self) -> None:
        while True:
            whitespace = WHITESPACE.match(self._text, self._position)
            assert whitespace
            self._advance(whitespace.end())
            if self._position < len(self._text) or not self._read_chunk():
                return

    def _advance(self, end: int) -> None:
        self._line += self._text.count("\n", self._position, end)
        self._position = end

    def _read_chunk(self) -> bool:
        try:
            more = self._file.read(self.CHUNK)
        except UnicodeDecodeError:
            raise self._error("invalid UTF-8") from None
        self._text, self._position = self._text[self._position :] + more, 0
        return bool(more)

    def _error(self, problem: object) -> UserError:
        return UserError(f"{self.where}: {problem}; fetch the archive again")


def data_elements(stream: JsonStream) -> Iterator[tuple[str, Any]]:
    """Yields (place for error messages, element) of the list under the key "Data" of the object in the stream."""
    stream.expect("{")
    while stream.read_value() != "Data":
        stream.expect(":")
        stream.read_value()
        stream.expect(",")
    stream.expect(":")
    stream.expect("[")
    while True:
        element = stream.read_value()
        yield stream.where, element
        if stream.expect(",]") == "]":
            return


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output_directory", type=user_path, metavar="DIR", default=Path("data"), help="default: data")
    parser.add_argument("--dataset", nargs="+", choices=INDEX_NAMES, default=[*INDEX_NAMES], help="default: both")
    parser.add_argument("--overwrite", action="store_true", help="replace existing folders")
    parser.add_argument(
        "--nq_train", type=user_path, metavar="FILE", help=f"instead of downloading {NQ_URL}NQ-open.train.jsonl"
    )
    parser.add_argument(
        "--nq_dev", type=user_path, metavar="FILE", help="instead of downloading NQ-open.dev.jsonl from there"
    )
    parser.add_argument("--triviaqa_tar", type=user_path, metavar="FILE", help=f"instead of downloading {TRIVIAQA_URL}")
    parser.add_argument(
        "--index_tar", type=user_path, metavar="FILE", help=f"the splits, instead of downloading {INDEX_URL}"
    )
    with exit_on_error("prepare_qa"):
        args = parser.parse_args(argv)
        for dataset in args.dataset:
            prepare(dataset, args)


def find_nq_original(split: str, args: argparse.Namespace) -> Path:
    name = f"NQ-open.{split}.jsonl"
    target = args.output_directory / "original_naturalquestions" / name
    return find_original(getattr(args, f"nq_{split}"), f"--nq_{split}", NQ_URL + name, target)


def prepare(dataset: str, args: argparse.Namespace) -> None:
    output = args.output_directory
    folder = output / f"{dataset}_data"
    if folder.exists() and not args.overwrite:
        missing = [name for name in FILES if not (folder / f"{name}.jsonl").is_file()]
        if missing:
            raise UserError(f"{folder}: is there without {missing[0]}.jsonl; --overwrite makes it anew")
        print(f"{folder}: is there and kept; --overwrite makes it anew")
        return

    index = read_index(find_original(args.index_tar, "--index_tar", INDEX_URL, output / "index.tar"), dataset)
    index["train.64-shot"] = FEW_SHOT_INDICES[dataset]
    wanted = {"train": {*index["train"], *index["train.64-shot"], *index["dev"]}, "dev": {*index["test"]}}
    if dataset == "nq":
        lines = read_nq({split: find_nq_original(split, args) for split in wanted}, wanted)
    else:
        target = output / "triviaqa_data.tar"
        lines = read_triviaqa(find_original(args.triviaqa_tar, "--triviaqa_tar", TRIVIAQA_URL, target), wanted)

    with atomic_folder(folder, "choose another --output_directory", replace=args.overwrite) as draft:
        for name, split in FILES.items():
            write_lines(draft / f"{name}.jsonl", (lines[split][number] for number in index[name]))
    sizes = ", ".join(f"{name}.jsonl {len(index[name]):,}" for name in FILES)
    print(f"{folder}: {sizes}\n  use it: atlas train --task qa --train_data {folder}/train.64-shot.jsonl")


if __name__ == "__main__":
    main()
