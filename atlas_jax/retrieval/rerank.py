"""--retrieve_with_rerank: embeds the candidates of a search with the current passage encoder and sorts them again."""

import numpy as np
from jaxtyping import Float32, Int64

from atlas_jax.mesh import to_host
from atlas_jax.retrieval.embedder import Embedder
from atlas_jax.retrieval.passage_store import PassageTokens
from atlas_jax.retrieval.search import SearchResult
from atlas_jax.runtime.process_group import process_group


class Reranker:
    """Embeds the candidates of each query and keeps those with the largest inner products."""

    def __init__(self, passages: Embedder, tokens: PassageTokens, candidates: int, batch: int):
        """`tokens`: of all passages, for the retriever; `batch`: passages embedded at a time per device, at most."""
        self.passage_embedder = passages
        self.tokens = tokens
        self.candidates = candidates  # passages that the search must find for each query
        self.batch = batch

    def __call__(
        self, queries: Float32[np.ndarray, "q d"], candidates: Int64[np.ndarray, "q c"], k: int
    ) -> SearchResult:
        """Returns the k best of each query's candidates (passage numbers); equal scores keep the candidates' order."""
        vectors = self._embed(candidates.reshape(-1)).reshape(*candidates.shape, -1)
        scores = np.einsum("qd,qcd->qc", queries, vectors)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return SearchResult(np.take_along_axis(scores, best, 1), np.take_along_axis(candidates, best, 1))

    def _embed(self, numbers: Int64[np.ndarray, " p"]) -> Float32[np.ndarray, "p d"]:
        """Embeds passages by number; one that occurs several times is embedded once."""
        unique, inverse = np.unique(numbers, return_inverse=True)
        out = np.empty((len(unique), self.passage_embedder.dim), np.float32)
        parts = np.array_split(unique, process_group().count)
        # list(): all batches are dispatched before the first is waited for
        for part, vectors in list(self.passage_embedder.batches(self.tokens, parts, self.batch)):
            valid = part >= 0
            out[np.searchsorted(unique, part[valid])] = to_host(vectors)[valid]
        return out[inverse]
