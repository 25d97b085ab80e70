"""Flat search equals brute force on any mesh."""

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from atlas_jax.errors import UserError
from atlas_jax.mesh import replicate
from atlas_jax.retrieval import flat_index
from atlas_jax.retrieval.flat_index import FlatIndex


def mesh_of(*shape: int) -> Mesh:
    """A mesh of this shape, of the first devices."""
    devices = np.array(jax.devices()[: np.prod(shape)])
    return Mesh(devices.reshape(shape), ("data", "fsdp", "model")[: len(shape)])


def brute_force(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores in float64 and passage numbers of the k best passages of each query."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    numbers = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, numbers, axis=1), numbers


def normal(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    """Standard normal float16 vectors."""
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float16)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 300),
    fraction=st.floats(0, 1),
    q=st.integers(1, 9),
    dim=st.integers(1, 16),
    devices=st.sampled_from([1, 2, 3, 8]),
    chunk=st.sampled_from([8, 64, flat_index.CHUNK_ROWS]),
)
@example(seed=0, count=300, fraction=1.0, q=2, dim=1, devices=8, chunk=8)  # k is larger than the rows of a device
@example(seed=0, count=2, fraction=1.0, q=1, dim=3, devices=8, chunk=8)  # some devices hold padding only
def test_search_equals_brute_force_with_ties_by_the_smaller_number(seed, count, fraction, q, dim, devices, chunk):
    """Scores and numbers are equal for any shapes and mesh; small integers give exact sums and many ties."""
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-2, 3, (count, dim)).astype(np.float16)
    queries = rng.integers(-2, 3, (q, dim)).astype(np.float32)
    k = max(1, round(fraction * count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat_index, "CHUNK_ROWS", chunk)
        found = FlatIndex.from_array(vectors, mesh_of(devices)).search(queries, k)
    scores, numbers = brute_force(vectors, queries, k)
    np.testing.assert_array_equal(found.numbers, numbers)
    np.testing.assert_array_equal(found.scores, scores)
    assert found.scores.dtype == np.float32
    assert found.numbers.dtype == np.int64


def test_zeros_of_both_signs_are_a_tie():
    """A product with -0 is -0, which top_k alone would sort after 0."""
    vectors = np.array([[-0.0], [0.0], [-0.0], [0.0]], np.float16)
    found = FlatIndex.from_array(vectors, mesh_of(1)).search(np.ones((1, 1), np.float32), 4)
    np.testing.assert_array_equal(found.numbers, [[0, 1, 2, 3]])


def test_scores_are_float32_sums_of_the_float16_vectors():
    """Normal vectors: the order of float64 and its scores within 1e-5, which float16 sums would miss."""
    vectors, queries = normal(3000, 256), normal(5, 256, seed=1).astype(np.float32)
    found = FlatIndex.from_array(vectors, mesh_of(4)).search(queries, 50)
    scores, numbers = brute_force(vectors, queries, 50)
    np.testing.assert_array_equal(found.numbers, numbers)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)
    half = (queries.astype(np.float16) @ vectors.T).astype(np.float32)
    assert not np.allclose(np.take_along_axis(half, numbers, axis=1), scores, rtol=1e-5)


def test_results_are_bit_identical_on_every_mesh(monkeypatch):
    """Passages that occur twice have equal scores, whichever device holds each copy."""
    monkeypatch.setattr(flat_index, "CHUNK_ROWS", 256)
    vectors, queries = normal(2001, 96), normal(3, 96, seed=1).astype(np.float32)
    vectors[1001:] = vectors[:1000]
    one_device = FlatIndex.from_array(vectors, mesh_of(1)).search(queries, 100)
    np.testing.assert_array_equal(one_device.numbers[:, 0::2] + 1001, one_device.numbers[:, 1::2])
    for shape in [(3,), (8,), (2, 3), (2, 2, 2)]:
        sharded = FlatIndex.from_array(vectors, mesh_of(*shape)).search(queries, 100)
        np.testing.assert_array_equal(sharded.numbers, one_device.numbers)
        np.testing.assert_array_equal(sharded.scores, one_device.scores)


def test_a_device_holds_its_own_rows_only(tmp_path):
    """Rows of a memory map are sharded, with padding of less than a row per device (or up to one chunk)."""
    np.save(tmp_path / "vectors.npy", normal(20_001, 8))
    vectors = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    index = FlatIndex.from_array(vectors, mesh_of(2))
    assert [shard.data.shape for shard in index.rows.addressable_shards] == [(10_001, 8)] * 2
    assert index.rows.dtype == np.float16
    assert FlatIndex.from_array(vectors[:40], mesh_of(2)).rows.shape == (2 * 64, 8)
    scores, numbers = brute_force(vectors, vectors[:3].astype(np.float32), 7)
    found = index.search(np.asarray(vectors[:3], np.float32), 7)
    np.testing.assert_array_equal(found.numbers, numbers)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)


def test_query_counts_share_compiled_programs():
    """5 to 8 queries run the program compiled for 8; counter-case: 9. No queries give an empty result."""
    index = FlatIndex.from_array(normal(40, 4), mesh_of(2))
    queries = normal(9, 4, seed=1).astype(np.float32)
    index.search(queries[:8], 3)
    programs = flat_index.best_rows._cache_size()
    for q in (5, 6, 7):
        np.testing.assert_array_equal(index.search(queries[:q], 3).numbers, index.search(queries[:8], 3).numbers[:q])
    assert flat_index.best_rows._cache_size() == programs
    index.search(queries, 3)
    assert flat_index.best_rows._cache_size() == programs + 1
    assert index.search(queries[:0], 3).numbers.shape == (0, 3)


def test_begin_search_ignores_rows_beyond_the_count():
    """Replicated queries followed by NaN rows give the results of `search`; counter-case: a count of one more."""
    mesh = mesh_of(2, 2)
    index = FlatIndex.from_array(normal(300, 8), mesh)
    queries = normal(6, 8, seed=1).astype(np.float32)
    queries[4:] = np.nan
    expected = index.search(queries[:4], 20)
    found = index.begin_search(replicate(mesh, queries), 4, 20)()
    np.testing.assert_array_equal(found.numbers, expected.numbers)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)
    with pytest.raises(UserError, match="not finite"):
        index.begin_search(replicate(mesh, queries), 5, 20)()


def test_search_accepts_bfloat16_queries_on_a_device():
    """bfloat16 queries on a device find the passages that their float32 copy on the host finds."""
    index, queries = FlatIndex.from_array(normal(40, 4), mesh_of(2)), jax.numpy.asarray(normal(3, 4)).astype("bfloat16")
    found = index.search(queries, 3)
    np.testing.assert_array_equal(found.numbers, index.search(np.asarray(queries, np.float32), 3).numbers)


@pytest.mark.parametrize("count", [1, 7, 300])
def test_one_file_loads_on_every_mesh(tmp_path, count):
    """Scores and numbers equal those of the index made from the array in memory."""
    vectors, queries = normal(count, 16), normal(3, 16, seed=1).astype(np.float32)
    index = FlatIndex.from_array(vectors, mesh_of(3))
    np.save(tmp_path / "embeddings.npy", vectors)
    for shape in [(1,), (2, 4)]:
        loaded = FlatIndex.load(tmp_path, {"count": count, "dim": 16}, mesh_of(*shape))
        for loaded_array, array in zip(loaded.search(queries, count), index.search(queries, count), strict=True):
            np.testing.assert_array_equal(loaded_array, array)


def test_impossible_searches_are_refused():
    """UserError for each; the message names the values."""
    index = FlatIndex.from_array(normal(10, 4), mesh_of(2))
    with pytest.raises(UserError, match="11 passages asked for but the index holds 10"):
        index.search(np.zeros((1, 4), np.float32), 11)
    with pytest.raises(UserError, match="0 passages asked for"):
        index.search(np.zeros((1, 4), np.float32), 0)
    with pytest.raises(UserError, match="queries are 5 wide but the index holds vectors of 4"):
        index.search(np.zeros((1, 5), np.float32), 1)
    with pytest.raises(UserError, match="not finite"):
        index.search(np.full((1, 4), np.nan, np.float32), 1)
    with pytest.raises(UserError, match="an index of 0 passages"):
        FlatIndex.from_array(np.zeros((0, 4), np.float16), mesh_of(2))


def test_a_damaged_file_is_refused(tmp_path):
    """Truncated, of another shape or dtype, pickled or missing: UserError, and nothing is unpickled."""
    metadata, file = {"count": 10, "dim": 4}, tmp_path / "embeddings.npy"
    np.save(file, normal(10, 4))
    whole = file.read_bytes()
    damages = [
        lambda: file.write_bytes(whole[:-1]),
        lambda: file.write_bytes(whole[:50]),
        lambda: file.write_bytes(b""),
        lambda: file.write_bytes(whole.replace(b"(10, 4)", b"(-1, 4)")),
        lambda: np.save(file, normal(10, 5)),
        lambda: np.save(file, normal(10, 4).astype(np.float32)),
        lambda: np.save(file, np.array([[{}]]), allow_pickle=True),
        lambda: file.unlink(),
    ]
    for damage in damages:
        damage()
        with pytest.raises(UserError, match=r"embeddings\.npy: .* build it again"):
            FlatIndex.load(tmp_path, metadata, mesh_of(1))
    file.write_bytes(whole)
    assert FlatIndex.load(tmp_path, metadata, mesh_of(1)).count == 10
