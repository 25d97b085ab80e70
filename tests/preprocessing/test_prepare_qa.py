"""NaturalQuestions and TriviaQA, from small files in the originals' formats."""

import hashlib
import io
import json
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from atlas_jax.errors import UserError
from atlas_jax.tasks.qa import QA
from tests.preprocessing.test_prepare_originals import HOSTILE, Run, load_script, read_tree, run_script, write_tar

FEW_SHOT = [4, 0]
INDEX = {
    **{"NQ.train": [3, 1, 4], "NQ.dev": [0, 2], "NQ.test": [1, 0]},
    **{"TQA.train": [2, 5, 3], "TQA.dev": [1], "TQA.test": [2, 0]},
}
FILES = ("train.jsonl", "train.64-shot.jsonl", "dev.jsonl", "test.jsonl")


def nq(name: str, count: int) -> list[dict]:
    return [{"question": f"{name} {n}é", "answer": [f"a{n}", "\u2028"]} for n in range(count)]


def triviaqa(name: str, count: int) -> list[dict]:
    """Rows with TriviaQA's fields; one answer is in capitals, one is a number."""
    values = ["sunset BLVD", "SUNSET BOULEVARD", "1980", "Malmö", "USA 1994", "x"]
    return [
        {
            "Answer": {
                "Aliases": [f"alias {n}", "Sunset"],
                "NormalizedValue": "x",
                "Type": "Other",
                "Value": values[n],
            },
            "EntityPages": [{"DocSource": "TagMe", "Filename": "a.txt", "Title": '}],"Data":['}],
            "Question": f'{name} "{n}"\n?',
            "QuestionId": f"tc_{n}",
            "QuestionSource": "http://www.triviacountry.com/",
            "SearchResults": [],
        }
        for n in range(count)
    ]


def as_json(rows: Sequence[object]) -> bytes:
    """A file in TriviaQA's format: an object with the rows under the key "Data"."""
    whole = {"Data": rows, "Domain": "unfiltered-web", "VerifiedEval": False, "Version": 1.0}
    return json.dumps(whole, indent=4).encode()


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


class Originals:
    """Small original files in a folder, and the call of the script on them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.index(INDEX)
        self.nq("train", nq("train", 5))
        self.nq("dev", nq("dev", 2))
        self.triviaqa({"train": as_json(triviaqa("train", 6)), "dev": as_json(triviaqa("dev", 3))})

    def index(self, numbers: Mapping[str, object]) -> Path:
        members = {f"./{name}.idx.json": json.dumps(value).encode() for name, value in numbers.items()}
        return write_tar(self.folder / "index.tar.gz", members)

    def nq(self, split: str, rows: Sequence[object]) -> Path:
        return write_jsonl(self.folder / f"NQ-open.{split}.jsonl", rows)

    def triviaqa(self, contents: Mapping[str, bytes]) -> Path:
        members = {f"triviaqa-unfiltered/unfiltered-web-{split}.json": content for split, content in contents.items()}
        return write_tar(self.folder / "triviaqa.tar.gz", members)

    def prepare(self, *arguments: object) -> Run:
        flags = {"index_tar": "index.tar.gz", "triviaqa_tar": "triviaqa.tar.gz"}
        flags |= {f"nq_{split}": f"NQ-open.{split}.jsonl" for split in ("train", "dev")}
        given = [part for flag, name in flags.items() for part in (f"--{flag}", self.folder / name)]
        return run_script("prepare_qa", "--output_directory", self.folder / "out", *given, *arguments)

    def outputs(self) -> dict[str, bytes]:
        return read_tree(self.folder / "out")


@pytest.fixture
def originals(tmp_path, monkeypatch) -> Originals:
    """Small originals; two few-shot questions in place of 64."""
    monkeypatch.setattr(load_script("prepare_qa"), "FEW_SHOT_INDICES", dict.fromkeys(("nq", "triviaqa"), FEW_SHOT))
    return Originals(tmp_path)


def test_natural_questions_are_selected_by_number(originals):
    """train and dev come from the original's train, test from its dev, in the index's order; text is not escaped."""
    assert originals.prepare("--dataset", "nq").status == 0
    train, dev = nq("train", 5), nq("dev", 2)
    chosen = {
        "nq_data/train.jsonl": [train[3], train[1], train[4]],
        "nq_data/train.64-shot.jsonl": [train[4], train[0]],
        "nq_data/dev.jsonl": [train[0], train[2]],
        "nq_data/test.jsonl": [dev[1], dev[0]],
    }
    expected = {
        path: "".join(
            f'{{"question": "{row["question"]}", "answers": ["{row["answer"][0]}", "\u2028"]}}\n' for row in rows
        )
        for path, rows in chosen.items()
    }
    assert {path: content.decode() for path, content in originals.outputs().items()} == expected


def test_triviaqa_rows_have_a_target_in_title_case(originals):
    """The aliases are the answers, the value is the target, in title case if it is all in capitals."""
    result = originals.prepare("--dataset", "triviaqa")
    assert result.status == 0
    outputs = {path: [json.loads(line) for line in text.splitlines()] for path, text in originals.outputs().items()}
    assert {path: [row["question"] for row in rows] for path, rows in outputs.items()} == {
        "triviaqa_data/train.jsonl": ['train "2"\n?', 'train "5"\n?', 'train "3"\n?'],
        "triviaqa_data/train.64-shot.jsonl": ['train "4"\n?', 'train "0"\n?'],
        "triviaqa_data/dev.jsonl": ['train "1"\n?'],
        "triviaqa_data/test.jsonl": ['dev "2"\n?', 'dev "0"\n?'],
    }
    rows = sorted((row for rows in outputs.values() for row in rows), key=lambda row: row["question"])
    assert [row["target"] for row in rows if row["question"].startswith("train")] == [
        *("sunset BLVD", "Sunset Boulevard", "1980", "Malmö", "Usa 1994", "x")
    ]
    assert list(rows[-1].items())[:2] == [("question", 'train "5"\n?'), ("answers", ["alias 5", "Sunset"])]
    assert "Malmö" in originals.outputs()["triviaqa_data/train.jsonl"].decode()
    assert f"--train_data {originals.folder}/out/triviaqa_data/train.64-shot.jsonl" in result.out


def test_both_data_sets_fit_the_qa_task_and_are_kept(originals):
    """--task qa accepts all rows; a second run keeps the folders, and --overwrite makes them again, byte for byte."""
    assert originals.prepare().status == 0
    before = originals.outputs()
    assert before.keys() == {f"{folder}/{name}" for folder in ("nq_data", "triviaqa_data") for name in FILES}
    for content in before.values():
        for line in content.decode().split("\n")[:-1]:
            QA().check(json.loads(line))
    originals.nq("train", nq("changed", 5))
    assert originals.prepare().out.count("is there and kept; --overwrite") == 2
    assert originals.outputs() == before
    assert originals.prepare("--overwrite").status == 0
    assert originals.outputs() != before
    originals.nq("train", nq("train", 5))
    assert originals.prepare("--overwrite").status == 0
    assert originals.outputs() == before
    (originals.folder / "out/nq_data/dev.jsonl").unlink()
    assert originals.prepare().failed_with("nq_data: is there without dev.jsonl", "--overwrite")


def test_existing_originals_are_not_downloaded(originals):
    """Originals at the paths of the downloads are used."""
    out = originals.folder / "out"
    (out / "original_naturalquestions").mkdir(parents=True)
    for split in ("train", "dev"):
        name = f"NQ-open.{split}.jsonl"
        (originals.folder / name).rename(out / "original_naturalquestions" / name)
    (originals.folder / "index.tar.gz").rename(out / "index.tar")
    (originals.folder / "triviaqa.tar.gz").rename(out / "triviaqa_data.tar")
    assert run_script("prepare_qa", "--output_directory", out).status == 0
    assert {path.name for path in out.iterdir()} >= {"nq_data", "triviaqa_data"}


def test_the_64_shots_are_those_of_the_paper(tmp_path):
    """The indices are the published ones in their order; originals too short for them are an error, not fewer shots."""
    indices = load_script("prepare_qa").FEW_SHOT_INDICES
    digests = {name: hashlib.sha256(repr(shots).encode()).hexdigest()[:16] for name, shots in indices.items()}
    assert digests == {"nq": "7ac17e61c2feceaf", "triviaqa": "f83a368c437cdfd5"}
    assert all(len(set(shots)) == 64 for shots in indices.values())
    originals = Originals(tmp_path)
    result = originals.prepare()
    assert result.failed_with(
        f"{tmp_path}/NQ-open.train.jsonl: 5 questions, and number 77,920 is asked for; give the original"
    )
    assert not originals.outputs()


BAD_INDEX = {
    "too large": {"NQ.test": [2]},
    "negative": {"NQ.train": [-1]},
    "no list": {"NQ.train": {"0": 1}},
    "no numbers": {"NQ.dev": [0, "1"]},
    "truth": {"NQ.dev": [True]},
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_invalid_question_numbers_are_refused(originals, case):
    """The error names archive and member, or the original that has no question of that number."""
    archive = originals.index(INDEX | BAD_INDEX[case])
    result = originals.prepare("--dataset", "nq")
    if case == "too large":
        assert result.failed_with(f"{originals.folder}/NQ-open.dev.jsonl: 2 questions, and number 2 is asked for")
    else:
        (name,) = BAD_INDEX[case]
        assert result.failed_with(f"{archive}: {name}.idx.json: not a list of numbers")
    assert not originals.outputs()


def test_a_missing_member_is_named(originals):
    """The error names the member: a missing split of the index, missing dev questions, an index that is not JSON."""
    archive = originals.index({name: numbers for name, numbers in INDEX.items() if name != "NQ.dev"})
    assert originals.prepare().failed_with(f"{archive}: has no NQ.dev.idx.json")
    originals.index(INDEX)
    archive = originals.triviaqa({"train": as_json(triviaqa("train", 6))})
    assert originals.prepare("--dataset", "triviaqa").failed_with(f"{archive}: has no unfiltered-web-dev.json")
    broken = write_tar(originals.folder / "index.tar.gz", {"NQ.train.idx.json": b"[1, 2"})
    assert originals.prepare().failed_with(f"{broken}: NQ.train.idx.json: not valid JSON")
    assert not originals.outputs()


@pytest.mark.parametrize("row", [{"question": "?"}, {"question": 1, "answer": ["x"]}, {"question": "?", "answer": "x"}])
def test_a_bad_row_of_natural_questions_is_named_by_line(originals, row):
    """A missing answer, a question that is no text and an answer that is no list are errors with the line."""
    path = originals.nq("train", [*nq("train", 4), row])
    assert originals.prepare().failed_with(f"{path}:5: not a question as in the original")
    assert not originals.outputs()


GOOD = json.dumps(triviaqa("train", 6)).encode()
BAD_JSON = {  # content of the training member, error after its name
    "no object": (GOOD, ":1: [ stands where { is due"),
    "no list": (b'{"Data": {}}', ":1: { stands where [ is due"),
    "no data": (b'{"Version": 1.0}', ":1: } stands where , is due"),
    "empty": (b"", ":1: the end stands where { is due"),
    "cut in a question": (b'{"Data":\n' + GOOD[:-100], ":2: "),
    "cut between questions": (b'{"Data":\n' + GOOD[:-1], ":2: the end stands where , or ] is due"),
    "malformed": (b'{"Data": [\n\n{"Answer" 1}]}', ":3: Expecting ':' delimiter"),
    "not text": (b'{"Data": ["\xff"]}', ":1: invalid UTF-8"),
    "deep": (b'{"Data": ' + b"[" * 100_000, ":1: "),
    "fields": (b'{"Data": [\n{"Question": "?"}]}', ":2: not a question as in the original"),
    "alias": (GOOD.replace(b'"alias 0"', b"7").join([b'{"Data": ', b"}"]), ":1: not a question as in the original"),
    "surrogate": (GOOD.replace(b"alias 0", rb"\ud800").join([b'{"Data": ', b"}"]), ":1: not a question"),
    "too few": (
        b'{"Data": ' + json.dumps(triviaqa("train", 5)).encode() + b"}",
        ": 5 questions, and number 5 is asked",
    ),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_a_bad_triviaqa_member_is_named_by_line(originals, case):
    """One line on stderr names member and line, whatever is wrong with the JSON; nothing is written."""
    content, error = BAD_JSON[case]
    archive = originals.triviaqa({"train": content, "dev": as_json(triviaqa("dev", 3))})
    result = originals.prepare("--dataset", "triviaqa")
    assert result.failed_with(f"{archive}: triviaqa-unfiltered/unfiltered-web-train.json{error}")
    assert not originals.outputs()


@pytest.mark.parametrize("dataset", ["nq", "triviaqa"])
def test_hostile_archives_are_refused(originals, dataset):
    """A hostile member is refused in the index archive and in TriviaQA's archive."""
    archive = write_tar(
        originals.folder / ("index.tar.gz" if dataset == "nq" else "triviaqa.tar.gz"), {}, HOSTILE["parent"]
    )
    assert originals.prepare("--dataset", dataset).failed_with(archive, "refused", "../../x.csv")
    assert not originals.outputs()


def data_elements(content: bytes) -> Iterator[object]:
    module = load_script("prepare_qa")
    return (element for _, element in module.data_elements(module.JsonStream(io.BytesIO(content), "x")))


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_chunk_size_does_not_change_the_parsed_json(monkeypatch, chunk):
    """The elements are the same wherever chunks end, in numbers, escapes and multi-byte characters."""
    monkeypatch.setattr(load_script("prepare_qa").JsonStream, "CHUNK", chunk)
    rows = [*triviaqa("é😀", 3), 12345, 'a\\"]', [], 1.5e3, None]
    whole = {"Version": 1.25, "Split": [{"Data": 1}], "Data": rows, "Domain": "x"}
    for content in (
        json.dumps(whole),
        json.dumps(whole, indent=2, ensure_ascii=False),
        "\ufeff \n" + json.dumps(whole),
    ):
        assert list(data_elements(content.encode())) == rows


def test_json_is_parsed_with_little_memory():
    """Memory does not grow with the text; its peak here is below a quarter of the text's size."""
    question = triviaqa("train", 1)[0] | {"SearchResults": [{"Description": "x" * 1000}] * 40}
    content = as_json([question] * 700)
    tracemalloc.start()
    assert sum(1 for _ in data_elements(content)) == 700
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(content) / 4


def test_an_endless_value_is_an_error(monkeypatch):
    """A string without closing quote is an error long before the end of the file."""
    parser = load_script("prepare_qa").JsonStream
    monkeypatch.setattr(parser, "CHUNK", 100)
    monkeypatch.setattr(parser, "MAX_VALUE_LENGTH", 1000)
    file = io.BytesIO(b'{"Data": ["' + b"x" * 10**6)
    endless = parser(file, "x")
    with pytest.raises(UserError, match="x:1: Unterminated string"):
        next(load_script("prepare_qa").data_elements(endless))
    assert file.tell() < 20_000
