"""Queries to passage numbers: embed, search, and on request rerank with today's passage encoder."""

import concurrent.futures
from collections.abc import Callable, Sequence

import numpy as np

from atlas_jax.mesh import to_host
from atlas_jax.retrieval.embedder import Embedder
from atlas_jax.retrieval.flat_index import FlatIndex
from atlas_jax.retrieval.interface import Index, SearchResult
from atlas_jax.retrieval.passage_store import PassageTokens
from atlas_jax.runtime.process_group import process_group


class Search:
    """Finds passages for a batch of queries."""

    def __init__(self, index: Index, queries: Embedder, rows: int):
        self.index = index
        self.queries = queries
        self.rows = rows  # of a batch, always the same
        self.programs = (queries.program,)
        self._host = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="search")

    def vectors(self, queries: Sequence[str]) -> np.ndarray:
        """Vectors (float32, "q d") of queries."""
        return np.asarray(self.queries.queries(queries, self.rows))[: len(queries)]

    def start(self, queries: Sequence[str], k: int) -> Callable[[], SearchResult]:
        """Begins to look for the best k passages of each query; calling the result waits for them.

        What runs on the devices is given to them at once, in front of any later work, and nothing is waited for.
        """
        index, vectors, count = self.index, self.queries.queries(queries, self.rows), len(queries)
        if isinstance(index, FlatIndex):
            return index.start(vectors, count, k)
        return self._host.submit(lambda: index.search(np.asarray(vectors)[:count], k)).result


class Rerank:
    """Finds more passages than asked for, and orders them by vectors that the passage encoder makes now."""

    def __init__(self, search: Search, passages: Embedder, tokens: PassageTokens, candidates: int, batch: int):
        self.search = search
        self.passages = passages
        self.tokens = tokens
        self.candidates = candidates
        self.batch = batch
        self.programs = (*search.programs, passages.program)

    def start(self, queries: Sequence[str], k: int) -> Callable[[], SearchResult]:
        """The best k of the candidates, at once; equal scores keep the index's order."""
        vectors = self.search.vectors(queries)
        numbers = self.search.index.search(vectors, self.candidates).numbers
        fresh = self._embed(numbers.reshape(-1)).reshape(*numbers.shape, -1)
        scores = np.einsum("qd,qcd->qc", vectors, fresh)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        found = SearchResult(np.take_along_axis(scores, best, 1), np.take_along_axis(numbers, best, 1))
        return lambda: found

    def _embed(self, numbers: np.ndarray) -> np.ndarray:
        """Vectors (float32, "p d") of passages, each once."""
        unique, place = np.unique(numbers, return_inverse=True)
        embed = self.passages
        out = np.empty((len(unique), embed.dim), np.float32)
        parts = np.array_split(unique, process_group().count)
        for part, vectors in list(embed.batches(self.tokens, parts, self.batch)):  # all under way, then awaited
            there = part >= 0
            out[np.searchsorted(unique, part[there])] = to_host(vectors)[there]
        return out[place]
