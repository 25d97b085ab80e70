"""Exact match and F1 equal those of SQuAD's evaluation script."""

import collections
import re
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from atlas_jax.tasks.metrics import exact_match, f1, normalize
from atlas_jax.tasks.qa import QA

WORDS = st.lists(st.sampled_from(["a", "An", "the", "cat", "Cat!", "dog", "?", "don't", "\u00e9", "7"]), max_size=6)
TEXTS = WORDS.map(" ".join) | st.text(max_size=12)


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
    """With one more answer, the score is the maximum of the score before and the score with that answer alone."""
    for score in (lambda texts: f1(prediction, texts), lambda texts: exact_match(prediction, texts, normalize)):
        assert score([*answers, added]) == max(score(answers), score([added]))
