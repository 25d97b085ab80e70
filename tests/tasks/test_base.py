"""The plain task: text to text."""

import pytest

from atlas_jax.data.tokens import Tokenizer
from atlas_jax.tasks.base import Base

ROW = {"query": "translate: {x}", "target": "y"}


@pytest.fixture(scope="module")
def tokenizer(golden):
    """The reader's."""
    return Tokenizer.load(golden / "assets" / "reader")


def test_a_row_is_taken_as_it_is(tokenizer):
    """No prompt and no sentinel around it; what it does not have is left out."""
    [example] = Base().examples(ROW, 0, tokenizer)
    assert (example.query, example.target, example.answers) == ("translate: {x}", "y", ["y"])
    assert (example.metadata, example.id) == (None, None)
    assert example.passages == [{"title": "", "text": ""}]
    full = ROW | {"answers": ["y", "Y"], "metadata": {"m": 1}, "id": "7", "passages": [{"text": "p"}]}
    [example] = Base().examples(full, 0, tokenizer)
    assert (example.answers, example.metadata, example.id) == (["y", "Y"], {"m": 1}, "7")
    assert example.passages == [{"text": "p"}]


def test_accuracy_is_of_the_text_itself():
    """Any of the answers, without a normal form."""
    assert [Base().score(text, ["y", "the Y"])["accuracy"] for text in ("y", "the Y", "Y", "")] == [1, 1, 0, 0]


def test_a_row_has_one_record():
    """Its line is its record; nothing needs more than one example."""
    record = {"query": "q"}
    assert Base().finish([record]) == (record, {})
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
def test_rows_that_cannot_be_used(changes, message):
    """What is wrong; a field that is not there is missing."""
    Base().check(ROW)
    with pytest.raises(ValueError, match=message):
        Base().check(ROW | changes)
    for field in ROW:
        with pytest.raises(ValueError, match=f"`{field}` is missing"):
            Base().check({name: value for name, value in ROW.items() if name != field})
