"""Reads the published shards of an index: `embeddings.N.pt` (float16 or float32 "d p") and `passages.N.pt`."""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16, Num

from atlas_jax.checkpoints.formats.safe_pickle import load_pickle
from atlas_jax.checkpoints.formats.torch_reader import load_torch
from atlas_jax.errors import UserError
from atlas_jax.retrieval.formats.index_folder import METADATA, Origin
from atlas_jax.retrieval.passage_store import serialize_passages
from atlas_jax.storage.mapped_file import release_pages

RELEASE_ROWS = 2**17  # vectors read between two releases of mapped pages: 200 MB for Contriever
TILE = 256  # columns transposed at a time: they fit into the CPU cache


class TorchShards:
    """`IndexSource` of all shards, concatenated; at most two embeddings files are memory-mapped at a time.

    UserError if a shard is missing, vectors differ in width, or there are none.
    """

    origin = Origin()

    def __init__(self, folder: Path):
        self.folder = folder
        self._open = functools.lru_cache(maxsize=2)(lambda n: _load_embeddings(folder / f"embeddings.{n}.pt"))
        shapes = [self._open(n).shape for n in range(len(shard_files(folder)) // 2)]
        self.counts = [count for _, count in shapes]
        self.count, self.dim = sum(self.counts), shapes[0][0]
        for n, (dim, _) in enumerate(shapes):
            if dim != self.dim:
                raise UserError(
                    f"{folder}/embeddings.{n}.pt: vectors of width {dim}, embeddings.0.pt has {self.dim}; "
                    "are these shards of one index?"
                )
        if not self.count:
            raise UserError(f"{folder}: {len(shapes)} shards without a vector; fetch them again")

    def read(self, start: int, stop: int) -> Float16[np.ndarray, "n d"]:
        """Returns the vectors of passages `start` to `stop` (exclusive), transposed to "n d" and in float16."""
        out = np.empty((stop - start, self.dim), np.float16)
        for n, begin, end, at in split_range(self.counts, start, stop):
            array = self._open(n)
            transpose(array[:, begin:end], out[at : at + end - begin])
            if begin // RELEASE_ROWS != end // RELEASE_ROWS:  # not every time: mapping pages again takes time
                release_pages(array)
        return out

    def passages_json(self) -> Iterator[bytes]:
        """Yields the JSON of every passage, in order."""
        return serialize_passages(self._passages())

    def _passages(self) -> Iterator[Mapping[str, Any]]:
        """Yields the passages shard by shard, one shard in memory; UserError unless a shard has one for each vector."""
        for n, count in enumerate(self.counts):
            file = self.folder / f"passages.{n}.pt"
            passages = load_pickle(file)
            if not isinstance(passages, list) or not all(isinstance(passage, dict) for passage in passages):
                raise UserError(f"{file}: holds no list of passages; fetch it again")
            if len(passages) != count:
                raise UserError(
                    f"{file}: {len(passages)} passages, but embeddings.{n}.pt has {count} vectors; fetch both again"
                )
            yield from passages
            del passages  # before the next shard is read


def split_range(counts: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Splits rows `start` to `stop` (exclusive) of concatenated parts with `counts` rows at the parts' boundaries.

    Yields (part, first and end row within the part, offset from `start`) for each part that has some of the rows.
    """
    first = 0
    for n, count in enumerate(counts):
        begin, end = max(start - first, 0), min(stop - first, count)
        if begin < end:
            yield n, begin, end, first + begin - start
        first += count


def transpose(source: Num[np.ndarray, "a b"], out: Float16[np.ndarray, "b a"]) -> None:
    """Computes `out[:] = source.T` in float16, several times faster: four columns move as one 8-byte integer."""
    a, b = source.shape
    columns = np.zeros((a, TILE), np.float16)
    for start in range(0, b, TILE):
        width = min(TILE, b - start)
        columns[:, :width] = source[:, start : start + width]
        packed = np.ascontiguousarray(columns.view(np.uint64).T).view(np.uint16)  # "b/4 (a 4)"
        rows = packed.reshape(TILE // 4, a, 4).transpose(0, 2, 1)
        if width == TILE:
            out[start : start + width].view(np.uint16).reshape(rows.shape)[:] = rows
        else:
            out[start : start + width].view(np.uint16)[:] = rows.reshape(TILE, a)[:width]


def shard_files(folder: Path) -> list[Path]:
    """Returns `embeddings.N.pt` and `passages.N.pt` of each shard; UserError if there is none or a file is missing."""
    names = [re.fullmatch(r"(?:embeddings|passages)\.(\d+)\.pt", file.name) for file in folder.iterdir()]
    count = 1 + max((int(name[1]) for name in names if name), default=-1)
    if not count:
        raise UserError(f"{folder}: neither {METADATA} nor embeddings.0.pt in this folder; is it an index?")
    files = [folder / f"{kind}.{n}.pt" for n, kind in itertools.product(range(count), ("embeddings", "passages"))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: missing, one of {count} shards; copy it from where the others are")
    return files


def _load_embeddings(file: Path) -> np.ndarray:
    """Memory-maps one embeddings file: float16 or float32 "d p"; UserError if it holds anything else."""
    array = load_torch(file)
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype not in (np.float16, np.float32):
        raise UserError(f"{file}: holds no matrix of vectors; fetch it again")
    return array
