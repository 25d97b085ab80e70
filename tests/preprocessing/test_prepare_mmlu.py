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
from tests.preprocessing.test_prepare_originals import HOSTILE, ROOT, load_script, read_tree, run_script, write_tar

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


def small_archive(**changes: bytes) -> dict[str, bytes]:
    """Members of an archive with one question in each split; `changes` replaces the content of a split."""
    contents = {split: changes.get(split, GOOD.encode()) for split in ("dev", "val", "test")}
    members = {f"data/{split}/anatomy_{split}.csv": content for split, content in contents.items()}
    return members | {"data/auxiliary_train/race.csv": changes.get("auxiliary_train", GOOD.encode())}


def prepare(folder: Path, members: Mapping[str, bytes]) -> dict[str, bytes]:
    """Runs the script on an archive of `members`; returns {path below data/mmlu_data/: content}."""
    result = run_script(
        "prepare_mmlu", "--output_directory", folder, "--data_tar", write_tar(folder / "data.tar", members)
    )
    assert result.status == 0, result.err
    return read_tree(folder / "data/mmlu_data")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[str, bytes]:
    """Outputs for an archive with three domains, 5,500 auxiliary questions, and files to be ignored."""
    other_files = {
        "data/README.txt": b"x",
        "data/possibly_contaminated_urls.txt": b"x",
        "data/dev/._anatomy_dev.csv": b"\xff",
    }
    return prepare(tmp_path_factory.mktemp("mmlu"), {path: as_csv(rows) for path, rows in ROWS.items()} | other_files)


def test_the_three_settings_hold_the_questions_of_the_archive(prepared):
    """File names, rows and field order are exact; domains are sorted; the last 5,000 after a shuffle are held out."""

    def expected_rows(split: str, *names: str) -> list[dict]:
        return [
            {"question": q, "options": {"A": a, "B": b, "C": c, "D": d}, "answer": answer, "dataset": name}
            for name in names
            for q, a, b, c, d, answer in ROWS[f"data/{split}/{name}.csv"]
        ]

    def all_domains(split: str) -> list[dict]:
        return expected_rows(split, *(f"{domain}_{split}" for domain in ("anatomy", "us_foreign_policy", "virology")))

    auxiliary = expected_rows("auxiliary_train", "arc_easy", "race")
    unshuffled = list(auxiliary)
    random.seed(10)
    random.shuffle(auxiliary)
    expected = {
        "5-shot-multitask/train.jsonl": all_domains("dev"),
        "full/train.jsonl": auxiliary[:500] + all_domains("dev"),
        "full/auxillary_valid.jsonl": auxiliary[500:],
    }
    for domain in DOMAINS:
        expected[f"5-shot/individual_train/{domain}.5-shot-train.jsonl"] = expected_rows("dev", f"{domain}_dev")
    for setting in ("5-shot", "5-shot-multitask", "full"):
        expected |= {
            f"{setting}/combined_valid.jsonl": all_domains("val"),
            f"{setting}/combined_test.jsonl": all_domains("test"),
        }
        for domain in DOMAINS:
            expected[f"{setting}/individual_valid/{domain}.val.jsonl"] = expected_rows("val", f"{domain}_val")
            expected[f"{setting}/individual_test/{domain}.test.jsonl"] = expected_rows("test", f"{domain}_test")

    assert prepared.keys() == expected.keys()
    for name, rows in expected.items():
        assert prepared[name] == "".join(json.dumps(row) + "\n" for row in rows).encode(), name
    assert auxiliary[500:] != unshuffled[500:]  # the shuffle matters


def test_files_of_the_launch_scripts_exist(prepared):
    """Every path in launch/mmlu/*.sh is an output below DATA_DIR; the multiple_choice task accepts every row."""
    for name in ("5-shot", "5-shot-multitask", "full", "zeroshot"):
        text = (ROOT / f"launch/mmlu/{name}.sh").read_text()
        setting = re.findall(r"^FILES=\$MMLU/(\S+)", text, re.MULTILINE)
        paths = [f"{setting[0]}/{path}" for path in re.findall(r"\$FILES/([^\s\"]+\.jsonl)", text)]
        paths += re.findall(r"\$MMLU/(\S+\.jsonl)", text)
        assert paths
        assert {path.replace("$domain", "anatomy") for path in paths} <= prepared.keys(), name
    assert "MMLU=$DATA_DIR/data/mmlu_data\n" in (ROOT / "launch/mmlu/common.sh").read_text()
    task = MultipleChoice()
    for content in prepared.values():
        for line in content.splitlines():
            task.check(json.loads(line))


def test_archive_order_and_repetition_do_not_change_the_bytes(prepared, tmp_path):
    """Member order changes nothing, nor does a second run, which replaces each folder as a whole."""
    reverse = {path: as_csv(rows) for path, rows in reversed(ROWS.items())}
    stale = tmp_path / "data/mmlu_data/5-shot/individual_train/gone.5-shot-train.jsonl"
    for _ in range(2):
        assert prepare(tmp_path, reverse) == prepared
        stale.write_bytes(b"x")
    outputs = read_tree(tmp_path / "data/mmlu_data")
    assert outputs.keys() - prepared.keys() == {str(stale.relative_to(tmp_path / "data/mmlu_data"))}
    assert sorted(path.name for path in (tmp_path / "data/mmlu_data").iterdir()) == [
        "5-shot",
        "5-shot-multitask",
        "full",
    ]


def test_an_existing_archive_is_not_downloaded(tmp_path):
    """A data.tar at the path of the download is used."""
    archive = tmp_path / "data/mmlu_data/data.tar"
    archive.parent.mkdir(parents=True)
    write_tar(archive, small_archive())
    result = run_script("prepare_mmlu", "--output_directory", tmp_path)
    assert (result.status, result.err) == (0, "")
    assert "5-shot-multitask/: 5 files; train.jsonl 1, combined_valid.jsonl 1, combined_test.jsonl 1\n" in result.out
    assert f"DATA_DIR={tmp_path} " in result.out


def test_fewer_auxiliary_questions_are_all_held_out(tmp_path):
    """Three auxiliary questions are all held out (Reference: the slice [-5000:]), and none is in the training file."""
    outputs = prepare(tmp_path, small_archive(auxiliary_train=GOOD.encode() * 3))
    assert len(outputs["full/auxillary_valid.jsonl"].splitlines()) == 3
    assert outputs["full/train.jsonl"] == outputs["5-shot-multitask/train.jsonl"]


QUIRKS = {  # csv, [question, A, B, C, D, answer]
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
def test_csv_fields_are_kept_as_text(tmp_path, case):
    """Quotes, commas, and texts that look like numbers or missing values are kept; line ends become \\n."""
    content, fields = QUIRKS[case]
    outputs = prepare(tmp_path, small_archive(test=content))
    (line,) = outputs["full/combined_test.jsonl"].decode("ascii").splitlines()
    row = json.loads(line)
    assert [row["question"], *row["options"].values(), row["answer"]] == fields


BAD = {  # csv, line of the error, error
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
    """One line on stderr names member and line; nothing is written."""
    content, line, problem = BAD[case]
    name = "race" if split == "auxiliary_train" else f"anatomy_{split}"
    archive = write_tar(tmp_path / "data.tar", small_archive(**{split: content}))
    result = run_script("prepare_mmlu", "--output_directory", tmp_path / "out", "--data_tar", archive)
    assert result.failed_with(f"{archive}: data/{split}/{name}.csv:{line}: {problem}")
    assert not read_tree(tmp_path / "out")


def test_archives_that_are_not_mmlu_are_refused(tmp_path):
    """The error names a missing split, a file without a domain, another archive, and a missing archive."""
    members = small_archive()
    without = {path: content for path, content in members.items() if "/val/" not in path}
    archive, arguments = tmp_path / "data.tar", ("--output_directory", tmp_path / "out", "--data_tar")
    assert run_script("prepare_mmlu", *arguments, write_tar(archive, without)).failed_with(
        archive, "has no data/val/*.csv"
    )
    for name in ("anatomy.csv", "_test.csv", "anatomy_val.csv"):
        odd = write_tar(archive, members | {f"data/test/{name}": GOOD.encode()})
        assert run_script("prepare_mmlu", *arguments, odd).failed_with(
            archive, f"data/test/{name}", "{domain}_test.csv"
        )
    assert run_script("prepare_mmlu", *arguments, write_tar(archive, {"x": b""})).failed_with(
        archive, "has no data/auxiliary_train"
    )
    assert run_script("prepare_mmlu", *arguments, tmp_path / "gone.tar").failed_with(
        "gone.tar: no such file", "--data_tar"
    )
    assert not read_tree(tmp_path / "out")


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_member_leaves_the_outputs_unchanged(tmp_path, case):
    """Even as the last member it ends the script; the outputs of an earlier run stay unchanged."""
    before = prepare(tmp_path, small_archive())
    archive = write_tar(tmp_path / "hostile.tar", small_archive(test=b"new,a,b,c,d,A\n"), HOSTILE[case])
    result = run_script("prepare_mmlu", "--output_directory", tmp_path, "--data_tar", archive)
    assert result.failed_with(archive, "refused", repr(HOSTILE[case].name))
    assert read_tree(tmp_path / "data/mmlu_data") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "data.tar", "hostile.tar"]


def test_all_three_settings_are_replaced_or_none(tmp_path, monkeypatch):
    """An error while the last setting is written leaves the earlier outputs, and no draft folders."""
    before = prepare(tmp_path, small_archive())
    module = load_script("prepare_mmlu")
    write_lines = module.write_lines

    def fail(path: Path, lines: Sequence[str]) -> None:
        if path.name == "auxillary_valid.jsonl":
            raise OSError(28, "No space left on device", str(path))
        write_lines(path, lines)

    monkeypatch.setattr(module, "write_lines", fail)
    archive = write_tar(tmp_path / "new.tar", small_archive(test=b"new,a,b,c,d,A\n"))
    result = run_script("prepare_mmlu", "--output_directory", tmp_path, "--data_tar", archive)
    assert result.failed_with("full: cannot be written (No space left on device)")
    assert read_tree(tmp_path / "data/mmlu_data") == before
    monkeypatch.undo()
    assert run_script("prepare_mmlu", "--output_directory", tmp_path, "--data_tar", archive).status == 0
    assert read_tree(tmp_path / "data/mmlu_data") != before
