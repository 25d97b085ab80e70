"""Conversion of published shards and merging: nothing is changed, and memory does not grow with the index."""

import errno
import itertools
import json
import os
import pickle
import tracemalloc

import numpy as np
import pytest

from atlas_jax.errors import UserError
from atlas_jax.retrieval.formats import convert as module
from atlas_jax.retrieval.formats.convert import FlatIndexFolder, convert, write_vectors
from atlas_jax.retrieval.formats.index_folder import Origin, read_metadata, read_vectors
from atlas_jax.retrieval.formats.merge import MergedIndexes
from atlas_jax.retrieval.formats.npy_files import VectorFile, create_array, read_array
from atlas_jax.retrieval.formats.torch_shards import TorchShards, split_range, transpose
from atlas_jax.storage.mapped_file import release_pages
from tests.checkpoints.formats import pickles

DIM = 24


def write_shards(folder, *counts, seed=0, dtype=np.float16):
    """Writes published shards of random vectors, with `counts` passages each; returns the vectors "p d"."""
    folder.mkdir()
    vectors = np.random.default_rng(seed).standard_normal((sum(counts), DIM)).astype(dtype)
    for n, (count, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
        pickles.save(folder / f"embeddings.{n}.pt", vectors[end - count : end].T)
        rows = [{"id": str(i), "title": "", "section": "", "text": f"t {i}"} for i in range(end - count, end)]
        (folder / f"passages.{n}.pt").write_bytes(pickle.dumps(rows))
    return vectors


@pytest.fixture
def small_chunks(monkeypatch):
    """Sets a chunk size that divides no shard."""
    monkeypatch.setattr(module, "CHUNK_ROWS", 37)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (DIM, 256), (DIM, 255), (DIM, 257), (768, 1000)])
def test_transpose_equals_numpy(shape):
    """Bit for bit, from any strides, NaN and -0 included; float32 is rounded as by NumPy; only `out` is written."""
    source = np.random.default_rng(0).integers(0, 2**16, shape, np.uint16).view(np.float16)
    wide = np.repeat(source, 2, axis=1)[:, ::2]
    for view in (source, np.asfortranarray(source), wide, np.nan_to_num(source).astype(np.float32) * 1.0001):
        out = np.full((shape[1] + 1, shape[0]), 7, np.float16)
        transpose(view, out[:-1])
        np.testing.assert_array_equal(out[:-1].view(np.uint16), view.astype(np.float16).T.copy().view(np.uint16))
        assert (out[-1] == 7).all()


@pytest.mark.parametrize("counts", [(500,), (1, 499), (200, 0, 100, 200), (125, 125, 125, 125)])
def test_any_number_of_shards_gives_the_same_index(tmp_path, small_chunks, counts):
    """Vectors bit for bit and passages in order, whether or not chunks end where shards do."""
    vectors = write_shards(tmp_path / "shards", *counts)
    convert(TorchShards(tmp_path / "shards"), tmp_path / "ours", Origin())
    found = FlatIndexFolder(tmp_path / "ours")
    np.testing.assert_array_equal(found.read(0, 500), vectors)
    np.testing.assert_array_equal(found.read(123, 456), vectors[123:456])
    assert [row["text"] for row in found.store.take(range(500))] == [f"t {i}" for i in range(500)]
    metadata = read_metadata(tmp_path / "ours")
    assert (metadata["count"], metadata["dim"], metadata["retriever"]) == (500, DIM, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "shards"]


@pytest.mark.parametrize("hosts", [1, 2, 3, 7])
def test_hosts_memory_map_their_own_rows(tmp_path, hosts):
    """The memory-mapped slices of any number of hosts add up to all vectors."""
    vectors = write_shards(tmp_path / "shards", 300, 200)
    convert(TorchShards(tmp_path / "shards"), tmp_path / "ours", Origin())
    metadata = read_metadata(tmp_path / "ours")
    bounds = [500 * host // hosts for host in range(hosts + 1)]
    slices = [read_vectors(tmp_path / "ours", metadata)[a:b] for a, b in itertools.pairwise(bounds)]
    np.testing.assert_array_equal(np.concatenate(slices), vectors)
    assert all(isinstance(rows, np.memmap) for rows in slices)


def test_float32_shards_convert_to_float16(tmp_path):
    """Vectors of float32 shards are rounded to float16 as numpy does."""
    vectors = write_shards(tmp_path / "shards", 40, dtype=np.float32)
    convert(TorchShards(tmp_path / "shards"), tmp_path / "ours", Origin())
    np.testing.assert_array_equal(FlatIndexFolder(tmp_path / "ours").read(0, 40), vectors.astype(np.float16))


def test_memory_is_one_chunk_per_thread(tmp_path, monkeypatch):
    """12 MB of vectors are converted in less than 1 MB; counter-case: `read` of all vectors at once."""
    write_shards(tmp_path / "shards", 150_000, 100_000)
    monkeypatch.setattr(module, "CHUNK_ROWS", 1024)
    monkeypatch.setattr(module, "THREADS", 2)
    source = TorchShards(tmp_path / "shards")

    def peak(work):
        """Peak of traced memory in bytes."""
        tracemalloc.start()
        work()
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak_bytes

    assert peak(lambda: write_vectors(source, tmp_path / "vectors.npy")) < 2**20
    assert peak(lambda: source.read(0, source.count)) > 12e6
    assert np.load(tmp_path / "vectors.npy", mmap_mode="r").shape == (250_000, DIM)


def test_released_pages_are_read_again(tmp_path):
    """`release_pages` does not change the content of an array, memory-mapped or not."""
    np.save(tmp_path / "a.npy", np.arange(2**20))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    written = create_array(tmp_path / "b.npy", np.int64, (2**20,))
    written[:] = mapped
    for array in (mapped[10:], written, np.arange(2**20)):
        before = array.sum()
        release_pages(array)
        assert array.sum() == before


def test_a_full_disk_fails_before_writing(tmp_path, monkeypatch):
    """Allocation fails with a UserError of one line before any vector is written; no file is left."""
    write_shards(tmp_path / "shards", 50)

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    monkeypatch.setattr(os, "pwrite", pytest.fail)
    with pytest.raises(
        UserError, match=r"ours: cannot be written \(No space left on device\); choose another --output"
    ):
        convert(TorchShards(tmp_path / "shards"), tmp_path / "ours", Origin())
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_a_file_system_that_cannot_reserve_space_is_asked_for_room(tmp_path, monkeypatch):
    """Without posix_fallocate the file gets its size; a full disk is an error as with it."""

    def refuse(file: int, offset: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    create_array(tmp_path / "fits.npy", np.float16, (3, 4))[:] = 1
    assert (read_array(tmp_path / "fits.npy", np.float16, (3, 4)) == 1).all()
    with pytest.raises(OSError, match="No space left on device"):
        VectorFile.create(tmp_path / "vast.npy", 2**50, 2)


@pytest.mark.parametrize("at", ["vectors", "passages"])
def test_an_interrupted_conversion_keeps_the_old_index(tmp_path, small_chunks, monkeypatch, at):
    """Ctrl-C between two chunks leaves no temporary folder, and the index to be replaced stays whole."""
    write_shards(tmp_path / "shards", 500)
    write_shards(tmp_path / "other", 60, seed=1)
    convert(TorchShards(tmp_path / "other"), tmp_path / "ours", Origin())
    before = FlatIndexFolder(tmp_path / "ours").read(0, 60)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(*((TorchShards, "read") if at == "vectors" else (TorchShards, "passages_json")), interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(TorchShards(tmp_path / "shards"), tmp_path / "ours", Origin())
    np.testing.assert_array_equal(FlatIndexFolder(tmp_path / "ours").read(0, 60), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "ours", "shards"]


def test_inconsistent_or_empty_shards_are_refused(tmp_path):
    """UserError for vectors of different widths, or no vectors at all."""
    write_shards(tmp_path / "shards", 10, 10)
    pickles.save(tmp_path / "shards" / "embeddings.1.pt", np.zeros((DIM + 1, 10), np.float16))
    with pytest.raises(UserError, match=r"embeddings\.1\.pt: vectors of width 25, embeddings\.0\.pt has 24"):
        TorchShards(tmp_path / "shards")
    write_shards(tmp_path / "empty", 0)
    with pytest.raises(UserError, match="1 shards without a vector"):
        TorchShards(tmp_path / "empty")


def test_merged_parts_are_concatenated(tmp_path, small_chunks):
    """Vectors and passages in the order of the folders given; the passages' JSON is kept byte for byte."""
    origin = Origin("r1", "{title} {text}", 200)
    vectors = [write_shards(tmp_path / f"s{n}", count, seed=n) for n, count in enumerate((100, 1, 250))]
    for n in range(3):
        convert(TorchShards(tmp_path / f"s{n}"), tmp_path / f"part{n}", origin)
    parts = MergedIndexes([tmp_path / f"part{n}" for n in (2, 0, 1)])
    convert(parts, tmp_path / "all", parts.origin)
    found = FlatIndexFolder(tmp_path / "all")
    np.testing.assert_array_equal(found.read(0, 351), np.concatenate([vectors[2], vectors[0], vectors[1]]))
    texts = [(tmp_path / f"part{n}" / "passages" / "text.bin").read_bytes() for n in (2, 0, 1)]
    assert (tmp_path / "all" / "passages" / "text.bin").read_bytes() == b"".join(texts)
    assert found.store.take([250])[0]["text"] == "t 0"
    assert found.origin == origin


@pytest.mark.parametrize(
    "change", [{"retriever": "r2"}, {"retriever": None}, {"retriever_format": "{text}"}, {"max_length": 9}]
)
def test_parts_of_different_origin_are_not_merged(tmp_path, change):
    """The message names the field that differs, both values and a remedy; counter-case: equal origins merge."""
    for n in range(2):
        write_shards(tmp_path / f"s{n}", 5)
        convert(TorchShards(tmp_path / f"s{n}"), tmp_path / f"part{n}", Origin("r1", "{title} {text}", 200))
    folders = [tmp_path / "part0", tmp_path / "part1"]
    assert MergedIndexes(folders).count == 10
    file = tmp_path / "part1" / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    [(field, value)] = change.items()
    expected = "unknown" if value is None else str(value).replace("{", r"\{")
    with pytest.raises(UserError, match=rf"part1: its {field} is {expected}, but .*part0 has .*; (merge|embed)"):
        MergedIndexes(folders)
    with pytest.raises(UserError, match=r"s0: no index of ours; `atlas index convert`"):
        MergedIndexes([tmp_path / "part0", tmp_path / "s0"])


def test_split_range_covers_the_range_exactly():
    """Every range of rows is split without gap or overlap, also with an empty part."""
    counts = [3, 0, 5, 1]
    whole = [(n, i) for n, count in enumerate(counts) for i in range(count)]
    for start in range(10):
        for stop in range(start, 10):
            ranges = list(split_range(counts, start, stop))
            assert [(n, i) for n, begin, end, _ in ranges for i in range(begin, end)] == whole[start:stop]
            offsets = [offset + i for _, begin, end, offset in ranges for i in range(end - begin)]
            assert offsets == list(range(stop - start))
