"""Where an example's passages come from: a search, or the example's own row."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from atlas_jax.data.ragged import Numbers
from atlas_jax.data.reader_inputs import Store, Tokens, render
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.runtime.compiled import CompiledFunction
from atlas_jax.tasks import Example


class RetrievedPassages(NamedTuple):
    """The passages of a batch of examples, by number in a store."""

    store: Store
    numbers: np.ndarray  # int64 "b n"
    valid: np.ndarray  # bool "b n"; false where an example has fewer than n


@runtime_checkable
class PassageSource(Protocol):
    """Finds n passages for each example."""

    @property
    def programs(self) -> Sequence[CompiledFunction]:
        """What it compiles."""
        ...

    def begin_retrieval(self, examples: Sequence[Example], n: int) -> Callable[[], RetrievedPassages]:
        """Begins to look for n passages of each; calling the result waits for them."""
        ...


class RowPassages:
    """The first n of the passages that come with each row."""

    programs: Sequence[CompiledFunction] = ()

    def begin_retrieval(self, examples: Sequence[Example], n: int) -> Callable[[], RetrievedPassages]:
        """As many as there are, at once."""
        passages = [list(example.passages or [])[:n] for example in examples]
        valid = np.arange(n) < np.asarray([len(own) for own in passages])[:, None]
        numbers = np.zeros(valid.shape, np.int64)
        numbers[valid] = np.arange(valid.sum())
        found = RetrievedPassages(_InMemory([dict(passage) for own in passages for passage in own]), numbers, valid)
        return lambda: found


class _InMemory:
    """Passages that live as long as their batch."""

    def __init__(self, passages: list[dict[str, Any]]):
        self.passages = passages or [{"title": "", "text": ""}]

    def take(self, numbers: Numbers) -> list[dict[str, Any]]:
        return [self.passages[number] for number in numbers]

    def tokens(self, tokenizer: Tokenizer, format: str, name: str, progress: Any = None) -> Tokens:
        del name, progress
        return _Ids([np.asarray(ids, np.int32) for ids in tokenizer.ids([render(format, p) for p in self.passages])])


class _Ids:
    def __init__(self, rows: list[np.ndarray]):
        self.rows = rows

    def take(self, numbers: Numbers) -> list[np.ndarray]:
        return [self.rows[number] for number in numbers]
