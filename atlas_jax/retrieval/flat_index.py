"""Exact search: float16 vectors spread over the devices of a mesh, scored in float32."""

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

CHUNK_ROWS = 4096  # rows scored at once: measured fastest on a CPU, where their float32 copy stays in the cache
LEAST = 17  # that top_k is asked for: XLA's compiler for GPUs (jax 0.12) fails with 2 to 16, its kernel for few


class FlatIndex:
    """Every passage is scored for every query.

    Rows are split over all axes of the mesh in order, and a device scans its share in chunks. The size of a chunk
    depends on the number of passages alone, so a score is computed alike whatever the number of devices.
    """

    kind = "flat"

    def __init__(self, rows: Float16[Array, "padded d"], count: int, mesh: Mesh):
        self.rows = rows  # zeros from `count` on
        self.mesh = mesh
        self.count = count
        self.dim = rows.shape[1]
        self._there = replicate(mesh, np.asarray(count, np.int32))

    @classmethod
    def from_array(cls, embeddings: Float16[np.ndarray, "p d"], mesh: Mesh) -> "FlatIndex":
        """Each device reads its own rows of an array or a memory map.

        The caller leaves `embeddings` unchanged afterwards: a CPU device may read them where they are.
        """
        count, dim = embeddings.shape
        if not 0 < count < 2**31:
            raise UserError(f"an index of {count} passages: it holds 1 to 2^31 - 1, so check the passage files")
        padded = padded_rows(count, mesh)

        def rows_of_device(place: Any) -> Float16[np.ndarray, "local d"]:
            start, stop, _ = place[0].indices(padded)
            rows = embeddings[start:stop]
            if len(rows) == stop - start:
                return rows
            return np.concatenate([rows, np.zeros((stop - start - len(rows), dim), np.float16)])

        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        return cls(jax.make_array_from_callback((padded, dim), sharding, rows_of_device), count, mesh)

    def search(self, queries: Float[np.ndarray | Array, "q d"], k: int) -> SearchResult:
        """Over several hosts, every host calls this with the same queries."""
        count = len(queries)
        padded = np.pad(np.asarray(queries, np.float32), ((0, padded_queries(count) - count), (0, 0)))
        return self.begin_search(replicate(self.mesh, padded), count, k)()

    def begin_search(self, queries: Float32[Array, "rows d"], count: int, k: int) -> Callable[[], SearchResult]:
        """Begins a search with the first `count` rows of what lies whole on every device; calling the result waits.

        Other rows mean nothing. The queries may still be under way: the host waits for nothing here.
        """
        check_queries(self, queries, k)
        best = best_rows(self.rows, queries, self._there, k=k, chunk=chunk_rows(self.count), mesh=self.mesh)

        def found() -> SearchResult:
            scores, numbers = (np.asarray(array)[:count] for array in best)
            return checked_result(scores, numbers.astype(np.int64))

        return found

    @classmethod
    def load(cls, folder: Path, meta: Mapping[str, Any], mesh: Mesh) -> "FlatIndex":
        shape = meta["count"], meta["dim"]
        return cls.from_array(read_array(folder / "embeddings.npy", np.float16, shape), mesh)


class _Best(NamedTuple):
    """The best rows for each query, best first; equal scores by the smaller number."""

    scores: Float32[Array, "*parts q k"]
    numbers: Int[Array, "*parts q k"]


def padded_rows(count: int, mesh: Mesh) -> int:
    """Rows of an index of `count` passages, which all devices have equally many of."""
    return max(-(-count // mesh.size), chunk_rows(count)) * mesh.size


def padded_queries(count: int) -> int:
    """Queries of a search: few sizes, so few programs are compiled."""
    return 1 << (count - 1).bit_length()


def chunk_rows(count: int) -> int:
    """Rows that are scored at once."""
    return min(CHUNK_ROWS, 1 << (count - 1).bit_length())


@functools.partial(jax.jit, static_argnames=("k", "chunk", "mesh"))
def best_rows(
    rows: Float16[Array, "padded d"], queries: Float32[Array, "q d"], count: Int[Array, ""], *,
    k: int, chunk: int, mesh: Mesh,
) -> _Best:  # fmt: skip
    """The best k of each chunk, of those the best of the device, of those the best of all."""
    axes = mesh.axis_names

    def of_device(rows: Float16[Array, "local d"], queries: Float32[Array, "q d"], count: Int[Array, ""]) -> _Best:
        local = len(rows)
        first = jax.lax.axis_index(axes) * local

        def of_chunk(wanted: Int[Array, ""]) -> _Best:
            start = jnp.minimum(wanted, local - chunk)  # the last chunk overlaps the one before it
            vectors = jax.lax.dynamic_slice_in_dim(rows, start, chunk).astype(jnp.float32)
            scores = jnp.einsum("qd,cd->qc", queries, vectors, precision=jax.lax.Precision.HIGHEST)
            scores = jnp.where(scores == 0, 0, scores)  # top_k would put 0 before -0, and they are a tie
            numbers = first + start + jnp.arange(chunk)
            is_new = (numbers >= first + wanted) & (numbers < count)
            scores, column = _top(jnp.where(is_new[None], scores, -jnp.inf), k)
            return _Best(scores, numbers[column])

        best = _merge(jax.lax.map(of_chunk, jnp.arange(0, local, chunk)), k)
        return _merge(jax.lax.all_gather(best, axes), k)

    sharded, replicated = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(
        of_device, mesh=mesh, in_specs=(sharded, replicated, replicated), out_specs=replicated, check_vma=False
    )(rows, queries, count)


def _merge(parts: _Best, k: int) -> _Best:
    """The best k over the first axis, or as many as there are.

    Parts come in order of number and `_top` keeps the first of equals: ties go to the smaller number.
    """
    n, q, kp = parts.scores.shape
    scores, numbers = (x.swapaxes(0, 1).reshape(q, n * kp) for x in parts)
    scores, column = _top(scores, k)
    return _Best(scores, jnp.take_along_axis(numbers, column, axis=1))


def _top(scores: Float32[Array, "q n"], k: int) -> tuple[Float32[Array, "q k"], Int[Array, "q k"]]:
    """The best k of a row, or as many as there are, and their columns; of equals the first."""
    scores, column = jax.lax.top_k(scores, min(max(k, LEAST), scores.shape[1]))
    return scores[:, :k], column[:, :k]
