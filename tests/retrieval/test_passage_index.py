"""Indexes on disk: published shards converted, our own format built, saved and opened, and what is refused."""

import copy
import dataclasses
import errno
import json
import os
import shutil

import numpy as np
import pytest

from atlas_jax.config import IndexConfig
from atlas_jax.errors import UserError
from atlas_jax.retrieval import passage_index
from atlas_jax.retrieval.formats.index_folder import link_tree
from atlas_jax.retrieval.passage_index import check_passage_index, open_passage_index

COUNT = 300  # passages; "pq" needs 256
KINDS = {  # the flags of every kind of index
    "flat": {},
    "faiss-flat": {"index_mode": "faiss"},
    "ivfflat": {"index_mode": "faiss", "faiss_index_type": "ivfflat"},
    "ivfsq": {"index_mode": "faiss", "faiss_index_type": "ivfsq"},
    "ivfpq": {"index_mode": "faiss", "faiss_index_type": "ivfpq", "faiss_code_size": 8},
    "pq": {"index_mode": "faiss", "faiss_index_type": "pq", "faiss_code_size": 8},
}
NOT_FLAT = [kind for kind in KINDS if kind != "flat"]


pytestmark = pytest.mark.usefixtures("one_faiss_thread")


@pytest.fixture(scope="module")
def open_index(tiny_config, passage_embedder, mesh, tmp_path_factory):
    """Function from index flags to a `PassageIndex` of the golden retriever; each call has its own scratch folder."""

    def open(fingerprint="r1", embedder=passage_embedder, **flags):
        flags = {name: str(value) if name.endswith("path") else value for name, value in flags.items()}
        config = dataclasses.replace(tiny_config, index=IndexConfig(per_gpu_embedder_batch_size=8, **flags))
        return open_passage_index(config, embedder, [fingerprint], mesh, tmp_path_factory.mktemp("scratch"))

    return open


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A JSON-lines file of short passages."""
    file = tmp_path_factory.mktemp("corpus") / "short.jsonl"
    words = ["tribe", "polymer", "atom", "king", "river", "war", "plant", "music", "code", "star"]
    rows = [{"id": str(i), "title": words[i % 10], "text": f"{words[i // 30]} {i}"} for i in range(COUNT)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def saved(open_index, corpus, tmp_path_factory):
    """Folder with a saved index of the short passages of each kind, by name."""
    folder = tmp_path_factory.mktemp("saved")
    for kind, flags in KINDS.items():
        open_index(passages=(str(corpus),), save_index_path=folder / kind, **flags)
    return folder


@pytest.fixture(scope="module")
def query_vectors(query_embedder):
    """Vectors of four questions."""
    return np.asarray(query_embedder.embed_queries(["a tribe", "what is code?", "king of the river", "star"], 8))[:4]


def assert_equal_results(found, expected):
    """Scores and passage numbers of two searches are bit-identical."""
    for array, expected_array in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array, expected_array)


def content(folder):
    """Relative path to bytes of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_any_number_of_shards_is_one_index(open_index, golden_batch, published):
    """One shard and four give the reference's vectors bit for bit, its passages in order, and its search results."""
    one_shard, four_shards = (open_index(load_index_path=published / f"index_{name}") for name in ("1shard", "4shards"))
    for found_index in (one_shard, four_shards):
        found = found_index.vectors.search(golden_batch["query_emb"], 5)
        np.testing.assert_array_equal(np.asarray(found_index.vectors.rows)[:240].T, golden_batch["index_embeddings"])
        assert found_index.vectors.count == len(found_index.passages) == 240
        ids = [[int(passage["id"]) for passage in found_index.passages.take(row)] for row in found.numbers]
        np.testing.assert_allclose(found.scores, golden_batch["retrieved_scores"], rtol=0, atol=2e-2)
        gaps = -np.diff(found_index.vectors.search(golden_batch["query_emb"], 6).scores, axis=1)  # to the next score
        distinct = np.minimum(gaps, np.pad(gaps, ((0, 0), (1, 0)), constant_values=np.inf)[:, :-1]) > 2e-2
        assert (np.asarray(ids) == golden_batch["retrieved_ids"])[distinct].all()
        assert distinct.sum() >= 15
    all_numbers = range(240)
    assert one_shard.passages.take(all_numbers) == four_shards.passages.take(all_numbers)
    assert one_shard.passages.take([0])[0]["title"] == "Chinese mythology: Summary"  # the section is joined once


def test_a_built_index_equals_the_published_one(open_index, golden, golden_batch, published):
    """From the same passages: equal passages, vectors within 2e-2, equal results; --max_passages takes the first."""
    built = open_index(passages=(str(golden / "passages.jsonl"),))
    published = open_index(load_index_path=published / "index_1shard")
    assert built.passages.take(range(240)) == published.passages.take(range(240))
    np.testing.assert_allclose(
        np.asarray(built.vectors.rows)[:240].T, golden_batch["index_embeddings"], rtol=0, atol=2e-2
    )
    assert_equal_results(
        built.vectors.search(golden_batch["query_emb"], 3)[1:],
        published.vectors.search(golden_batch["query_emb"], 3)[1:],
    )
    first = open_index(passages=(str(golden / "passages.jsonl"),), max_passages=10)
    assert first.passages.take(range(10)) == built.passages.take(range(10))
    assert first.vectors.count == 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_index_searches_like_the_built_one(open_index, saved, corpus, query_vectors, kind):
    """Bit-identical results, saved or not; loading does not read the --passages files."""
    built = open_index(passages=(str(corpus),), **KINDS[kind])
    loaded = open_index(load_index_path=saved / kind, passages=("gone.jsonl",), **KINDS[kind])
    assert_equal_results(loaded.vectors.search(query_vectors, 7), built.vectors.search(query_vectors, 7))
    assert loaded.vectors.kind == built.vectors.kind == kind.removeprefix("faiss-")
    assert loaded.passages.take(range(COUNT)) == built.passages.take(range(COUNT))


@pytest.mark.parametrize("kind", NOT_FLAT)
def test_a_flat_index_can_be_opened_as_faiss(open_index, saved, query_vectors, kind):
    """The faiss index built from its vectors equals the one built from passages; the folder does not change."""
    before = content(saved / "flat")
    opened = open_index(load_index_path=saved / "flat", **KINDS[kind])
    assert_equal_results(
        opened.vectors.search(query_vectors, 7),
        open_index(load_index_path=saved / kind, **KINDS[kind]).vectors.search(query_vectors, 7),
    )
    assert content(saved / "flat") == before


@pytest.mark.parametrize("kind", NOT_FLAT)
def test_a_faiss_index_opens_as_its_own_kind_only(open_index, saved, kind):
    """Opening a faiss index as flat or as another kind is refused; the message names the flags that fit."""
    fitting_flags = " ".join(
        f"--{flag} {value}" for flag, value in ({"faiss_index_type": "flat"} | KINDS[kind]).items()
    )
    others = [flags for name, flags in KINDS.items() if name != kind]
    if "pq" in kind:
        others.append(KINDS[kind] | {"faiss_code_size": 4})
    for flags in others:
        with pytest.raises(UserError, match="and no vectors to make another index from") as error:
            open_index(load_index_path=saved / kind, **flags)
        assert sorted(word for word in fitting_flags.split()) == sorted(
            str(error.value).split(": holds ")[1].split(", and")[0].split()
        )


def test_a_code_size_belongs_to_pq(open_index, saved, corpus, tmp_path, query_vectors):
    """--faiss_code_size is ignored with kinds other than "pq" and "ivfpq", when saving and when opening."""
    flags = {"index_mode": "faiss", "faiss_code_size": 8}
    opened = open_index(passages=(str(corpus),), save_index_path=tmp_path / "index", **flags)
    assert_equal_results(
        opened.vectors.search(query_vectors, 5),
        open_index(load_index_path=saved / "faiss-flat", **flags).vectors.search(query_vectors, 5),
    )
    open_index(load_index_path=tmp_path / "index", index_mode="faiss")


@pytest.mark.parametrize("kind", ["flat", "faiss-flat"])
def test_a_saved_index_is_hardly_larger_than_its_vectors(open_index, tmp_path, monkeypatch, kind):
    """A saved index without its passages has at most 1 % more bytes than the float16 vectors, of width 48."""
    count = 5_000
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(f'{{"id": "{i}", "text": "t"}}\n' for i in range(count)))
    rng = np.random.default_rng(0)

    def embed(embedder, tokens, out, batch, progress):
        out[:] = rng.standard_normal(out.shape)

    monkeypatch.setattr(passage_index, "embed_corpus", embed)
    open_index(passages=(str(file),), save_index_path=tmp_path / "index", **KINDS[kind])
    sizes = {name: len(data) for name, data in content(tmp_path / "index").items() if not name.startswith("passages/")}
    assert 2 * 48 * count < sum(sizes.values()) <= 1.01 * 2 * 48 * count
    assert "index.json" in sizes


def test_shards_convert_to_every_kind(open_index, tmp_path, golden_batch, published):
    """Faiss indexes of the shards find what the flat one finds; 240 vectors are too few for "pq"."""
    flat = open_index(load_index_path=published / "index_4shards").vectors.search(golden_batch["query_emb"], 5)
    for kind in ("faiss-flat", "ivfflat"):
        folder = tmp_path / kind
        open_index(load_index_path=published / "index_4shards", save_index_path=folder, **KINDS[kind])
        found = open_index(load_index_path=folder, **KINDS[kind]).vectors.search(golden_batch["query_emb"], 5)
        np.testing.assert_array_equal(found.numbers, flat.numbers)
        np.testing.assert_allclose(found.scores, flat.scores, rtol=1e-5)
        assert not (folder / "embeddings.npy").exists()
    with pytest.raises(UserError, match="there are only 240 passages"):
        open_index(load_index_path=published / "index_4shards", save_index_path=tmp_path / "pq", **KINDS["pq"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faiss-flat", "ivfflat"]


@pytest.mark.parametrize("kind", ["flat", "pq"])
def test_another_retriever_is_refused(open_index, passage_embedder, saved, kind):
    """UserError if the fingerprint of the passage encoder or the width of the vectors differs."""
    with pytest.raises(UserError, match=r"built by another retriever than this one; load the index that belongs"):
        open_index(load_index_path=saved / kind, fingerprint="r2", **KINDS[kind])
    wide = copy.copy(passage_embedder)
    wide.dim = 768
    with pytest.raises(UserError, match="vectors of width 48, but this retriever's are 768 wide"):
        open_index(load_index_path=saved / kind, embedder=wide, **KINDS[kind])


def test_shards_of_another_width_are_refused(open_index, passage_embedder, tmp_path, published):
    """Shards do not name the retriever that built them, but the width must fit."""
    wide = copy.copy(passage_embedder)
    wide.dim = 768
    with pytest.raises(UserError, match=r"embeddings\.0\.pt: vectors of width 48, but this retriever's are 768 wide"):
        open_index(load_index_path=published / "index_1shard", save_index_path=tmp_path / "index", embedder=wide)
    assert not list(tmp_path.iterdir())


def test_inconsistent_shards_are_refused(open_index, golden, tmp_path):
    """A missing shard, too few or too many passages, a wrong file: UserError, and nothing is left at the save path."""
    shards, index = tmp_path / "shards", tmp_path / "index"

    def assert_refused(message):
        with pytest.raises(UserError, match=message) as error:
            open_index(load_index_path=shards, save_index_path=index)
        assert "\n" not in str(error.value)
        assert list(tmp_path.iterdir()) == [shards]

    shutil.copytree(golden / "index_4shards", shards)
    (shards / "passages.2.pt").unlink()
    assert_refused(r"passages\.2\.pt: missing, one of 4 shards")
    shutil.copy(golden / "index_1shard" / "passages.0.pt", shards / "passages.2.pt")
    assert_refused(r"passages\.2\.pt: 240 passages, but embeddings\.2\.pt has 60 vectors")
    shutil.copy(golden / "index_1shard" / "embeddings.0.pt", shards / "passages.2.pt")
    assert_refused(r"passages\.2\.pt: holds no list of passages|passages\.2\.pt: ")
    shutil.copy(shards / "passages.1.pt", shards / "embeddings.3.pt")
    assert_refused(r"embeddings\.3\.pt")
    (shards / "embeddings.1.pt").unlink()
    assert_refused(r"embeddings\.1\.pt: missing, one of 4 shards")
    (shards / "embeddings.0.pt").unlink()
    assert_refused(r"embeddings\.0\.pt: missing, one of 4 shards")


def test_a_folder_without_an_index_is_refused(open_index, tmp_path):
    """UserError for a folder with neither our own format nor published shards."""
    with pytest.raises(UserError, match=r"neither index\.json nor embeddings\.0\.pt in this folder; is it an index\?"):
        open_index(load_index_path=tmp_path)


def test_a_save_path_with_other_files_is_refused(open_index, corpus, tmp_path, monkeypatch, published):
    """A file, a folder with other files, or the working directory: refused before embedding starts, and unchanged."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("more work")
    monkeypatch.setattr(passage_index, "embed_corpus", None)  # a call would fail
    before = content(tmp_path)
    for name in ("folder", "file"):
        for source in ({"passages": (str(corpus),)}, {"load_index_path": published / "index_1shard"}):
            with pytest.raises(UserError, match=rf"--save_index_path .*{name}: holds something else than an index"):
                open_index(save_index_path=tmp_path / name, **source)
    assert content(tmp_path) == before
    (folder / "index.json").write_text('{"chapters": 7}')  # not the index.json of an index
    with pytest.raises(UserError, match="holds something else than an index"):
        open_index(save_index_path=folder, passages=(str(corpus),))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"--save_index_path .*here: is the folder that this runs in"):
        open_index(save_index_path=".", passages=(str(corpus),))


def test_a_refresh_replaces_nothing_else(saved, tiny_config, tmp_path):
    """With an index to load, --save_index_path is judged at the start too: a refresh would write there hours later."""
    (tmp_path / "thesis.tex").write_text("years of work")
    index = IndexConfig(load_index_path=str(saved / "flat"), save_index_path=str(tmp_path))
    with pytest.raises(UserError, match=r"--save_index_path .*: holds something else than an index"):
        check_passage_index(dataclasses.replace(tiny_config, index=index))
    index = dataclasses.replace(index, save_index_path=str(tmp_path / "new"))
    check_passage_index(dataclasses.replace(tiny_config, index=index))


@pytest.mark.parametrize("refused", ["link", "link chmod", "link chmod symlink"])
def test_passages_are_linked_or_copied_wherever_that_is_refused(tmp_path, monkeypatch, refused):
    """Without hard links, permissions or symbolic links: the content is there, and the source unchanged."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    (source / "below/a").write_text("text")
    for name in refused.split():
        monkeypatch.setattr(os, name, refuse)
    for copied in (True, False):
        target = tmp_path / f"copy-{copied}"
        link_tree(source, target, copy=copied)
        assert (target / "below/a").read_text() == "text"
        assert target.is_symlink() == (not copied and "symlink" not in refused)


def test_an_index_or_an_empty_folder_is_replaced(open_index, saved, corpus, tmp_path):
    """No file of the old index stays, even of another kind; missing parent folders are created."""
    folder = tmp_path / "a" / "b" / "index"
    open_index(passages=(str(corpus),), save_index_path=folder, **KINDS["ivfsq"])
    open_index(passages=(str(corpus),), save_index_path=folder)
    assert set(content(folder)) == set(content(saved / "flat"))
    empty = tmp_path / "empty"
    empty.mkdir()
    open_index(passages=(str(corpus),), save_index_path=f"{empty}/")
    assert (empty / "index.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]
    assert [path.name for path in folder.parent.iterdir()] == ["index"]


@pytest.mark.parametrize("replaces", [False, True])
def test_a_failed_build_leaves_no_files(open_index, saved, corpus, tmp_path, monkeypatch, replaces):
    """A bad passage on line 50, or an error while embedding: no new file, and an existing index stays whole."""
    folder = tmp_path / "index"
    if replaces:
        shutil.copytree(saved / "flat", folder)
    lines = corpus.read_text().splitlines()
    lines[49] = '{"id": "50", "title": "no text"}'
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines) + "\n")
    before = content(tmp_path)
    with pytest.raises(UserError, match=r'bad\.jsonl:50: a passage without "text"'):
        open_index(passages=(str(corpus), str(bad)), save_index_path=folder)
    assert content(tmp_path) == before

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(passage_index, "embed_corpus", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        open_index(passages=(str(corpus),), save_index_path=folder)
    assert content(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"] + ["index"] * replaces


class FailsWhenUnpickled:
    """An object whose unpickling fails the test."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("kind", ["flat", "ivfpq"])
def test_npy_files_are_never_unpickled(open_index, passage_embedder, saved, tmp_path, kind):
    """An object array in place of any .npy file is refused without unpickling; the message names the file."""
    folder = tmp_path / "index"
    shutil.copytree(saved / kind, folder)
    files = sorted(folder.rglob("*.npy"))
    expected = {"flat": {"embeddings"}, "ivfpq": {"codes", "code_table", "centroids", "list_sizes", "numbers"}}[kind]
    names = {file.stem for file in files}
    assert names == expected | {"text.offsets", "tokens.offsets"}
    for file in files:
        whole = file.read_bytes()
        np.save(file, np.array([FailsWhenUnpickled()]), allow_pickle=True)
        with pytest.raises(UserError, match=file.stem.split(".")[0]):
            open_index(load_index_path=folder, **KINDS[kind]).passages.tokens(
                passage_embedder.tokenizer, "{title} {text}", "retriever"
            )
        file.write_bytes(whole)
    open_index(load_index_path=folder, **KINDS[kind])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"index\.json: format 2, not 1; build the index again"),
        ({"count": 299}, "299 vectors, but 300 passages"),
        ({"kind": "lsh", "index_mode": "faiss"}, "holds --index_mode faiss --faiss_index_type lsh"),
    ],
)
def test_bad_index_json_is_refused(open_index, saved, tmp_path, changes, message):
    """UserError for another format version or count, an unknown kind, or invalid JSON."""
    folder = tmp_path / "index"
    shutil.copytree(saved / "flat", folder)
    metadata = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(metadata | changes))
    with pytest.raises(UserError, match=message):
        open_index(load_index_path=folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json: not JSON"):
        open_index(load_index_path=folder)
