"""What every task is, and the plainest: rows carry `query` and `target`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from atlas_jax.data.tokens import Tokenizer
from atlas_jax.tasks.metrics import exact_match

Row = Mapping[str, Any]
Record = dict[str, Any]  # one line of a predictions file


@dataclasses.dataclass(frozen=True)
class Example:
    """One thing to read and answer."""

    query: str
    target: str | None  # what the decoder is taught; None where the row has none
    answers: list[str]  # what counts as right
    metadata: Mapping[str, Any] | None = None  # travels into the predictions file
    passages: Sequence[Mapping[str, Any]] | None = None  # those of the row, for --use_file_passages
    id: Any = None


@runtime_checkable
class Task(Protocol):
    """Rows in, scores out; nothing here knows a model or a device."""

    @property
    def metrics(self) -> Sequence[str]:
        """What an evaluation reports, `eval_loss` among it."""
        ...

    @property
    def choices(self) -> Sequence[str]:
        """The texts whose logits decide, for multiple choice; else empty."""
        ...

    @property
    def per_row(self) -> int:
        """The number of examples that every row makes."""
        ...

    def check(self, row: Row) -> None:
        """Raises ValueError, saying what is wrong and the remedy, if the row cannot be used."""
        ...

    def examples(self, row: Row, number: int, tokenizer: Tokenizer) -> list[Example]:
        """The examples of a row; `number` decides what is drawn, the reader's tokenizer tells what is too long."""
        ...

    def score(self, prediction: str, answers: Sequence[str]) -> dict[str, float]:
        """The scores, 0 to 1, of one generated text."""
        ...

    def finish(self, records: list[Record]) -> tuple[Record, dict[str, float]]:
        """From the records of a row's examples: the line to write, and the scores that need all of them."""
        ...


def need(row: Row, field: str, kind: type | tuple[type, ...], what: str) -> None:
    """Raises ValueError unless the row has the field, of this type."""
    if not isinstance(row.get(field), kind):
        raise ValueError(f"`{field}` is {'not ' + what if field in row else 'missing'}; every row needs {what} there")


def check_lists(row: Row) -> None:
    """Raises ValueError unless `answers` and `passages`, where the row has them, are what is scored and read."""
    answers, passages = row.get("answers", [""]), row.get("passages") or []
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError('`answers` is not a list of texts; write ["..", ".."]')
    if not answers:
        raise ValueError("`answers` is empty; give at least one")
    if not isinstance(passages, list) or not all(isinstance(passage, dict) for passage in passages):
        raise ValueError('`passages` is not a list of passages; write [{"title": "..", "text": ".."}, ..]')


def file_passages(row: Row) -> Sequence[Mapping[str, Any]]:
    """The row's own passages; one empty passage where it has none."""
    return row.get("passages") or [{"title": "", "text": ""}]


@dataclasses.dataclass(frozen=True)
class Base:
    """Text to text: `query` in, `target` out."""

    metrics: tuple[str, ...] = ("accuracy", "eval_loss")
    choices: tuple[str, ...] = ()
    per_row: int = 1

    def check(self, row: Row) -> None:
        """Needs `query` and `target`."""
        need(row, "query", str, "a text")
        need(row, "target", str, "a text")
        check_lists(row)

    def examples(self, row: Row, number: int, tokenizer: Tokenizer) -> list[Example]:
        """One example."""
        del number, tokenizer
        answers = row.get("answers", [row["target"]])
        return [Example(row["query"], row["target"], answers, row.get("metadata"), file_passages(row), row.get("id"))]

    def score(self, prediction: str, answers: Sequence[str]) -> dict[str, float]:
        """Accuracy: the text itself."""
        return {"accuracy": exact_match(prediction, answers)}

    def finish(self, records: list[Record]) -> tuple[Record, dict[str, float]]:
        """The example's own record."""
        return records[0], {}
