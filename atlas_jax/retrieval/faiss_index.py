"""Search on the host with faiss: vectors in fewer bytes, or in clusters of which a query reads the nearest."""

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

PQ_CENTROIDS = 256  # for each of the `code_size` parts of a vector: one byte names one
TRAINING_ROWS_PER_CENTROID = 256  # of more, faiss's k-means would itself take a sample
TRAINING_BYTES = 2**31  # of the sample in float32, at most; for 37 million passages still a hundred a centroid
CODE_TABLE_ROWS = {"flat": 0, "ivfflat": 0, "ivfsq": 2, "ivfpq": PQ_CENTROIDS, "pq": PQ_CENTROIDS}  # of `dim` numbers
CHUNK_ROWS = 16_384  # vectors in float32 at once


class FaissIndex(HostIndex):
    """A code for each passage: its float16 vector ("flat"), 4 bits a dimension ("sq") or `code_size` bytes ("pq").

    The "ivf" kinds keep a code in the list of its nearest centroid, and a query reads its `n_probe` nearest lists.
    Equal scores are ordered by the smaller number, but faiss chooses which of them fill the last places.
    """

    def __init__(self, kind: FaissKind, code_size: int | None, index: Any):
        super().__init__()
        self.kind: str = kind
        self.code_size = code_size
        self.count: int = index.ntotal
        self.dim: int = index.d
        self.n_list: int = index.nlist if _is_ivf(index) else 1
        self.n_probe = self.n_list  # Reference: both are floor(sqrt(p)), so every list is read
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
        """Train on a sample, then encode every vector; `progress` is told how many more are in."""
        count, dim = embeddings.shape
        index = _empty_index(kind, count, dim, code_size)
        _train(index, embeddings, seed)
        _fill(index, embeddings, progress or (lambda added: None))
        return cls(kind, code_size, index)

    def search(self, queries: Float[np.ndarray | Array, "q d"], k: int) -> SearchResult:
        """A query whose nearest lists hold fewer than k passages reads them all."""
        queries = checked_queries(self, queries, k)
        scores, numbers = self._search(queries, k, self.n_probe)
        short = (numbers < 0).any(axis=1)  # faiss fills up with -1
        if short.any():
            scores[short], numbers[short] = self._search(queries[short], k, self.n_list)
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
        """codes.npy, a row a passage; what training found; for "ivf" how long the lists are and who is in them."""
        index, count = self._index, self.count
        np.save(folder / "code_table.npy", faiss.vector_to_array(_code_table(index)))
        if _is_ivf(index):
            np.save(folder / "centroids.npy", faiss.downcast_index(index.quantizer).reconstruct_n(0, self.n_list))
            sizes = [index.invlists.list_size(i) for i in range(self.n_list)]
            np.save(folder / "list_sizes.npy", np.array(sizes, np.int32))
            numbers = create_array(folder / "numbers.npy", np.int32, (count,))
            codes = create_array(folder / "codes.npy", np.uint8, (count, index.code_size))
            for i, rows in enumerate(_slices(sizes)):
                numbers[rows], codes[rows] = _list_in_place(index, i, sizes[i])
            numbers.flush()
            codes.flush()
        else:
            np.save(folder / "codes.npy", _codes_in_place(index))
        meta = {"kind": self.kind, "count": count, "dim": self.dim, "code_size": self.code_size}
        return {"index_mode": "faiss", **meta}

    @classmethod
    def load(cls, folder: Path, meta: Mapping[str, Any], part: slice = slice(None)) -> "FaissIndex":
        """The index that was saved, from `save`'s metadata; nothing is trained again and no vectors are needed.

        Or of its passages only the `part`, as if there were no others, with their numbers counted from its start.
        """
        kind, count, code_size = meta["kind"], meta["count"], meta["code_size"]
        index, arrays = _empty_index(kind, count, meta["dim"], code_size), map_arrays(folder, meta)
        faiss.copy_array_to_vector(np.array(arrays["code_table"]), _code_table(index))
        start, stop, _ = part.indices(count)
        if _is_ivf(index):
            index.quantizer.add(np.array(arrays["centroids"]))
            _check_lists(folder, arrays["list_sizes"], arrays["numbers"])
            for i, rows in enumerate(_slices(arrays["list_sizes"].tolist())):
                members = arrays["numbers"][rows].astype(np.int64)
                own = (members >= start) & (members < stop)
                members, content = members[own] - start, np.array(arrays["codes"][rows][own])
                index.invlists.add_entries(i, len(members), faiss.swig_ptr(members), faiss.swig_ptr(content))
            index.ntotal = stop - start
        else:
            _make_room(index, stop - start)
            _codes_in_place(index)[:] = arrays["codes"][part]
        index.is_trained = True
        return cls(kind, code_size, index)


def map_arrays(folder: Path, meta: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The files that `save` wrote, by name and memory-mapped; one that is missing or not whole is a `UserError`."""
    kind, count, dim = meta["kind"], meta["count"], meta["dim"]
    if kind not in CODE_TABLE_ROWS:
        raise UserError(f"{folder}: kind {kind!r:.40}, this program knows {', '.join(CODE_TABLE_ROWS)}; {REBUILD}")
    index = _empty_index(kind, count, dim, meta["code_size"])
    files: dict[str, tuple[type[Any], tuple[int, ...]]] = {
        "codes": (np.uint8, (count, index.code_size)),
        "code_table": (np.float32, (CODE_TABLE_ROWS[kind] * dim,)),
    }
    if _is_ivf(index):
        files |= {"centroids": (np.float32, (index.nlist, dim)), "list_sizes": (np.int32, (index.nlist,))}
        files |= {"numbers": (np.int32, (count,))}
    return {name: read_array(folder / f"{name}.npy", dtype, shape) for name, (dtype, shape) in files.items()}


def _empty_index(kind: FaissKind, count: int, dim: int, code_size: int | None) -> Any:
    """A faiss index that is not trained yet, once it is known that it can be."""
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
            f"a {kind!r} index learns {PQ_CENTROIDS} centroids and there are only {count} passages: "
            "use --index_mode flat"
        )
    if kind == "pq":
        return faiss.IndexPQ(dim, code_size, 8, metric)
    return faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, n_list, code_size, 8, metric)


def _train(index: Any, embeddings: Float16[np.ndarray, "p d"], seed: int) -> None:
    """Learn centroids and code table from a sample, whose size depends on how many there are to learn."""
    count, wanted = len(embeddings), TRAINING_ROWS_PER_CENTROID * max(PQ_CENTROIDS, getattr(index, "nlist", 0))
    sample = min(wanted, TRAINING_BYTES // (4 * index.d))
    rows = np.arange(count)
    if count > sample:  # sorted: a memory map is read forward
        rows = np.sort(np.random.default_rng(seed).choice(count, sample, replace=False, shuffle=False))
    k_means = ([index.cp] if _is_ivf(index) else []) + ([index.pq.cp] if hasattr(index, "pq") else [])
    for clustering in k_means:
        clustering.seed = seed
        clustering.min_points_per_centroid = 1  # faiss would warn of fewer than 39, of which nothing follows
    logger.info("faiss: training on %d of %d vectors", len(rows), count)
    vectors = _float32_rows(embeddings, rows)
    if _is_ivf(index):
        clusters = _on_gpu(faiss.IndexFlatIP(index.d))
        index.clustering_index = clusters
        index.train(vectors)
        index.clustering_index = None  # `clusters` ends with this function
    else:
        index.train(vectors)


def _fill(index: Any, embeddings: Float16[np.ndarray, "p d"], progress: Callable[[int], object]) -> None:
    """Encode every vector, a chunk at a time; "ivf" appends each code to the list of its nearest centroid."""
    if _is_ivf(index):
        centroids = _on_gpu(faiss.downcast_index(index.quantizer))
    else:
        _make_room(index, len(embeddings))
    for start in range(0, len(embeddings), CHUNK_ROWS):
        rows = np.arange(start, min(start + CHUNK_ROWS, len(embeddings)))
        vectors = _float32_rows(embeddings, rows)
        if _is_ivf(index):
            _, nearest = centroids.search(vectors, 1)
            index.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(nearest))
        else:
            _codes_in_place(index)[rows] = index.sa_encode(vectors)
        progress(len(vectors))


def _on_gpu(index: Any) -> Any:
    """The index copied to the first GPU if faiss was built for one and there is one (which no test of ours has)."""
    if not hasattr(faiss, "index_cpu_to_gpu") or faiss.get_num_gpus() == 0:
        return index
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)


def _float32_rows(embeddings: Float16[np.ndarray, "p d"], rows: Int64[np.ndarray, " r"]) -> Float32[np.ndarray, "r d"]:
    """These rows as faiss takes them; beyond them, only a chunk is in memory."""
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
    """Whether codes are kept in lists, one a centroid."""
    return isinstance(index, faiss.IndexIVF)


def _code_table(index: Any) -> Any:
    """The faiss vector of what codes stand for: sub-centroids, or the range of each dimension; float16 needs none."""
    return index.pq.centroids if hasattr(index, "pq") else index.sq.trained


def _make_room(index: Any, count: int) -> None:
    """Space for all codes at once: growing would hold them twice."""
    index.codes.resize(count * index.code_size)
    index.ntotal = count


def _codes_in_place(index: Any) -> UInt8[np.ndarray, "p c"]:
    """A view of faiss's own memory, valid as long as the index."""
    return faiss.rev_swig_ptr(index.codes.data(), index.codes.size()).reshape(-1, index.code_size)


def _list_in_place(index: Any, i: int, size: int) -> tuple[Int64[np.ndarray, " m"], UInt8[np.ndarray, "m c"]]:
    """Whose codes list `i` holds, and the codes: views of faiss's own memory."""
    if size == 0:
        return np.empty(0, np.int64), np.empty((0, index.code_size), np.uint8)
    numbers = faiss.rev_swig_ptr(index.invlists.get_ids(i), size)
    codes = faiss.rev_swig_ptr(index.invlists.get_codes(i), size * index.code_size)
    return numbers, codes.reshape(size, index.code_size)


def _slices(sizes: Iterable[int]) -> Iterator[slice]:
    """Pieces of these sizes, end to end."""
    ends = itertools.accumulate(sizes, initial=0)
    return itertools.starmap(slice, itertools.pairwise(ends))


def _check_lists(folder: Path, sizes: Int32[np.ndarray, " n"], numbers: Int32[np.ndarray, " p"]) -> None:
    """The lists must be as many as there are passages, with each passage in one of them."""
    count = len(numbers)
    if sizes.min() < 0 or sizes.sum(dtype=np.int64) != count:
        raise UserError(f"{folder}/list_sizes.npy: not the sizes of {len(sizes)} lists of {count} passages; {REBUILD}")
    seen = np.zeros(count, bool)
    seen[numbers[(numbers >= 0) & (numbers < count)]] = True
    if not seen.all():
        raise UserError(f"{folder}/numbers.npy: does not name each of {count} passages once; {REBUILD}")
