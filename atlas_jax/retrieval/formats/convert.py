"""An index from one form into another, chunk by chunk: memory depends neither on its size nor on its shards."""

import concurrent.futures
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float16

from atlas_jax.retrieval.formats.index_folder import (
    PASSAGES,
    VECTORS,
    Origin,
    origin_of,
    read_about,
    read_vectors,
    write_about,
)
from atlas_jax.retrieval.formats.npy_files import VectorFile
from atlas_jax.retrieval.passage_store import PassageStore
from atlas_jax.runtime.progress import progress
from atlas_jax.storage.files import atomic_folder
from atlas_jax.storage.mapped_file import release_pages

CHUNK_ROWS = 4096  # vectors that a thread reads and writes at a time: 6 MB of Contriever's, which a cache holds
THREADS = min(8, os.cpu_count() or 1)


@runtime_checkable
class IndexSource(Protocol):
    """Vectors and passages in any form, in order."""

    count: int
    dim: int
    origin: Origin

    def read(self, start: int, stop: int) -> Float16[np.ndarray, "n d"]:
        """The vectors from `start` on, before `stop`; threads may read side by side."""
        ...

    def texts(self) -> Iterator[bytes]:
        """The JSON of all passages, as a stream."""
        ...


class FlatIndexFolder:
    """A flat index of ours."""

    def __init__(self, folder: Path):
        self.about = read_about(folder)
        self.origin = origin_of(self.about)
        self.count, self.dim = self.about["count"], self.about["dim"]
        self.store = PassageStore.open(folder / PASSAGES)
        self._vectors = read_vectors(folder, self.about)

    def read(self, start: int, stop: int) -> Float16[np.ndarray, "n d"]:
        """A copy of these rows."""
        rows = np.array(self._vectors[start:stop])
        release_pages(self._vectors)
        return rows

    def texts(self) -> Iterator[bytes]:
        """As they are in the store."""
        return self.store.texts()


def convert(source: IndexSource, output: Path, origin: Origin) -> None:
    """Writes an index of ours."""
    with atomic_folder(output, "choose another --output", replace=True) as draft:
        write_about(draft, take(source, draft), origin)


def take(source: IndexSource, folder: Path) -> dict[str, Any]:
    """Writes the vectors and passages in our form; returns what index.json must say of the arrays."""
    write_vectors(source, folder / VECTORS)
    with progress("writing passages", "passages", source.count) as more:
        PassageStore.write(source.texts(), folder / PASSAGES, more)
    return {"index_mode": "flat", "kind": "flat", "count": source.count, "dim": source.dim}


def write_vectors(source: IndexSource, file: Path) -> None:
    """One .npy file, whose space is taken before anything is written: a full disk is found at once."""
    with (
        contextlib.closing(VectorFile.create(file, source.count, source.dim)) as out,
        progress("writing vectors", "vectors", source.count) as more,
    ):

        def copy(start: int) -> int:
            rows = source.read(start, min(start + CHUNK_ROWS, source.count))
            out[start : start + len(rows)] = rows
            return len(rows)

        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            for count in pool.map(copy, range(0, source.count, CHUNK_ROWS)):
                more(count)
