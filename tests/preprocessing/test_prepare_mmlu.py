"""MMLU's three settings, from an archive in the official layout."""

import csv
import io
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from atlas_jax.tasks.multiple_choice import MultipleChoice
from tests.preprocessing.test_prepare_originals import HOSTILE, ROOT, load, put_tar, run, tree

COUNTS = {"dev": 5, "val": 3, "test": 4}
DOMAINS = ("virology", "anatomy", "us_foreign_policy")  # not sorted
AUXILIARY = {"race": 3200, "arc_easy": 2300}
GOOD = "What?,a,b,c,d,B\n"


def questions(name: str, count: int) -> list[list[str]]:
    return [
        [f"{name} {number}?", f"{number}, a", 'b "b"', "c\nc", "None", "ABCD"[number % 4]] for number in range(count)
    ]


ROWS = {
    **{f"data/{split}/{d}_{split}.csv": questions(f"{d}_{split}", n) for split, n in COUNTS.items() for d in DOMAINS},
    **{f"data/auxiliary_train/{name}.csv": questions(name, count) for name, count in AUXILIARY.items()},
}


def as_csv(rows: Sequence[Sequence[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def small(**changes: bytes) -> dict[str, bytes]:
    """An archive's members, one question in each split; `changes` by split."""
    contents = {split: changes.get(split, GOOD.encode()) for split in ("dev", "val", "test")}
    members = {f"data/{split}/anatomy_{split}.csv": content for split, content in contents.items()}
    return members | {"data/auxiliary_train/race.csv": changes.get("auxiliary_train", GOOD.encode())}


def make(folder: Path, members: Mapping[str, bytes]) -> dict[str, bytes]:
    """What becomes of an archive, without `data/mmlu_data/`."""
    done = run("prepare_mmlu", "--output_directory", folder, "--data_tar", put_tar(folder / "data.tar", members))
    assert done.status == 0, done.err
    return tree(folder / "data/mmlu_data")


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> dict[str, bytes]:
    """The tree from an archive with three domains and 5,500 auxiliary questions, beside other files."""
    others = {
        "data/README.txt": b"x",
        "data/possibly_contaminated_urls.txt": b"x",
        "data/dev/._anatomy_dev.csv": b"\xff",
    }
    return make(tmp_path_factory.mktemp("mmlu"), {path: as_csv(rows) for path, rows in ROWS.items()} | others)


def test_the_three_settings_hold_what_the_archive_does(official):
    """Names, rows, fields and their order; domains sorted; the last 5,000 after a shuffle with seed 10 held out."""

    def of(split: str, *names: str) -> list[dict]:
        return [
            {"question": q, "options": {"A": a, "B": b, "C": c, "D": d}, "answer": answer, "dataset": name}
            for name in names
            for q, a, b, c, d, answer in ROWS[f"data/{split}/{name}.csv"]
        ]

    def joined(split: str) -> list[dict]:
        return of(split, *(f"{domain}_{split}" for domain in ("anatomy", "us_foreign_policy", "virology")))

    auxiliary = of("auxiliary_train", "arc_easy", "race")
    map_in_order = list(auxiliary)
    random.seed(10)
    random.shuffle(auxiliary)
    expected = {
        "5-shot-multitask/train.jsonl": joined("dev"),
        "full/train.jsonl": auxiliary[:500] + joined("dev"),
        "full/auxillary_valid.jsonl": auxiliary[500:],
    }
    for domain in DOMAINS:
        expected[f"5-shot/individual_train/{domain}.5-shot-train.jsonl"] = of("dev", f"{domain}_dev")
    for setting in ("5-shot", "5-shot-multitask", "full"):
        expected |= {f"{setting}/combined_valid.jsonl": joined("val"), f"{setting}/combined_test.jsonl": joined("test")}
        for domain in DOMAINS:
            expected[f"{setting}/individual_valid/{domain}.val.jsonl"] = of("val", f"{domain}_val")
            expected[f"{setting}/individual_test/{domain}.test.jsonl"] = of("test", f"{domain}_test")

    assert official.keys() == expected.keys()
    for name, rows in expected.items():
        assert official[name] == "".join(json.dumps(row) + "\n" for row in rows).encode(), name
    assert auxiliary[500:] != map_in_order[500:]  # the shuffle matters


def test_what_the_launch_scripts_read_is_there(official):
    """The paths in launch/mmlu/*.sh, below DATA_DIR; multiple_choice takes every row."""
    for name in ("5-shot", "5-shot-multitask", "full", "zeroshot"):
        text = (ROOT / f"launch/mmlu/{name}.sh").read_text()
        setting = re.findall(r"^FILES=\$MMLU/(\S+)", text, re.MULTILINE)
        paths = [f"{setting[0]}/{path}" for path in re.findall(r"\$FILES/([^\s\"]+\.jsonl)", text)]
        paths += re.findall(r"\$MMLU/(\S+\.jsonl)", text)
        assert paths
        assert {path.replace("$domain", "anatomy") for path in paths} <= official.keys(), name
    assert "MMLU=$DATA_DIR/data/mmlu_data\n" in (ROOT / "launch/mmlu/common.sh").read_text()
    task = MultipleChoice()
    for content in official.values():
        for line in content.splitlines():
            task.check(json.loads(line))


def test_the_same_bytes_whatever_the_order_and_however_often(official, tmp_path):
    """Another order in the archive changes nothing, nor does a second run; it replaces each folder as a whole."""
    reverse = {path: as_csv(rows) for path, rows in reversed(ROWS.items())}
    stale = tmp_path / "data/mmlu_data/5-shot/individual_train/gone.5-shot-train.jsonl"
    for _ in range(2):
        assert make(tmp_path, reverse) == official
        stale.write_bytes(b"x")
    made = tree(tmp_path / "data/mmlu_data")
    assert made.keys() - official.keys() == {str(stale.relative_to(tmp_path / "data/mmlu_data"))}
    assert sorted(path.name for path in (tmp_path / "data/mmlu_data").iterdir()) == [
        "5-shot",
        "5-shot-multitask",
        "full",
    ]


def test_an_archive_that_is_there_needs_no_network(tmp_path):
    """A data.tar where the download would put it is taken."""
    place = tmp_path / "data/mmlu_data/data.tar"
    place.parent.mkdir(parents=True)
    put_tar(place, small())
    done = run("prepare_mmlu", "--output_directory", tmp_path)
    assert (done.status, done.err) == (0, "")
    assert "5-shot-multitask/: 5 files; train.jsonl 1, combined_valid.jsonl 1, combined_test.jsonl 1\n" in done.out
    assert f"DATA_DIR={tmp_path} " in done.out


def test_fewer_auxiliary_questions_are_all_held_out(tmp_path):
    """The last 5,000 of three are three, as the reference slices; none of them is trained on."""
    made = make(tmp_path, small(auxiliary_train=GOOD.encode() * 3))
    assert len(made["full/auxillary_valid.jsonl"].splitlines()) == 3
    assert made["full/train.jsonl"] == made["5-shot-multitask/train.jsonl"]


QUIRKS = {  # csv -> question, A, B, C, D, answer
    "plain": (b"q,a,b,c,d,A\n", ["q", "a", "b", "c", "d", "A"]),
    "quotes": (b'"say ""x""?","""a""",b,c,d,A\n', ['say "x"?', '"a"', "b", "c", "d", "A"]),
    "quote inside": (b'q 5" long,a,b,c,d,A\n', ['q 5" long', "a", "b", "c", "d", "A"]),
    "commas": (b'"1,000","1,000",",",1e3,007,A\n', ["1,000", "1,000", ",", "1e3", "007", "A"]),
    "newlines and blanks": (b'"q\n\n q",a, b ,c,d,B\n', ["q\n\n q", "a", " b ", "c", "d", "B"]),
    "carriage returns": (b'"q\r\nq",a,b,c,d,C\r\n', ["q\nq", "a", "b", "c", "d", "C"]),
    "byte order mark": (b'\xef\xbb\xbf"q",a,b,c,d,D\n', ["q", "a", "b", "c", "d", "D"]),
    "like nothing": (b"NA,None,nan,,0,A\n", ["NA", "None", "nan", "", "0", "A"]),
    "no newline at the end": (b"q,a,b,c,d,A", ["q", "a", "b", "c", "d", "A"]),
    "blank lines": (b"\n\nq,a,b,c,d,A\r\n\r\n", ["q", "a", "b", "c", "d", "A"]),
    "unicode": ("é\u2028\x0c\x85,a,b,c,d,A\n".encode(), ["é\u2028\x0c\x85", "a", "b", "c", "d", "A"]),
}


@pytest.mark.parametrize("case", QUIRKS)
def test_fields_are_taken_as_they_are(tmp_path, case):
    """Quotes, commas, line ends and texts that look like numbers or like nothing."""
    content, fields = QUIRKS[case]
    made = make(tmp_path, small(test=content))
    (line,) = made["full/combined_test.jsonl"].decode("ascii").splitlines()
    row = json.loads(line)
    assert [row["question"], *row["options"].values(), row["answer"]] == fields


BAD = {  # csv -> the line it is wrong in, and what is said
    "five columns": (GOOD.encode() + b"q,a,b,c,A\n", 2, "5 columns"),
    "seven columns": (GOOD.encode() * 2 + b"q,a,b,c,d,e,A\n", 3, "7 columns"),
    "answer": (b"q,a,b,c,d,E\n", 1, "the answer is 'E'"),
    "two answers": (b"q,a,b,c,d,AB\n", 1, "the answer is 'AB'"),
    "no answer": (b"q,a,b,c,d,\n", 1, "the answer is ''"),
    "open quote": (b'"q\nq",a,b,c,d,A\n"q,a,b,c,d,A\n' + GOOD.encode(), 3, "1 columns"),
    "latin-1": (GOOD.encode() + "é,a,b,c,d,A\n".encode("latin-1"), 2, "invalid UTF-8"),
    "utf-16": (GOOD.encode("utf-16"), 1, "invalid UTF-8"),
    "endless field": (b"q" * 200_000 + b",a,b,c,d,A\n", 1, "field larger than field limit"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("split", ["auxiliary_train", "test"])
def test_a_bad_row_is_named_by_member_and_line(tmp_path, case, split):
    """One line on stderr; nothing is made."""
    content, line, problem = BAD[case]
    name = "race" if split == "auxiliary_train" else f"anatomy_{split}"
    archive = put_tar(tmp_path / "data.tar", small(**{split: content}))
    done = run("prepare_mmlu", "--output_directory", tmp_path / "out", "--data_tar", archive)
    assert done.said(f"{archive}: data/{split}/{name}.csv:{line}: {problem}")
    assert not tree(tmp_path / "out")


def test_what_is_no_mmlu_archive_is_refused(tmp_path):
    """A split without files, a file of no domain, another archive, none: each is named."""
    members = small()
    without = {path: content for path, content in members.items() if "/val/" not in path}
    archive, arguments = tmp_path / "data.tar", ("--output_directory", tmp_path / "out", "--data_tar")
    assert run("prepare_mmlu", *arguments, put_tar(archive, without)).said(archive, "has no data/val/*.csv")
    for name in ("anatomy.csv", "_test.csv", "anatomy_val.csv"):
        odd = put_tar(archive, members | {f"data/test/{name}": GOOD.encode()})
        assert run("prepare_mmlu", *arguments, odd).said(archive, f"data/test/{name}", "{domain}_test.csv")
    assert run("prepare_mmlu", *arguments, put_tar(archive, {"x": b""})).said(archive, "has no data/auxiliary_train")
    assert run("prepare_mmlu", *arguments, tmp_path / "gone.tar").said("gone.tar: no such file", "--data_tar")
    assert not tree(tmp_path / "out")


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_member_ends_it_before_anything_is_made(tmp_path, case):
    """Though it is the last of the archive; what an earlier run made stays as it was."""
    before = make(tmp_path, small())
    archive = put_tar(tmp_path / "hostile.tar", small(test=b"new,a,b,c,d,A\n"), HOSTILE[case])
    done = run("prepare_mmlu", "--output_directory", tmp_path, "--data_tar", archive)
    assert done.said(archive, "refused", repr(HOSTILE[case].name))
    assert tree(tmp_path / "data/mmlu_data") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "data.tar", "hostile.tar"]


def test_all_three_settings_are_replaced_or_none(tmp_path, monkeypatch):
    """An error while the last is written leaves the earlier tree, and no drafts."""
    before = make(tmp_path, small())
    module = load("prepare_mmlu")
    write_lines = module.write_lines

    def fail(path: Path, lines: Sequence[str]) -> None:
        if path.name == "auxillary_valid.jsonl":
            raise OSError(28, "No space left on device", str(path))
        write_lines(path, lines)

    monkeypatch.setattr(module, "write_lines", fail)
    archive = put_tar(tmp_path / "new.tar", small(test=b"new,a,b,c,d,A\n"))
    done = run("prepare_mmlu", "--output_directory", tmp_path, "--data_tar", archive)
    assert done.said("full: cannot be written (No space left on device)")
    assert tree(tmp_path / "data/mmlu_data") == before
    monkeypatch.undo()
    assert run("prepare_mmlu", "--output_directory", tmp_path, "--data_tar", archive).status == 0
    assert tree(tmp_path / "data/mmlu_data") != before
