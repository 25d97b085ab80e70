"""The interface of passage sources, and the source that takes passages from the rows (--use_file_passages)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from atlas_jax.data.ragged import Numbers
from atlas_jax.data.reader_inputs import PassageLookup, TokenLookup, render
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.runtime.compiled import CompiledFunction
from atlas_jax.tasks import Example


class RetrievedPassages(NamedTuple):
    """The passages of a batch of examples, as numbers in a store."""

    store: PassageLookup
    numbers: np.ndarray  # passage numbers, int64 "b n"
    valid: np.ndarray  # bool "b n"; False where an example has fewer than n passages; the number there is arbitrary


@runtime_checkable
class PassageSource(Protocol):
    """Finds n passages for each example."""

    @property
    def programs(self) -> Sequence[CompiledFunction]:
        """The compiled functions that retrieval calls; none if it runs nothing on the devices."""
        ...

    def begin_retrieval(self, examples: Sequence[Example], n: int) -> Callable[[], RetrievedPassages]:
        """Starts to retrieve n passages for each example and returns a function that waits for them."""
        ...


class RowPassages:
    """A `PassageSource` that takes the first n of the passages that each row brings in its field `passages`."""

    programs: Sequence[CompiledFunction] = ()

    def begin_retrieval(self, examples: Sequence[Example], n: int) -> Callable[[], RetrievedPassages]:
        """See `PassageSource.begin_retrieval`; nothing runs in the background."""
        passages = [list(example.passages or [])[:n] for example in examples]
        valid = np.arange(n) < np.asarray([len(row) for row in passages])[:, None]
        numbers = np.zeros(valid.shape, np.int64)
        numbers[valid] = np.arange(valid.sum())
        retrieved = RetrievedPassages(
            _InMemoryStore([dict(passage) for row in passages for passage in row]), numbers, valid
        )
        return lambda: retrieved


class _InMemoryStore:
    """The passages of one batch; one empty passage if there are none, so that every number in a batch is valid."""

    def __init__(self, passages: list[dict[str, Any]]):
        self.passages = passages or [{"title": "", "text": ""}]

    def take(self, numbers: Numbers) -> list[dict[str, Any]]:
        return [self.passages[number] for number in numbers]

    def tokens(self, tokenizer: Tokenizer, format: str, name: str, progress: Any = None) -> TokenLookup:
        del name, progress
        return _InMemoryTokens(
            [np.asarray(ids, np.int32) for ids in tokenizer.ids([render(format, p) for p in self.passages])]
        )


class _InMemoryTokens:
    """Token ids of the passages of one batch."""

    def __init__(self, rows: list[np.ndarray]):
        self.rows = rows

    def take(self, numbers: Numbers) -> list[np.ndarray]:
        return [self.rows[number] for number in numbers]
