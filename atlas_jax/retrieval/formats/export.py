"""Writes an index as the published shards, in any number of them, without torch and without `pickle`."""

import concurrent.futures
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.checkpoints.formats.torch_writer import dump, write_tensor
from atlas_jax.errors import UserError
from atlas_jax.retrieval.formats.convert import CHUNK_ROWS, THREADS, IndexSource
from atlas_jax.retrieval.formats.index_folder import check_replaceable
from atlas_jax.retrieval.formats.npy_files import create_array
from atlas_jax.retrieval.formats.torch_shards import transpose
from atlas_jax.runtime.progress import progress
from atlas_jax.storage.files import atomic_folder


def export_torch_shards(source: IndexSource, output: Path, shards: int) -> None:
    """Writes `embeddings.N.pt` and `passages.N.pt`, with shard sizes that differ by at most one passage.

    Memory: one chunk per thread; the vectors of a shard are transposed in a memory-mapped file.
    """
    if not 1 <= shards <= source.count:
        raise UserError(f"--shards {shards}: must be 1 to {source.count}, the number of passages")
    bounds = [source.count * n // shards for n in range(shards + 1)]
    check = functools.partial(check_replaceable, output, "--output")
    with atomic_folder(output, "choose another --output", replace=True, check=check) as draft:
        with progress("writing vectors", "vectors", source.count) as advance:
            for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
                _write_vectors(source, start, stop, draft / f"embeddings.{n}.pt", advance)
        with progress("writing passages", "passages", source.count) as advance:
            texts = source.passages_json()
            for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
                _write_passages(itertools.islice(texts, stop - start), draft / f"passages.{n}.pt")
                advance(stop - start)


def _write_vectors(source: IndexSource, start: int, stop: int, file: Path, advance: Callable[[int], object]) -> None:
    """Writes the vectors of passages `start` to `stop` (exclusive) as one float16 tensor "d p"."""
    scratch = file.with_suffix(".scratch")
    transposed = create_array(scratch, np.float16, (source.dim, stop - start))

    def transpose_chunk(first: int) -> int:
        last = min(first + CHUNK_ROWS, stop)
        transpose(source.read(first, last), transposed[:, first - start : last - start])
        return last - first

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for count in pool.map(transpose_chunk, range(start, stop, CHUNK_ROWS)):
            advance(count)
    write_tensor(file, transposed)
    scratch.unlink()


def _write_passages(texts: Iterator[bytes], file: Path) -> None:
    """Writes passages, given as JSON, as a pickled list of dicts."""
    with open(file, "wb") as out:
        out.write(b"\x80\x02]")  # PROTO 2, EMPTY_LIST
        while batch := list(itertools.islice(texts, 1000)):
            out.write(b"(" + b"".join(_dict_opcodes(json.loads(text)) for text in batch) + b"e")  # MARK, items, APPENDS
        out.write(b".")


def _dict_opcodes(passage: dict[str, Any]) -> bytes:
    """Returns the pickle opcodes that push one dict: its pickle without the leading PROTO and the final STOP."""
    try:
        return dump(passage)[2:-1]
    except TypeError as error:
        raise UserError(
            f"passage {passage.get('id')}: {error}; remove the field that is neither text nor number"
        ) from None
