"""Passages that come with the rows (--use_file_passages)."""

import pytest

from atlas_jax.data.tokens import Tokenizer
from atlas_jax.retrieval.passage_source import PassageSource, RowPassages
from atlas_jax.tasks import Example


def example(*passages):
    """An example whose row has passages with these texts."""
    return Example("who?", None, [], passages=[{"title": "", "text": text} for text in passages])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_row_passages_are_the_first_n_in_order(golden, n):
    """The first n passages of each row, in order; `valid` is False where a row has fewer."""
    given = [["a", "b", "c"], ["d"], [], ["e", "f"]]
    found = RowPassages().begin_retrieval([example(*texts) for texts in given], n)()
    assert isinstance(RowPassages(), PassageSource)
    assert found.numbers.shape == found.valid.shape == (4, n)
    assert found.valid.sum(axis=1).tolist() == [min(len(texts), n) for texts in given]
    for texts, numbers, valid in zip(given, found.numbers, found.valid, strict=True):
        assert [passage["text"] for passage in found.store.take(numbers[valid])] == texts[:n]
        assert len(found.store.take(numbers)) == n  # numbers that are not valid are those of some passage too
    tokenizer = Tokenizer.load(golden / "assets" / "reader")
    first = found.store.tokens(tokenizer, "{text}", "reader").take(found.numbers[0])
    assert [ids.tolist() for ids in first[:3]] == tokenizer.ids(["a", "b", "c"][:n])


@pytest.mark.parametrize("passages", [None, []])
def test_rows_without_passages_give_an_empty_one(passages):
    """`valid` is False everywhere, and every number is that of an empty passage."""
    found = RowPassages().begin_retrieval([Example("who?", None, [], passages=passages)] * 2, 3)()
    assert not found.valid.any()
    assert found.valid.shape == (2, 3)
    assert found.store.take(found.numbers[0]) == [{"title": "", "text": ""}] * 3


def test_row_passages_are_copies():
    """A change to a retrieved passage does not reach the row."""
    row = example("a")
    RowPassages().begin_retrieval([row], 1)().store.take([0])[0]["text"] = "changed"
    assert row.passages[0]["text"] == "a"
