"""The passage store: reading back, atomic replacement, what is refused, and token ids that are computed once."""

import copy
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.data.jsonl import read_rows
from atlas_jax.data.ragged import RaggedArray
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.errors import UserError
from atlas_jax.retrieval.passage_store import PassageStore, build_passages
from atlas_jax.storage import file_lock

GOLDEN = Path(__file__).parent.parent / "golden"
RETRIEVER_FORMAT = "{title} {text}"
READER, RETRIEVER = (Tokenizer.load(GOLDEN / "assets" / name) for name in ("reader", "retriever"))
PASSAGE = {"id": "1", "text": "Some text", "title": "A title", "section": ""}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Store of the 240 golden passages."""
    return build_passages([GOLDEN / "passages.jsonl"], tmp_path_factory.mktemp("golden") / "passages")


def write_jsonl(folder, *rows, name="corpus.jsonl"):
    """Writes rows as JSON lines; returns the path."""
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_passages_come_back_as_the_reference_loads_them(store):
    """All fields, in any order of numbers; the section is joined to the title once, and stays a field."""
    rows = [row for _, row in read_rows(GOLDEN / "passages.jsonl")]
    for row in rows:
        row["title"] = f"{row['title']}: {row['section']}" if row["section"] else row["title"]
    assert store.take(range(len(store))) == rows
    assert store.take(np.array([239, 0, 0])) == [rows[239], rows[0], rows[0]]
    assert store.take([]) == []
    assert any(row["section"] for row in rows)
    for number in (-1, 240):
        with pytest.raises(IndexError, match="there are 240 rows"):
            store.take([number])


def test_build_does_not_join_sections_again(tmp_path, store):
    """Passages of published shards have joined titles: `build` writes any iterable of dicts unchanged."""
    passages = store.take(range(240))
    again = PassageStore.build(iter(passages), tmp_path / "again")
    assert again.take(range(240)) == passages
    assert again.take([0])[0]["title"].count("Summary") == 1


def test_title_and_section_are_optional(tmp_path):
    """Title and section default to ""; other fields are kept; blank lines are skipped."""
    path = write_jsonl(
        tmp_path, {"id": 7, "text": "é"}, {"id": "8", "text": "", "title": None, "section": "S", "topic": "x"}
    )
    path.write_text("\n" + path.read_text().replace("}\n", "}\n\n"))
    store = build_passages([path], tmp_path / "store")
    assert store.take([0, 1]) == [
        {"id": 7, "text": "é", "title": "", "section": ""},
        {"id": "8", "text": "", "title": ": S", "section": "S", "topic": "x"},
    ]


ROWS = {  # what is unusual -> the line of JSON
    "plain": '{"id": "1", "title": "T", "section": "", "text": "x"}',
    "section": '{"id": "1", "title": "T", "section": "S", "text": "x"}',
    "other_order": '{"text": "x", "section": "S", "id": 1, "title": "T"}',
    "no_spaces": '{"id":"1","title":"T","section":"S","text":"x"}',
    "spaces": ' { "id" : "1", "title" : "T", "section" : "S", "text" : "x" } ',
    "escapes": '{"id": "1", "title": "\\u00e9", "section": "S", "text": "\\u4e2d"}',
    "escaped_key": '{"id": "1", "\\u0074itle": "T", "section": "S", "text": "x"}',
    "slash": r'{"id": "1", "title": "a\/b", "section": "S", "text": "x"}',
    "quotes": r'{"id": "1", "title": "\"T\" \\", "section": "\"S\"", "text": "\"title\": \"T\""}',
    "nested": '{"meta": {"title": "T"}, "id": "1", "title": "T", "section": "S", "text": "x"}',
    "key_ending_in_title": r'{"a \"title": "T", "id": "1", "title": "T", "section": "S", "text": "x"}',
    "duplicate_key": '{"id": "1", "title": "A", "section": "S", "text": "x", "title": "T"}',
    "title_is_title": '{"id": "1", "title": "title", "section": "title", "text": "title"}',
    "no_section": '{"id": "1", "title": "T", "text": "x"}',
    "null_title": '{"id": "1", "title": null, "section": "S", "text": "x"}',
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_are_kept_however_their_json_is_written(tmp_path, case):
    """Whether the line is copied or re-serialized, the store returns the parsed row with its section joined."""
    path = tmp_path / "corpus.jsonl"
    path.write_text(ROWS[case] + "\n")
    row = json.loads(ROWS[case])
    expected = {"title": "", "section": "", **row} | ({"title": ""} if row.get("title", "") is None else {})
    if expected["section"]:
        expected["title"] = f"{expected['title']}: {expected['section']}"
    built = build_passages([path], tmp_path / "store")
    assert built.take([0]) == [expected]
    assert b"\\u" not in (tmp_path / "store" / "text.bin").read_bytes()
    assert list(built.passages_json()) == [(tmp_path / "store" / "text.bin").read_bytes()]


def test_plain_rows_are_copied_without_serializing(tmp_path, monkeypatch):
    """Copying the line is fastest; to join a section, only the title in it is replaced."""
    path = tmp_path / "corpus.jsonl"
    path.write_text(ROWS["plain"] + "\n" + ROWS["section"] + "\n")
    monkeypatch.setattr("atlas_jax.retrieval.passage_store._validated", pytest.fail)
    build_passages([path], tmp_path / "store")
    text = (tmp_path / "store" / "text.bin").read_text()
    assert text == ROWS["plain"] + ROWS["section"].replace('"T"', '"T: S"')


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, 'a passage without "id"'),
        ({"id": "1"}, 'a passage without "text"'),
        ({"id": "1", "text": None}, '"text" must be a string, not None'),
        ({"id": "1", "text": "x", "title": 3}, '"title" must be a string, not 3'),
    ],
)
def test_bad_passages_are_named_and_nothing_is_written(tmp_path, row, message):
    """The message has file and line; neither a store nor a temporary folder is left."""
    path = write_jsonl(tmp_path, PASSAGE, row)
    with pytest.raises(UserError, match=rf"corpus\.jsonl:2: {message}"):
        build_passages([path], tmp_path / "store")
    assert list(tmp_path.iterdir()) == [path]


def test_max_passages_counts_over_all_files(tmp_path):
    """Lines after the last passage that is taken are not parsed. No files or no passages are a UserError."""
    first = write_jsonl(tmp_path, PASSAGE, PASSAGE, name="1.jsonl")
    second = write_jsonl(tmp_path, PASSAGE, {"bad": 1}, name="2.jsonl")
    for count, length in ((3, 3), (1, 1)):
        assert len(build_passages([first, second], tmp_path / f"store{count}", count)) == length
    with pytest.raises(UserError, match=r"2\.jsonl:2"):
        build_passages([first, second], tmp_path / "all", -1)
    with pytest.raises(UserError, match="no passages to write"):
        build_passages([first], tmp_path / "none", 0)
    with pytest.raises(UserError, match="no passage files"):
        build_passages([], tmp_path / "none")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_build_keeps_the_old_store(tmp_path, error):
    """The old store stays whole until the new one is complete, which then replaces it; no other file is left."""

    def rows():
        yield from [PASSAGE] * 3000
        raise error

    old = build_passages([write_jsonl(tmp_path, PASSAGE)], tmp_path / "store")
    with pytest.raises(error):
        PassageStore.build(rows(), old.folder)
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.jsonl", "store"}
    assert len(PassageStore.open(old.folder)) == 1
    done = []
    assert len(PassageStore.build([PASSAGE] * 3000, old.folder, done.append)) == 3000
    assert done == [1024, 1024, 952]
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.jsonl", "store"}


def test_other_files_are_never_replaced(tmp_path):
    """A folder that holds anything but a store, or a file in its place, is refused and unchanged."""
    (tmp_path / "thesis.tex").write_text("years of work")
    for folder in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(UserError, match="choose a new folder"):
            PassageStore.build([PASSAGE], folder)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_text_that_utf8_cannot_encode_is_refused(tmp_path):
    """Half a surrogate pair, which a pickle may hold: the message names the passage."""
    with pytest.raises(UserError, match=r"passage 1 \(x\): not text .*surrogates"):
        PassageStore.build([PASSAGE, {"id": "x", "text": "\ud800"}], tmp_path / "store")


@pytest.mark.parametrize("file", ["text.bin", "text.offsets.npy", "passages.json"])
@pytest.mark.parametrize("end", [0, -1, None])
def test_a_damaged_store_is_refused(tmp_path, file, end):
    """Each file truncated, empty or missing: a message of one line names it and the remedy."""
    PassageStore.build([PASSAGE, PASSAGE], tmp_path / "store")
    path = tmp_path / "store" / file
    if end is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().rstrip(b"\n")[:end])
    with pytest.raises(UserError, match=r"build the passages again") as error:
        PassageStore.open(tmp_path / "store")
    assert str(tmp_path / "store" / file.split(".")[0]) in str(error.value)
    assert "\n" not in str(error.value)


def test_another_version_or_count_is_refused(tmp_path):
    """passages.json must fit the other files; a missing folder is named."""
    PassageStore.build([PASSAGE], tmp_path)
    for text, message in (
        ('{"version": 9, "count": 1}', "version 9"),
        ('{"version": 1, "count": 2}', "not the offsets"),
    ):
        (tmp_path / "passages.json").write_text(text)
        with pytest.raises(UserError, match=message):
            PassageStore.open(tmp_path)
    with pytest.raises(UserError, match=r"nowhere/passages\.json: cannot be read .*check the path"):
        PassageStore.open(tmp_path / "nowhere")


def test_tokens_equal_the_ids_of_the_tokenizer(store):
    """Ids of every passage are uncut, without special tokens, and uint16 if the vocabulary fits."""
    tokens = store.tokens(RETRIEVER, RETRIEVER_FORMAT, "retriever")
    expected = RETRIEVER.ids([RETRIEVER_FORMAT.format(**passage) for passage in store.take(range(240))])
    taken = tokens.take(range(240))
    assert [row.tolist() for row in taken] == expected
    assert {row.dtype for row in taken} == {np.dtype(np.uint16)}
    assert tokens.lengths(np.array([5, 0])).tolist() == [len(expected[5]), len(expected[0])]
    assert len(tokens) == 240


def test_a_large_vocabulary_takes_int32(tmp_path):
    """An id above 65,535 does not overflow."""
    large = copy.copy(RETRIEVER)
    large.vocab_size, large.ids = 70_000, lambda texts: [[69_999, 1]] * len(texts)
    [row] = PassageStore.build([PASSAGE], tmp_path / "store").tokens(large, "{text}", "large").take([0])
    assert row.tolist() == [69_999, 1]


def test_tokens_are_computed_once(tmp_path, monkeypatch):
    """A second run loads them; each format and tokenizer has its own; damaged ones are refused, naming the folder."""
    folder = PassageStore.build([PASSAGE] * 3, tmp_path / "store").folder
    done = []
    computed = PassageStore.open(folder).tokens(RETRIEVER, "{text}", "retriever", done.append).take([2])
    PassageStore.open(folder).tokens(READER, "{text}", "retriever")
    PassageStore.open(folder).tokens(RETRIEVER, "{title}", "retriever")
    assert done == [3]
    assert len(list(folder.glob("tokens-retriever-*"))) == 3
    monkeypatch.setattr(Tokenizer, "ids", None)  # from here on, tokenizing fails
    np.testing.assert_array_equal(
        PassageStore.open(folder).tokens(RETRIEVER, "{text}", "retriever").take([2]), computed
    )
    for path in folder.glob("tokens-*/tokens.bin"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"tokens-retriever-.*delete this folder"):
        PassageStore.open(folder).tokens(RETRIEVER, "{text}", "retriever")


def test_interrupted_tokenization_leaves_no_files(tmp_path):
    """A KeyboardInterrupt half way leaves the store unchanged."""
    store = PassageStore.build([PASSAGE] * 2000, tmp_path / "store")
    before = sorted(store.folder.iterdir())

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.tokens(RETRIEVER, "{text}", "retriever", interrupt)
    assert sorted(store.folder.iterdir()) == before


def test_two_writers_of_the_same_tokens_both_succeed(tmp_path, monkeypatch):
    """Two hosts on a disk without locks: the files of the first to finish are kept, and the other reads them."""
    monkeypatch.setattr(file_lock, "try_lock", lambda file: None)
    folder = PassageStore.build([PASSAGE] * 3, tmp_path / "store").folder
    barrier, taken = threading.Barrier(2, timeout=10), []

    def tokenize():
        store = PassageStore.open(folder)
        taken.append(store.tokens(RETRIEVER, "{text}", "retriever", lambda _: barrier.wait()).take([1])[0].tolist())

    threads = [threading.Thread(target=tokenize) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == RETRIEVER.ids(["Some text"]) * 2
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize(
    ("format", "message"),
    [("{title} {author}", "passage 1: no field 'author'"), ("{}", "not a format"), ("{title", "not a format")],
)
def test_bad_formats_are_refused(tmp_path, format, message):
    """The message names the passage and its missing field, or the malformed format."""
    with pytest.raises(UserError, match=message):
        PassageStore.build([PASSAGE], tmp_path / "store").tokens(RETRIEVER, format, "retriever")


def test_ragged_rows_may_be_empty(tmp_path):
    """If all rows are empty, there are no bytes to map."""
    np.save(tmp_path / "x.offsets.npy", np.zeros(3, np.uint64))
    (tmp_path / "x.bin").touch()
    rows = RaggedArray.open(tmp_path, "x", np.dtype(np.uint16), 2, "")
    assert [row.tolist() for row in rows.take([0, 1])] == [[], []]
