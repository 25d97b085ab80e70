"""Reader inputs: ids of query and passage, tokenized separately or not, equal those of the whole text."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas_jax.data.reader_inputs import ReaderInputEncoder, join_ids, passage_part, render
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.errors import UserError
from atlas_jax.retrieval.passage_store import build_passages

GOLDEN = Path(__file__).parent.parent / "golden"
FORMAT = "{query} title: {title} context: {text}"
READER, RETRIEVER = (Tokenizer.load(GOLDEN / "assets" / name) for name in ("reader", "retriever"))
PASSAGE = {"id": "1", "text": "Some text", "title": "A title", "section": ""}
QUERIES = (
    "question: what is Tribe? answer: <extra_id_0>",
    "plain",
    "",
    "ends in space ",
    "שלום\u200b",
    "<extra_id_0>",
    "▁",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A passage store of the 240 golden passages."""
    return build_passages([GOLDEN / "passages.jsonl"], tmp_path_factory.mktemp("golden") / "passages")


def ids_of_whole_text(tokenizer, format, query, passage, max_length):
    """Returns the ids as the reference makes them: of the filled-in format as one text."""
    return tokenizer.add_special_tokens(tokenizer.ids([format.format(query=query, **passage)])[0], max_length)


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        (FORMAT, " title: {title} context: {text}"),
        ("{query} {text}", " {text}"),
        ("{query}", None),  # no part after the query
        ("{query}: {text}", None),  # no space after the query
        ("q: {query} {text}", None),  # the query is not first
        ("{query} {text} {query}", None),  # the query occurs twice
        ("{query!r} {text}", None),
        ("{{query}} {text}", None),  # escaped braces, no query field
    ],
)
def test_passage_part_of_a_format(format, expected):
    """Only a format of the query, a space and a rest without the query has a passage part."""
    assert passage_part(format) == expected


def test_an_invalid_format_is_an_error():
    """The UserError for unbalanced braces names the flag and its value."""
    with pytest.raises(UserError, match=r"--encoder_format '{query} {title'"):
        passage_part("{query} {title")


@pytest.mark.parametrize("format", [FORMAT, "{query} {text}", "{text} {query}", "{query}-{text}"])
@pytest.mark.parametrize("tokenizer", [READER, RETRIEVER], ids=["reader", "retriever"])
def test_encode_equals_tokenizing_whole_texts(store, tokenizer, format):
    """Formats and queries that can be joined, and others, give the ids of the filled-in format, cut at the same id."""
    numbers = np.random.default_rng(0).integers(0, len(store), (len(QUERIES), 4))
    for max_length in (12, 40, 512):
        encoded = ReaderInputEncoder(tokenizer, format, max_length).encode(QUERIES, numbers, store)
        for query, row, ids in zip(QUERIES, numbers, encoded, strict=True):
            assert ids == [
                ids_of_whole_text(tokenizer, format, query, passage, max_length) for passage in store.take(row)
            ]


@given(st.text(), st.integers(0, 239), st.integers(3, 200))
def test_encode_equals_tokenizing_the_whole_text_for_any_query(store, query, number, max_length):
    """The query is any Unicode text, the passage any golden one, cut at any length."""
    [[ids]] = ReaderInputEncoder(READER, FORMAT, max_length).encode([query], [[number]], store)
    assert ids == ids_of_whole_text(READER, FORMAT, query, store.take([number])[0], max_length)


def test_prepared_passages_are_not_tokenized_again(store, monkeypatch):
    """`encode` then tokenizes one text per query; without `splits_at_spaces`, one per passage, with equal ids."""
    text = ReaderInputEncoder(READER, FORMAT, 512)
    text.prepare(store)
    tokenized, ids = [], READER.ids
    monkeypatch.setattr(READER, "ids", lambda texts: tokenized.extend(texts) or ids(texts))
    joined = text.encode(["what?", "who?"], [[0, 1], [2, 3]], store)
    assert tokenized == ["what?", "who?"]
    monkeypatch.setattr(READER, "splits_at_spaces", False)
    assert ReaderInputEncoder(READER, FORMAT, 512).encode(["what?", "who?"], [[0, 1], [2, 3]], store) == joined
    assert len(tokenized) == 6
    assert text.encode([], [], store) == []
    assert text.encode(["what?"], [[]], store) == [[]]


def test_join_ids_cuts_and_render_prefers_the_query():
    """Special tokens count towards `max_length`; a passage's own `query` field does not replace the query."""
    assert join_ids([3, 4], np.array([5, 6, 7], np.uint16), READER, 4) == [3, 4, 5, 1]
    assert join_ids([3, 4], [5, 6, 7], READER, None) == [3, 4, 5, 6, 7, 1]
    assert render("{query} {id}", {**PASSAGE, "query": "other"}, query="who?") == "who? 1"


def test_every_golden_passage_joins(store):
    """For each of the 240 passages, the query's ids and the stored ids are the ids of the whole text."""
    query, passage_format = QUERIES[0], passage_part(FORMAT)
    numbers = range(len(store))
    expected = READER.ids([FORMAT.format(query=query, **passage) for passage in store.take(numbers)])
    stored = store.tokens(READER, passage_format, "reader").take(numbers)
    [query_ids] = READER.ids([query])
    assert all([*query_ids, *row.tolist()] == ids for row, ids in zip(stored, expected, strict=True))
    encoded = ReaderInputEncoder(READER, FORMAT, 128).encode([query], [numbers], store)[0]
    assert encoded == [READER.add_special_tokens(ids, 128) for ids in expected]
    assert len(store) == 240


def test_null_is_not_a_word():
    """A field that is null is empty in a format; the word None stays one."""
    assert render("{title}|{text}|{n}", {"title": None, "text": "None", "n": 0}) == "|None|0"
