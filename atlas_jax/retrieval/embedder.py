"""Texts to vectors: queries a batch at a time, a whole corpus by length."""

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
from atlas_jax.mesh import AXES, constrain, local_row_indices, local_rows, put_rows, row_owners
from atlas_jax.models.atlas import Retriever
from atlas_jax.retrieval.passage_store import PassageTokens
from atlas_jax.runtime.compiled import CompiledFunction
from atlas_jax.runtime.process_group import process_group

Side = Literal["query", "passage"]
WINDOW = 2**16  # passages that are sorted by length at a time: near each other on disk, little padding in a batch
TOKENS_PER_DEVICE = {"cpu": 2**13, "gpu": 2**17, "tpu": 2**17}  # of a batch: what keeps a device busy


class Embedder:
    """One side of the retriever, compiled once for each length bucket."""

    def __init__(self, retriever: Retriever, side: Side, tokenizer: Tokenizer, mesh: Mesh, max_length: int):
        self._state = nnx.state(retriever)
        self.program = encoder_program(retriever, side, mesh)
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.max_length = max_length
        self.dim = retriever.encoder_of(side).cfg.d_model

    def update(self, retriever: Retriever) -> None:
        """Takes the retriever's present parameters."""
        self._state = nnx.state(retriever)

    def rows(self, length: int, batch: int) -> int:
        """Texts of this length that make a batch: at most `batch` a device."""
        return encoder_rows(self.mesh, length, batch)

    def __call__(self, texts: Sequence[Sequence[int] | np.ndarray], length: int, rows: int) -> Array:
        """Vectors (float32, "rows d") of texts by their bare ids; rows beyond them are meaningless.

        With several processes, each has the texts of its own rows.
        """
        finished = [self.tokenizer.finish(text, self.max_length) for text in texts]
        empty = len(local_row_indices(self.mesh, rows, AXES)) - len(texts)
        ids, mask = pad([*finished, *[[]] * empty], length, self.tokenizer.pad_id)
        return self.program(self._state, put_rows(self.mesh, ids, rows), put_rows(self.mesh, mask, rows))

    def embed_queries(self, queries: Sequence[str], rows: int) -> Array:
        """Vectors of queries, in one batch of `rows`; of those that are another process's, the text does not matter."""
        own = local_row_indices(self.mesh, rows, AXES).tolist()
        ids = self.tokenizer.ids([queries[row] for row in own if row < len(queries)])
        (longest,) = process_group().all_max(max(map(len, ids), default=0))
        return self(ids, self._length(longest), rows)

    def batches(
        self, tokens: PassageTokens, parts: Sequence[np.ndarray], batch: int
    ) -> Iterator[tuple[np.ndarray, Array]]:
        """Passages in batches of like length, longest first; `parts` has the numbers of those of each process.

        Each batch: whose vector each row is, -1 for nobody's, and the vectors, which may still be under way.
        """
        orders = [part[np.argsort(-tokens.lengths(part), kind="stable")] for part in parts]
        at = 0
        while at < max(map(len, orders)):
            longest = max(int(tokens.lengths(order[at : at + 1]).max(initial=0)) for order in orders)
            length = self._length(longest)
            rows = self.rows(length, batch)
            numbers, owners = np.full(rows, -1), row_owners(self.mesh, rows)
            for process, order in enumerate(orders):
                chosen = order[at : at + rows // len(orders)]
                numbers[np.flatnonzero(owners == process)[: len(chosen)]] = chosen
            own = numbers[owners == process_group().index]
            yield numbers, self(tokens.take(own[own >= 0]), length, rows)
            at += rows // len(orders)

    def _length(self, bare: int) -> int:
        """The bucket of a text with so many ids of its own."""
        specials = len(self.tokenizer.prefix) + len(self.tokenizer.suffix)
        return bucket(min(bare + specials, self.max_length), self.max_length)


def encoder_program(retriever: Retriever, side: Side, mesh: Mesh) -> CompiledFunction:
    """What embeds a batch of texts, for the retriever's state."""
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
    """Texts of this length that make a batch: at most `batch` a device."""
    tokens = TOKENS_PER_DEVICE[mesh.devices.flat[0].platform]
    return mesh.size * max(1, min(batch, tokens // length))


@runtime_checkable
class RowWriter(Protocol):
    """What takes rows: an array, or `interface.RowFile`."""

    def __setitem__(self, rows: slice, values: np.ndarray) -> None: ...


@dataclasses.dataclass
class _Window:
    """Neighbours on disk, until their vectors are all there."""

    first: int
    vectors: np.ndarray
    missing: int


def embed_corpus(
    embedder: Embedder, tokens: PassageTokens, out: RowWriter, batch: int, progress: Callable[[int], object]
) -> None:
    """Fills `out` (float16, "p d") with the vectors of all passages; the host stays two batches ahead of the device.

    With several processes, each fills a part of its own.
    """
    group = process_group()
    under_way: collections.deque[tuple[_Window, np.ndarray, Array]] = collections.deque()

    def land() -> None:
        window, numbers, vectors = under_way.popleft()
        own = numbers[row_owners(embedder.mesh, len(numbers)) == group.index]
        there = own >= 0
        window.vectors[own[there] - window.first] = local_rows(vectors)[there].astype(np.float16)
        window.missing -= int(there.sum())
        if not window.missing and len(window.vectors):
            out[window.first : window.first + len(window.vectors)] = window.vectors
            window.vectors = window.vectors[:0]
        progress(int((numbers >= 0).sum()))

    ends = [len(tokens) * process // group.count for process in range(group.count + 1)]
    for offset in range(0, -(-len(tokens) // group.count), WINDOW):
        group.all_max()
        parts = [
            np.arange(min(start + offset, end), min(start + offset + WINDOW, end))
            for start, end in itertools.pairwise(ends)
        ]
        size = len(parts[group.index])
        first = ends[group.index] + offset
        window = _Window(first, np.empty((size, embedder.dim), np.float16), size)
        for numbers, vectors in embedder.batches(tokens, parts, batch):
            under_way.append((window, numbers, vectors))
            if len(under_way) > 2:
                land()
    while under_way:
        land()
