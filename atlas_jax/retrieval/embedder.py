"""Embeds texts with the retriever: queries one batch at a time, a whole corpus in batches of similar length."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from atlas_jax.data.tokens import Tokenizer, bucket, pad
from atlas_jax.errors import UserError
from atlas_jax.mesh import AXES, constrain, local_row_indices, local_rows, put_rows, row_owners
from atlas_jax.models.atlas import Retriever
from atlas_jax.retrieval.passage_store import PassageTokens
from atlas_jax.runtime.compiled import CompiledFunction
from atlas_jax.runtime.process_group import process_group

Side = Literal["query", "passage"]
WINDOW = 2**16  # consecutive passages sorted by length together: reads stay local on disk, batches have little padding
TOKENS_PER_DEVICE = {"cpu": 2**13, "gpu": 2**17, "tpu": 2**17}  # tokens of a batch: enough to keep a device busy


class Embedder:
    """The encoder of one side of the retriever (queries or passages), compiled once for each length bucket."""

    def __init__(self, retriever: Retriever, side: Side, tokenizer: Tokenizer, mesh: Mesh, max_length: int):
        """`max_length`: tokens of a text, special tokens included; longer texts are cut."""
        self._state = nnx.state(retriever)
        self.program = compiled_encoder(retriever, side, mesh)
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.max_length = max_length
        self.dim = retriever.encoder_of(side).cfg.d_model

    def update(self, retriever: Retriever) -> None:
        """Takes the retriever's current parameters; nothing is compiled again."""
        self._state = nnx.state(retriever)

    def batch_rows(self, length: int, batch: int) -> int:
        """See `encoder_rows`."""
        return encoder_rows(self.mesh, length, batch)

    def __call__(self, texts: Sequence[Sequence[int] | np.ndarray], length: int, rows: int) -> Array:
        """Embeds token ids without special tokens, padded to `length`: float32 "rows d", see `compiled_encoder`.

        Each process passes the texts of its own rows (`local_row_indices`); vectors of rows without a text are
        meaningless.
        """
        ids_with_specials = [self.tokenizer.add_special_tokens(text, self.max_length) for text in texts]
        padding = len(local_row_indices(self.mesh, rows, AXES)) - len(texts)
        ids, mask = pad([*ids_with_specials, *[[]] * padding], length, self.tokenizer.pad_id)
        return self.program(self._state, put_rows(self.mesh, ids, rows), put_rows(self.mesh, mask, rows))

    def embed_queries(self, queries: Sequence[str], rows: int) -> Array:
        """Embeds queries in one batch: float32 "rows d"; vectors of rows beyond the queries are meaningless.

        Each process tokenizes the queries of its own rows only; what `queries` holds for other rows does not matter.
        """
        local = local_row_indices(self.mesh, rows, AXES).tolist()
        ids = self.tokenizer.ids([queries[row] for row in local if row < len(queries)])
        (longest,) = process_group().all_max(max(map(len, ids), default=0))
        return self(ids, self._bucket(longest), rows)

    def batches(
        self, tokens: PassageTokens, parts: Sequence[np.ndarray], batch: int
    ) -> Iterator[tuple[np.ndarray, Array]]:
        """Embeds passages in batches of similar length, longest first; `parts[i]` holds process i's passage numbers.

        Yields for each batch the passage number of every row (-1: padding) and the vectors, float32 "rows d", which
        may still be computing.
        """
        sorted_parts = [part[np.argsort(-tokens.lengths(part), kind="stable")] for part in parts]
        start = 0
        while start < max(map(len, sorted_parts)):
            longest = max(int(tokens.lengths(part[start : start + 1]).max(initial=0)) for part in sorted_parts)
            length = self._bucket(longest)
            rows = self.batch_rows(length, batch)
            numbers, owners = np.full(rows, -1), row_owners(self.mesh, rows)
            for process, part in enumerate(sorted_parts):
                chunk = part[start : start + rows // len(sorted_parts)]
                numbers[np.flatnonzero(owners == process)[: len(chunk)]] = chunk
            local_numbers = numbers[owners == process_group().index]
            yield numbers, self(tokens.take(local_numbers[local_numbers >= 0]), length, rows)
            start += rows // len(sorted_parts)

    def _bucket(self, ids: int) -> int:
        """Padded length of a text with this many ids before special tokens."""
        specials = len(self.tokenizer.prefix) + len(self.tokenizer.suffix)
        return bucket(min(ids + specials, self.max_length), self.max_length)


def compiled_encoder(retriever: Retriever, side: Side, mesh: Mesh) -> CompiledFunction:
    """Returns the function (retriever state, ids "b l", mask "b l") -> vectors "b d" of one side.

    Rows are sharded over all axes of the mesh; query vectors are then replicated, for `VectorIndex.begin_search`.
    """
    graph, _ = nnx.split(retriever)
    return CompiledFunction(
        f"{side} encoder",
        lambda state, ids, mask: constrain(
            nnx.merge(graph, state)(constrain(ids, AXES), constrain(mask, AXES), side=side), AXES
        ),
        mesh,
        gather=side == "query",
    )


def encoder_rows(mesh: Mesh, length: int, batch: int) -> int:
    """Rows of a batch of texts of this length: per device at most `batch` and `TOKENS_PER_DEVICE`, at least one."""
    tokens = TOKENS_PER_DEVICE[mesh.devices.flat[0].platform]
    return mesh.size * max(1, min(batch, tokens // length))


@runtime_checkable
class RowWriter(Protocol):
    """Destination of rows: an array, or a `VectorFile`."""

    def __setitem__(self, rows: slice, values: np.ndarray) -> None: ...


@dataclasses.dataclass
class _Window:
    """Buffer for the vectors of consecutive passages, written at once when the last of them is computed."""

    first: int  # number of the first passage
    vectors: np.ndarray  # float16 "w d"
    missing: int  # number of vectors not computed yet


def embed_corpus(
    embedder: Embedder, tokens: PassageTokens, out: RowWriter, batch: int, progress: Callable[[int], object]
) -> None:
    """Fills `out` (float16, "p d") with the vectors of all passages; two batches are dispatched ahead of the device.

    Each process fills a contiguous range of rows. `progress` is called with the number of passages of each batch,
    all processes together.
    """
    group = process_group()
    in_flight: collections.deque[tuple[_Window, np.ndarray, Array]] = collections.deque()

    def finish_oldest_batch() -> None:
        window, numbers, vectors = in_flight.popleft()
        local_numbers = numbers[row_owners(embedder.mesh, len(numbers)) == group.index]
        valid = local_numbers >= 0
        with np.errstate(over="ignore"):
            computed = local_rows(vectors)[valid].astype(np.float16)
        if not np.isfinite(computed).all():
            number = local_numbers[valid][~np.isfinite(computed).all(1)][0]
            raise UserError(
                f"passage {number}: its vector is not finite in float16; take undamaged weights of the retriever"
            )
        window.vectors[local_numbers[valid] - window.first] = computed
        window.missing -= int(valid.sum())
        if not window.missing and len(window.vectors):
            out[window.first : window.first + len(window.vectors)] = window.vectors
            window.vectors = window.vectors[:0]
        progress(int((numbers >= 0).sum()))

    bounds = [len(tokens) * process // group.count for process in range(group.count + 1)]
    for offset in range(0, -(-len(tokens) // group.count), WINDOW):
        group.all_max()  # raises Interrupted on all processes if one has got a signal to stop
        parts = [
            np.arange(min(start + offset, stop), min(start + offset + WINDOW, stop))
            for start, stop in itertools.pairwise(bounds)
        ]
        size = len(parts[group.index])
        first = bounds[group.index] + offset
        window = _Window(first, np.empty((size, embedder.dim), np.float16), size)
        for numbers, vectors in embedder.batches(tokens, parts, batch):
            in_flight.append((window, numbers, vectors))
            if len(in_flight) > 2:
                finish_oldest_batch()
    while in_flight:
        finish_oldest_batch()
