#!/usr/bin/env python3
"""Make the questions of NaturalQuestions and TriviaQA from their originals, with the paper's 64-shot subsets.

    prepare_qa.py --output_directory $DATA_DIR/data                 download what is not there (TriviaQA is large)
    prepare_qa.py --output_directory $DATA_DIR/data --dataset nq --nq_train NQ-open.train.jsonl \\
        --nq_dev NQ-open.dev.jsonl --index_tar dataindex.tar.gz     without a network; TriviaQA: --triviaqa_tar

makes, below --output_directory, for `--task qa`,

    nq_data/, triviaqa_data/
        train.jsonl   train.64-shot.jsonl   dev.jsonl   test.jsonl

A line is {"question": "..", "answers": ["..", ..]}; in TriviaQA it also has a "target", the answer that is taught.
Splits are those usual in open-domain question answering: dev is held out of the original's training questions, test is
the original's dev file. Their numbers in the originals are in the index archive. A folder that is there is kept,
unless --overwrite.

Originals are read in place, one question at a time. Downloaded ones stay for another time, as index.tar,
triviaqa_data.tar and original_naturalquestions/; delete them as you like.
"""

import argparse
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from originals import integers, json_line, original, script, tar_files, write_lines

from atlas_jax.data.jsonl import read_rows
from atlas_jax.errors import UserError
from atlas_jax.runtime.progress import progress
from atlas_jax.storage.files import atomic_folder

INDEX_URL = "https://dl.fbaipublicfiles.com/FiD/data/dataindex.tar.gz"
NQ_URL = "https://raw.githubusercontent.com/google-research-datasets/natural-questions/master/nq_open/"
TRIVIAQA_URL = "http://nlp.cs.washington.edu/triviaqa/data/triviaqa-unfiltered.tar.gz"

INDEX_NAMES = {"nq": "NQ", "triviaqa": "TQA"}
FILES = {"train": "train", "train.64-shot": "train", "dev": "train", "test": "dev"}  # from which original each is taken
FEW = {  # the 64 training questions of the paper, in their order: numbers in the original's training file
    "nq": integers(
        """
        27144 14489 49702 38094 6988 60660 65643 48249 48085 52629 48431 7262 34659 24332 44839 17721 50819 62279 37021
        77405 52556 23802 40974 64678 69673 77277 18419 25635 1513 11930 5542 13453 52754 65663 67400 42409 74541 33159
        65445 28572 74069 7162 19204 63509 12244 48532 72778 37507 70300 29927 18186 27579 58411 63559 4347 59383 57392
        42014 77920 45592 32321 3422 61041 34051
        """
    ),
    "triviaqa": integers(
        """
        75927 38807 452 68095 44621 34592 36091 65286 56484 48197 34692 28011 16670 62641 37865 6658 45724 37527 17740
        31133 8010 48573 53670 15514 25996 54404 10739 55105 66122 73324 41202 71253 41258 51344 60092 50455 65078
        36169 33408 55106 40526 65582 66337 39766 77174 17289 7367 50930 21151 21809 52804 26110 54414 73358 11459
        66019 41084 13349 39059 6626 25540 15110 53320 61313
        """
    ),
}

RetrievedPassages = dict[int, str]  # questions by their number in an original, each as its line of JSON


def read_index(archive: Path, dataset: str) -> dict[str, list[int]]:
    """The numbers of the questions of each split."""
    members = {f"{INDEX_NAMES[dataset]}.{split}.idx.json": split for split in ("train", "dev", "test")}
    index = {}
    with tar_files(archive) as files:
        for path, file in files:
            if path.name in members:
                index[members[path.name]] = numbers(file.read(), f"{archive}: {path}")
    missing = [name for name, split in members.items() if split not in index]
    if missing:
        raise UserError(f"{archive}: has no {', '.join(missing)}; give the index archive, {INDEX_URL}")
    return index


def numbers(raw: bytes, where: str) -> list[int]:
    try:
        found = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}); fetch the archive again") from None
    if not isinstance(found, list) or not all(type(number) is int and number >= 0 for number in found):
        raise UserError(f"{where}: not a list of numbers; fetch the archive again")
    return found


def read_nq(originals: Mapping[str, Path], wanted: Mapping[str, set[int]]) -> dict[str, RetrievedPassages]:
    return {
        which: pick(((f"{path}:{line}", row) for line, row in read_rows(path)), wanted[which], nq_row, str(path))
        for which, path in originals.items()
    }


def read_triviaqa(archive: Path, wanted: Mapping[str, set[int]]) -> dict[str, RetrievedPassages]:
    found = {}
    with tar_files(archive) as files:
        for path, file in files:
            for which in wanted:
                if path.name == f"unfiltered-web-{which}.json":
                    where = f"{archive}: {path}"
                    found[which] = pick(elements(JsonText(file, where)), wanted[which], triviaqa_row, where)
    for which in wanted.keys() - found:
        raise UserError(f"{archive}: has no unfiltered-web-{which}.json; give the unfiltered archive, {TRIVIAQA_URL}")
    return found


def nq_row(row: Any) -> dict[str, Any]:
    return {"question": text(row["question"]), "answers": texts(row["answer"])}


def triviaqa_row(row: Any) -> dict[str, Any]:
    target = text(row["Answer"]["Value"])
    return {
        "question": text(row["Question"]),
        "answers": texts(row["Answer"]["Aliases"]),
        "target": target.title() if target.isupper() else target,
    }


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # half of a surrogate pair is no text
    return value


def texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise TypeError
    return [text(one) for one in value]


def pick(
    rows: Iterable[tuple[str, Any]], wanted: set[int], convert: Callable[[Any], dict[str, Any]], where: str
) -> RetrievedPassages:
    """Of the (place, row) in an original, those with the wanted numbers."""
    found: RetrievedPassages = {}
    count = 0
    with progress(where, "questions") as more:
        for place, row in rows:
            if count in wanted:
                try:
                    found[count] = json_line(convert(row), ascii_only=False)
                except (LookupError, TypeError, UnicodeEncodeError):
                    raise UserError(f"{place}: not a question as in the original; fetch it again") from None
            count += 1
            more(1)
    if count <= max(wanted, default=-1):
        raise UserError(f"{where}: {count:,} questions, and number {max(wanted):,} is asked for; give the original")
    return found


BLANKS = re.compile(r"[ \t\r\n]*")
ENDS = frozenset(" \t\r\n,:]}")  # what can follow a value


class JsonText:
    """A JSON text of any size, read as far as it is asked for."""

    CHUNK = 2**20  # characters
    LONGEST = 2**24  # of one value

    def __init__(self, file: IO[bytes], where: str):
        self._file, self._where, self._line = io.TextIOWrapper(file, encoding="utf-8-sig"), where, 1
        self._text, self._at = "", 0

    @property
    def place(self) -> str:
        """Archive, member and line."""
        return f"{self._where}:{self._line}"

    def take(self, expected: str) -> str:
        """Passes blanks, then one of the expected characters."""
        self._pass_blanks()
        found = self._text[self._at : self._at + 1]
        if not found or found not in expected:
            raise self._error(f"{found or 'the end'} stands where {' or '.join(expected)} is due")
        self._at += 1
        return found

    def value(self) -> Any:
        """Passes a value."""
        self._pass_blanks()
        while True:
            problem, end = None, self._at
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                problem = getattr(error, "msg", error)
            whole = self._text[end : end + 1] in ENDS and not problem  # else it may go on, as a number does
            if whole or len(self._text) - self._at > self.LONGEST or not self._read():
                break
        if problem:
            raise self._error(problem)
        self._pass(end)
        return value

    def _pass_blanks(self) -> None:
        while True:
            blanks = BLANKS.match(self._text, self._at)
            assert blanks
            self._pass(blanks.end())
            if self._at < len(self._text) or not self._read():
                return

    def _pass(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _read(self) -> bool:
        try:
            more = self._file.read(self.CHUNK)
        except UnicodeDecodeError:
            raise self._error("invalid UTF-8") from None
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def _error(self, problem: object) -> UserError:
        return UserError(f"{self.place}: {problem}; fetch the archive again")


def elements(json_text: JsonText) -> Iterator[tuple[str, Any]]:
    """The elements of the list "Data" in an object, each with its place."""
    json_text.take("{")
    while json_text.value() != "Data":
        json_text.take(":")
        json_text.value()
        json_text.take(",")
    json_text.take(":")
    json_text.take("[")
    while True:
        element = json_text.value()
        yield json_text.place, element
        if json_text.take(",]") == "]":
            return


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output_directory", type=Path, metavar="DIR", default=Path("data"), help="default: data")
    parser.add_argument("--dataset", nargs="+", choices=INDEX_NAMES, default=[*INDEX_NAMES], help="default: both")
    parser.add_argument("--overwrite", action="store_true", help="make what is there anew")
    parser.add_argument(
        "--nq_train", type=Path, metavar="FILE", help=f"instead of downloading {NQ_URL}NQ-open.train.jsonl"
    )
    parser.add_argument(
        "--nq_dev", type=Path, metavar="FILE", help="instead of downloading NQ-open.dev.jsonl from there"
    )
    parser.add_argument("--triviaqa_tar", type=Path, metavar="FILE", help=f"instead of downloading {TRIVIAQA_URL}")
    parser.add_argument(
        "--index_tar", type=Path, metavar="FILE", help=f"the splits, instead of downloading {INDEX_URL}"
    )
    args = parser.parse_args(argv)

    with script("prepare_qa"):
        for dataset in args.dataset:
            prepare(dataset, args)


def nq_original(which: str, args: argparse.Namespace) -> Path:
    name = f"NQ-open.{which}.jsonl"
    place = args.output_directory / "original_naturalquestions" / name
    return original(getattr(args, f"nq_{which}"), f"--nq_{which}", NQ_URL + name, place)


def prepare(dataset: str, args: argparse.Namespace) -> None:
    output = args.output_directory
    folder = output / f"{dataset}_data"
    if folder.exists() and not args.overwrite:
        missing = [name for name in FILES if not (folder / f"{name}.jsonl").is_file()]
        if missing:
            raise UserError(f"{folder}: is there without {missing[0]}.jsonl; --overwrite makes it anew")
        print(f"{folder}: is there and kept; --overwrite makes it anew")
        return

    index = read_index(original(args.index_tar, "--index_tar", INDEX_URL, output / "index.tar"), dataset)
    index["train.64-shot"] = FEW[dataset]
    wanted = {"train": {*index["train"], *index["train.64-shot"], *index["dev"]}, "dev": {*index["test"]}}
    if dataset == "nq":
        found = read_nq({which: nq_original(which, args) for which in wanted}, wanted)
    else:
        place = output / "triviaqa_data.tar"
        found = read_triviaqa(original(args.triviaqa_tar, "--triviaqa_tar", TRIVIAQA_URL, place), wanted)

    with atomic_folder(folder, "choose another --output_directory", replace=args.overwrite) as draft:
        for name, which in FILES.items():
            write_lines(draft / f"{name}.jsonl", (found[which][number] for number in index[name]))
    sizes = ", ".join(f"{name}.jsonl {len(index[name]):,}" for name in FILES)
    print(f"{folder}: {sizes}\n  use it: atlas train --task qa --train_data {folder}/train.64-shot.jsonl")


if __name__ == "__main__":
    main()
