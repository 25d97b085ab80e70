"""Compresses a flat index to a faiss index; measures recall against exact search, bytes on disk and time per query."""

import dataclasses
import functools
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
    check_replaceable,
    link_tree,
    origin_from_metadata,
    read_metadata,
    read_vectors,
    write_metadata,
)
from atlas_jax.retrieval.passage_index import build_faiss_index
from atlas_jax.runtime.progress import progress
from atlas_jax.storage.files import atomic_folder
from atlas_jax.storage.mapped_file import release_pages

logger = logging.getLogger(__name__)

CHUNK_ROWS = 16_384  # vectors held in float32 at a time


@dataclasses.dataclass(frozen=True)
class IndexMetrics:
    """Search quality, speed and size of one index."""

    recall: float  # recall@k: mean share of the k best passages by exact search among the k that this index returns
    milliseconds_per_query: float  # wall-clock time per query when all queries are searched in one call
    bytes: int  # size on disk, without the passages


@dataclasses.dataclass(frozen=True)
class RecallQueries:
    """Query vectors to measure recall with."""

    vectors: Float32[np.ndarray, "q d"]
    source_passages: Int64[np.ndarray, " q"]  # passage that a query was made from, dropped from its results; -1: none


def from_passages(folder: Path, count: int, seed: int) -> RecallQueries:
    """Draws up to `count` passage vectors of a flat index at random, as a stand-in for questions."""
    vectors = read_vectors(folder, read_metadata(folder))
    rng = np.random.default_rng(seed)
    sample = np.sort(rng.choice(len(vectors), min(count, len(vectors)), replace=False, shuffle=False))
    return RecallQueries(np.asarray(vectors[sample], np.float32), sample)


def from_questions(embedder: Embedder, questions: Sequence[str]) -> RecallQueries:
    """Embeds questions with the query encoder."""
    rows = global_batch_size(embedder.mesh, 8)
    batches = [questions[start : start + rows] for start in range(0, len(questions), rows)]
    vectors = [np.asarray(embedder.embed_queries(batch, rows))[: len(batch)] for batch in batches]
    return RecallQueries(np.concatenate(vectors), np.full(len(questions), -1))


def compress(
    source: Path, output: Path, config: Config, queries: RecallQueries, k: int
) -> tuple[IndexMetrics, IndexMetrics]:
    """Writes flat index `source` to `output` as the faiss index that the flags ask for; returns the metrics of both.

    Passages are hard-linked where the file system allows it. Memory: the training sample, the codes, one chunk of
    vectors.
    """
    metadata = read_metadata(source)
    vectors = read_vectors(source, metadata)
    check = functools.partial(check_replaceable, output, "--output")
    with atomic_folder(output, "choose another --output", replace=True, check=check) as draft:
        index = build_faiss_index(vectors, config)
        write_metadata(draft, index.save(draft), origin_from_metadata(metadata))
        link_tree(source / PASSAGES, draft / PASSAGES, copy=True)
    logger.info("wrote %s", output)
    expected, exact_milliseconds = exact_search(vectors, queries, k)
    start = time.perf_counter()
    found = drop_own_passage(index.search(queries.vectors, k + 1).numbers, queries.source_passages)
    milliseconds = 1e3 * (time.perf_counter() - start) / len(found)
    recall = float(np.mean([np.isin(a, b).mean() for a, b in zip(found, expected, strict=True)]))
    return (
        IndexMetrics(1.0, exact_milliseconds, index_bytes(source)),
        IndexMetrics(recall, milliseconds, index_bytes(output)),
    )


def exact_search(
    vectors: Float16[np.ndarray, "p d"], queries: RecallQueries, k: int
) -> tuple[Int64[np.ndarray, "q {k}"], float]:
    """Returns the numbers of the k best passages of each query by exact float32 search, and milliseconds per query."""
    start = time.perf_counter()
    parts = []
    with progress("searching exactly", "vectors", len(vectors)) as advance:
        for first in range(0, len(vectors), CHUNK_ROWS):
            chunk = vectors[first : first + CHUNK_ROWS].astype(np.float32)
            scores, numbers = faiss.knn(queries.vectors, chunk, min(k + 1, len(chunk)), faiss.METRIC_INNER_PRODUCT)
            parts.append((scores, numbers + first))
            scores, numbers = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
            best = np.argsort(-scores, axis=1, kind="stable")[:, : k + 1]
            parts = [(np.take_along_axis(scores, best, axis=1), np.take_along_axis(numbers, best, axis=1))]
            release_pages(vectors)
            advance(len(chunk))
    return drop_own_passage(parts[0][1], queries.source_passages), 1e3 * (time.perf_counter() - start) / len(
        queries.source_passages
    )


def drop_own_passage(
    numbers: Int64[np.ndarray, "q found"], source_passages: Int64[np.ndarray, " q"]
) -> Int64[np.ndarray, "q found-1"]:
    """Drops from each query's results the passage that the query was made from, or the last result if it is absent."""
    order = np.argsort(numbers == source_passages[:, None], axis=1, kind="stable")
    return np.take_along_axis(numbers, order[:, :-1], axis=1)


def index_bytes(folder: Path) -> int:
    """Returns the size of an index on disk, without its passages."""
    return sum(file.stat().st_size for file in folder.glob("*") if file.is_file())
