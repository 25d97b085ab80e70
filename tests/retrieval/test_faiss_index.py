"""Faiss indexes: recall and size of each kind, saving and loading, and what is refused."""

import functools
from collections.abc import Callable

import faiss
import numpy as np
import pytest

from atlas_jax.errors import UserError
from atlas_jax.retrieval import faiss_index
from atlas_jax.retrieval.faiss_index import FaissIndex

COUNT, DIM, K = 3000, 32, 10
KINDS = [("flat", None), ("ivfflat", None), ("ivfsq", None), ("ivfpq", 8), ("pq", 8)]
Build = Callable[..., FaissIndex]


pytestmark = pytest.mark.usefixtures("one_faiss_thread")


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Passage vectors in 60 clusters."""
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((60, DIM))
    return (topics[rng.integers(0, 60, COUNT)] + 0.4 * rng.standard_normal((COUNT, DIM))).astype(np.float16)


@pytest.fixture(scope="module")
def queries(vectors) -> np.ndarray:
    """Query vectors, each near a passage."""
    rng = np.random.default_rng(1)
    return vectors[rng.choice(COUNT, 50)].astype(np.float32) + 0.2 * rng.standard_normal((50, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def exact_numbers(vectors, queries) -> np.ndarray:
    """Numbers of the K best passages of each query, by exact search in float64."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    return np.argsort(-scores, axis=1, kind="stable")[:, :K]


@pytest.fixture(scope="module")
def build(vectors) -> Build:
    """Function (kind, code_size) -> index of `vectors`, cached; a test that changes an index builds its own."""
    return functools.cache(functools.partial(FaissIndex.build, vectors))


def recall(index: FaissIndex, queries: np.ndarray, exact_numbers: np.ndarray) -> float:
    """Mean share of the exact best passages among as many results of the index."""
    found = index.search(queries, exact_numbers.shape[1]).numbers
    return float(np.mean([np.isin(row, best).mean() for row, best in zip(found, exact_numbers, strict=True)]))


@pytest.mark.parametrize(("kind", "code_size"), KINDS)
def test_build_equals_plain_faiss(vectors, queries, build, kind, code_size):
    """`build` gives the index that faiss itself trains and fills from all vectors in float32."""
    recipes = {"flat": "SQfp16", "ivfflat": "IVF54,Flat", "ivfsq": "IVF54,SQ4", "ivfpq": "IVF54,PQ8np", "pq": "PQ8np"}
    plain = faiss.index_factory(DIM, recipes[kind], faiss.METRIC_INNER_PRODUCT)
    for part in (plain, getattr(plain, "pq", None)):
        if hasattr(part, "cp"):
            part.cp.seed, part.cp.min_points_per_centroid = 0, 1
    plain.train(vectors.astype(np.float32))
    plain.add(vectors.astype(np.float32))
    if "ivf" in kind:
        plain.nprobe = 54
    scores, numbers = plain.search(queries, K)
    found = build(kind, code_size).search(queries, K)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)
    assert (found.numbers == numbers).mean() > 0.98  # the rest are ties


def test_a_gpu_searches_the_centroids(vectors, queries, build, monkeypatch):
    """Centroids are copied to the GPU (here a fake: faiss-cpu has none) for training and for filling; same index."""
    copied = []

    def index_cpu_to_gpu(resources: object, device: int, index: faiss.Index) -> faiss.Index:
        copied.append((device, index.ntotal))
        return faiss.clone_index(index)

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", index_cpu_to_gpu, raising=False)
    found = FaissIndex.build(vectors, "ivfpq", 8).search(queries, K)
    assert copied == [(0, 0), (0, 54)]
    np.testing.assert_array_equal(found.numbers, build("ivfpq", 8).search(queries, K).numbers)


def test_kinds_that_keep_the_vectors_are_exact(vectors, queries, exact_numbers, build):
    """ "flat", and "ivfflat" while it scans every list, as the reference does; with one list it is not exact."""
    for kind in ("flat", "ivfflat"):
        found = build(kind, None).search(queries, K)
        np.testing.assert_array_equal(found.numbers, exact_numbers)
        scores = np.einsum("qd,qkd->qk", queries, vectors[exact_numbers].astype(np.float32))
        np.testing.assert_allclose(found.scores, scores, rtol=1e-5)
    index = FaissIndex.build(vectors, "ivfflat")
    assert index.n_probe == index.n_list == 54  # floor(sqrt(3000))
    index.n_probe = 1
    assert 0.3 < recall(index, queries, exact_numbers) < 0.95


def test_recall_falls_with_code_size(queries, exact_numbers, build):
    """Recall@10, from 16 bytes per passage to 1; at equal code size inverted lists have the higher recall."""
    ivfsq, ivfpq, pq, tiny = (
        recall(build(*kind), queries, exact_numbers) for kind in [("ivfsq", None), ("ivfpq", 8), ("pq", 8), ("pq", 1)]
    )
    assert 1 > ivfsq > ivfpq > pq > tiny + 0.1
    assert ivfsq > 0.8
    assert pq > 0.5


@pytest.mark.parametrize(("kind", "code_size"), KINDS)
def test_a_loaded_index_equals_the_saved_one(vectors, queries, kind, code_size, tmp_path):
    """Bit-identical results, also with one list per query; loading needs the saved arrays only, not the vectors."""
    index = FaissIndex.build(vectors, kind, code_size)
    meta = index.save(tmp_path)
    assert meta == {"index_mode": "faiss", "kind": kind, "count": COUNT, "dim": DIM, "code_size": code_size}
    loaded = FaissIndex.load(tmp_path, meta)
    assert (loaded.kind, loaded.count, loaded.dim, loaded.n_probe) == (kind, COUNT, DIM, index.n_probe)
    for n_probe in {index.n_list, 1}:
        index.n_probe = loaded.n_probe = n_probe
        for loaded_array, saved_array in zip(loaded.search(queries, K), index.search(queries, K), strict=True):
            np.testing.assert_array_equal(loaded_array, saved_array)


@pytest.mark.parametrize(("kind", "code_size"), KINDS)
def test_size_on_disk_is_codes_lists_and_tables(vectors, build, kind, code_size, tmp_path):
    """Bytes without .npy headers: codes, for "ivf" 4 more per passage for its number, and the trained tables."""
    build(kind, code_size).save(tmp_path)
    row = {"flat": 2 * DIM, "ivfflat": 2 * DIM + 4, "ivfsq": DIM // 2 + 4, "ivfpq": 8 + 4, "pq": 8}[kind]
    table = {"ivfsq": 2 * DIM, "ivfpq": 256 * DIM, "pq": 256 * DIM}.get(kind, 0)
    lists = 54 * (DIM + 1) if "ivf" in kind else 0
    files = list(tmp_path.iterdir())
    assert sum(file.stat().st_size - 128 for file in files) == COUNT * row + 4 * (table + lists)
    if kind == "flat":
        assert sum(file.stat().st_size for file in files) < 1.01 * vectors.nbytes


@pytest.mark.parametrize(("kind", "code_size"), KINDS)
def test_equal_seeds_write_equal_files(vectors, kind, code_size, tmp_path, monkeypatch):
    """Chunk size and number of threads do not change the files; another seed does, if anything is trained."""
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    monkeypatch.setattr(faiss_index, "TRAINING_ROWS_PER_CENTROID", 2)  # so that training draws a sample
    written = []
    for chunk, rows, threads, seed in [(16_384, vectors, 1, 0), (1000, mapped, 2, 0), (16_384, vectors, 1, 1)]:
        monkeypatch.setattr(faiss_index, "CHUNK_ROWS", chunk)
        faiss.omp_set_num_threads(threads)
        folder = tmp_path / f"{len(written)}"
        folder.mkdir()
        added: list[int] = []
        FaissIndex.build(rows, kind, code_size, seed, progress=added.append).save(folder)
        assert added == ([1000] * 3 if chunk == 1000 else [COUNT])
        written.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert written[0] == written[1]
    assert (written[0] == written[2]) == (kind == "flat")


def test_the_training_sample_is_bounded(vectors, monkeypatch):
    """At most TRAINING_BYTES of float32, however many vectors there are; all vectors if they are few."""
    sizes = []

    def record_size(embeddings, rows):
        sizes.append(len(rows))
        return float32_rows(embeddings, rows)

    float32_rows = faiss_index._float32_rows
    monkeypatch.setattr(faiss_index, "_float32_rows", record_size)
    FaissIndex.build(vectors, "ivfsq")
    monkeypatch.setattr(faiss_index, "TRAINING_BYTES", 4 * DIM * 500)
    FaissIndex.build(vectors, "ivfsq")
    assert sizes[::2] == [COUNT, 500]
    assert sizes[1::2] == [COUNT, COUNT]  # filled with all of them


def test_equal_scores_are_ordered_by_number(vectors):
    """Ties are ordered by the smaller passage number, whichever inverted list holds them."""
    index = FaissIndex.build(np.concatenate([vectors[:100]] * 7), "ivfflat")
    found = index.search(vectors[:20].astype(np.float32), 70)
    drop = np.diff(found.scores) < 0
    assert (drop | (np.diff(found.numbers) > 0)).all()
    assert (~drop).mean() > 0.8


def test_a_query_with_too_few_results_scans_all_lists(vectors, queries, exact_numbers):
    """-1 is never returned as a passage number; queries with enough results scan their nearest lists only."""
    index = FaissIndex.build(vectors, "ivfflat")
    all_lists = index.search(queries, 60)
    index.n_probe = 1
    sizes = [index._index.invlists.list_size(i) for i in range(index.n_list)]
    assert min(sizes) < 60 < max(sizes)
    found = index.search(queries, 60)
    assert found.numbers.min() >= 0
    widened = (found.numbers == all_lists.numbers).all(axis=1)
    assert 0 < widened.sum() < len(queries)


def test_empty_lists_are_kept(tmp_path, capfd):
    """Equal vectors leave most inverted lists empty; the index can be saved and loaded, and faiss logs no warning."""
    index = FaissIndex.build(np.ones((50, 4), np.float16), "ivfflat")
    loaded = FaissIndex.load(tmp_path, index.save(tmp_path))
    assert 0 in np.load(tmp_path / "list_sizes.npy")
    np.testing.assert_array_equal(loaded.search(np.ones((1, 4), np.float32), 50).numbers, [range(50)])
    assert not capfd.readouterr().err
    single = FaissIndex.build(np.ones((1, 4), np.float16), "ivfsq")
    assert single.search(np.ones((1, 4), np.float32), 1).numbers == 0


def test_impossible_builds_and_searches_are_refused(vectors):
    """UserError for each; the message names the values and a remedy."""
    for kind in ("pq", "ivfpq"):
        with pytest.raises(UserError, match="pq: learns 256 centroids, and there are only 255 passages; take flat"):
            FaissIndex.build(vectors[:255], kind, 8)
        for code_size in (None, 0, -8, 7, 64):
            with pytest.raises(UserError, match=f"--faiss_code_size {code_size}: .* divisor of the vectors' width, 32"):
                FaissIndex.build(vectors, kind, code_size)
    assert FaissIndex.build(vectors[:256], "pq", 8).count == 256
    with pytest.raises(UserError, match="an index of 0 passages"):
        FaissIndex.build(vectors[:0], "flat")
    with pytest.raises(UserError, match="passage vector is not finite"):
        FaissIndex.build(np.full((9, 4), np.inf, np.float16), "flat")
    for kind, code_size in KINDS:
        index = FaissIndex.build(vectors[:300], kind, code_size)
        with pytest.raises(UserError, match="301 passages asked for but the index holds 300"):
            index.search(np.zeros((1, DIM), np.float32), 301)
        with pytest.raises(UserError, match="queries are 31 wide but the index holds vectors of 32"):
            index.search(np.zeros((1, DIM - 1), np.float32), 1)
        with pytest.raises(UserError, match="search score is not finite"):
            index.search(np.full((1, DIM), np.nan, np.float32), 1)


def test_damaged_files_are_refused(build, tmp_path):
    """Arrays are checked against each other before faiss gets a pointer to them; the message names the file."""
    meta = build("ivfpq", 8).save(tmp_path)
    whole = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(whole) == 5
    for file, content in whole.items():
        for damage in (content[:-1], content[:40], b""):
            file.write_bytes(damage)
            with pytest.raises(UserError, match=file.name):
                FaissIndex.load(tmp_path, meta)
        file.write_bytes(content)
    for name, change in [
        ("numbers", lambda numbers: np.where(numbers == 7, 8, numbers)),
        ("numbers", lambda numbers: np.where(numbers == 7, -1, numbers)),
        ("numbers", lambda numbers: np.where(numbers == 7, COUNT, numbers)),
        ("list_sizes", lambda sizes: sizes + (np.arange(len(sizes)) == 0).astype(np.int32)),
        ("list_sizes", lambda sizes: np.concatenate([[-1, sizes[0] + sizes[1] + 1], sizes[2:]]).astype(np.int32)),
        ("codes", lambda codes: codes[:, :-1]),
        ("codes", lambda codes: codes.astype(np.int8)),
        ("centroids", lambda centroids: centroids[:-1]),
    ]:
        file = tmp_path / f"{name}.npy"
        np.save(file, change(np.load(file)))
        with pytest.raises(UserError, match=file.name):
            FaissIndex.load(tmp_path, meta)
        file.write_bytes(whole[file])
    assert FaissIndex.load(tmp_path, meta).count == COUNT
