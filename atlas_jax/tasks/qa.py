"""Open-domain questions: rows carry `question` and `answers`."""

import dataclasses
import random
from collections.abc import Sequence

from atlas_jax.data.tokens import Tokenizer
from atlas_jax.tasks.base import Example, Record, Row, check_lists, file_passages, need
from atlas_jax.tasks.metrics import exact_match, f1, normalize


@dataclasses.dataclass(frozen=True)
class QA:
    """Question to short answer, behind T5's first sentinel."""

    prompt: str = "question: {question} answer: <extra_id_0>"
    metrics: tuple[str, ...] = ("exact_match", "f1", "eval_loss")
    choices: tuple[str, ...] = ()
    per_row: int = 1

    def check(self, row: Row) -> None:
        """Needs `question`, and `answers` or `target`."""
        need(row, "question", str, "a text")
        if "target" in row:
            need(row, "target", str, "a text")
        else:
            need(row, "answers", list, "a list of texts")
        check_lists(row)

    def examples(self, row: Row, number: int, tokenizer: Tokenizer) -> list[Example]:
        """One example; where the row names no `target`, one of its answers, drawn by `number`."""
        del tokenizer
        target = row["target"] if "target" in row else random.Random(number).choice(row["answers"])
        return [
            Example(
                self.prompt.format(question=row["question"]),
                f"<extra_id_0> {target}",
                row.get("answers", [f"<extra_id_0> {target}"]),
                row.get("metadata", {}),
                file_passages(row),
                row.get("id"),
            )
        ]

    def score(self, prediction: str, answers: Sequence[str]) -> dict[str, float]:
        """Exact match and F1 of SQuAD's normalised texts."""
        return {"exact_match": exact_match(prediction, answers, normalize), "f1": f1(prediction, answers)}

    def finish(self, records: list[Record]) -> tuple[Record, dict[str, float]]:
        """The example's own record."""
        return records[0], {}
