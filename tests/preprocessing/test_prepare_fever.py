"""FEVER's claims and their 64-shot subset, from small files in the original's format."""

import hashlib
import json
from pathlib import Path

import pytest

from tests.preprocessing.test_prepare_originals import Run, load, run, tree

NAMES = ("train", "shared_task_dev", "shared_task_test")
LABELS = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")


def claim(number: int, split: str = "train") -> str:
    """A line as FEVER's own, with spacing that json.dumps would not choose; test claims have nothing but the claim."""
    text = f"{split} claim \u00e9 {number}."
    if split == "test":
        return f'{{"id":{number}, "claim":"{text}"}}\n'
    evidence = f'[[[92206, 104971, "Nikolaj_Coster-Waldau", 7]], [[{number}, null, null, null]]]'
    label = LABELS[number % 3]
    return f'{{"id": {number}, "verifiable": "x", "label": "{label}","claim": "{text}", "evidence": {evidence}}}\n'


@pytest.fixture
def originals(tmp_path) -> Path:
    """The folder of the three originals; of the 64 training claims, 200 lines hold one: 135."""
    folder = tmp_path / "originals"
    folder.mkdir()
    for split, count in {"train": 200, "dev": 3, "test": 2}.items():
        text = "".join(claim(number, split) for number in range(count))
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def prepare(originals: Path, *arguments: object) -> Run:
    given = [part for split in ("train", "dev", "test") for part in (f"--{split}", originals / f"{split}.jsonl")]
    return run("prepare_fever", "--output_directory", originals.parent / "out", *given, *arguments)


def test_originals_are_unchanged_and_64_claims_drawn(originals, tmp_path):
    """Three files byte by byte, and those of the 64 lines that the training file has, counted from 0."""
    done = prepare(originals)
    assert (done.status, done.err) == (0, "")
    made = tree(tmp_path / "out/fever_data")
    few = json.dumps(json.loads(claim(135))) + "\n"
    assert made == tree(originals) | {"train-64.jsonl": few.encode()}
    assert "train-64.jsonl: 1 claims; " in done.out
    assert "ends before the other 63" in done.out
    assert few != claim(135)  # as the reference, it is written anew, in ASCII


def test_the_64_claims_are_the_papers():
    """The published line numbers."""
    few = load("prepare_fever").FEW
    assert len(set(few)) == 64
    assert hashlib.sha256(repr(few).encode()).hexdigest()[:16] == "927d211047383acf"


def test_lines_are_counted_with_blank_ones(originals, tmp_path):
    """A blank line before it makes the claim at 134 the one on line 135."""
    path = originals / "train.jsonl"
    path.write_bytes(b"\n" + path.read_bytes())
    assert prepare(originals).status == 0
    few = (tmp_path / "out/fever_data/train-64.jsonl").read_bytes()
    assert json.loads(few) == json.loads(claim(134))


def test_what_is_there_is_kept_unless_overwritten(originals, tmp_path):
    """Also where another program has put only the originals there: then the subset alone is made."""
    folder = tmp_path / "out/fever_data"
    folder.parent.mkdir()
    originals.rename(folder)
    before = tree(folder)
    assert run("prepare_fever", "--output_directory", tmp_path / "out").status == 0
    assert tree(folder).keys() - before.keys() == {"train-64.jsonl"}

    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "dev", "test"):
        (other / f"{split}.jsonl").write_text(claim(7, split) * 136, encoding="utf-8")
    assert prepare(other).out.count("kept; --overwrite") == 3
    assert before.items() <= tree(folder).items()
    assert prepare(other, "--overwrite").status == 0
    few = json.dumps(json.loads(claim(7))) + "\n"
    assert tree(folder) == tree(other) | {"train-64.jsonl": few.encode()}


def test_originals_are_fetched_once_or_to_overwrite(tmp_path, monkeypatch):
    """From FEVER's own addresses, to where they are read."""
    fetched = []

    def download(url: str, place: Path) -> None:
        fetched.append(url)
        place.write_text(claim(len(fetched)), encoding="utf-8")

    monkeypatch.setattr(load("originals"), "download", download)
    addresses = [f"https://fever.ai/download/fever/{name}.jsonl" for name in NAMES]
    for arguments, count in ((), 1), ((), 1), (("--overwrite",), 2):
        assert run("prepare_fever", "--output_directory", tmp_path, *arguments).status == 0
        assert fetched == addresses * count
    assert (tmp_path / "fever_data/test.jsonl").read_text(encoding="utf-8") == claim(6)


BAD = {  # a file and its second line -> what is said
    "no claim": ("dev", '{"label": "SUPPORTS"}', "`claim` is no text"),
    "claim": ("test", '{"claim": 1}', "`claim` is no text"),
    "no label": ("train", '{"claim": "x"}', "`label` is none of SUPPORTS, REFUTES, NOT ENOUGH INFO"),
    "label": ("dev", '{"claim": "x", "label": "supports"}', "`label` is none of"),
    "label in test": ("test", '{"claim": "x", "label": "maybe"}', "`label` is none of"),
    "web page": ("train", "<html>", "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named_and_nothing_replaced(originals, tmp_path, case):
    """The given file and its line; what is there stays, whole."""
    prepare(originals)
    before = tree(tmp_path / "out")
    split, line, problem = BAD[case]
    (originals / "train.jsonl").write_text(claim(1) * 200, encoding="utf-8")
    path = originals / f"{split}.jsonl"
    path.write_text(f"{claim(0, split)}{line}\n", encoding="utf-8")
    assert prepare(originals, "--overwrite").said(f"{path}:2: {problem}")
    assert tree(tmp_path / "out") == before
