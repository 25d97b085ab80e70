"""Multiple choice, as MMLU: the reader is shown the options in several orders and its probabilities are averaged."""

import dataclasses
import functools
import itertools
import string
from collections.abc import Sequence
from typing import Literal

import numpy as np

from atlas_jax.data.tokens import Tokenizer
from atlas_jax.tasks.base import Example, Record, Row, file_passages, need
from atlas_jax.tasks.metrics import exact_match

Permutations = Literal["single", "cyclic", "all"]
TIE = 1e-6  # options this near are equal and the first is chosen: rounding, which batches change, decides nothing
MAX_PROMPT_TOKENS = 356  # a longer prompt loses the start of its question


def orders(count: int, permutations: Permutations) -> list[tuple[int, ...]]:
    """The orders in which options are shown: the option at each place; the first order is their own."""
    own = tuple(range(count))
    match permutations:
        case "single":
            return [own]
        case "cyclic":
            return [own[count - i :] + own[: count - i] for i in range(count)]
        case "all":
            return list(itertools.permutations(own))


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
    """Rows carry `question`, `options` {"A": text, ...} and `answer`, the letter of the right one."""

    num_options: int = 4
    permutations: Permutations = "single"
    metrics: tuple[str, ...] = ("debiased_accuracy", "accuracy", "eval_loss")

    @functools.cached_property
    def choices(self) -> str:
        """The letters, each with a logit in the reader's answer."""
        return string.ascii_uppercase[: self.num_options]

    @functools.cached_property
    def per_row(self) -> int:
        """The number of orders."""
        return len(orders(self.num_options, self.permutations))

    def check(self, row: Row) -> None:
        """Needs a question, texts for exactly the letters, and one of them as the answer."""
        need(row, "question", str, "a text")
        need(row, "options", dict, "an object of letters and texts")
        need(row, "answer", str, "the letter of an option")
        options = row["options"]
        if sorted(options) != list(self.choices):
            raise ValueError(
                f"`options` has {', '.join(sorted(options)) or 'nothing'} where --multiple_choice_num_options "
                f"{self.num_options} means {', '.join(self.choices)}; mend the row or the flag"
            )
        for letter, text in options.items():
            if not isinstance(text, str):
                raise ValueError(f"option {letter} is not a text; every option needs one")
        if row["answer"] not in options:
            raise ValueError(f"`answer` is {row['answer']!r}, no option; it must be one of {', '.join(self.choices)}")

    def prompt(self, question: str, options: dict[str, str], tokenizer: Tokenizer) -> str:
        """The query; where it is too long, the question's last tokens."""
        listed = " ".join(f"({letter}) {text}" for letter, text in options.items()).strip()

        def fill(question: str) -> str:
            return f"question: {question.strip()} options: {listed} answer: <extra_id_0>"

        def tokens(text: str) -> list[int]:
            return tokenizer.finish(tokenizer.ids([text])[0])

        if len(tokens(fill(question))) > MAX_PROMPT_TOKENS:
            # Reference: a negative rest (the options alone are too long) cuts from the other side, as the slice does
            rest = MAX_PROMPT_TOKENS - len(tokens(fill("")))
            question = tokenizer.decode(tokens(question)[-rest:])
        return fill(question)

    def examples(self, row: Row, number: int, tokenizer: Tokenizer) -> list[Example]:
        """The row under each order of its options; a permuted example's answer is its letter there."""
        del number
        texts = [row["options"][letter] for letter in self.choices]
        answer = self.choices.index(row["answer"])
        uid = row["question"] + " ".join(row["options"].values())
        found = []
        for order in orders(self.num_options, self.permutations):
            options = {letter: texts[option] for letter, option in zip(self.choices, order, strict=True)}
            letter = self.choices[order.index(answer)]
            metadata = dict(row) | {
                "options": options,
                "answer": letter,
                "is_original": order == tuple(range(self.num_options)),
                "uid": uid,
            }
            query = self.prompt(row["question"], options, tokenizer)
            found.append(Example(query, f"<extra_id_0> {letter}", [letter], metadata, file_passages({})))
        return found

    def score(self, prediction: str, answers: Sequence[str]) -> dict[str, float]:
        """Accuracy of the generated letter."""
        return {"accuracy": exact_match(prediction, answers)}

    def finish(self, permuted: list[Record]) -> tuple[Record, dict[str, float]]:
        """The question with each option's probability averaged over the orders, and its debiased accuracy."""
        by_option: list[list[float]] = [[] for _ in self.choices]
        by_text: dict[str, list[float]] = {}
        for order, record in zip(orders(self.num_options, self.permutations), permuted, strict=True):
            probabilities = softmax([record["choice_logits"][letter] for letter in self.choices])
            for option, text, p in zip(order, record["metadata"]["options"].values(), probabilities, strict=True):
                by_option[option].append(p)
                by_text.setdefault(text, []).append(p)
        means = {
            letter: float(np.mean(ps, dtype=np.float32)) for letter, ps in zip(self.choices, by_option, strict=True)
        }
        top = max(means.values())
        line = {key: value for key, value in permuted[0].items() if key != "choice_logits"}
        line |= {
            "generation": max(means, key=lambda letter: means[letter] > top - TIE),  # the first that is
            "choice_probs": means,
            "all_probs": by_text,
            "permutations": permuted,
        }
        return line, {"debiased_accuracy": float(line["generation"] == line["metadata"]["answer"])}


def softmax(logits: Sequence[float]) -> list[float]:
    """The probabilities of a few logits, in float32."""
    shifted = np.asarray(logits, np.float32) - np.float32(max(logits))
    weights = np.exp(shifted.astype(np.float64)).astype(np.float32)  # rounded alike on every machine
    return (weights / weights.sum()).tolist()
