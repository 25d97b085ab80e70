"""`make_task` maps --task to a class."""

import re

import pytest

from atlas_jax.config import TaskConfig
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.errors import UserError
from atlas_jax.tasks import make_task
from atlas_jax.tasks.base import Base
from atlas_jax.tasks.multiple_choice import MultipleChoice
from atlas_jax.tasks.qa import QA


def test_make_task_returns_the_named_task():
    """`make_task` passes the flags that belong to the task; a task that is not implemented is a UserError."""

    def task(name, train=False, **flags):
        return make_task(TaskConfig(name, **flags), 7, train=train)

    assert task("base") == Base(needs_target=False)
    assert task("base", train=True) == Base()
    assert task("qa", qa_prompt_format="{question}?") == QA("{question}?", 7, needs_target=False)
    flags = {"multiple_choice_num_options": 5, "multiple_choice_eval_permutations": "cyclic"}
    assert task("multiple_choice", **flags) == MultipleChoice(5, "cyclic", needs_target=False)
    assert task("multiple_choice", max_orders=3, **flags) == MultipleChoice(5, "cyclic", False, 3)
    assert task("multiple_choice", train=True, max_orders=3, **flags) == MultipleChoice(5, "single")
    with pytest.raises(UserError, match="--task kilt: not built yet"):
        task("kilt")


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("base", {"query": "q"}),
        ("qa", {"question": "q"}),
        ("qa", {"question": "q", "answers": []}),
        ("multiple_choice", {"question": "q", "options": dict(zip("ABCD", "wxyz", strict=True))}),
    ],
)
def test_rows_without_answers_are_for_evaluation(task, row, golden):
    """They have no answers there, for each order of the options; training refuses them."""
    evaluation = make_task(TaskConfig(task, multiple_choice_eval_permutations="cyclic"))
    evaluation.check(row)
    tokenizer = Tokenizer.load(golden / "assets" / "reader")
    for which in range(evaluation.examples_per_row):
        assert evaluation.example(row, which, 0, tokenizer).answers == []
    with pytest.raises(ValueError, match=r"is missing; every row needs|`answers` is empty"):
        make_task(TaskConfig(task), train=True).check(row)


ROWS = {
    "base": {"query": "q", "target": "t"},
    "qa": {"question": "q", "answers": ["a"]},
    "multiple_choice": {"question": "q", "options": dict(zip("ABCD", "wxyz", strict=True)), "answer": "A"},
}


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize(
    ("passages", "expected"),
    [
        ({"passages": [{"title": None, "text": "x"}]}, [{"title": "", "text": "x"}]),
        ({"passages": [{"text": "x", "id": 3}]}, [{"text": "x", "id": 3, "title": ""}]),
        ({"passages": None}, [{"text": "", "title": ""}]),
        ({"ctxs": [{"title": "T", "text": "x", "score": "1.5", "hasanswer": True}]}, [{"title": "T", "text": "x"}]),
        ({"passages": [{"title": "P", "text": "y"}], "ctxs": [{"text": "x"}]}, [{"title": "P", "text": "y"}]),
        ({"passages": [{"title": "P", "text": "y", "score": 2}]}, [{"title": "P", "text": "y", "score": 2}]),
    ],
)
def test_a_row_brings_its_own_passages(golden, task, passages, expected):
    """Under `passages`, or `ctxs` without scores; a title that is null or missing is empty, in every task."""
    row = ROWS[task] | passages
    made = make_task(TaskConfig(task))
    made.check(row)
    assert list(made.example(row, 0, 0, Tokenizer.load(golden / "assets" / "reader")).passages) == expected


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("field", ["passages", "ctxs"])
@pytest.mark.parametrize(
    ("passage", "problem"),
    [
        ({"title": "T"}, "`text` of passage 1 in `{}` is missing"),
        ({"title": "T", "text": None}, "`text` of passage 1 in `{}` is missing"),
        ({"title": 7, "text": "x"}, "`title` of passage 1 in `{}` is not a text"),
        ("x", "`{}` is not a list of passages"),
    ],
)
def test_passages_without_a_text_are_refused(task, field, passage, problem):
    """With the number of the passage; file and line are those of the row."""
    row = ROWS[task] | {field: [{"title": "T", "text": "x"}, passage]}
    with pytest.raises(ValueError, match=re.escape(problem.format(field))):
        make_task(TaskConfig(task)).check(row)
