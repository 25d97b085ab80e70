"""FEVER's claims and their 64-shot subset, from small files in the original's format."""

import hashlib
import json
from pathlib import Path

import pytest

from tests.preprocessing.test_prepare_originals import Run, load_script, read_tree, run_script

NAMES = ("train", "shared_task_dev", "shared_task_test")
LABELS = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")


def claim(number: int, split: str = "train") -> str:
    """A line in FEVER's format, with spacing unlike that of json.dumps; a test line has only id and claim."""
    text = f"{split} claim \u00e9 {number}."
    if split == "test":
        return f'{{"id":{number}, "claim":"{text}"}}\n'
    evidence = f'[[[92206, 104971, "Nikolaj_Coster-Waldau", 7]], [[{number}, null, null, null]]]'
    label = LABELS[number % 3]
    return f'{{"id": {number}, "verifiable": "x", "label": "{label}","claim": "{text}", "evidence": {evidence}}}\n'


@pytest.fixture
def originals(tmp_path) -> Path:
    """A folder with the three originals; its 200 training lines hold one of the 64 claims, line 135."""
    folder = tmp_path / "originals"
    folder.mkdir()
    for split, count in {"train": 200, "dev": 3, "test": 2}.items():
        text = "".join(claim(number, split) for number in range(count))
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def prepare(originals: Path, *arguments: object) -> Run:
    given = [part for split in ("train", "dev", "test") for part in (f"--{split}", originals / f"{split}.jsonl")]
    return run_script("prepare_fever", "--output_directory", originals.parent / "out", *given, *arguments)


def test_originals_are_copied_and_64_claims_drawn(originals, tmp_path):
    """The three files are copied byte for byte; the subset holds those of the 64 lines that exist, counted from 0."""
    result = prepare(originals)
    assert (result.status, result.err) == (0, "")
    outputs = read_tree(tmp_path / "out/fever_data")
    few_shot = json.dumps(json.loads(claim(135))) + "\n"
    assert outputs == read_tree(originals) | {"train-64.jsonl": few_shot.encode()}
    assert "train-64.jsonl: 1 claims; " in result.out
    assert "ends before the other 63" in result.out
    assert few_shot != claim(135)  # Reference: it is serialized again, in ASCII


def test_the_64_claims_are_those_of_the_paper():
    """The indices are 64 different ones with the published hash."""
    indices = load_script("prepare_fever").FEW_SHOT_INDICES
    assert len(set(indices)) == 64
    assert hashlib.sha256(repr(indices).encode()).hexdigest()[:16] == "927d211047383acf"


def test_blank_lines_count_as_lines(originals, tmp_path):
    """With a blank line at the start of the file, claim 134 is on line 135 and drawn."""
    path = originals / "train.jsonl"
    path.write_bytes(b"\n" + path.read_bytes())
    assert prepare(originals).status == 0
    few_shot = (tmp_path / "out/fever_data/train-64.jsonl").read_bytes()
    assert json.loads(few_shot) == json.loads(claim(134))


def test_existing_files_are_kept_unless_overwritten(originals, tmp_path):
    """Existing originals, of another program too, are kept, and only the subset is made; --overwrite replaces them."""
    folder = tmp_path / "out/fever_data"
    folder.parent.mkdir()
    originals.rename(folder)
    before = read_tree(folder)
    assert run_script("prepare_fever", "--output_directory", tmp_path / "out").status == 0
    assert read_tree(folder).keys() - before.keys() == {"train-64.jsonl"}

    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "dev", "test"):
        (other / f"{split}.jsonl").write_text(claim(7, split) * 136, encoding="utf-8")
    assert prepare(other).out.count("kept; --overwrite") == 3
    assert before.items() <= read_tree(folder).items()
    assert prepare(other, "--overwrite").status == 0
    few_shot = json.dumps(json.loads(claim(7))) + "\n"
    assert read_tree(folder) == read_tree(other) | {"train-64.jsonl": few_shot.encode()}


def test_originals_are_downloaded_once_or_with_overwrite(tmp_path, monkeypatch):
    """FEVER's own URLs are downloaded once, and again with --overwrite."""
    urls = []

    def download(url: str, target: Path) -> None:
        urls.append(url)
        target.write_text(claim(len(urls)), encoding="utf-8")

    monkeypatch.setattr(load_script("originals"), "download", download)
    addresses = [f"https://fever.ai/download/fever/{name}.jsonl" for name in NAMES]
    for arguments, count in ((), 1), ((), 1), (("--overwrite",), 2):
        assert run_script("prepare_fever", "--output_directory", tmp_path, *arguments).status == 0
        assert urls == addresses * count
    assert (tmp_path / "fever_data/test.jsonl").read_text(encoding="utf-8") == claim(6)


BAD = {  # split, its second line, the error
    "no claim": ("dev", '{"label": "SUPPORTS"}', "`claim` is no text"),
    "claim": ("test", '{"claim": 1}', "`claim` is no text"),
    "no label": ("train", '{"claim": "x"}', "`label` is none of SUPPORTS, REFUTES, NOT ENOUGH INFO"),
    "label": ("dev", '{"claim": "x", "label": "supports"}', "`label` is none of"),
    "label in test": ("test", '{"claim": "x", "label": "maybe"}', "`label` is none of"),
    "web page": ("train", "<html>", "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named_and_nothing_replaced(originals, tmp_path, case):
    """The error names the given file and its line; the existing files stay unchanged."""
    prepare(originals)
    before = read_tree(tmp_path / "out")
    split, line, problem = BAD[case]
    (originals / "train.jsonl").write_text(claim(1) * 200, encoding="utf-8")
    path = originals / f"{split}.jsonl"
    path.write_text(f"{claim(0, split)}{line}\n", encoding="utf-8")
    assert prepare(originals, "--overwrite").failed_with(f"{path}:2: {problem}")
    assert read_tree(tmp_path / "out") == before
