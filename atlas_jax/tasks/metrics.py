"""Scores of a predicted text against the accepted answers, 0 to 1: the best over the answers."""

import collections
import re
import string
from collections.abc import Callable, Sequence

LOWER_IS_BETTER = ("eval_loss",)


def higher_is_better(metric: str) -> bool:
    """Whether more of a score, named as in a task's `metrics`, is better."""
    return metric not in LOWER_IS_BETTER


def normalize(text: str) -> str:
    """Normalizes as SQuAD does (arXiv 1606.05250): lower case, no punctuation, no English articles, single spaces."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: Sequence[str], normalizer: Callable[[str], str] = lambda text: text) -> float:
    """Returns 1 if the prediction equals an answer after `normalizer` of both, else 0."""
    return float(any(normalizer(prediction) == normalizer(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Returns SQuAD's F1: harmonic mean of precision and recall over the words of the normalized texts."""
    return max(_word_f1(normalize(prediction).split(), normalize(answer).split()) for answer in answers)


def _word_f1(predicted: list[str], expected: list[str]) -> float:
    common = sum((collections.Counter(predicted) & collections.Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0
