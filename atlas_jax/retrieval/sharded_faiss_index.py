"""A faiss index in parts, one a process: all search the same queries, and only the best k of each part travel."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from atlas_jax.retrieval.faiss_index import FaissIndex
from atlas_jax.retrieval.search import HostIndex, SearchResult, checked_queries, checked_result
from atlas_jax.runtime.process_group import process_group

CHANNEL = "search"  # a host's own search is no business of its main thread


class ShardedFaissIndex(HostIndex):
    """What one `FaissIndex` of all passages finds; every process asks with the same queries, in the same order."""

    def __init__(self, folder: Path, meta: Mapping[str, Any]):
        super().__init__()
        group = process_group()
        self.kind: str = meta["kind"]
        self.count: int = meta["count"]
        self.dim: int = meta["dim"]
        self.first, stop = (self.count * (group.index + i) // group.count for i in (0, 1))
        self._part = FaissIndex.load(folder, meta, slice(self.first, stop)) if stop > self.first else None

    def search(self, queries: Float[np.ndarray | Array, "q d"], k: int) -> SearchResult:
        """Equal scores are ordered by the smaller number."""
        queries = checked_queries(self, queries, k)
        own = b""
        if self._part:
            found = self._part.search(queries, min(k, self._part.count))
            own = found.scores.tobytes() + (found.numbers + self.first).tobytes()
        parts = [_unpack(one, len(queries)) for one in process_group().all_gather(own, channel=CHANNEL)]
        scores, numbers = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
        order = np.lexsort((numbers, -scores))[:, :k]
        return checked_result(np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1))


def _unpack(packed: bytes, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and numbers, "q n" each: n times 4 and 8 bytes a query."""
    split = len(packed) // 3
    scores, numbers = np.frombuffer(packed[:split], np.float32), np.frombuffer(packed[split:], np.int64)
    return scores.reshape(queries, -1), numbers.reshape(queries, -1)
