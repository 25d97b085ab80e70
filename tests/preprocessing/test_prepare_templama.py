"""TempLAMA's questions whose answer changed, from small files in the original's format."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from atlas_jax.tasks.qa import QA
from tests.preprocessing.test_prepare_originals import Run, read_tree, run_script

NAMES = [f"temp_lama.{split}.{year}.jsonl" for split in ("train", "valid", "test") for year in (2017, 2020)]


def fact(query: str, date: str, *names: str) -> dict:
    """A row in TempLAMA's format."""
    answer = [{"wikidata_id": f"Q{number}", "name": name} for number, name in enumerate(names)]
    return {
        **{"query": f"{query} plays for _X_.", "answer": answer, "date": date, "id": f"{query}_P54_{date}"},
        **{"most_frequent_answer": answer[:1], "relation": "P54"},
    }


CHANGED = [fact("Ann", "2017", "Ajax", "Ajax", "PSV"), fact("Ann", "2020", "Bayern é")]
FACTS = [
    CHANGED[0],
    fact("Ann", "2018", "Chelsea"),  # another year
    fact("Bob", "2017", "Ajax"),  # unchanged in 2020
    fact("Bob", "2020", "Ajax"),
    fact("Cid", "2017", "Ajax"),  # one of two answers is unchanged
    fact("Cid", "2020", "Porto", "Ajax"),
    fact("Dan", "2020", "Porto"),  # not in 2017
    fact("Eva", "2020", "Roma"),  # the later year comes first
    CHANGED[1],
    fact("Eva", "2017", "Lazio"),
    fact("Flo", "2017", "Roma"),  # of the three later rows, two changed
    fact("Flo", "2020", "Roma"),
    fact("Flo", "2020", "Lazio"),
    fact("Flo", "2017", "Inter"),
]


@pytest.fixture
def originals(tmp_path) -> Path:
    """A folder with the three originals."""
    folder = tmp_path / "originals"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        write_jsonl(folder / f"{split}.json", FACTS if split == "train" else CHANGED)
    return folder


def write_jsonl(path: Path, rows: Sequence[object]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), encoding="utf-8")


def prepare(originals: Path) -> Run:
    flags = [part for split in ("train", "valid", "test") for part in (f"--{split}", originals / f"{split}.json")]
    return run_script("prepare_templama", "--output_directory", originals.parent, *flags)


def rows(folder: Path, name: str) -> list[dict]:
    path = folder / "data/templama_data" / name
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def test_questions_whose_answer_changed_are_kept(originals, tmp_path):
    """Rows are in the file of their year, in the order of first occurrence; unchanged questions are in neither."""
    assert prepare(originals).status == 0
    found = {
        year: [tuple(row["metadata"]["original_instance"]["id"].split("_P54_")) for row in rows(tmp_path, name)]
        for year, name in ((2017, NAMES[0]), (2020, NAMES[1]))
    }
    assert found == {
        2017: [("Ann", "2017"), ("Eva", "2017"), ("Flo", "2017"), ("Flo", "2017")],
        2020: [("Ann", "2020"), ("Eva", "2020"), ("Flo", "2020")],
    }
    assert [row["answers"] for row in rows(tmp_path, NAMES[0])[2:]] == [["Roma"], ["Inter"]]


def test_a_row_is_a_cloze_for_the_qa_task(originals, tmp_path):
    """T5's sentinel replaces _X_, each answer occurs once, the original row is metadata; the field order is exact."""
    assert prepare(originals).status == 0
    (row,) = rows(tmp_path, "temp_lama.test.2017.jsonl")
    expected = {
        "question": "Ann plays for <extra_id_0>.",
        "answers": ["Ajax", "PSV"],
        "metadata": {"original_instance": CHANGED[0]},
    }
    assert json.dumps(row) == json.dumps(expected)
    for name in NAMES:
        for row in rows(tmp_path, name):
            QA().check(row)


def test_given_and_existing_originals_give_the_same_bytes(originals, tmp_path):
    """Originals given by flag, or found at the download paths, give the same six files; old files are replaced."""
    assert prepare(originals).status == 0
    folder = tmp_path / "data/templama_data"
    before = read_tree(folder)
    assert sorted(before) == sorted(NAMES)
    (folder / NAMES[0]).write_text("old")
    for split in ("train", "valid", "test"):
        (originals / f"{split}.json").rename(folder / f"{split}.original.jsonl")
    result = run_script("prepare_templama", "--output_directory", tmp_path)
    assert (result.status, result.err) == (0, "")
    assert {name: content for name, content in read_tree(folder).items() if name in NAMES} == before


BAD = {
    "no date": {"query": "q", "answer": []},
    "date": {"query": "q", "answer": [], "date": 2017},
    "query": {"query": ["q"], "answer": [], "date": "2017"},
    "answer": {"query": "q", "answer": "Ajax", "date": "2017"},
    "name": {"query": "q", "answer": [{"name": None}], "date": "2017"},
    "no name": {"query": "q", "answer": [{"wikidata_id": "Q1"}], "date": "2010"},
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named_and_nothing_replaced(originals, tmp_path, case):
    """The error names the original and its line; the outputs of an earlier run stay unchanged."""
    assert prepare(originals).status == 0
    before = read_tree(tmp_path / "data")
    write_jsonl(originals / "train.json", CHANGED)
    write_jsonl(originals / "test.json", [CHANGED[0], BAD[case]])
    assert prepare(originals).failed_with(f"{originals}/test.json:3: not TempLAMA's")
    assert read_tree(tmp_path / "data") == before
