"""Reader inputs: token ids of query and passage as one text, from passages tokenized in advance where that is exact."""

import itertools
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from atlas_jax.data.ragged import Numbers
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.errors import UserError

QUERY = "{query}"


@runtime_checkable
class TokenLookup(Protocol):
    """Token ids of passages by number."""

    def take(self, numbers: Numbers) -> list[np.ndarray]:
        """Returns the ids of each of these passages, without special tokens."""


@runtime_checkable
class PassageLookup(Protocol):
    """Passages by number, such as `retrieval.passage_store.PassageStore` on disk."""

    def take(self, numbers: Numbers) -> list[dict[str, Any]]:
        """Returns the fields of each of these passages."""

    def tokens(self, tokenizer: Tokenizer, format: str, name: str, progress: Any = None) -> TokenLookup:
        """Returns the ids of `format` filled in with each passage; `name` labels them on disk."""


class ReaderInputEncoder:
    """Makes the reader ids of queries with their passages, equal to tokenizing each filled-in `encoder_format` whole.

    Only the query is tokenized, and the passage's ids come from the store, where that is exact: with a format that has
    a `passage_part`, a tokenizer that `splits_at_spaces` and a query with `splits_after(query)`.
    """

    def __init__(self, tokenizer: Tokenizer, encoder_format: str, max_length: int):
        self.tokenizer, self.encoder_format, self.max_length = tokenizer, encoder_format, max_length
        passage_format = passage_part(encoder_format)
        self.passage_format = passage_format if tokenizer.splits_at_spaces else None

    def prepare(self, store: PassageLookup, progress: Any = None) -> None:
        """Tokenizes all passages of the store now, with progress, rather than at the first `encode`."""
        if self.passage_format is not None:
            store.tokens(self.tokenizer, self.passage_format, "reader", progress)

    def encode(
        self, queries: Sequence[str], numbers: Sequence[Sequence[int]] | np.ndarray, store: PassageLookup
    ) -> list[list[list[int]]]:
        """Returns ids of each query ("b") with each of its passages ("b n"): special tokens added, cut, not padded."""
        pairs = list(zip(queries, np.asarray(numbers, np.int64), strict=True))
        joinable = [self.passage_format is not None and self.tokenizer.splits_after(query) for query in queries]
        joined = self._encode_joined(list(itertools.compress(pairs, joinable)), store)
        whole = self._encode_whole([pair for pair, join in zip(pairs, joinable, strict=True) if not join], store)
        return [next(joined if join else whole) for join in joinable]

    def _encode_joined(self, pairs: list[tuple[str, np.ndarray]], store: PassageLookup) -> Iterator[list[list[int]]]:
        """Yields the ids of each query with its passages, joined from the query's ids and the store's."""
        if pairs and self.passage_format is not None:
            tokens = store.tokens(self.tokenizer, self.passage_format, "reader")
            passages = iter(tokens.take(np.concatenate([row for _, row in pairs])))
            for query, (_, row) in zip(self.tokenizer.ids([query for query, _ in pairs]), pairs, strict=True):
                yield [join_ids(query, next(passages), self.tokenizer, self.max_length) for _ in row]

    def _encode_whole(self, pairs: list[tuple[str, np.ndarray]], store: PassageLookup) -> Iterator[list[list[int]]]:
        """Yields the ids of each query with its passages, tokenized as whole texts."""
        for query, row in pairs:
            texts = [render(self.encoder_format, passage, query=query) for passage in store.take(row)]
            yield [self.tokenizer.add_special_tokens(ids, self.max_length) for ids in self.tokenizer.ids(texts)]


def passage_part(encoder_format: str) -> str | None:
    """Returns what follows the query in "{query} title: {title} ..", with the space; None for any other format."""
    rest = encoder_format.removeprefix(QUERY)
    try:
        fields = [f"{field} {spec}" for _, field, spec, _ in string.Formatter().parse(rest)]
    except ValueError as error:
        raise UserError(f"--encoder_format {encoder_format!r}: {error}; write a literal brace twice") from None
    query_only_first = encoder_format.startswith(f"{QUERY} ") and not any("query" in field for field in fields)
    return rest if query_only_first else None


def join_ids(
    query: Sequence[int], passage: Sequence[int] | np.ndarray, tokenizer: Tokenizer, max_length: int | None
) -> list[int]:
    """Returns the reader ids of a query and a passage that were tokenized separately."""
    tail = passage[:max_length]
    return tokenizer.add_special_tokens(
        [*query, *(tail.tolist() if isinstance(tail, np.ndarray) else tail)], max_length
    )


def render(format: str, passage: Mapping[str, Any], **overrides: str) -> str:
    """Returns `format` filled in with `overrides`, else the passage's fields; a null is empty.

    UserError if a field is missing.
    """
    fields = {name: "" if value is None else value for name, value in passage.items()}
    try:
        return format.format(**fields | overrides)
    except KeyError as error:
        raise UserError(f"passage {passage.get('id')}: no field {error}, which {format!r} asks for; add it") from None
    except (IndexError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{format!r}: not a format of passage fields ({error}); write {{title}}, ..") from None
