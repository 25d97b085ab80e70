"""Question answering: examples and scores equal the reference's and SQuAD's; tasks by name."""

import collections
import json
import re
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from atlas_jax.config import Config, ModelConfig, TaskConfig
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.errors import UserError
from atlas_jax.tasks import make_task
from atlas_jax.tasks.base import Base
from atlas_jax.tasks.metrics import exact_match, f1, normalize
from atlas_jax.tasks.multiple_choice import MultipleChoice
from atlas_jax.tasks.qa import QA

ROW = {"question": "who?", "answers": ["Ada", "Grace", "Alan"]}
WORDS = st.lists(st.sampled_from(["a", "An", "the", "cat", "Cat!", "dog", "?", "don't", "\u00e9", "7"]), max_size=6)
TEXTS = WORDS.map(" ".join) | st.text(max_size=12)


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
        [example] = QA().examples(row, number, tokenizer)
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
        return QA().examples(ROW, number, tokenizer)[0].target

    drawn = [draw(number) for number in range(100)]
    assert drawn == [draw(number) for number in range(100)]
    assert set(drawn) == {"<extra_id_0> Ada", "<extra_id_0> Grace", "<extra_id_0> Alan"}
    assert min(collections.Counter(drawn).values()) > 15
    assert {QA().examples(ROW | {"target": "T"}, n, tokenizer)[0].target for n in range(9)} == {"<extra_id_0> T"}


def test_an_example_takes_passages_metadata_and_id_from_its_row(tokenizer):
    """Reference: without `answers`, the target with its sentinel is the accepted answer."""
    row = {"question": "{who}?", "target": "Ada", "metadata": {"x": 1}, "id": 0, "passages": [{"text": "t"}]}
    [example] = QA("Q: {question} A: <extra_id_0>").examples(row, 5, tokenizer)
    assert example.query == "Q: {who}? A: <extra_id_0>"  # braces of a question are text
    assert example.answers == ["<extra_id_0> Ada"]
    assert (example.metadata, example.id, example.passages) == ({"x": 1}, 0, [{"text": "t"}])
    for empty in ({}, {"passages": []}, {"passages": None}):
        [example] = QA().examples(ROW | empty, 0, tokenizer)
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


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Cat, an owl & a dog.", "cat owl dog"),
        ("don't", "dont"),
        ("the.the", "thethe"),  # punctuation is removed first
        ("theory of a-an", "theory of aan"),
        ("  two\t\nspaces ", "two spaces"),
        ("a the an", ""),
        ("\u2018curly\u2019", "\u2018curly\u2019"),  # only ASCII punctuation is removed
        ("\u00c9COLE", "\u00e9cole"),
    ],
)
def test_normalize_follows_squad(text, normalized):
    """Hand-made cases of SQuAD's normalization."""
    assert normalize(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "answers", "expected_em", "expected_f1"),
    [
        ("The cat", ["cat"], 1, 1),
        ("cat sat", ["the cat"], 0, 2 / 3),  # precision 1/2, recall 1
        ("cat cat", ["cat"], 0, 2 / 3),  # repeated words count
        ("cat cat dog", ["dog cat cat"], 0, 1),  # word order does not matter
        ("dog", ["cat"], 0, 0),
        ("dog", ["cat", "big dog", "a dog!"], 1, 1),  # the best answer
        ("big red dog", ["cat", "big dog", "dog"], 0, 0.8),
        ("", ["cat"], 0, 0),
        ("the", ["a"], 1, 0),  # Reference: both normalize to an empty text, so they match but share no word
        ("", [""], 1, 0),
    ],
)
def test_exact_match_and_f1_of_hand_made_cases(prediction, answers, expected_em, expected_f1):
    """`score` returns the expected exact match and F1."""
    assert QA().score(prediction, answers) == {"exact_match": expected_em, "f1": pytest.approx(expected_f1)}


def squad_f1(prediction, answer):
    """Returns F1 as the published evaluation script of SQuAD 1.1 computes it."""

    def normalized_words(text):
        text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()).split()

    common = collections.Counter(normalized_words(prediction)) & collections.Counter(normalized_words(answer))
    same = sum(common.values())
    if same == 0:
        return 0
    precision, recall = same / len(normalized_words(prediction)), same / len(normalized_words(answer))
    return 2 * precision * recall / (precision + recall)


@given(TEXTS, TEXTS)
@example("the", "a")
@example("", "")
def test_f1_and_exact_match_of_any_two_texts(left, right):
    """F1 equals SQuAD's script and is symmetric; a match has F1 1, or 0 if both normalize to an empty text."""
    score = f1(left, [right])
    assert score == pytest.approx(squad_f1(left, right))
    assert score == f1(right, [left])
    assert 0 <= score <= 1
    match = exact_match(left, [right], normalize)
    assert match == exact_match(right, [left], normalize)
    if match:
        assert score == (1 if normalize(left) else 0)
    assert normalize(normalize(left)) == normalize(left)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=4), TEXTS)
def test_a_score_is_the_best_over_the_answers(prediction, answers, added):
    """With one more answer, it is the maximum of the score before and the score with that answer alone."""
    for score in (lambda texts: f1(prediction, texts), lambda texts: exact_match(prediction, texts, normalize)):
        assert score([*answers, added]) == max(score(answers), score([added]))


def test_make_task_returns_the_named_task():
    """With the flags that belong to the task; a task that is not built is a UserError."""

    def task(name, **flags):
        return make_task(Config(model=ModelConfig(), task=TaskConfig(name, **flags)))

    assert task("base") == Base()
    assert task("qa", qa_prompt_format="{question}?") == QA("{question}?")
    flags = {"multiple_choice_num_options": 5, "multiple_choice_eval_permutations": "cyclic"}
    assert task("multiple_choice", **flags) == MultipleChoice(5, "cyclic")
    with pytest.raises(UserError, match="--task kilt: not built yet"):
        task("kilt")
