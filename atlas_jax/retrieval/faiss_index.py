"""Search on the host with faiss: scalar or product quantization, with or without inverted lists (IVF)."""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from jaxtyping import Array, Float, Float16, Float32, Int32, Int64, UInt8

from atlas_jax.errors import UserError
from atlas_jax.retrieval.formats.npy_files import REBUILD, create_array, read_array
from atlas_jax.retrieval.search import HostIndex, SearchResult, checked_queries, checked_result
from atlas_jax.storage.mapped_file import release_pages

logger = logging.getLogger(__name__)

FaissKind = Literal["flat", "ivfflat", "ivfsq", "ivfpq", "pq"]

PQ_CENTROIDS = 256  # centroids of each of the `code_size` sub-vectors: a code byte is the index of one
TRAINING_ROWS_PER_CENTROID = 256  # given more, faiss's k-means would subsample them itself
TRAINING_BYTES = 2**31  # limit of the training sample in float32; 37 million passages still get 100 rows per centroid
CODE_TABLE_ROWS = {"flat": 0, "ivfflat": 0, "ivfsq": 2, "ivfpq": PQ_CENTROIDS, "pq": PQ_CENTROIDS}  # rows "dim"
CHUNK_ROWS = 16_384  # vectors converted to float32 at a time


class FaissIndex(HostIndex):
    """A faiss index with one code per passage: float16 ("flat"), 4 bits per dimension ("sq"), `code_size` bytes ("pq").

    The "ivf" kinds store a code in the inverted list of its nearest centroid; a query scans its `n_probe` nearest
    lists. Equal scores are ordered by the smaller passage number, but faiss chooses which of them fill the last places.
    """

    def __init__(self, kind: FaissKind, code_size: int | None, index: Any):
        """`index`: a trained and filled `faiss.Index`; see `build` and `load`."""
        super().__init__()
        self.kind: str = kind
        self.code_size = code_size
        self.count: int = index.ntotal
        self.dim: int = index.d
        self.n_list: int = index.nlist if _is_ivf(index) else 1
        self.n_probe = self.n_list  # Reference: both are floor(sqrt(p)), so every list is scanned
        self._index = index

    @classmethod
    def build(
        cls,
        embeddings: Float16[np.ndarray, "p d"],
        kind: FaissKind,
        code_size: int | None = None,
        seed: int = 0,
        progress: Callable[[int], object] | None = None,
    ) -> "FaissIndex":
        """Trains on a sample, then encodes every vector; calls `progress` with the size of each chunk encoded.

        Equal seeds give equal indexes. UserError if `kind` cannot be built from so many vectors of this width, or a
        vector is not finite.
        """
        count, dim = embeddings.shape
        index = _empty_index(kind, count, dim, code_size)
        _train(index, embeddings, seed)
        _fill(index, embeddings, progress or (lambda added: None))
        return cls(kind, code_size, index)

    def search(self, queries: Float[np.ndarray | Array, "q d"], k: int) -> SearchResult:
        """Returns the k best passages of each query; scans all lists if the nearest ones hold fewer than k passages."""
        queries = checked_queries(self, queries, k)
        scores, numbers = self._search(queries, k, self.n_probe)
        incomplete = (numbers < 0).any(axis=1)  # faiss pads missing results with -1
        if incomplete.any():
            scores[incomplete], numbers[incomplete] = self._search(queries[incomplete], k, self.n_list)
        order = np.lexsort((numbers, -scores))
        return checked_result(np.take_along_axis(scores, order, axis=1), np.take_along_axis(numbers, order, axis=1))

    def _search(
        self, queries: Float32[np.ndarray, "q d"], k: int, n_probe: int
    ) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
        if not _is_ivf(self._index):
            return self._index.search(queries, k)
        params = faiss.SearchParametersIVF()
        params.nprobe = n_probe
        return self._index.search(queries, k, params=params)

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the arrays; returns the fields of index.json that describe them.

        codes.npy (one row per passage) and code_table.npy; "ivf" also centroids.npy, list_sizes.npy, and numbers.npy,
        the passage number of each row of codes.npy.
        """
        index, count = self._index, self.count
        np.save(folder / "code_table.npy", faiss.vector_to_array(_code_table(index)))
        if _is_ivf(index):
            np.save(folder / "centroids.npy", faiss.downcast_index(index.quantizer).reconstruct_n(0, self.n_list))
            sizes = [index.invlists.list_size(i) for i in range(self.n_list)]
            np.save(folder / "list_sizes.npy", np.array(sizes, np.int32))
            numbers = create_array(folder / "numbers.npy", np.int32, (count,))
            codes = create_array(folder / "codes.npy", np.uint8, (count, index.code_size))
            for i, rows in enumerate(_consecutive_slices(sizes)):
                numbers[rows], codes[rows] = _list_view(index, i, sizes[i])
            numbers.flush()
            codes.flush()
        else:
            np.save(folder / "codes.npy", _codes_view(index))
        metadata = {"kind": self.kind, "count": count, "dim": self.dim, "code_size": self.code_size}
        return {"index_mode": "faiss", **metadata}

    @classmethod
    def load(cls, folder: Path, metadata: Mapping[str, Any], part: slice = slice(None)) -> "FaissIndex":
        """Loads what `save` wrote and returned; neither trains again nor needs the vectors.

        With `part`, loads those passages only, numbered from the start of the part. UserError if a file is missing,
        damaged or does not fit `metadata`.
        """
        kind, count, code_size = metadata["kind"], metadata["count"], metadata["code_size"]
        index, arrays = _empty_index(kind, count, metadata["dim"], code_size), map_arrays(folder, metadata)
        faiss.copy_array_to_vector(np.array(arrays["code_table"]), _code_table(index))
        start, stop, _ = part.indices(count)
        if _is_ivf(index):
            index.quantizer.add(np.array(arrays["centroids"]))
            _check_lists(folder, arrays["list_sizes"], arrays["numbers"])
            for i, rows in enumerate(_consecutive_slices(arrays["list_sizes"].tolist())):
                members = arrays["numbers"][rows].astype(np.int64)
                in_part = (members >= start) & (members < stop)
                members, codes = members[in_part] - start, np.array(arrays["codes"][rows][in_part])
                index.invlists.add_entries(i, len(members), faiss.swig_ptr(members), faiss.swig_ptr(codes))
            index.ntotal = stop - start
        else:
            _allocate_codes(index, stop - start)
            _codes_view(index)[:] = arrays["codes"][part]
        index.is_trained = True
        return cls(kind, code_size, index)


def map_arrays(folder: Path, metadata: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Memory-maps the files that `FaissIndex.save` wrote, by name; UserError if one is missing or not whole."""
    kind, count, dim = metadata["kind"], metadata["count"], metadata["dim"]
    if kind not in CODE_TABLE_ROWS:
        raise UserError(f"{folder}: kind {kind!r:.40}, this program knows {', '.join(CODE_TABLE_ROWS)}; {REBUILD}")
    index = _empty_index(kind, count, dim, metadata["code_size"])
    files: dict[str, tuple[type[Any], tuple[int, ...]]] = {
        "codes": (np.uint8, (count, index.code_size)),
        "code_table": (np.float32, (CODE_TABLE_ROWS[kind] * dim,)),
    }
    if _is_ivf(index):
        files |= {"centroids": (np.float32, (index.nlist, dim)), "list_sizes": (np.int32, (index.nlist,))}
        files |= {"numbers": (np.int32, (count,))}
    return {name: read_array(folder / f"{name}.npy", dtype, shape) for name, (dtype, shape) in files.items()}


def _empty_index(kind: FaissKind, count: int, dim: int, code_size: int | None) -> Any:
    """Creates an untrained `faiss.Index`; UserError if `count`, `dim` and `code_size` do not suit its kind."""
    if not 0 < count < 2**31:
        raise UserError(f"an index of {count} passages: it holds 1 to 2^31 - 1, so check the passage files")
    metric, sq, n_list = faiss.METRIC_INNER_PRODUCT, faiss.ScalarQuantizer, math.isqrt(count)
    if kind == "flat":
        return faiss.IndexScalarQuantizer(dim, sq.QT_fp16, metric)
    if kind == "ivfflat":
        return faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dim), dim, n_list, sq.QT_fp16, metric, False)
    if kind == "ivfsq":
        return faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dim), dim, n_list, sq.QT_4bit, metric, True)
    if code_size is None or code_size < 1 or dim % code_size:
        raise UserError(f"--faiss_code_size {code_size}: a {kind!r} index needs a divisor of the vectors' width, {dim}")
    if count < PQ_CENTROIDS:
        raise UserError(
            f"--faiss_index_type {kind}: learns {PQ_CENTROIDS} centroids, and there are only {count} passages; "
            "take flat, which is exact, or ivfsq"
        )
    if kind == "pq":
        return faiss.IndexPQ(dim, code_size, 8, metric)
    return faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, n_list, code_size, 8, metric)


def _train(index: Any, embeddings: Float16[np.ndarray, "p d"], seed: int) -> None:
    """Learns centroids and code table from a random sample, whose size grows with the number of centroids."""
    count, wanted = len(embeddings), TRAINING_ROWS_PER_CENTROID * max(PQ_CENTROIDS, getattr(index, "nlist", 0))
    sample = min(wanted, TRAINING_BYTES // (4 * index.d))
    rows = np.arange(count)
    if count > sample:  # sorted, so that a memory map is read front to back
        rows = np.sort(np.random.default_rng(seed).choice(count, sample, replace=False, shuffle=False))
    k_means = ([index.cp] if _is_ivf(index) else []) + ([index.pq.cp] if hasattr(index, "pq") else [])
    for clustering in k_means:
        clustering.seed = seed
        clustering.min_points_per_centroid = 1  # no warning below 39 rows per centroid, which is harmless
    logger.info("faiss: training on %d of %d vectors", len(rows), count)
    vectors = _float32_rows(embeddings, rows)
    if _is_ivf(index):
        clustering_index = _to_gpu(faiss.IndexFlatIP(index.d))
        index.clustering_index = clustering_index
        index.train(vectors)
        index.clustering_index = None  # it is freed when this function returns
    else:
        index.train(vectors)


def _fill(index: Any, embeddings: Float16[np.ndarray, "p d"], progress: Callable[[int], object]) -> None:
    """Encodes every vector, chunk by chunk; "ivf" appends each code to the inverted list of its nearest centroid."""
    if _is_ivf(index):
        centroids = _to_gpu(faiss.downcast_index(index.quantizer))
    else:
        _allocate_codes(index, len(embeddings))
    for start in range(0, len(embeddings), CHUNK_ROWS):
        rows = np.arange(start, min(start + CHUNK_ROWS, len(embeddings)))
        vectors = _float32_rows(embeddings, rows)
        if _is_ivf(index):
            _, nearest = centroids.search(vectors, 1)
            index.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(nearest))
        else:
            _codes_view(index)[rows] = index.sa_encode(vectors)
        progress(len(vectors))


def _to_gpu(index: Any) -> Any:
    """Copies the index to the first GPU if faiss has GPU support and there is one (never so in our tests)."""
    if not hasattr(faiss, "index_cpu_to_gpu") or faiss.get_num_gpus() == 0:
        return index
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)


def _float32_rows(embeddings: Float16[np.ndarray, "p d"], rows: Int64[np.ndarray, " r"]) -> Float32[np.ndarray, "r d"]:
    """Copies rows into a float32 array, chunk by chunk; UserError if one is not finite.

    Memory: the result and one chunk, since pages of a memory map are released.
    """
    vectors = np.empty((len(rows), embeddings.shape[1]), np.float32)
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        vectors[chunk] = embeddings[rows[chunk]]
        if not np.isfinite(vectors[chunk]).all():
            raise UserError(
                "a passage vector is not finite: the passage encoder has diverged; start from earlier weights"
            )
        release_pages(embeddings)
    return vectors


def _is_ivf(index: Any) -> bool:
    """True if codes are stored in inverted lists, one per centroid."""
    return isinstance(index, faiss.IndexIVF)


def _code_table(index: Any) -> Any:
    """The faiss vector that decodes codes: "pq" sub-centroids, "sq" range of each dimension; empty for float16."""
    return index.pq.centroids if hasattr(index, "pq") else index.sq.trained


def _allocate_codes(index: Any, count: int) -> None:
    """Allocates the memory of all codes at once: growing it would need twice as much for a moment."""
    index.codes.resize(count * index.code_size)
    index.ntotal = count


def _codes_view(index: Any) -> UInt8[np.ndarray, "p c"]:
    """Returns all codes as a view of faiss's memory, valid as long as the index lives."""
    return faiss.rev_swig_ptr(index.codes.data(), index.codes.size()).reshape(-1, index.code_size)


def _list_view(index: Any, i: int, size: int) -> tuple[Int64[np.ndarray, " m"], UInt8[np.ndarray, "m c"]]:
    """Returns the passage numbers and the codes of inverted list `i`, as views of faiss's memory."""
    if size == 0:
        return np.empty(0, np.int64), np.empty((0, index.code_size), np.uint8)
    numbers = faiss.rev_swig_ptr(index.invlists.get_ids(i), size)
    codes = faiss.rev_swig_ptr(index.invlists.get_codes(i), size * index.code_size)
    return numbers, codes.reshape(size, index.code_size)


def _consecutive_slices(sizes: Iterable[int]) -> Iterator[slice]:
    """Yields slices of these sizes, each starting where the one before it ends."""
    ends = itertools.accumulate(sizes, initial=0)
    return itertools.starmap(slice, itertools.pairwise(ends))


def _check_lists(folder: Path, sizes: Int32[np.ndarray, " n"], numbers: Int32[np.ndarray, " p"]) -> None:
    """UserError unless the sizes add up to the number of passages and each passage number occurs once."""
    count = len(numbers)
    if sizes.min() < 0 or sizes.sum(dtype=np.int64) != count:
        raise UserError(f"{folder}/list_sizes.npy: not the sizes of {len(sizes)} lists of {count} passages; {REBUILD}")
    seen = np.zeros(count, bool)
    seen[numbers[(numbers >= 0) & (numbers < count)]] = True
    if not seen.all():
        raise UserError(f"{folder}/numbers.npy: does not name each of {count} passages once; {REBUILD}")
