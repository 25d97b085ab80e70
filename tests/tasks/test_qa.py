"""Question answering: examples and scores equal the reference's."""

import collections
import json
import random

import pytest

from atlas_jax.data.tokens import Tokenizer
from atlas_jax.tasks.qa import QA

ROW = {"question": "who?", "answers": ["Ada", "Grace", "Alan"]}


@pytest.fixture(scope="module")
def tokenizer(golden):
    """The reader's tokenizer."""
    return Tokenizer.load(golden / "assets" / "reader")


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_examples_equal_the_reference(golden, tokenizer):
    """Query, answers and metadata as in its predictions file; query and target as in its first training batch."""
    rows, predictions = read_lines(golden / "qa.jsonl"), read_lines(golden / "exp" / "qa" / "qa-step-1.jsonl")
    batch = json.loads((golden / "batch.json").read_text())
    examples = []
    for number, (row, line) in enumerate(zip(rows, predictions, strict=True)):
        QA().check(row)
        example = QA().example(row, 0, number, tokenizer)
        examples.append(example)
        assert (example.query, example.answers, example.metadata) == (line["query"], line["answers"], line["metadata"])
        assert example.id is None
        assert "id" not in line
    assert [example.query for example in examples[:4]] == batch["query"]
    assert [example.target for example in examples[:4]] == batch["target"]


def test_scores_equal_the_reference(golden):
    """On the reference's generations, which are nonsense; counter-case: a right answer scores 1."""
    predictions = read_lines(golden / "exp" / "qa" / "qa-step-1.jsonl")
    metrics = json.loads((golden / "meta.json").read_text())["qa_metrics"]
    scores = [QA().score(line["generation"], line["answers"]) for line in predictions]
    for metric in ("exact_match", "f1"):
        assert sum(score[metric] for score in scores) / len(scores) == metrics[metric]
    assert all(QA().score(line["answers"][1], line["answers"]) == {"exact_match": 1, "f1": 1} for line in predictions)


def test_the_target_is_an_answer_drawn_with_the_row_number_as_seed(tokenizer):
    """Equal numbers draw equal answers, and each answer is drawn for some numbers; a row's own `target` is kept."""

    def draw(number):
        return QA().example(ROW, 0, number, tokenizer).target

    drawn = [draw(number) for number in range(100)]
    assert drawn == [draw(number) for number in range(100)]
    assert set(drawn) == {"<extra_id_0> Ada", "<extra_id_0> Grace", "<extra_id_0> Alan"}
    assert min(collections.Counter(drawn).values()) > 15
    assert {QA().example(ROW | {"target": "T"}, 0, n, tokenizer).target for n in range(9)} == {"<extra_id_0> T"}


def test_an_example_takes_passages_metadata_and_id_from_its_row(tokenizer):
    """Reference: without `answers`, the target with its sentinel is the accepted answer."""
    row = {
        "question": "{who}?",
        "target": "Ada",
        "metadata": {"x": 1},
        "id": 0,
        "passages": [{"title": "", "text": "t"}],
    }
    example = QA("Q: {question} A: <extra_id_0>").example(row, 0, 5, tokenizer)
    assert example.query == "Q: {who}? A: <extra_id_0>"  # braces of a question are text
    assert example.answers == ["<extra_id_0> Ada"]
    assert (example.metadata, example.id, example.passages) == ({"x": 1}, 0, [{"title": "", "text": "t"}])
    for empty in ({}, {"passages": []}, {"passages": None}):
        example = QA().example(ROW | empty, 0, 0, tokenizer)
        assert example.passages == [{"title": "", "text": ""}]
        assert example.metadata == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": ["x"]}, "`question` is missing"),
        ({"question": 3, "answers": ["x"]}, "`question` is not a text"),
        ({"question": "q"}, "`answers` is missing"),
        ({"question": "q", "answers": "x"}, "`answers` is not a list of texts"),
        ({"question": "q", "answers": []}, "`answers` is empty"),
        ({"question": "q", "answers": ["x", 1]}, "`answers` is not a list of texts"),
        ({"question": "q", "target": None}, "`target` is not a text"),
        ({"question": "q", "target": "x", "answers": []}, "`answers` is empty"),  # no prediction could score
        ({"question": "q", "target": "x", "answers": "x"}, "`answers` is not a list of texts"),
        ({"question": "q", "target": "x", "passages": "p"}, "`passages` is not a list of passages"),
        ({"question": "q", "target": "x", "passages": ["p"]}, "`passages` is not a list of passages"),
    ],
)
def test_invalid_rows_are_errors(row, message):
    """The ValueError says in one line what is wrong."""
    QA().check(ROW)
    QA().check({"question": "q", "target": "x", "passages": None})
    with pytest.raises(ValueError, match=message) as error:
        QA().check(row)
    assert "\n" not in str(error.value)


def test_the_target_is_a_function_of_seed_and_number(tokenizer):
    """One of three answers: each is drawn at some number, seeds draw others, and seed 0 draws as older versions did."""
    row = {"question": "q", "answers": ["a", "b", "c"]}

    def draws(seed):
        return [QA(seed=seed).example(row, 0, number, tokenizer).target for number in range(300)]

    assert draws(1) == draws(1) != draws(2)
    assert draws(0) == [f"<extra_id_0> {random.Random(number).choice(row['answers'])}" for number in range(300)]
    for seed in range(4):
        assert min(collections.Counter(draws(seed)).values()) > 70
