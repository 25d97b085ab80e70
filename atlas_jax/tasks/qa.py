"""Open-domain question answering: rows carry `question` and `answers`."""

import dataclasses
import random
from collections.abc import Sequence

from atlas_jax.data.tokens import Tokenizer
from atlas_jax.tasks.base import Example, Record, Row, check_answers_and_passages, file_passages, require_field
from atlas_jax.tasks.metrics import exact_match, f1, normalize


@dataclasses.dataclass(frozen=True)
class QA:
    """Short answers to questions, written after T5's first sentinel `<extra_id_0>`."""

    prompt: str = "question: {question} answer: <extra_id_0>"
    metrics: tuple[str, ...] = ("exact_match", "f1", "eval_loss")
    choices: tuple[str, ...] = ()
    examples_per_row: int = 1

    def check(self, row: Row) -> None:
        """Raises ValueError unless the row has `question`, and `answers` or `target`."""
        require_field(row, "question", str, "a text")
        if "target" in row:
            require_field(row, "target", str, "a text")
        else:
            require_field(row, "answers", list, "a list of texts")
        check_answers_and_passages(row)

    def examples(self, row: Row, number: int, tokenizer: Tokenizer) -> list[Example]:
        """Returns the one example of the row; without `target`, its target is an answer drawn with seed `number`."""
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
        """Returns SQuAD's exact match and F1."""
        return {"exact_match": exact_match(prediction, answers, normalize), "f1": f1(prediction, answers)}

    def merge_records(self, records: list[Record]) -> tuple[Record, dict[str, float]]:
        """Returns the record of the one example."""
        return records[0], {}
