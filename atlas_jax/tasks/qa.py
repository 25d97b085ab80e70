"""Open-domain question answering: rows carry `question` and `answers`."""

import dataclasses
import random
from collections.abc import Sequence

from atlas_jax.data.tokens import Tokenizer
from atlas_jax.tasks.base import Example, Record, Row, check_answers, check_passages, file_passages, require_field
from atlas_jax.tasks.metrics import exact_match, f1, normalize


@dataclasses.dataclass(frozen=True)
class QA:
    """Short answers to questions, written after T5's first sentinel `<extra_id_0>`.

    Unless a row `needs_target`, as in training, one without answers is read but not scored.
    """

    prompt: str = "question: {question} answer: <extra_id_0>"
    seed: int = 0  # of the draw of a target among several answers
    needs_target: bool = True
    metrics: tuple[str, ...] = ("exact_match", "f1", "eval_loss")
    choices: tuple[str, ...] = ()
    examples_per_row: int = 1

    def check(self, row: Row) -> None:
        """Raises ValueError unless the row has `question`, and `answers` or `target` where they are needed."""
        require_field(row, "question", str, "a text")
        if "target" in row:
            require_field(row, "target", str, "a text")
        elif self.needs_target:
            require_field(row, "answers", list, "a list of texts")
        check_answers(row, needed=self.needs_target)
        check_passages(row)

    def example(self, row: Row, which: int, number: int, tokenizer: Tokenizer) -> Example:
        """Returns the one example of the row; without `target`, its target is an answer drawn by seed and `number`."""
        del which, tokenizer
        target = row["target"] if "target" in row else self._draw(row.get("answers", []), number)
        target = None if target is None else f"<extra_id_0> {target}"
        return Example(
            self.prompt.format(question=row["question"]),
            target,
            row.get("answers", [] if target is None else [target]),
            row.get("metadata", {}),
            file_passages(row),
            row.get("id"),
        )

    def _draw(self, answers: Sequence[str], number: int) -> str | None:
        """One of the answers, a pure function of the seed and `number`; None if there is none."""
        random_state = random.Random(f"{self.seed} {number}" if self.seed else number)  # seed 0: as older versions drew
        return random_state.choice(answers) if answers else None

    def score(self, prediction: str, answers: Sequence[str]) -> dict[str, float]:
        """Returns SQuAD's exact match and F1."""
        return {"exact_match": exact_match(prediction, answers, normalize), "f1": f1(prediction, answers)}

    def merge_records(self, records: list[Record]) -> tuple[Record, dict[str, float]]:
        """Returns the record of the one example."""
        return records[0], {}
