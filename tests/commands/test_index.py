"""`atlas index`: what it writes is what runs load, what it prints is true, and what it refuses it names."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.checkpoints.formats.torch_reader import load_torch
from atlas_jax.commands.main import USAGE, main
from atlas_jax.errors import UserError
from atlas_jax.retrieval import compress as compressing
from atlas_jax.retrieval.compress import Queries, drop_own_passage, exact_search
from atlas_jax.retrieval.faiss_index import FaissIndex
from atlas_jax.retrieval.formats import inspection
from atlas_jax.retrieval.formats.convert import FlatIndexFolder, convert
from atlas_jax.retrieval.formats.index_folder import Origin, read_about, read_vectors
from tests.commands.sample_run import SAMPLE, command

COUNT, DIM = 600, 16
MODEL = ["--model_path", SAMPLE / "model", "--reader_model_type", SAMPLE / "reader"]
MODEL += ["--retriever_model_path", SAMPLE / "retriever"]


pytestmark = pytest.mark.usefixtures("one_faiss_thread")


@pytest.fixture
def index(capsys):
    """Runs `atlas index` with these words, which must go well; returns what it printed."""

    def run(*words: object) -> str:
        assert main(["index", *map(str, words)]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refuse(refused):
    """The same where it must be refused."""
    return lambda words, *parts: refused(["index", *map(str, words)], *parts)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The folder of a run that wrote the index it built to `index/`."""
    folder = tmp_path_factory.mktemp("done")
    assert main(command(folder, save_index_path=folder / "index", retrieve_only=True)) == 0
    return folder


class Topics:
    """Passages around 20 topics, as a source of `convert`."""

    count, dim, origin = COUNT, DIM, Origin("r1", "{title} {text}", 200)

    def __init__(self):
        rng = np.random.default_rng(0)
        topics = rng.standard_normal((20, DIM))
        self.vectors = (topics[rng.integers(0, 20, COUNT)] + rng.standard_normal((COUNT, DIM))).astype(np.float16)

    def read(self, start, stop):
        return self.vectors[start:stop]

    def texts(self):
        return (b'{"id": "%d", "title": "%d", "text": "", "section": ""}' % (i, i) for i in range(COUNT))


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> Path:
    """A flat index."""
    folder = tmp_path_factory.mktemp("flat") / "index"
    convert(Topics(), folder, Topics.origin)
    return folder


def printed(text: str) -> dict[str, str]:
    """The values that `inspect` prints, by name."""
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def test_build_writes_what_a_run_would(index, done, tmp_path):
    """The index that `--save_index_path` writes, file by file; only what is tokenized for the reader is not there."""
    flags = ["--text_maxlength", 64, "--passages", done / "passages.jsonl", "--output", tmp_path / "index"]
    index("build", *MODEL, *flags)
    built = {str(path.relative_to(tmp_path / "index")): path for path in (tmp_path / "index").rglob("*.*")}
    for name, path in built.items():
        if path.is_file():
            assert path.read_bytes() == (done / "index" / name).read_bytes(), name
    assert {"index.json", "embeddings.npy", "passages/text.bin"} <= built.keys()
    assert len(list((tmp_path / "index" / "passages").glob("tokens-*"))) == 1


def test_converted_shards_are_searched_as_before(index, golden, tmp_path, monkeypatch, caplog):
    """One shard or four give the same files; without a model any retriever of the width may ask, and is told so."""
    for name in ("1shard", "4shards"):
        index("convert", "--load_index_path", golden / f"index_{name}", "--output", tmp_path / name)
    for file in ("embeddings.npy", "passages/text.bin", "index.json"):
        assert (tmp_path / "1shard" / file).read_bytes() == (tmp_path / "4shards" / file).read_bytes()
    vectors = np.load(tmp_path / "1shard" / "embeddings.npy")
    np.testing.assert_array_equal(vectors.T, np.load(golden / "batch.npz")["index_embeddings"])
    caplog.clear()
    flags = {"retrieve_only": True, "n_context": 5}
    for folder in (tmp_path / "1shard", golden / "index_1shard"):
        assert main(command(tmp_path, name=folder.name, load_index_path=folder, **flags)) == 0
        assert "does not say which retriever built it; make sure it is this one" in caplog.text
        caplog.clear()
    runs = [tmp_path / "runs" / name / "eval-step-1.jsonl" for name in ("1shard", "index_1shard")]
    assert runs[0].read_bytes() == runs[1].read_bytes()


def test_convert_binds_the_index_to_a_model(index, refuse, done, golden, tmp_path):
    """Its fingerprint is the one that `build` writes; a model other than the one that is known is refused."""
    source = ["convert", "--load_index_path", golden / "index_1shard"]
    index(*source, *MODEL, "--text_maxlength", 512, "--output", tmp_path / "bound")
    about = read_about(tmp_path / "bound")
    assert about["retriever"] == read_about(done / "index")["retriever"]
    assert (about["retriever_format"], about["max_length"]) == (None, 512)
    file = tmp_path / "bound" / "index.json"
    file.write_text(json.dumps(about | {"retriever": "r2"}))
    argv = ["convert", "--load_index_path", tmp_path / "bound", *MODEL, "--output", tmp_path / "no"]
    refuse(argv, "bound: built by another retriever than this one")
    index("convert", "--load_index_path", tmp_path / "bound", "--output", tmp_path / "copy")
    assert read_about(tmp_path / "copy") == about | {"retriever": "r2"}


@pytest.mark.parametrize("source", ["ours", "published"])
@pytest.mark.parametrize("shards", [1, 7, 60])
def test_back_into_any_number_of_shards(index, refuse, golden, tmp_path, source, shards):
    """Ours or four shards as one, seven or sixty: Python's pickle and our reader find what was there, and so do we."""
    folder = golden / "index_4shards"
    if source == "ours":
        index("convert", "--load_index_path", folder, "--output", tmp_path / "ours")
        folder = tmp_path / "ours"
    words = ["convert", "--load_index_path", folder, "--to", "published", "--output", tmp_path / "back"]
    index(*words, "--shards", shards)
    assert len(list((tmp_path / "back").iterdir())) == 2 * shards
    arrays = [load_torch(tmp_path / "back" / f"embeddings.{n}.pt") for n in range(shards)]
    assert {array.dtype for array in arrays} == {np.dtype(np.float16)}
    assert max(array.shape[1] for array in arrays) - min(array.shape[1] for array in arrays) <= 1
    np.testing.assert_array_equal(np.concatenate(arrays, 1), np.load(golden / "batch.npz")["index_embeddings"])
    files = [tmp_path / "back" / f"passages.{n}.pt" for n in range(shards)]
    original = pickle.loads((golden / "index_1shard" / "passages.0.pt").read_bytes())
    assert [row for file in files for row in pickle.loads(file.read_bytes())] == original
    again = tmp_path / "again"
    index("convert", "--load_index_path", tmp_path / "back", "--output", again)
    index("convert", "--load_index_path", golden / "index_1shard", "--output", tmp_path / "once")
    for file in ("embeddings.npy", "passages/text.bin"):
        assert (again / file).read_bytes() == (tmp_path / "once" / file).read_bytes()
    refuse([*words, "--shards", 2], "holds something else than an index; choose a new folder")
    refuse([*words[:-1], tmp_path / "no", "--shards", 241], "--shards 241: must be 1 to 240")


@pytest.mark.parametrize("kind", ["flat", "ivfflat", "ivfsq", "ivfpq", "pq"])
def test_compress_to_any_type(index, flat, tmp_path, kind, monkeypatch):
    """What is printed: recall, 1 for exact types and less for few bytes, and bytes; no vectors are kept or needed."""
    words = ["--faiss_index_type", kind, *(["--faiss_code_size", 4] if "pq" in kind else [])]
    out = index("compress", "--load_index_path", flat, "--output", tmp_path / "small", "--k", 10, *words)
    header, before, after = (line.split() for line in out.splitlines())
    assert header == ["bytes", "bytes/passage", "recall@10", "ms/query"]
    sizes = {name: sum(file.stat().st_size for file in folder.glob("*.*")) for name, folder in
             (("before", flat), ("after", tmp_path / "small"))}  # fmt: skip
    assert [before[1], after[1]] == [str(sizes["before"]), str(sizes["after"])]
    assert float(before[3]) == 1
    assert {"flat": 0.999, "ivfflat": 0.999, "ivfsq": 0.7}.get(kind, 0.2) <= float(after[3])
    assert float(after[3]) <= {"flat": 1, "ivfflat": 1}.get(kind, 0.95)
    assert not (tmp_path / "small" / "embeddings.npy").exists()
    monkeypatch.setattr(inspection, "read_vectors", pytest.fail)
    about = read_about(tmp_path / "small")
    assert (about["retriever"], about["max_length"]) == ("r1", 200)
    loaded = FaissIndex.load(tmp_path / "small", about)
    assert loaded.search(np.ones((1, DIM), np.float32), 3).numbers.shape == (1, 3)
    assert printed(index("inspect", tmp_path / "small"))["kind"] == f"faiss {kind}"


def test_a_compressed_index_outlives_the_flat_one(index, tmp_path):
    """Its passages are links or copies, never a path into the folder it was made of."""
    convert(Topics(), tmp_path / "flat", Topics.origin)
    index(
        "compress", "--load_index_path", tmp_path / "flat", "--output", tmp_path / "sq", "--faiss_index_type", "ivfsq"
    )
    shutil.rmtree(tmp_path / "flat")
    assert printed(index("inspect", tmp_path / "sq"))["first passage"] == "0"


def test_recall_with_questions(index, refuse, golden, tmp_path):
    """Questions embedded by the model that built the index; rows without one, and another model, are refused."""
    index("convert", "--load_index_path", golden / "index_1shard", *MODEL, "--output", tmp_path / "flat")
    asked = ["--sample", 5, *MODEL]
    words = [
        "compress",
        "--load_index_path",
        tmp_path / "flat",
        "--faiss_index_type",
        "ivfflat",
        "--output",
        tmp_path / "o",
    ]
    out = index(*words, "--queries", SAMPLE / "mmlu.jsonl", *asked)
    assert float(out.splitlines()[2].split()[3]) > 0.99
    refuse([*words, "--queries", golden / "passages.jsonl", *asked], "passages.jsonl:", "no `question`")
    (tmp_path / "flat" / "index.json").write_text(json.dumps(read_about(tmp_path / "flat") | {"retriever": "r2"}))
    refuse([*words, "--queries", SAMPLE / "mmlu.jsonl", *asked], "built by another retriever than this one")


def test_exact_search_is_exact(monkeypatch):
    """The best by numpy over all chunks, without the query's own passage, also where that is not among the best."""
    vectors = Topics().vectors
    monkeypatch.setattr(compressing, "CHUNK_ROWS", 70)
    own = np.array([3, 599, 0])
    queries = np.stack([vectors[3], vectors[599], -vectors[0]]).astype(np.float32)  # the third does not find itself
    scores = queries @ vectors.T.astype(np.float32)
    scores[np.arange(3), own] = -np.inf
    expected = np.argsort(-scores, axis=1)[:, :10]
    np.testing.assert_array_equal(exact_search(vectors, Queries(queries, own), 10)[0], expected)
    numbers = np.array([[4, 5, 6], [4, 5, 6]])
    np.testing.assert_array_equal(drop_own_passage(numbers, np.array([5, -1])), [[4, 6], [4, 5]])


def test_inspect_says_what_is_there(index, flat, golden):
    """Ours and the published form: figures that the files have."""
    ours = printed(index("inspect", flat))
    assert (ours["form"], ours["kind"], ours["passages"], ours["dim"]) == ("ours", "flat (exact)", "600", "16")
    assert (ours["retriever"], ours["max_length"]) == ("r1", "200")
    assert int(ours["bytes"]) == sum(path.stat().st_size for path in flat.rglob("*") if path.is_file())
    published = printed(index("inspect", golden / "index_4shards"))
    assert (published["form"], published["passages"], published["dim"]) == ("published", "240", "48")
    assert published["shards"] == "4 of 60 to 60 passages"
    assert int(published["bytes of vectors"]) == sum(f.stat().st_size for f in (golden / "index_4shards").glob("emb*"))


@pytest.mark.parametrize("form", ["flat", "ivfpq", "published"])
def test_inspect_finds_what_is_not_whole(index, refuse, flat, golden, tmp_path, form):
    """Each file cut short or gone is named; untouched, there is nothing to say."""
    folder = tmp_path / "index"
    if form == "ivfpq":
        index(
            "compress",
            "--load_index_path",
            flat,
            "--output",
            folder,
            "--faiss_index_type",
            form,
            "--faiss_code_size",
            4,
        )
    else:
        shutil.copytree(flat if form == "flat" else golden / "index_4shards", folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == {"flat": 5, "ivfpq": 9, "published": 8}[form]
    for file in files:
        whole = file.read_bytes()
        file.unlink()
        refuse(["inspect", folder], "" if file.name == "index.json" else file.name)
        for cut in (whole[: len(whole) // 2], b""):
            file.write_bytes(cut)
            refuse(["inspect", folder], file.name)
        file.write_bytes(whole)
    index("inspect", folder)


def test_parts_built_apart_are_the_whole(index, refuse, flat, golden, tmp_path):
    """Merging the same index twice has every passage twice; its folder is not to be written meanwhile."""
    index("merge", flat, flat, "--output", tmp_path / "twice")
    found = FlatIndexFolder(tmp_path / "twice")
    np.testing.assert_array_equal(found.read(0, 2 * COUNT), np.concatenate([Topics().vectors] * 2))
    assert found.store.take([COUNT + 7])[0]["id"] == "7"
    refuse(["merge", flat, tmp_path / "twice", "--output", tmp_path / "twice"], "is the folder that is read")
    refuse(["merge", flat, golden / "index_1shard", "--output", tmp_path / "no"], "no index of ours", "convert")
    assert len(read_vectors(tmp_path / "twice", read_about(tmp_path / "twice"))) == 2 * COUNT


def test_what_is_refused(refuse, flat, golden, tmp_path):
    """One line with the value and a remedy, before any work, and what is there stays."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    compress = ["compress", "--load_index_path", flat, "--output", tmp_path / "o"]
    output = ["--output", tmp_path / "o"]
    refuse(["compres"], "did you mean compress?")
    refuse(["build", *MODEL, *output], "no passages")
    refuse(["build", *MODEL, *output, "--passages", "gone.jsonl"], "--passages gone.jsonl: no such file")
    refuse(["build", *output, "--passages", golden / "passages.jsonl"], "--reader_model_type is missing")
    refuse(["convert", "--load_index_path", tmp_path / "gone", *output], "gone: no such folder")
    refuse(["convert", "--load_index_path", flat, "--output", flat], "is the folder that is read; choose another")
    refuse(
        ["convert", "--load_index_path", flat, "--output", tmp_path / "thesis"], "holds something else than an index"
    )
    refuse(["convert", "--load_index_path", tmp_path / "thesis", *output], "neither index.json nor embeddings.0.pt")
    refuse(compress, "--faiss_index_type is missing")
    refuse([*compress, "--faiss_index_type", "pq"], "needs --faiss_code_size")
    refuse([*compress, "--faiss_index_type", "pq", "--faiss_code_size", 5], "divisor of the vectors' width, 16")
    refuse([*compress, "--faiss_index_type", "ivfsq", "--k", COUNT], "--k 600: must be 1 to 599")
    refuse([*compress, "--faiss_index_type", "ivfsq", "--sample", 0], "--sample 0: must be at least 1")
    refuse([*compress, "--faiss_index_type", "ivfsq", "--colour"], "--colour")
    refuse(["inspect", tmp_path / "gone"], "gone: no such folder")
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "o").exists()


def test_a_compressed_index_is_not_compressed_again(index, refuse, flat, tmp_path):
    """Its vectors are gone: compress, convert and merge say so."""
    index("compress", "--load_index_path", flat, "--output", tmp_path / "sq", "--faiss_index_type", "ivfsq")
    for words in (["compress", "--faiss_index_type", "ivfsq"], ["convert"]):
        argv = [*words, "--load_index_path", tmp_path / "sq", "--output", tmp_path / "o"]
        refuse(argv, "sq: a faiss ivfsq index, without the vectors; take the flat one")
    refuse(["merge", flat, tmp_path / "sq", "--output", tmp_path / "o"], "without the vectors")
    with pytest.raises(UserError, match="without the vectors"):
        FlatIndexFolder(tmp_path / "sq")


@pytest.mark.parametrize("name", ["build", "convert", "compress", "inspect", "merge"])
def test_help_teaches(index, name):
    """Each command's --help has an example of itself that parses as one; the overview names them all."""
    assert f"atlas index {name} " in index(name, "--help").split("example")[1]
    assert name in index("--help")
    assert "atlas index --help" in USAGE
