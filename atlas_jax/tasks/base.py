"""The interface of all tasks, and the plainest task: rows carry `query` and `target`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from atlas_jax.data.tokens import Tokenizer
from atlas_jax.tasks.metrics import exact_match

Row = Mapping[str, Any]
Record = dict[str, Any]  # one line of a predictions file


@dataclasses.dataclass(frozen=True)
class Example:
    """One query for the reader, with its target and the accepted answers."""

    query: str
    target: str | None  # text that the decoder is trained on; None where a row to evaluate has none
    answers: list[str]  # accepted answers: a prediction scores against the best match; without one nothing is scored
    metadata: Mapping[str, Any] | None = None  # copied into the predictions file
    passages: Sequence[Mapping[str, Any]] | None = None  # the row's own, for --use_file_passages
    id: Any = None


@runtime_checkable
class Task(Protocol):
    """Makes examples of rows and scores of predictions, without a model or a device."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names of the scores that an evaluation reports, `eval_loss` among them; the first selects the best step."""
        ...

    @property
    def choices(self) -> Sequence[str]:
        """For multiple choice, the texts whose logits are compared; else empty."""
        ...

    @property
    def examples_per_row(self) -> int:
        """Number of examples made of each row."""
        ...

    def check(self, row: Row) -> None:
        """Raises ValueError, with what is wrong and the remedy, if the row cannot be used."""
        ...

    def example(self, row: Row, which: int, number: int, tokenizer: Tokenizer) -> Example:
        """Returns example `which` of `examples_per_row`; `number` seeds random choices, `tokenizer` is the reader's."""
        ...

    def score(self, prediction: str, answers: Sequence[str]) -> dict[str, float]:
        """Returns the scores, 0 to 1, of one generated text."""
        ...

    def merge_records(self, records: list[Record]) -> tuple[Record, dict[str, float]]:
        """Merges the records of a row's examples into the one to write; returns it with the scores that need all."""
        ...


def require_field(row: Row, field: str, types: type | tuple[type, ...], description: str) -> None:
    """Raises ValueError, naming the `description`, unless the row has the field with one of these types."""
    if not isinstance(row.get(field), types):
        raise ValueError(
            f"`{field}` is {'not ' + description if field in row else 'missing'}; every row needs {description} there"
        )


def check_answers(row: Row, *, needed: bool) -> None:
    """Raises ValueError if `answers` is there but no list of texts, or is empty although it is `needed`."""
    answers = row.get("answers", [""])
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError('`answers` is not a list of texts; write ["..", ".."]')
    if not answers and needed:
        raise ValueError("`answers` is empty; give at least one")


def check_passages(row: Row) -> None:
    """Raises ValueError if the row's own passages are no list of objects with a text, and a title or none."""
    field = "passages" if row.get("passages") else "ctxs"
    passages = row.get(field) or []
    if not isinstance(passages, list) or not all(isinstance(passage, dict) for passage in passages):
        raise ValueError(f'`{field}` is not a list of passages; write [{{"title": "..", "text": ".."}}, ..]')
    for number, passage in enumerate(passages):
        for name, value in (("text", passage.get("text")), ("title", passage.get("title") or "")):
            if not isinstance(value, str):
                problem = "missing" if value is None else "not a text"
                raise ValueError(f"`{name}` of passage {number} in `{field}` is {problem}; every passage needs a text")


def file_passages(row: Row) -> Sequence[Mapping[str, Any]]:
    """Returns the row's own passages, with a title; one empty passage where it has none.

    `ctxs`, as FiD and DPR call them, stand for `passages`, without their scores.
    """
    passages = row.get("passages") or row.get("ctxs") or [{"text": ""}]
    scores = () if row.get("passages") else ("score", "hasanswer", "has_answer")
    kept = [{name: value for name, value in passage.items() if name not in scores} for passage in passages]
    return [passage | {"title": passage.get("title") or "", "text": passage["text"]} for passage in kept]


@dataclasses.dataclass(frozen=True)
class Base:
    """Text to text: the reader gets `query` as it is and learns `target`.

    Unless a row `needs_target`, as in training, one without it is read but not scored.
    """

    needs_target: bool = True
    metrics: tuple[str, ...] = ("accuracy", "eval_loss")
    choices: tuple[str, ...] = ()
    examples_per_row: int = 1

    def check(self, row: Row) -> None:
        """Raises ValueError unless `query` is a text, and `target` one where it is there or needed."""
        require_field(row, "query", str, "a text")
        if self.needs_target or "target" in row:
            require_field(row, "target", str, "a text")
        check_answers(row, needed=self.needs_target)
        check_passages(row)

    def example(self, row: Row, which: int, number: int, tokenizer: Tokenizer) -> Example:
        """Returns the one example of the row."""
        del which, number, tokenizer
        target = row.get("target")
        answers = row.get("answers", [] if target is None else [target])
        return Example(row["query"], target, answers, row.get("metadata"), file_passages(row), row.get("id"))

    def score(self, prediction: str, answers: Sequence[str]) -> dict[str, float]:
        """Returns the accuracy: 1 if the text is exactly an answer."""
        return {"accuracy": exact_match(prediction, answers)}

    def merge_records(self, records: list[Record]) -> tuple[Record, dict[str, float]]:
        """Returns the record of the one example."""
        return records[0], {}
