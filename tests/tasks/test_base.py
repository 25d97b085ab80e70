"""The task `base`: text to text."""

import pytest

from atlas_jax.data.tokens import Tokenizer
from atlas_jax.tasks.base import Base

ROW = {"query": "translate: {x}", "target": "y"}


@pytest.fixture(scope="module")
def tokenizer(golden):
    """The reader's tokenizer."""
    return Tokenizer.load(golden / "assets" / "reader")


def test_an_example_has_the_fields_of_its_row(tokenizer):
    """Query and target without prompt or sentinel; defaults for fields that the row lacks."""
    example = Base().example(ROW, 0, 0, tokenizer)
    assert (example.query, example.target, example.answers) == ("translate: {x}", "y", ["y"])
    assert (example.metadata, example.id) == (None, None)
    assert example.passages == [{"title": "", "text": ""}]
    full = ROW | {"answers": ["y", "Y"], "metadata": {"m": 1}, "id": "7", "passages": [{"title": "", "text": "p"}]}
    example = Base().example(full, 0, 0, tokenizer)
    assert (example.answers, example.metadata, example.id) == (["y", "Y"], {"m": 1}, "7")
    assert example.passages == [{"title": "", "text": "p"}]


def test_accuracy_is_an_exact_match_with_any_answer():
    """Texts are not normalized: another case or an article does not match."""
    assert [Base().score(text, ["y", "the Y"])["accuracy"] for text in ("y", "the Y", "Y", "")] == [1, 1, 0, 0]


def test_merge_records_returns_the_only_record():
    """The record is unchanged, and there are no scores over several examples."""
    record = {"query": "q"}
    assert Base().merge_records([record]) == (record, {})
    assert Base().metrics == ("accuracy", "eval_loss")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": None}, "`query` is not a text"),
        ({"target": 1}, "`target` is not a text"),
        ({"answers": []}, "`answers` is empty"),
        ({"answers": "y"}, "`answers` is not a list of texts"),
        ({"passages": [None]}, "`passages` is not a list of passages"),
    ],
)
def test_invalid_rows_are_errors(changes, message):
    """The ValueError says what is wrong with the field, or that it is missing."""
    Base().check(ROW)
    with pytest.raises(ValueError, match=message):
        Base().check(ROW | changes)
    for field in ROW:
        with pytest.raises(ValueError, match=f"`{field}` is missing"):
            Base().check({name: value for name, value in ROW.items() if name != field})
