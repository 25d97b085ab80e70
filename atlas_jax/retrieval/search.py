"""Queries to passage numbers: embed, search, and on request rerank with today's passage encoder."""

from collections.abc import Sequence

import numpy as np

from atlas_jax.retrieval.embed import Embedder
from atlas_jax.retrieval.interface import Index, SearchResult
from atlas_jax.retrieval.passages import PassageTokens


class Search:
    """Finds passages for a batch of queries."""

    def __init__(self, index: Index, queries: Embedder, rows: int):
        self.index = index
        self.queries = queries
        self.rows = rows  # of a batch, always the same
        self.programs = (queries.program,)

    def __call__(self, queries: Sequence[str], k: int) -> SearchResult:
        """The best k passages of each query; scores are inner products in float32."""
        vectors = np.asarray(self.queries.queries(queries, self.rows))[: len(queries)]
        return self.index.search(vectors, k)


class Rerank:
    """Finds more passages than asked for, and orders them by vectors that the passage encoder makes now."""

    def __init__(self, search: Search, passages: Embedder, tokens: PassageTokens, candidates: int, batch: int):
        self.search = search
        self.passages = passages
        self.tokens = tokens
        self.candidates = candidates
        self.batch = batch
        self.programs = (*search.programs, passages.program)

    def __call__(self, queries: Sequence[str], k: int) -> SearchResult:
        """The best k of the candidates; equal scores keep the index's order."""
        search = self.search
        vectors = np.asarray(search.queries.queries(queries, search.rows))[: len(queries)]
        numbers = search.index.search(vectors, self.candidates).numbers
        fresh = self._embed(numbers.reshape(-1)).reshape(*numbers.shape, -1)
        scores = np.einsum("qd,qcd->qc", vectors, fresh)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return SearchResult(np.take_along_axis(scores, best, 1), np.take_along_axis(numbers, best, 1))

    def _embed(self, numbers: np.ndarray) -> np.ndarray:
        """Vectors (float32, "p d") of passages, each once."""
        unique, place = np.unique(numbers, return_inverse=True)
        embed = self.passages
        out = np.empty((len(unique), embed.dim), np.float32)
        for part, vectors in list(embed.batches(self.tokens, unique, self.batch)):  # all under way, then awaited
            out[np.searchsorted(unique, part)] = np.asarray(vectors)[: len(part)]
        return out[place]
