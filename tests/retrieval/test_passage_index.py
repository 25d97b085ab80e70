"""Libraries on disk: the published form taken over, ours saved and opened, and what is refused."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest

from atlas_jax.config import IndexConfig
from atlas_jax.errors import UserError
from atlas_jax.retrieval import passage_index
from atlas_jax.retrieval.passage_index import open_passage_index

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
def opened(tiny_config, passages, mesh, tmp_path_factory):
    """Flags to a passage_index, with the golden retriever; what is not saved goes to a folder of its own."""

    def open(retriever="r1", embedder=passages, **flags):
        flags = {name: str(value) if name.endswith("path") else value for name, value in flags.items()}
        config = dataclasses.replace(tiny_config, index=IndexConfig(per_gpu_embedder_batch_size=8, **flags))
        return open_passage_index(config, embedder, [retriever], mesh, tmp_path_factory.mktemp("scratch"))

    return open


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A file of short passages."""
    file = tmp_path_factory.mktemp("corpus") / "short.jsonl"
    words = ["tribe", "polymer", "atom", "king", "river", "war", "plant", "music", "code", "star"]
    rows = [{"id": str(i), "title": words[i % 10], "text": f"{words[i // 30]} {i}"} for i in range(COUNT)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def saved(opened, corpus, tmp_path_factory):
    """A folder with an index of the short passages of each kind, made once."""
    folder = tmp_path_factory.mktemp("saved")
    for kind, flags in KINDS.items():
        opened(passages=(str(corpus),), save_index_path=folder / kind, **flags)
    return folder


@pytest.fixture(scope="module")
def vectors(queries):
    """Of a few questions."""
    return np.asarray(queries.embed_queries(["a tribe", "what is code?", "king of the river", "star"], 8))[:4]


def equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def content(folder):
    """Every file and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_published_shards_are_one_index(opened, golden, batch):
    """One shard or four: the reference's vectors bit for bit, its passages in order, and its search results."""
    one, four = (opened(load_index_path=golden / f"index_{name}") for name in ("1shard", "4shards"))
    for found_index in (one, four):
        found = found_index.vectors.search(batch["query_emb"], 5)
        np.testing.assert_array_equal(np.asarray(found_index.vectors.rows)[:240].T, batch["index_embeddings"])
        assert found_index.vectors.count == len(found_index.passages) == 240
        ids = [[int(passage["id"]) for passage in found_index.passages.take(row)] for row in found.numbers]
        np.testing.assert_allclose(found.scores, batch["retrieved_scores"], rtol=0, atol=2e-2)
        gaps = -np.diff(found_index.vectors.search(batch["query_emb"], 6).scores, axis=1)  # to the next
        apart = np.minimum(gaps, np.pad(gaps, ((0, 0), (1, 0)), constant_values=np.inf)[:, :-1]) > 2e-2
        assert (np.asarray(ids) == batch["retrieved_ids"])[apart].all()
        assert apart.sum() >= 15
    everything = range(240)
    assert one.passages.take(everything) == four.passages.take(everything)
    assert one.passages.take([0])[0]["title"] == "Chinese mythology: Summary"  # joined once


def test_what_is_built_is_what_was_published(opened, golden, batch):
    """From the same passages: the same ids, vectors within 2e-2, the same passages found."""
    built = opened(passages=(str(golden / "passages.jsonl"),))
    published = opened(load_index_path=golden / "index_1shard")
    assert built.passages.take(range(240)) == published.passages.take(range(240))
    np.testing.assert_allclose(np.asarray(built.vectors.rows)[:240].T, batch["index_embeddings"], rtol=0, atol=2e-2)
    equal(built.vectors.search(batch["query_emb"], 3)[1:], published.vectors.search(batch["query_emb"], 3)[1:])
    first = opened(passages=(str(golden / "passages.jsonl"),), max_passages=10)
    assert first.passages.take(range(10)) == built.passages.take(range(10))
    assert first.vectors.count == 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_library_searches_as_the_one_built(opened, saved, corpus, vectors, kind):
    """Every bit of every result, with `--save_index_path` and without; the passages are not read again."""
    built = opened(passages=(str(corpus),), **KINDS[kind])
    loaded = opened(load_index_path=saved / kind, passages=("gone.jsonl",), **KINDS[kind])
    equal(loaded.vectors.search(vectors, 7), built.vectors.search(vectors, 7))
    assert loaded.vectors.kind == built.vectors.kind == kind.removeprefix("faiss-")
    assert loaded.passages.take(range(COUNT)) == built.passages.take(range(COUNT))


@pytest.mark.parametrize("kind", NOT_FLAT)
def test_a_flat_index_can_be_opened_as_faiss(opened, saved, vectors, kind):
    """Made from its vectors, equal to the one built so; the folder stays as it is."""
    before = content(saved / "flat")
    made = opened(load_index_path=saved / "flat", **KINDS[kind])
    equal(
        made.vectors.search(vectors, 7), opened(load_index_path=saved / kind, **KINDS[kind]).vectors.search(vectors, 7)
    )
    assert content(saved / "flat") == before


@pytest.mark.parametrize("kind", NOT_FLAT)
def test_a_faiss_index_is_that_one_only(opened, saved, kind):
    """Its vectors are gone: flat or another kind is refused with the flags that would do."""
    had = " ".join(f"--{flag} {value}" for flag, value in ({"faiss_index_type": "flat"} | KINDS[kind]).items())
    others = [flags for name, flags in KINDS.items() if name != kind]
    if "pq" in kind:
        others.append(KINDS[kind] | {"faiss_code_size": 4})
    for flags in others:
        with pytest.raises(UserError, match="and no vectors to make another index from") as error:
            opened(load_index_path=saved / kind, **flags)
        assert sorted(word for word in had.split()) == sorted(
            str(error.value).split(": holds ")[1].split(", and")[0].split()
        )


def test_a_code_size_belongs_to_pq(opened, saved, corpus, tmp_path, vectors):
    """Beside another kind it means nothing, neither when saving nor when opening."""
    flags = {"index_mode": "faiss", "faiss_code_size": 8}
    made = opened(passages=(str(corpus),), save_index_path=tmp_path / "index", **flags)
    equal(
        made.vectors.search(vectors, 5),
        opened(load_index_path=saved / "faiss-flat", **flags).vectors.search(vectors, 5),
    )
    opened(load_index_path=tmp_path / "index", index_mode="faiss")


@pytest.mark.parametrize("kind", ["flat", "faiss-flat"])
def test_size_on_disk(opened, tmp_path, monkeypatch, kind):
    """A saved index is its vectors in float16, of width 48, and at most 1 % more, plus the passages."""
    count = 5_000
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(f'{{"id": "{i}", "text": "t"}}\n' for i in range(count)))
    rng = np.random.default_rng(0)

    def embed(embedder, tokens, out, batch, progress):
        out[:] = rng.standard_normal(out.shape)

    monkeypatch.setattr(passage_index, "embed_corpus", embed)
    opened(passages=(str(file),), save_index_path=tmp_path / "index", **KINDS[kind])
    sizes = {name: len(data) for name, data in content(tmp_path / "index").items() if not name.startswith("passages/")}
    assert 2 * 48 * count < sum(sizes.values()) <= 1.01 * 2 * 48 * count
    assert "index.json" in sizes


def test_the_published_form_as_every_kind(opened, golden, tmp_path, batch):
    """240 published vectors as faiss; too few for "pq", which leaves nothing behind."""
    flat = opened(load_index_path=golden / "index_4shards").vectors.search(batch["query_emb"], 5)
    for kind in ("faiss-flat", "ivfflat"):
        folder = tmp_path / kind
        opened(load_index_path=golden / "index_4shards", save_index_path=folder, **KINDS[kind])
        found = opened(load_index_path=folder, **KINDS[kind]).vectors.search(batch["query_emb"], 5)
        np.testing.assert_array_equal(found.numbers, flat.numbers)
        np.testing.assert_allclose(found.scores, flat.scores, rtol=1e-5)
        assert not (folder / "embeddings.npy").exists()
    with pytest.raises(UserError, match="there are only 240 passages"):
        opened(load_index_path=golden / "index_4shards", save_index_path=tmp_path / "pq", **KINDS["pq"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faiss-flat", "ivfflat"]


@pytest.mark.parametrize("kind", ["flat", "pq"])
def test_another_retriever_is_refused(opened, passages, saved, kind):
    """By the fingerprint of its passage encoder, or by the width of its vectors."""
    with pytest.raises(UserError, match=r"built by another retriever than this one; load the index that belongs"):
        opened(load_index_path=saved / kind, retriever="r2", **KINDS[kind])
    wide = copy.copy(passages)
    wide.dim = 768
    with pytest.raises(UserError, match="vectors of width 48, but this retriever's are 768 wide"):
        opened(load_index_path=saved / kind, embedder=wide, **KINDS[kind])


def test_published_vectors_of_another_width(opened, passages, golden, tmp_path):
    """They cannot say which retriever built them, but the width tells."""
    wide = copy.copy(passages)
    wide.dim = 768
    with pytest.raises(UserError, match=r"embeddings\.0\.pt: vectors of width 48, but this retriever's are 768 wide"):
        opened(load_index_path=golden / "index_1shard", save_index_path=tmp_path / "index", embedder=wide)
    assert not list(tmp_path.iterdir())


def test_shards_that_do_not_belong_together(opened, golden, tmp_path):
    """A gap, too few or too many passages, a file that is none: nothing is left at the save path."""
    theirs, index = tmp_path / "theirs", tmp_path / "index"

    def refused(message):
        with pytest.raises(UserError, match=message) as error:
            opened(load_index_path=theirs, save_index_path=index)
        assert "\n" not in str(error.value)
        assert list(tmp_path.iterdir()) == [theirs]

    shutil.copytree(golden / "index_4shards", theirs)
    (theirs / "passages.2.pt").unlink()
    refused(r"passages\.2\.pt: missing, one of 4 shards")
    shutil.copy(golden / "index_1shard" / "passages.0.pt", theirs / "passages.2.pt")
    refused(r"passages\.2\.pt: 240 passages, but embeddings\.2\.pt has 60 vectors")
    shutil.copy(golden / "index_1shard" / "embeddings.0.pt", theirs / "passages.2.pt")
    refused(r"passages\.2\.pt: holds no list of passages|passages\.2\.pt: ")
    shutil.copy(theirs / "passages.1.pt", theirs / "embeddings.3.pt")
    refused(r"embeddings\.3\.pt")
    (theirs / "embeddings.1.pt").unlink()
    refused(r"embeddings\.1\.pt: missing, one of 4 shards")
    (theirs / "embeddings.0.pt").unlink()
    refused(r"embeddings\.0\.pt: missing, one of 4 shards")


def test_a_folder_that_is_no_index(opened, tmp_path):
    """Neither ours nor the published form."""
    with pytest.raises(UserError, match=r"neither index\.json nor embeddings\.0\.pt in this folder; is it an index\?"):
        opened(load_index_path=tmp_path)


def test_a_save_path_that_holds_something_else(opened, corpus, tmp_path, golden, monkeypatch):
    """A file, a folder with anything in it, or where the run is: refused before work starts, and untouched."""
    thesis = tmp_path / "folder"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("more work")
    monkeypatch.setattr(passage_index, "embed_corpus", None)  # would be called
    before = content(tmp_path)
    for name in ("folder", "file"):
        for source in ({"passages": (str(corpus),)}, {"load_index_path": golden / "index_1shard"}):
            with pytest.raises(UserError, match=rf"--save_index_path .*{name}: holds something else than an index"):
                opened(save_index_path=tmp_path / name, **source)
    assert content(tmp_path) == before
    (thesis / "index.json").write_text('{"chapters": 7}')  # an index of another kind
    with pytest.raises(UserError, match="holds something else than an index"):
        opened(save_index_path=thesis, passages=(str(corpus),))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"--save_index_path .*here: is the folder that this runs in"):
        opened(save_index_path=".", passages=(str(corpus),))


def test_an_index_or_an_empty_folder_gives_way(opened, saved, corpus, tmp_path):
    """The new index replaces it whole, of another kind too; parents that are missing are made."""
    folder = tmp_path / "a" / "b" / "index"
    opened(passages=(str(corpus),), save_index_path=folder, **KINDS["ivfsq"])
    opened(passages=(str(corpus),), save_index_path=folder)
    assert set(content(folder)) == set(content(saved / "flat"))
    empty = tmp_path / "empty"
    empty.mkdir()
    opened(passages=(str(corpus),), save_index_path=f"{empty}/")
    assert (empty / "index.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]
    assert [path.name for path in folder.parent.iterdir()] == ["index"]


@pytest.mark.parametrize("there", [False, True])
def test_an_error_in_the_middle_leaves_nothing(opened, saved, corpus, tmp_path, monkeypatch, there):
    """A bad passage on line 50, or a device that gives up: no new file, and an index that was there is whole."""
    folder = tmp_path / "index"
    if there:
        shutil.copytree(saved / "flat", folder)
    lines = corpus.read_text().splitlines()
    lines[49] = '{"id": "50", "title": "no text"}'
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines) + "\n")
    before = content(tmp_path)
    with pytest.raises(UserError, match=r'bad\.jsonl:50: a passage without "text"'):
        opened(passages=(str(corpus), str(bad)), save_index_path=folder)
    assert content(tmp_path) == before

    def give_up(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(passage_index, "embed_corpus", give_up)
    with pytest.raises(RuntimeError, match="out of memory"):
        opened(passages=(str(corpus),), save_index_path=folder)
    assert content(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"] + ["index"] * there


class Boom:
    """Unpickled, it would say so."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("kind", ["flat", "ivfpq"])
def test_no_array_is_unpickled(opened, passages, saved, tmp_path, kind):
    """An array of objects in place of any .npy is refused, by name, without looking into it."""
    folder = tmp_path / "index"
    shutil.copytree(saved / kind, folder)
    files = sorted(folder.rglob("*.npy"))
    expected = {"flat": {"embeddings"}, "ivfpq": {"codes", "code_table", "centroids", "list_sizes", "numbers"}}[kind]
    names = {file.stem for file in files}
    assert names == expected | {"text.offsets", "tokens.offsets"}
    for file in files:
        whole = file.read_bytes()
        np.save(file, np.array([Boom()]), allow_pickle=True)
        with pytest.raises(UserError, match=file.stem.split(".")[0]):
            opened(load_index_path=folder, **KINDS[kind]).passages.tokens(
                passages.tokenizer, "{title} {text}", "retriever"
            )
        file.write_bytes(whole)
    opened(load_index_path=folder, **KINDS[kind])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"index\.json: format 2, not 1; build the index again"),
        ({"count": 299}, "299 vectors, but 300 passages"),
        ({"kind": "lsh", "index_mode": "faiss"}, "holds --index_mode faiss --faiss_index_type lsh"),
    ],
)
def test_what_index_json_must_say(opened, saved, tmp_path, changes, message):
    """Another version, another count, or a kind that nobody knows."""
    folder = tmp_path / "index"
    shutil.copytree(saved / "flat", folder)
    about = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(about | changes))
    with pytest.raises(UserError, match=message):
        opened(load_index_path=folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json: not JSON"):
        opened(load_index_path=folder)
