"""Reader inputs: query and passage tokenized apart equal the whole text, or are tokenized whole."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas_jax.data.reader_inputs import ReaderText, join, render, split_encoder_format
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.errors import UserError
from atlas_jax.retrieval.passage_store import build_passages

GOLDEN = Path(__file__).parent.parent / "golden"
VITAL = Path(__file__).parents[3] / "shared" / "data" / "wikipedia-vital.jsonl"
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
    """The 240 golden passages."""
    return build_passages([GOLDEN / "passages.jsonl"], tmp_path_factory.mktemp("golden") / "passages")


def whole(tokenizer, format, query, passage, max_length):
    """What the reference does: one text, tokenized at once."""
    return tokenizer.finish(tokenizer.ids([format.format(query=query, **passage)])[0], max_length)


@pytest.mark.parametrize(
    ("format", "part"),
    [
        (FORMAT, " title: {title} context: {text}"),
        ("{query} {text}", " {text}"),
        ("{query}", None),  # nothing to store
        ("{query}: {text}", None),  # no space between
        ("q: {query} {text}", None),  # not in front
        ("{query} {text} {query}", None),  # again behind
        ("{query!r} {text}", None),
        ("{{query}} {text}", None),  # no field at all
    ],
)
def test_formats_that_part_after_the_query(format, part):
    """Only a query in front, a space, and a rest without the query can be tokenized apart."""
    assert split_encoder_format(format) == part


def test_a_format_that_is_none():
    """Unbalanced braces name the flag."""
    with pytest.raises(UserError, match=r"--encoder_format '{query} {title'"):
        split_encoder_format("{query} {title")


@pytest.mark.parametrize("format", [FORMAT, "{query} {text}", "{text} {query}", "{query}-{text}"])
@pytest.mark.parametrize("tokenizer", [READER, RETRIEVER], ids=["reader", "retriever"])
def test_reader_text_is_the_whole_text(store, tokenizer, format):
    """Every query and format, apart or whole: the ids of the filled-in format, in order, cut alike."""
    numbers = np.random.default_rng(0).integers(0, len(store), (len(QUERIES), 4))
    for max_length in (12, 40, 512):
        encoded = ReaderText(tokenizer, format, max_length).encode(QUERIES, numbers, store)
        for query, row, ids in zip(QUERIES, numbers, encoded, strict=True):
            assert ids == [whole(tokenizer, format, query, passage, max_length) for passage in store.take(row)]


@given(st.text(), st.integers(0, 239), st.integers(3, 200))
def test_any_query_joins(store, query, number, max_length):
    """Whatever a person may ask."""
    [[ids]] = ReaderText(READER, FORMAT, max_length).encode([query], [[number]], store)
    assert ids == whole(READER, FORMAT, query, store.take([number])[0], max_length)


def test_only_the_query_is_tokenized(store, monkeypatch):
    """Once prepared, a step tokenizes one text a query, unless the tokenizer does not split at spaces."""
    text = ReaderText(READER, FORMAT, 512)
    text.prepare(store)
    seen, ids = [], READER.ids
    monkeypatch.setattr(READER, "ids", lambda texts: seen.extend(texts) or ids(texts))
    fast = text.encode(["what?", "who?"], [[0, 1], [2, 3]], store)
    assert seen == ["what?", "who?"]
    monkeypatch.setattr(READER, "splits_at_spaces", False)
    assert ReaderText(READER, FORMAT, 512).encode(["what?", "who?"], [[0, 1], [2, 3]], store) == fast
    assert len(seen) == 6
    assert text.encode([], [], store) == []
    assert text.encode(["what?"], [[]], store) == [[]]


def test_joining_cuts_and_fills_in():
    """The special tokens count towards the limit; a passage's own `query` field does not replace the query."""
    assert join([3, 4], np.array([5, 6, 7], np.uint16), READER, 4) == [3, 4, 5, 1]
    assert join([3, 4], [5, 6, 7], READER, None) == [3, 4, 5, 6, 7, 1]
    assert render("{query} {id}", {**PASSAGE, "query": "other"}, query="who?") == "who? 1"


def test_the_whole_corpus_joins(tmp_path):
    """Every passage of the corpus: query ids and stored ids are the ids of the whole text."""
    corpus = VITAL if VITAL.exists() else GOLDEN / "passages.jsonl"
    store = build_passages([corpus], tmp_path / "store")
    query, rest = QUERIES[0], split_encoder_format(FORMAT)
    everything = range(len(store))
    expected = READER.ids([FORMAT.format(query=query, **passage) for passage in store.take(everything)])
    stored = store.tokens(READER, rest, "reader").take(everything)
    [front] = READER.ids([query])
    assert all([*front, *row.tolist()] == ids for row, ids in zip(stored, expected, strict=True))
    encoded = ReaderText(READER, FORMAT, 128).encode([query], [everything], store)[0]
    assert encoded == [READER.finish(ids, 128) for ids in expected]
    assert len(store) in (10_033, 240)
