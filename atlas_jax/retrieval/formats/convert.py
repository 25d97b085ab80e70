"""Writes an index of any form as a flat index, chunk by chunk: memory depends neither on its size nor on its shards."""

import concurrent.futures
import contextlib
import functools
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
    check_replaceable,
    origin_from_metadata,
    read_metadata,
    read_vectors,
    write_metadata,
)
from atlas_jax.retrieval.formats.npy_files import VectorFile
from atlas_jax.retrieval.passage_store import REMEDY, PassageStore
from atlas_jax.runtime.progress import progress
from atlas_jax.storage.files import atomic_folder
from atlas_jax.storage.mapped_file import release_pages

CHUNK_ROWS = 4096  # vectors that a thread reads and writes at a time: 6 MB for Contriever, which fits into a CPU cache
THREADS = min(8, os.cpu_count() or 1)


@runtime_checkable
class IndexSource(Protocol):
    """Vectors and passages of an index in any form, by passage number."""

    count: int
    dim: int
    origin: Origin

    def read(self, start: int, stop: int) -> Float16[np.ndarray, "n d"]:
        """Returns the vectors of passages `start` to `stop` (exclusive); safe to call from several threads."""
        ...

    def passages_json(self) -> Iterator[bytes]:
        """Yields the JSON of every passage, in order."""
        ...


class FlatIndexFolder:
    """`IndexSource` of a flat index in our own format."""

    def __init__(self, folder: Path):
        self.metadata = read_metadata(folder)
        self.origin = origin_from_metadata(self.metadata)
        self.count, self.dim = self.metadata["count"], self.metadata["dim"]
        self.store = PassageStore.open(folder / PASSAGES)
        self._vectors = read_vectors(folder, self.metadata)

    def read(self, start: int, stop: int) -> Float16[np.ndarray, "n d"]:
        """Returns a copy of these rows."""
        rows = np.array(self._vectors[start:stop])
        release_pages(self._vectors)
        return rows

    def passages_json(self) -> Iterator[bytes]:
        """Yields the JSON of every passage as the store holds it, without parsing."""
        return self.store.passages_json()


def convert(source: IndexSource, output: Path, origin: Origin) -> None:
    """Writes a flat index in our own format to the folder `output`."""
    remedy = "choose another --output"
    check = functools.partial(check_replaceable, output, "--output")
    with atomic_folder(output, remedy, replace=True, check=check) as draft:
        write_metadata(draft, write_flat_index(source, draft, remedy), origin)


def write_flat_index(source: IndexSource, folder: Path, remedy: str = REMEDY) -> dict[str, Any]:
    """Writes the vectors and passages of a flat index; returns the fields of index.json that describe the vectors."""
    write_vectors(source, folder / VECTORS)
    with progress("writing passages", "passages", source.count) as advance:
        PassageStore.write(source.passages_json(), folder / PASSAGES, advance, remedy)
    return {"index_mode": "flat", "kind": "flat", "count": source.count, "dim": source.dim}


def write_vectors(source: IndexSource, file: Path) -> None:
    """Writes all vectors to one .npy file, allocated in full first so that a full disk fails at once."""
    with (
        contextlib.closing(VectorFile.create(file, source.count, source.dim)) as out,
        progress("writing vectors", "vectors", source.count) as advance,
    ):

        def copy_chunk(start: int) -> int:
            rows = source.read(start, min(start + CHUNK_ROWS, source.count))
            out[start : start + len(rows)] = rows
            return len(rows)

        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            for count in pool.map(copy_chunk, range(0, source.count, CHUNK_ROWS)):
                advance(count)
