"""Multiple choice, as in MMLU: the reader sees the options in several orders and its probabilities are averaged."""

import dataclasses
import functools
import math
import string
from collections.abc import Sequence
from typing import Literal

import numpy as np

from atlas_jax.data.tokens import Tokenizer
from atlas_jax.tasks.base import Example, Record, Row, check_passages, file_passages, require_field
from atlas_jax.tasks.metrics import exact_match

Permutations = Literal["single", "cyclic", "all"]
TIE_MARGIN = 1e-6  # probabilities this close tie, the first wins: rounding, which varies by batch, must not decide
MAX_PROMPT_TOKENS = 356  # a longer prompt loses the start of its question


def count_orders(count: int, permutations: Permutations) -> int:
    """Returns the number of orders to show options in: 1, all rotations, or all permutations."""
    return {"single": 1, "cyclic": count, "all": math.factorial(count)}[permutations]


def option_order(count: int, permutations: Permutations, which: int) -> tuple[int, ...]:
    """Returns one of the orders to show options in: the option's index by letter; number 0 is the original order.

    Those of `all` are in lexical order, as `itertools.permutations` lists them, of which no other is made.
    """
    original = list(range(count))
    if permutations == "cyclic":
        return tuple(original[count - which :] + original[: count - which])
    order = []
    for left in range(count, 0, -1):
        first, which = divmod(which, math.factorial(left - 1))
        order.append(original.pop(first))
    return tuple(order)


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
    """Rows carry `question`, `options` {"A": text, ...} and `answer`, the letter of the right option.

    Unless a row `needs_target`, as in training, one without `answer` is read but not scored.
    """

    num_options: int = 4
    permutations: Permutations = "single"
    needs_target: bool = True
    max_orders: int | None = None  # at most so many of the orders, spread evenly over all of them
    metrics: tuple[str, ...] = ("debiased_accuracy", "accuracy", "eval_loss")

    @functools.cached_property
    def choices(self) -> str:
        """The letters of the options, whose logits are compared."""
        return string.ascii_uppercase[: self.num_options]

    @functools.cached_property
    def examples_per_row(self) -> int:
        """Number of orders of the options."""
        return min(self._all_orders, self.max_orders or self._all_orders)

    @property
    def _all_orders(self) -> int:
        return count_orders(self.num_options, self.permutations)

    def order(self, which: int) -> tuple[int, ...]:
        """Returns one of the `examples_per_row` orders of the options; number 0 is the original order."""
        place = which * self._all_orders // self.examples_per_row
        return option_order(self.num_options, self.permutations, place)

    def check(self, row: Row) -> None:
        """Raises ValueError unless `options` has a text for each letter, and `answer`, if needed, is such a letter."""
        require_field(row, "question", str, "a text")
        require_field(row, "options", dict, "an object of letters and texts")
        if self.needs_target or "answer" in row:
            require_field(row, "answer", str, "the letter of an option")
        options = row["options"]
        if sorted(options) != list(self.choices):
            raise ValueError(
                f"`options` has {', '.join(sorted(options)) or 'nothing'} where --multiple_choice_num_options "
                f"{self.num_options} means {', '.join(self.choices)}; mend the row or the flag"
            )
        for letter, text in options.items():
            if not isinstance(text, str):
                raise ValueError(f"option {letter} is not a text; every option needs one")
        if "answer" in row and row["answer"] not in options:
            raise ValueError(f"`answer` is {row['answer']!r}, no option; it must be one of {', '.join(self.choices)}")
        check_passages(row)

    def prompt(self, question: str, options: dict[str, str], tokenizer: Tokenizer) -> str:
        """Returns the query; one of over MAX_PROMPT_TOKENS keeps only the last tokens of its question."""
        listed = " ".join(f"({letter}) {text}" for letter, text in options.items()).strip()

        def fill(question: str) -> str:
            return f"question: {question.strip()} options: {listed} answer: <extra_id_0>"

        def tokens(text: str) -> list[int]:
            return tokenizer.add_special_tokens(tokenizer.ids([text])[0])

        if len(tokens(fill(question))) > MAX_PROMPT_TOKENS:
            # Reference: a negative budget (the options alone are too long) cuts tokens off the start, as the slice does
            budget = MAX_PROMPT_TOKENS - len(tokens(fill("")))
            question = tokenizer.decode(tokens(question)[-budget:])
        return fill(question)

    def example(self, row: Row, which: int, number: int, tokenizer: Tokenizer) -> Example:
        """Returns the example of one order of the options; its answer is the right option's letter in that order."""
        del number
        texts, order = [row["options"][letter] for letter in self.choices], self.order(which)
        options = {letter: texts[option] for letter, option in zip(self.choices, order, strict=True)}
        metadata, answers = dict(row) | {"options": options}, []
        if "answer" in row:
            answers = [self.choices[order.index(self.choices.index(row["answer"]))]]
            metadata["answer"] = answers[0]
        uid = row["question"] + " ".join(row["options"].values())
        metadata |= {"is_original": order == tuple(range(self.num_options)), "uid": uid}
        # Without an answer any letter does: the choices are compared after the sentinel, before the letter
        target = f"<extra_id_0> {(answers or self.choices)[0]}"
        query = self.prompt(row["question"], options, tokenizer)
        return Example(query, target, answers, metadata, file_passages(row))

    def score(self, prediction: str, answers: Sequence[str]) -> dict[str, float]:
        """Returns the accuracy: 1 if the text is exactly the right letter."""
        return {"accuracy": exact_match(prediction, answers)}

    def merge_records(self, records: list[Record]) -> tuple[Record, dict[str, float]]:
        """Averages each option's probability over the orders; returns the row's record and its debiased accuracy.

        Without an answer in the row there is no accuracy.
        """
        probs_by_option: list[list[float]] = [[] for _ in self.choices]
        probs_by_text: dict[str, list[float]] = {}
        for order, record in zip(map(self.order, range(self.examples_per_row)), records, strict=True):
            probabilities = softmax([record["choice_logits"][letter] for letter in self.choices])
            for option, text, p in zip(order, record["metadata"]["options"].values(), probabilities, strict=True):
                probs_by_option[option].append(p)
                probs_by_text.setdefault(text, []).append(p)
        means = {
            letter: float(np.mean(ps, dtype=np.float32))
            for letter, ps in zip(self.choices, probs_by_option, strict=True)
        }
        top = max(means.values())
        merged = {key: value for key, value in records[0].items() if key != "choice_logits"}
        merged |= {
            # The first of the options that tie at the top
            "generation": max(means, key=lambda letter: means[letter] > top - TIE_MARGIN),
            "choice_probs": means,
            "all_probs": probs_by_text,
            "permutations": records,
        }
        if "answer" not in merged["metadata"]:
            return merged, {}
        return merged, {"debiased_accuracy": float(merged["generation"] == merged["metadata"]["answer"])}


def softmax(logits: Sequence[float]) -> list[float]:
    """Returns the softmax of a few logits, rounded to float32."""
    shifted = np.asarray(logits, np.float32) - np.float32(max(logits))
    # Computed in float64, so that every machine rounds to the same float32
    weights = np.exp(shifted.astype(np.float64)).astype(np.float32)
    return (weights / weights.sum()).tolist()
