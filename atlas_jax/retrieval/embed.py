"""Texts to vectors: queries a batch at a time, a whole corpus by length."""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from atlas_jax.data.tokens import Tokenizer, bucket, pad
from atlas_jax.mesh import AXES, put_rows, split
from atlas_jax.models.atlas import Retriever
from atlas_jax.programs import Program
from atlas_jax.retrieval.passages import PassageTokens

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
        """Vectors (float32, "rows d") of texts by their bare ids; rows beyond them are meaningless."""
        finished = [self.tokenizer.finish(text, self.max_length) for text in texts]
        ids, mask = pad([*finished, *[[]] * (rows - len(texts))], length, self.tokenizer.pad_id)
        return self.program(self._state, put_rows(self.mesh, ids), put_rows(self.mesh, mask))

    def queries(self, queries: Sequence[str], rows: int) -> Array:
        """Vectors of queries, in one batch of `rows`."""
        ids = self.tokenizer.ids(queries)
        return self(ids, self._length(max(map(len, ids))), rows)

    def batches(self, tokens: PassageTokens, numbers: np.ndarray, batch: int) -> Iterator[tuple[np.ndarray, Array]]:
        """(numbers, vectors) of passages in batches of like length, longest first; vectors may still be under way."""
        order = numbers[np.argsort(-tokens.lengths(numbers), kind="stable")]
        at = 0
        while at < len(order):
            length = self._length(int(tokens.lengths(order[at : at + 1])[0]))
            rows = self.rows(length, batch)
            chosen = order[at : at + rows]
            yield chosen, self(tokens.take(chosen), length, rows)
            at += rows

    def _length(self, bare: int) -> int:
        """The bucket of a text with so many ids of its own."""
        specials = len(self.tokenizer.prefix) + len(self.tokenizer.suffix)
        return bucket(min(bare + specials, self.max_length), self.max_length)


def encoder_program(retriever: Retriever, side: Side, mesh: Mesh) -> Program:
    """What embeds a batch of texts, for the retriever's state."""
    graph, _ = nnx.split(retriever)
    return Program(
        f"{side} encoder",
        lambda state, ids, mask: nnx.merge(graph, state)(split(ids, AXES), split(mask, AXES), side=side),
        mesh,
        gather=side == "query",
    )


def encoder_rows(mesh: Mesh, length: int, batch: int) -> int:
    """Texts of this length that make a batch: at most `batch` a device."""
    tokens = TOKENS_PER_DEVICE[mesh.devices.flat[0].platform]
    return mesh.size * max(1, min(batch, tokens // length))


def embed_corpus(
    embedder: Embedder, tokens: PassageTokens, out: np.ndarray, batch: int, progress: Callable[[int], object]
) -> None:
    """Fills `out` (float16, "p d") with the vectors of all passages; the host stays two batches ahead of the device."""
    under_way: collections.deque[tuple[np.ndarray, Array]] = collections.deque()

    def land() -> None:
        numbers, vectors = under_way.popleft()
        out[numbers] = np.asarray(vectors)[: len(numbers)].astype(np.float16)
        progress(len(numbers))

    for start in range(0, len(tokens), WINDOW):
        window = np.arange(start, min(start + WINDOW, len(tokens)))
        for item in embedder.batches(tokens, window, batch):
            under_way.append(item)
            if len(under_way) > 2:
                land()
    while under_way:
        land()
