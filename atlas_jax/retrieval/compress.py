"""A flat index as one in fewer bytes, and what that costs: recall against exact search, bytes, time."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
from jaxtyping import Float16, Float32, Int64

from atlas_jax.config import Config
from atlas_jax.mesh import global_batch_size
from atlas_jax.retrieval.embedder import Embedder
from atlas_jax.retrieval.formats.index_folder import (
    PASSAGES,
    link_tree,
    origin_of,
    read_about,
    read_vectors,
    write_about,
)
from atlas_jax.retrieval.passage_index import build_faiss_index
from atlas_jax.runtime.progress import progress
from atlas_jax.storage.files import atomic_folder
from atlas_jax.storage.mapped_file import release_pages

logger = logging.getLogger(__name__)

CHUNK_ROWS = 16_384  # vectors in float32 at once


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of searching an index."""

    recall: float  # the share of the best k, by exact search, among the k that it finds
    milliseconds: float  # a query, many at once
    bytes: int  # on the disk, without the passages


@dataclasses.dataclass(frozen=True)
class Queries:
    """What recall is measured with."""

    vectors: Float32[np.ndarray, "q d"]
    own: Int64[np.ndarray, " q"]  # the passage that a query is made of, which does not count as found; -1: none


def from_passages(folder: Path, count: int, seed: int) -> Queries:
    """Passages of an index, drawn at random, in place of questions."""
    vectors = read_vectors(folder, read_about(folder))
    rng = np.random.default_rng(seed)
    own = np.sort(rng.choice(len(vectors), min(count, len(vectors)), replace=False, shuffle=False))
    return Queries(np.asarray(vectors[own], np.float32), own)


def from_questions(embedder: Embedder, questions: Sequence[str]) -> Queries:
    """Questions as the retriever embeds them."""
    rows = global_batch_size(embedder.mesh, 8)
    batches = [questions[start : start + rows] for start in range(0, len(questions), rows)]
    vectors = [np.asarray(embedder.embed_queries(batch, rows))[: len(batch)] for batch in batches]
    return Queries(np.concatenate(vectors), np.full(len(questions), -1))


def compress(source: Path, output: Path, config: Config, queries: Queries, k: int) -> tuple[Cost, Cost]:
    """Writes `output` as the flags say, from a flat index; returns the costs before and after.

    Passages are hard links where the file system allows. Memory: the sample to train on, the codes, a chunk of vectors.
    """
    about = read_about(source)
    vectors = read_vectors(source, about)
    with atomic_folder(output, "choose another --output", replace=True) as draft:
        index = build_faiss_index(vectors, config)
        write_about(draft, index.save(draft), origin_of(about))
        link_tree(source / PASSAGES, draft / PASSAGES, copy=True)
    logger.info("wrote %s", output)
    wanted, before = exact_search(vectors, queries, k)
    start = time.perf_counter()
    found = drop_own_passage(index.search(queries.vectors, k + 1).numbers, queries.own)
    after = 1e3 * (time.perf_counter() - start) / len(found)
    recall = float(np.mean([np.isin(a, b).mean() for a, b in zip(found, wanted, strict=True)]))
    return Cost(1.0, before, index_bytes(source)), Cost(recall, after, index_bytes(output))


def exact_search(
    vectors: Float16[np.ndarray, "p d"], queries: Queries, k: int
) -> tuple[Int64[np.ndarray, "q {k}"], float]:
    """The best k passages of each query, by exact search in float32, and the milliseconds a query took."""
    start = time.perf_counter()
    parts = []
    with progress("searching exactly", "vectors", len(vectors)) as more:
        for first in range(0, len(vectors), CHUNK_ROWS):
            chunk = vectors[first : first + CHUNK_ROWS].astype(np.float32)
            scores, numbers = faiss.knn(queries.vectors, chunk, min(k + 1, len(chunk)), faiss.METRIC_INNER_PRODUCT)
            parts.append((scores, numbers + first))
            scores, numbers = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
            best = np.argsort(-scores, axis=1, kind="stable")[:, : k + 1]
            parts = [(np.take_along_axis(scores, best, axis=1), np.take_along_axis(numbers, best, axis=1))]
            release_pages(vectors)
            more(len(chunk))
    return drop_own_passage(parts[0][1], queries.own), 1e3 * (time.perf_counter() - start) / len(queries.own)


def drop_own_passage(
    numbers: Int64[np.ndarray, "q found"], own: Int64[np.ndarray, " q"]
) -> Int64[np.ndarray, "q found-1"]:
    """All but the query's own passage or, where that was not found, all but the last."""
    order = np.argsort(numbers == own[:, None], axis=1, kind="stable")
    return np.take_along_axis(numbers, order[:, :-1], axis=1)


def index_bytes(folder: Path) -> int:
    """Bytes of an index without its passages."""
    return sum(file.stat().st_size for file in folder.glob("*") if file.is_file())
