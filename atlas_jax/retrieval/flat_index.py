"""Exact search on the devices of a mesh: vectors in float16, sharded by rows, and scores in float32."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float16, Float32, Int

from atlas_jax.errors import UserError
from atlas_jax.mesh import replicate
from atlas_jax.retrieval.formats.npy_files import read_array
from atlas_jax.retrieval.search import SearchResult, check_queries, checked_result

CHUNK_ROWS = 4096  # rows scored at a time: measured fastest on a CPU, whose cache holds their float32 copy
MIN_TOP_K = 17  # smallest k for top_k: XLA's GPU compiler (jax 0.12) fails for 2 to 16, in its kernel for small k


class FlatIndex:
    """Brute-force index: scores every passage for every query.

    Rows are sharded over all axes of the mesh, in order, and each device scans its rows in chunks. The chunk size
    depends on the number of passages alone, so that scores are bit-identical on any number of devices.
    """

    kind = "flat"

    def __init__(self, rows: Float16[Array, "padded d"], count: int, mesh: Mesh):
        self.rows = rows  # zeros from `count` on
        self.mesh = mesh
        self.count = count
        self.dim = rows.shape[1]
        self._replicated_count = replicate(mesh, np.asarray(count, np.int32))

    @classmethod
    def from_array(cls, embeddings: Float16[np.ndarray, "p d"], mesh: Mesh) -> "FlatIndex":
        """Puts an array or a memory map on the devices; each process reads the rows of its own devices only.

        `embeddings` must not change afterwards: a CPU device may use their memory without a copy. UserError if there
        are none, or 2^31 or more.
        """
        count, dim = embeddings.shape
        if not 0 < count < 2**31:
            raise UserError(f"an index of {count} passages: it holds 1 to 2^31 - 1, so check the passage files")
        padded = padded_rows(count, mesh)

        def rows_of_device(index: Any) -> Float16[np.ndarray, "local d"]:
            start, stop, _ = index[0].indices(padded)
            rows = embeddings[start:stop]
            if len(rows) == stop - start:
                return rows
            return np.concatenate([rows, np.zeros((stop - start - len(rows), dim), np.float16)])

        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        return cls(jax.make_array_from_callback((padded, dim), sharding, rows_of_device), count, mesh)

    def search(self, queries: Float[np.ndarray | Array, "q d"], k: int) -> SearchResult:
        """See `VectorIndex.search`. A collective: every process must call it with the same queries."""
        count = len(queries)
        padded = np.pad(np.asarray(queries, np.float32), ((0, padded_queries(count) - count), (0, 0)))
        return self.begin_search(replicate(self.mesh, padded), count, k)()

    def begin_search(self, queries: Float32[Array, "rows d"], count: int, k: int) -> Callable[[], SearchResult]:
        """See `VectorIndex.begin_search`; dispatches the search to the devices before it returns."""
        check_queries(self, queries, k)
        best = best_rows(self.rows, queries, self._replicated_count, k=k, chunk=chunk_rows(self.count), mesh=self.mesh)

        def result() -> SearchResult:
            scores, numbers = (np.asarray(array)[:count] for array in best)
            return checked_result(scores, numbers.astype(np.int64))

        return result

    @classmethod
    def load(cls, folder: Path, metadata: Mapping[str, Any], mesh: Mesh) -> "FlatIndex":
        """Loads embeddings.npy, given the content of index.json; UserError if the file does not fit that."""
        shape = metadata["count"], metadata["dim"]
        return cls.from_array(read_array(folder / "embeddings.npy", np.float16, shape), mesh)


class _Best(NamedTuple):
    """The best rows for each query, best first; equal scores are ordered by the smaller number."""

    scores: Float32[Array, "*parts q k"]
    numbers: Int[Array, "*parts q k"]


def padded_rows(count: int, mesh: Mesh) -> int:
    """Number of rows of an index of `count` passages with padding: a multiple of the number of devices."""
    return max(-(-count // mesh.size), chunk_rows(count)) * mesh.size


def padded_queries(count: int) -> int:
    """Number of queries rounded up to a power of two, so that few programs are compiled."""
    return 1 << (count - 1).bit_length()


def chunk_rows(count: int) -> int:
    """Number of rows that are scored at a time in an index of `count` passages."""
    return min(CHUNK_ROWS, 1 << (count - 1).bit_length())


@functools.partial(jax.jit, static_argnames=("k", "chunk", "mesh"))
def best_rows(
    rows: Float16[Array, "padded d"], queries: Float32[Array, "q d"], count: Int[Array, ""], *,
    k: int, chunk: int, mesh: Mesh,
) -> _Best:  # fmt: skip
    """Searches `rows` ("padded d", sharded) for the k best per query: top k per chunk, per device, over all devices.

    `count` is the number of rows that are passages; later rows are padding. The result is replicated.
    """
    axes = mesh.axis_names

    def search_device(rows: Float16[Array, "local d"], queries: Float32[Array, "q d"], count: Int[Array, ""]) -> _Best:
        local = len(rows)
        first = jax.lax.axis_index(axes) * local

        def search_chunk(offset: Int[Array, ""]) -> _Best:
            start = jnp.minimum(offset, local - chunk)  # the last chunk overlaps the one before it
            vectors = jax.lax.dynamic_slice_in_dim(rows, start, chunk).astype(jnp.float32)
            scores = jnp.einsum("qd,cd->qc", queries, vectors, precision=jax.lax.Precision.HIGHEST)
            scores = jnp.where(scores == 0, 0, scores)  # -0 to 0: top_k would order 0 before -0, but they are equal
            numbers = first + start + jnp.arange(chunk)
            is_new = (numbers >= first + offset) & (numbers < count)
            scores, column = _top_k(jnp.where(is_new[None], scores, -jnp.inf), k)
            return _Best(scores, numbers[column])

        best = _merge(jax.lax.map(search_chunk, jnp.arange(0, local, chunk)), k)
        return _merge(jax.lax.all_gather(best, axes), k)

    sharded, replicated = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(
        search_device, mesh=mesh, in_specs=(sharded, replicated, replicated), out_specs=replicated, check_vma=False
    )(rows, queries, count)


def _merge(parts: _Best, k: int) -> _Best:
    """Reduces the first axis: the best k of all parts for each query, or as many as there are.

    Parts are ordered by passage number and `_top_k` keeps the first of equal scores: ties go to the smaller number.
    """
    n, q, kp = parts.scores.shape
    scores, numbers = (x.swapaxes(0, 1).reshape(q, n * kp) for x in parts)
    scores, column = _top_k(scores, k)
    return _Best(scores, jnp.take_along_axis(numbers, column, axis=1))


def _top_k(scores: Float32[Array, "q n"], k: int) -> tuple[Float32[Array, "q k"], Int[Array, "q k"]]:
    """Returns the k largest scores of each row, or all if there are fewer, and their columns; ties: the first."""
    scores, column = jax.lax.top_k(scores, min(max(k, MIN_TOP_K), scores.shape[1]))
    return scores[:, :k], column[:, :k]
