"""Search by inner product: the interface of every vector index, its result, and the checks they share."""

import concurrent.futures
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Float32, Int64

from atlas_jax.errors import UserError

QueryVectors = Float[np.ndarray | Array, "q d"]


class SearchResult(NamedTuple):
    """The k best passages of each query, best first; equal scores are ordered by the smaller passage number."""

    scores: Float32[np.ndarray, "q k"]  # inner products
    numbers: Int64[np.ndarray, "q k"]  # passage numbers: rows of the index, from 0


@runtime_checkable
class VectorIndex(Protocol):
    """Passage vectors, numbered from 0 in the order they were given, searched by inner product."""

    kind: str
    count: int  # number of passages
    dim: int  # width of a vector

    def search(self, queries: QueryVectors, k: int) -> SearchResult:
        """Returns the k best passages of each query; UserError if the shapes do not fit or a score is not finite."""
        ...

    def begin_search(self, queries: Float32[Array, "rows d"], count: int, k: int) -> Callable[[], SearchResult]:
        """Starts `search` for the first `count` rows of `queries` and returns a function that waits for its result.

        `queries` are replicated on every device and may still be computing: the caller is not blocked.
        """
        ...


class HostIndex:
    """Implements `VectorIndex.begin_search` for an index that is searched on the host, in a thread of its own."""

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="search")

    def search(self, queries: QueryVectors, k: int) -> SearchResult:
        """See `VectorIndex.search`."""
        raise NotImplementedError

    def begin_search(self, queries: Float32[Array, "rows d"], count: int, k: int) -> Callable[[], SearchResult]:
        """See `VectorIndex.begin_search`."""
        return self._thread.submit(lambda: self.search(np.asarray(queries)[:count], k)).result


def check_queries(index: VectorIndex, queries: QueryVectors, k: int) -> None:
    """UserError if the queries' width is not the index's, or k is not 1 to the number of passages."""
    if queries.shape[1] != index.dim:
        raise UserError(
            f"the queries are {queries.shape[1]} wide but the index holds vectors of {index.dim}: "
            "build the index with the retriever that embeds the queries"
        )
    if not 0 < k <= index.count:
        raise UserError(
            f"{k} passages asked for but the index holds {index.count}: "
            f"ask for 1 to {index.count} (--n_context and what multiplies it), or index more passages"
        )


def checked_queries(index: VectorIndex, queries: QueryVectors, k: int) -> Float32[np.ndarray, "q d"]:
    """Returns the queries on the host as contiguous float32, after `check_queries`."""
    check_queries(index, queries, k)
    return np.ascontiguousarray(queries, np.float32)


def checked_result(scores: Float32[np.ndarray, "q k"], numbers: Int64[np.ndarray, "q k"]) -> SearchResult:
    """UserError if a score is not finite: it has no order, and faiss gives the number -1 beside it."""
    if not np.isfinite(scores).all() or (numbers < 0).any():
        raise UserError(
            "a search score is not finite: the query encoder has diverged (lower --lr_retriever), "
            "or the index was built by one that had (build it again)"
        )
    return SearchResult(scores, numbers)
