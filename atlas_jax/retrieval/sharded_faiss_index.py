"""A faiss index sharded over the processes: each searches its own passages, and the best k of each are all-gathered."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from atlas_jax.retrieval.faiss_index import FaissIndex
from atlas_jax.retrieval.search import HostIndex, SearchResult, checked_queries, checked_result
from atlas_jax.runtime.process_group import process_group

CHANNEL = "search"  # searches run in a thread of their own, so their collectives need a channel of their own


class ShardedFaissIndex(HostIndex):
    """Finds what one `FaissIndex` of all passages finds.

    Search is a collective: every process must make the same searches in the same order.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, Any]):
        """Loads this process's passages from a folder that `FaissIndex.save` wrote, given the content of index.json."""
        super().__init__()
        group = process_group()
        self.kind: str = metadata["kind"]
        self.count: int = metadata["count"]
        self.dim: int = metadata["dim"]
        # passage numbers of this process: `first` to `stop` (exclusive)
        self.first, stop = (self.count * (group.index + i) // group.count for i in (0, 1))
        self._shard = FaissIndex.load(folder, metadata, slice(self.first, stop)) if stop > self.first else None

    def search(self, queries: Float[np.ndarray | Array, "q d"], k: int) -> SearchResult:
        """See `VectorIndex.search`."""
        queries = checked_queries(self, queries, k)
        packed = b""
        if self._shard:
            found = self._shard.search(queries, min(k, self._shard.count))
            packed = found.scores.tobytes() + (found.numbers + self.first).tobytes()
        parts = [_unpack(part, len(queries)) for part in process_group().all_gather(packed, channel=CHANNEL)]
        scores, numbers = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
        order = np.lexsort((numbers, -scores))[:, :k]
        return checked_result(np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1))


def _unpack(packed: bytes, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Unpacks scores (float32 "q n") and passage numbers (int64 "q n"), which follow them."""
    split = len(packed) // 3  # 4 of the 12 bytes per result are its score
    scores, numbers = np.frombuffer(packed[:split], np.float32), np.frombuffer(packed[split:], np.int64)
    return scores.reshape(queries, -1), numbers.reshape(queries, -1)
