"""An index of ours in the published form again, in any number of shards, written without torch and without `pickle`."""

import concurrent.futures
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.checkpoints.formats.torch_writer import dump, write_tensor
from atlas_jax.errors import UserError
from atlas_jax.retrieval.formats.convert import CHUNK_ROWS, THREADS, IndexSource
from atlas_jax.retrieval.formats.npy_files import create_array
from atlas_jax.retrieval.formats.torch_shards import transpose
from atlas_jax.runtime.progress import progress
from atlas_jax.storage.files import atomic_folder


def export_torch_shards(source: IndexSource, output: Path, shards: int) -> None:
    """Writes `embeddings.N.pt` and `passages.N.pt`, as near to equal as can be.

    Memory: a chunk for each thread; a shard's vectors are turned around on the disk.
    """
    if not 1 <= shards <= source.count:
        raise UserError(f"--shards {shards}: must be 1 to {source.count}, the number of passages")
    bounds = [source.count * n // shards for n in range(shards + 1)]
    with atomic_folder(output, "choose another --output", replace=True) as draft:
        with progress("writing vectors", "vectors", source.count) as more:
            for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
                _write_vectors(source, start, stop, draft / f"embeddings.{n}.pt", more)
        with progress("writing passages", "passages", source.count) as more:
            texts = source.texts()
            for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
                _write_passages(itertools.islice(texts, stop - start), draft / f"passages.{n}.pt")
                more(stop - start)


def _write_vectors(source: IndexSource, start: int, stop: int, file: Path, more: Callable[[int], object]) -> None:
    """A tensor "d p" of the vectors from `start` on, before `stop`."""
    scratch = file.with_suffix(".scratch")
    turned = create_array(scratch, np.float16, (source.dim, stop - start))

    def turn(first: int) -> int:
        last = min(first + CHUNK_ROWS, stop)
        transpose(source.read(first, last), turned[:, first - start : last - start])
        return last - first

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for count in pool.map(turn, range(start, stop, CHUNK_ROWS)):
            more(count)
    write_tensor(file, turned)
    scratch.unlink()


def _write_passages(texts: Iterator[bytes], file: Path) -> None:
    """A pickled list of dicts."""
    with open(file, "wb") as out:
        out.write(b"\x80\x02]")  # protocol 2, an empty list
        while some := list(itertools.islice(texts, 1000)):
            out.write(b"(" + b"".join(_dict(json.loads(text)) for text in some) + b"e")  # a mark, values, append them
        out.write(b".")


def _dict(passage: dict[str, Any]) -> bytes:
    """The opcodes of a passage alone: a pickle without what begins and ends it."""
    try:
        return dump(passage)[2:-1]
    except TypeError as error:
        raise UserError(
            f"passage {passage.get('id')}: {error}; remove the field that is neither text nor number"
        ) from None
