"""What the reader reads: a query and a passage as one text, the passage tokenized once for all where that is exact."""

import itertools
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from atlas_jax.data.ragged import Numbers
from atlas_jax.data.tokens import Tokenizer, ends_visibly
from atlas_jax.errors import UserError

QUERY = "{query}"


@runtime_checkable
class Tokens(Protocol):
    """Token ids by passage number."""

    def take(self, numbers: Numbers) -> list[np.ndarray]:
        """The ids of each passage."""


@runtime_checkable
class Store(Protocol):
    """Passages by number; `retrieval.passages.PassageStore` is the one on disk."""

    def take(self, numbers: Numbers) -> list[dict[str, Any]]:
        """The fields of each passage."""

    def tokens(self, tokenizer: Tokenizer, format: str, name: str, progress: Any = None) -> Tokens:
        """The ids of `format` filled in with each passage."""


class ReaderText:
    """Reader ids of queries with their passages, as if each `encoder_format` were tokenized whole.

    Where it is exact to do so (`split_encoder_format`, `splits_at_spaces`, a query that `ends_visibly`), the
    passage's ids come from the store and only the query is tokenized.
    """

    def __init__(self, tokenizer: Tokenizer, encoder_format: str, max_length: int):
        self.tokenizer, self.encoder_format, self.max_length = tokenizer, encoder_format, max_length
        part = split_encoder_format(encoder_format)
        self.passage_format = part if tokenizer.splits_at_spaces else None

    def prepare(self, store: Store, progress: Any = None) -> None:
        """Tokenizes the passages now, with progress, rather than at the first `encode`."""
        if self.passage_format is not None:
            store.tokens(self.tokenizer, self.passage_format, "reader", progress)

    def encode(
        self, queries: Sequence[str], numbers: Sequence[Sequence[int]] | np.ndarray, store: Store
    ) -> list[list[list[int]]]:
        """Ids of each query ("b") with each of its passages ("b n"): special tokens added, cut, not padded."""
        pairs = list(zip(queries, np.asarray(numbers, np.int64), strict=True))
        joins = [self.passage_format is not None and ends_visibly(query) for query in queries]
        joined = self._join(list(itertools.compress(pairs, joins)), store)
        whole = self._whole([pair for pair, apart in zip(pairs, joins, strict=True) if not apart], store)
        return [next(joined if apart else whole) for apart in joins]

    def _join(self, pairs: list[tuple[str, np.ndarray]], store: Store) -> Iterator[list[list[int]]]:
        if pairs and self.passage_format is not None:
            tokens = store.tokens(self.tokenizer, self.passage_format, "reader")
            passages = iter(tokens.take(np.concatenate([row for _, row in pairs])))
            for query, (_, row) in zip(self.tokenizer.ids([query for query, _ in pairs]), pairs, strict=True):
                yield [join(query, next(passages), self.tokenizer, self.max_length) for _ in row]

    def _whole(self, pairs: list[tuple[str, np.ndarray]], store: Store) -> Iterator[list[list[int]]]:
        for query, row in pairs:
            texts = [render(self.encoder_format, passage, query=query) for passage in store.take(row)]
            yield [self.tokenizer.finish(ids, self.max_length) for ids in self.tokenizer.ids(texts)]


def split_encoder_format(encoder_format: str) -> str | None:
    """The passage's part of "{query} title: {title} ..", with its leading space; None for any other shape."""
    part = encoder_format.removeprefix(QUERY)
    try:
        mentions = [f"{field} {spec}" for _, field, spec, _ in string.Formatter().parse(part)]
    except ValueError as error:
        raise UserError(f"--encoder_format {encoder_format!r}: {error}; write a literal brace twice") from None
    shaped = encoder_format.startswith(f"{QUERY} ") and not any("query" in mention for mention in mentions)
    return part if shaped else None


def join(
    query: Sequence[int], passage: Sequence[int] | np.ndarray, tokenizer: Tokenizer, max_length: int | None
) -> list[int]:
    """Reader ids of a query and a passage that were tokenized apart."""
    tail = passage[:max_length]
    return tokenizer.finish([*query, *(tail.tolist() if isinstance(tail, np.ndarray) else tail)], max_length)


def render(format: str, passage: Mapping[str, Any], **more: str) -> str:
    """`format` filled in with the passage's fields, over which `more` wins."""
    try:
        return format.format(**{**passage, **more})
    except KeyError as error:
        raise UserError(f"passage {passage.get('id')}: no field {error}, which {format!r} asks for; add it") from None
    except (IndexError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{format!r}: not a format of passage fields ({error}); write {{title}}, ..") from None
