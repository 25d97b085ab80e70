"""Published shards are taken over once for all runs, and token ids made once, where there is a place for them."""

import dataclasses
import logging
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.config import IndexConfig, RunConfig
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.errors import UserError
from atlas_jax.retrieval import passage_index
from atlas_jax.retrieval.formats.torch_shards import TorchShards
from atlas_jax.retrieval.passage_index import open_passage_index
from atlas_jax.retrieval.passage_store import PassageStore
from atlas_jax.retrieval.published_index import PREFIX, take_over
from atlas_jax.storage import cache

FORMAT = "{title} {text}"


@pytest.fixture
def shards(published, tmp_path) -> Path:
    """A folder of published shards that no run has read yet."""
    copied = shutil.ignore_patterns(f"{PREFIX}*", f".{PREFIX}*")
    return Path(shutil.copytree(published / "index_4shards", tmp_path / "shards", ignore=copied))


@pytest.fixture
def open_index(tiny_config, passage_embedder, mesh, tmp_path, tmp_path_factory):
    """Function from --load_index_path to the `PassageIndex` that a run opens; its --cache_dir is tmp_path/cache."""

    def open(folder, **flags):
        run = RunConfig(cache_dir=str(tmp_path / "cache"))
        config = dataclasses.replace(tiny_config, run=run, index=IndexConfig(load_index_path=str(folder), **flags))
        return open_passage_index(config, passage_embedder, ["r1"], mesh, tmp_path_factory.mktemp("scratch"))

    return open


@pytest.fixture
def make_read_only(monkeypatch):
    """Function after whose call no file can be made in a folder, as on a disk that is mounted read-only."""

    def make(folder):
        original = cache.tempfile.TemporaryFile

        def refuse(dir):
            if Path(dir).is_relative_to(folder):
                raise OSError(30, "Read-only file system", str(dir))
            return original(dir=dir)

        monkeypatch.setattr(cache.tempfile, "TemporaryFile", refuse)

    return make


def copies(folder: Path) -> list[Path]:
    """The copies of an index in this folder."""
    return sorted(folder.glob(f"{PREFIX}*"))


def found(index, golden_batch):
    """Scores and numbers of a search, and the passages of the best one."""
    result = index.vectors.search(golden_batch["query_emb"], 5)
    return result.scores, result.numbers, index.passages.take(result.numbers[0])


def assert_equal(a, b):
    """Two results of `found` are equal, bit for bit."""
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])
    assert a[2] == b[2]


def test_the_second_run_converts_nothing(open_index, shards, golden_batch, monkeypatch, caplog, tmp_path):
    """The first writes a copy beside the shards and says where and how large; the next ones open it, with its results.

    The counter-case: shards that were written again are taken over again, and a line names the copy that they replace.
    """
    with caplog.at_level(logging.INFO):
        first = found(open_index(shards), golden_batch)
    [copy] = copies(shards)
    assert f"{shards}: taken over once for all runs, " in caplog.text
    assert str(copy) in caplog.text
    assert not (tmp_path / "cache").exists()
    caplog.clear()
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(passage_index, "write_flat_index", None)  # a call would fail
        second = found(open_index(shards), golden_batch)
    assert "taken over" not in caplog.text
    assert_equal(first, second)
    os.utime(shards / "embeddings.2.pt")
    with caplog.at_level(logging.INFO):
        assert_equal(first, found(open_index(shards), golden_batch))
    assert len(copies(shards)) == 2
    assert f"the shards or the kind of index are others than those of {copy.name}" in caplog.text


def test_each_kind_of_index_has_its_copy(open_index, shards, golden_batch):
    """A flat index and a faiss index from one folder of shards, each found again."""
    for _ in range(2):
        open_index(shards)
        open_index(shards, index_mode="faiss", faiss_index_type="ivfflat")
    assert len(copies(shards)) == 2


def test_a_folder_that_cannot_be_written_is_taken_over_into_the_cache(
    open_index, shards, golden_batch, make_read_only, tmp_path
):
    """The copy is in --cache_dir and is found there again, also from another path to the same shards."""
    expected = found(open_index(shards), golden_batch)
    shutil.rmtree(copies(shards)[0])
    make_read_only(shards)
    assert_equal(found(open_index(shards), golden_batch), expected)
    [copy] = copies(tmp_path / "cache" / "indexes")
    before = copy.stat().st_ino
    (tmp_path / "link").symlink_to(shards)
    assert_equal(found(open_index(tmp_path / "link"), golden_batch), expected)
    assert copies(tmp_path / "cache" / "indexes")[0].stat().st_ino == before
    assert copies(shards) == []


def test_a_full_disk_is_refused_before_anything_is_written(open_index, shards, monkeypatch, tmp_path):
    """One line with both places, their room and the flag."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(
        UserError, match=r"takes .* GB, but .*shards has 1e-06 GB of room and .*name a folder with --cache_dir"
    ):
        open_index(shards)
    assert copies(shards) == copies(tmp_path / "cache" / "indexes") == []


@pytest.mark.parametrize("file", ["passages/text.bin", "embeddings.npy", "index.json"])
def test_a_damaged_copy_is_made_again(open_index, shards, golden_batch, caplog, file):
    """A truncated file: a warning, and the results of a whole copy."""
    expected = found(open_index(shards), golden_batch)
    path = copies(shards)[0] / file
    path.write_bytes(path.read_bytes()[:-7])
    assert_equal(found(open_index(shards), golden_batch), expected)
    assert "made again" in caplog.text


def test_a_quota_that_ends_the_writing_leads_to_the_cache(open_index, shards, monkeypatch, tmp_path, golden_batch):
    """Free space of the disk does not show it; the copy goes to --cache_dir, and nothing is left beside the shards."""
    original = passage_index.write_flat_index

    def refuse_beside(source, draft):
        if draft.is_relative_to(shards):
            raise OSError(122, "Disk quota exceeded", str(draft / "embeddings.npy"))
        return original(source, draft)

    monkeypatch.setattr(passage_index, "write_flat_index", refuse_beside)
    found(open_index(shards), golden_batch)
    assert len(copies(tmp_path / "cache" / "indexes")) == 1
    assert sorted(path.suffix for path in shards.iterdir()) == [".pt"] * 8


def test_shards_of_equal_size_and_time_are_told_apart(open_index, shards, published, golden_batch):
    """As in archives that give all files one time: a sample of the content is in the fingerprint."""
    open_index(shards)
    path = shards / "embeddings.0.pt"
    times, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    open_index(shards)
    assert len(copies(shards)) == 2


def test_runs_that_start_together_convert_once(shards, caplog):
    """One of four converts, the others wait for it and say so; without locks each would."""
    conversions = []

    def convert(source: TorchShards, draft: Path) -> None:
        conversions.append(draft)
        begun.wait(5)
        passage_index._convert(source, config, source.dim, passage_index.Origin(), draft)

    from atlas_jax.config import Config, ModelConfig, TaskConfig

    config = Config(model=ModelConfig(), task=TaskConfig(task="qa"))
    begun, results = threading.Event(), []
    threads = [threading.Thread(target=lambda: results.append(take_over(shards, None, {}, convert))) for _ in range(4)]
    with caplog.at_level(logging.INFO):
        for thread in threads:
            thread.start()
        while caplog.text.count("another process makes it now; waiting for that") < 3:
            threading.Event().wait(0.01)
        begun.set()
        for thread in threads:
            thread.join()
    assert len(conversions) == 1
    assert results == copies(shards) * 4


def test_token_ids_beside_read_only_passages_are_kept_in_the_cache(
    store, golden, make_read_only, tmp_path, monkeypatch
):
    """They equal those beside the passages, and are found again; without a cache the line names the flag."""
    shutil.copytree(store.folder, tmp_path / "passages", ignore=shutil.ignore_patterns("tokens-*", ".*"))
    tokenizer = Tokenizer.load(golden / "assets" / "retriever")
    make_read_only(tmp_path / "passages")
    with pytest.raises(
        UserError, match=r"token ids takes .*passages cannot be written; name a folder with --cache_dir"
    ):
        PassageStore.open(tmp_path / "passages").tokens(tokenizer, FORMAT, "retriever")
    read_only = PassageStore.open(tmp_path / "passages", tmp_path / "cache").tokens(tokenizer, FORMAT, "retriever")
    expected = store.tokens(tokenizer, FORMAT, "retriever")
    numbers = np.arange(len(store))
    assert [ids.tolist() for ids in read_only.take(numbers)] == [ids.tolist() for ids in expected.take(numbers)]
    monkeypatch.setattr(PassageStore, "_write_tokens", None)  # a call would fail
    again = PassageStore.open(tmp_path / "passages", tmp_path / "cache").tokens(tokenizer, FORMAT, "retriever")
    assert len(again) == len(store)


def test_tokens_of_another_tokenizer_are_made_again(store, golden, tmp_path, caplog):
    """A line says so, once for each tokenizer; another format is no other tokenizer."""
    shutil.copytree(store.folder, tmp_path / "passages", ignore=shutil.ignore_patterns("tokens-*", ".*"))
    passages = PassageStore.open(tmp_path / "passages")
    reader, retriever = (Tokenizer.load(golden / "assets" / name) for name in ("reader", "retriever"))
    with caplog.at_level(logging.INFO):
        passages.tokens(reader, FORMAT, "reader")
        passages.tokens(reader, "{text}", "reader")
        assert caplog.text == ""
        passages.tokens(retriever, FORMAT, "reader")
    assert caplog.text.count("made by another tokenizer than this run's; tokenizing again") == 1
