"""Scores of a text against the answers that count as right, 0 to 1: the best over the answers."""

import collections
import re
import string
from collections.abc import Callable, Sequence


def normalize(text: str) -> str:
    """SQuAD's normal form (arXiv 1606.05250): lower case, no punctuation, no English articles, single spaces."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: Sequence[str], form: Callable[[str], str] = lambda text: text) -> float:
    """1 if the prediction is one of the answers, in this form of both."""
    return float(any(form(prediction) == form(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over the words of the normal forms (SQuAD)."""
    return max(_f1(normalize(prediction).split(), normalize(answer).split()) for answer in answers)


def _f1(predicted: list[str], wanted: list[str]) -> float:
    common = sum((collections.Counter(predicted) & collections.Counter(wanted)).values())
    return 2 * common / (len(predicted) + len(wanted)) if common else 0.0
