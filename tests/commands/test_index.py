"""`atlas index`: the indexes that it writes are those that runs load, its figures are right, its refusals are named."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.checkpoints.formats.torch_reader import load_torch
from atlas_jax.commands.main import USAGE, main
from atlas_jax.errors import UserError
from atlas_jax.retrieval import compress as compressing
from atlas_jax.retrieval.compress import RecallQueries, drop_own_passage, exact_search
from atlas_jax.retrieval.faiss_index import FaissIndex
from atlas_jax.retrieval.formats import inspection
from atlas_jax.retrieval.formats.convert import FlatIndexFolder, convert
from atlas_jax.retrieval.formats.index_folder import Origin, read_metadata, read_vectors
from atlas_jax.retrieval.passage_store import PassageStore
from tests.commands.sample_evaluation import SAMPLE, evaluate_argv

COUNT, DIM = 600, 16
MODEL_FLAGS = ["--model_path", SAMPLE / "model", "--reader_model_type", SAMPLE / "reader"]
MODEL_FLAGS += ["--retriever_model_path", SAMPLE / "retriever"]


pytestmark = pytest.mark.usefixtures("one_faiss_thread")


@pytest.fixture
def run_index(capsys):
    """A function that runs `atlas index` with these arguments, asserts success and returns its stdout."""

    def run(*argv: object) -> str:
        assert main(["index", *map(str, argv)]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def index_fails(assert_refused):
    """A function that runs `atlas index` with these arguments and asserts that it fails as `assert_refused` says."""
    return lambda argv, *parts: assert_refused(["index", *map(str, argv)], *parts)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """The folder of a run of `atlas evaluate` that wrote its index to `index/`."""
    folder = tmp_path_factory.mktemp("done")
    assert main(evaluate_argv(folder, save_index_path=folder / "index", retrieve_only=True)) == 0
    return folder


class TopicPassages:
    """An `IndexSource` of random vectors clustered around 20 topics."""

    count, dim, origin = COUNT, DIM, Origin("r1", "{title} {text}", 200)

    def __init__(self):
        rng = np.random.default_rng(0)
        topics = rng.standard_normal((20, DIM))
        self.vectors = (topics[rng.integers(0, 20, COUNT)] + rng.standard_normal((COUNT, DIM))).astype(np.float16)

    def read(self, start, stop):
        return self.vectors[start:stop]

    def passages_json(self):
        return (b'{"id": "%d", "title": "%d", "text": "", "section": ""}' % (i, i) for i in range(COUNT))


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> Path:
    """The folder of a flat index of `TopicPassages`."""
    folder = tmp_path_factory.mktemp("flat") / "index"
    convert(TopicPassages(), folder, TopicPassages.origin)
    return folder


def parse_inspection(text: str) -> dict[str, str]:
    """The values that `atlas index inspect` printed, by name."""
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def test_build_writes_the_index_that_a_run_writes(run_index, finished_run, tmp_path):
    """Each file that `build` writes equals that of `--save_index_path`, which also has the passages' reader tokens."""
    flags = ["--text_maxlength", 64, "--passages", finished_run / "passages.jsonl", "--output", tmp_path / "index"]
    run_index("build", *MODEL_FLAGS, *flags)
    built = {str(path.relative_to(tmp_path / "index")): path for path in (tmp_path / "index").rglob("*.*")}
    for name, path in built.items():
        if path.is_file():
            assert path.read_bytes() == (finished_run / "index" / name).read_bytes(), name
    assert {"index.json", "embeddings.npy", "passages/text.bin"} <= built.keys()
    assert len(list((tmp_path / "index" / "passages").glob("tokens-*"))) == 1


def test_converted_shards_give_the_same_predictions(run_index, golden, published, tmp_path, monkeypatch, caplog):
    """One shard and four convert to the same files; without a model, a retriever of the same width gets a warning."""
    for name in ("1shard", "4shards"):
        run_index("convert", "--load_index_path", golden / f"index_{name}", "--output", tmp_path / name)
    for file in ("embeddings.npy", "passages/text.bin", "index.json"):
        assert (tmp_path / "1shard" / file).read_bytes() == (tmp_path / "4shards" / file).read_bytes()
    vectors = np.load(tmp_path / "1shard" / "embeddings.npy")
    np.testing.assert_array_equal(vectors.T, np.load(golden / "batch.npz")["index_embeddings"])
    caplog.clear()
    flags = {"retrieve_only": True, "n_context": 5}
    for folder in (tmp_path / "1shard", published / "index_1shard"):
        assert main(evaluate_argv(tmp_path, name=folder.name, load_index_path=folder, **flags)) == 0
        assert "does not say which retriever built it; make sure it is this one" in caplog.text
        caplog.clear()
    predictions = [tmp_path / "runs" / name / "eval-step-1.jsonl" for name in ("1shard", "index_1shard")]
    assert predictions[0].read_bytes() == predictions[1].read_bytes()


def test_convert_stores_the_fingerprint_of_the_model(run_index, index_fails, finished_run, golden, tmp_path):
    """The fingerprint is the one that `build` writes; an index with another model's fingerprint is refused."""
    source = ["convert", "--load_index_path", golden / "index_1shard"]
    run_index(*source, *MODEL_FLAGS, "--text_maxlength", 512, "--output", tmp_path / "bound")
    metadata = read_metadata(tmp_path / "bound")
    assert metadata["retriever"] == read_metadata(finished_run / "index")["retriever"]
    assert (metadata["retriever_format"], metadata["max_length"]) == (None, 512)
    file = tmp_path / "bound" / "index.json"
    file.write_text(json.dumps(metadata | {"retriever": "r2"}))
    argv = ["convert", "--load_index_path", tmp_path / "bound", *MODEL_FLAGS, "--output", tmp_path / "no"]
    index_fails(argv, "bound: built by another retriever than this one")
    run_index("convert", "--load_index_path", tmp_path / "bound", "--output", tmp_path / "copy")
    assert read_metadata(tmp_path / "copy") == metadata | {"retriever": "r2"}


@pytest.mark.parametrize("source", ["ours", "published"])
@pytest.mark.parametrize("shards", [1, 7, 60])
def test_an_index_is_written_as_any_number_of_published_shards(
    run_index, index_fails, golden, tmp_path, source, shards
):
    """Pickle, `load_torch` and `convert` read the original passages and vectors from 1, 7 or 60 shards."""
    folder = golden / "index_4shards"
    if source == "ours":
        run_index("convert", "--load_index_path", folder, "--output", tmp_path / "ours")
        folder = tmp_path / "ours"
    argv = ["convert", "--load_index_path", folder, "--to", "published", "--output", tmp_path / "back"]
    run_index(*argv, "--shards", shards)
    assert len(list((tmp_path / "back").iterdir())) == 2 * shards
    arrays = [load_torch(tmp_path / "back" / f"embeddings.{n}.pt") for n in range(shards)]
    assert {array.dtype for array in arrays} == {np.dtype(np.float16)}
    assert max(array.shape[1] for array in arrays) - min(array.shape[1] for array in arrays) <= 1
    np.testing.assert_array_equal(np.concatenate(arrays, 1), np.load(golden / "batch.npz")["index_embeddings"])
    files = [tmp_path / "back" / f"passages.{n}.pt" for n in range(shards)]
    original = pickle.loads((golden / "index_1shard" / "passages.0.pt").read_bytes())
    assert [row for file in files for row in pickle.loads(file.read_bytes())] == original
    again = tmp_path / "again"
    run_index("convert", "--load_index_path", tmp_path / "back", "--output", again)
    run_index("convert", "--load_index_path", golden / "index_1shard", "--output", tmp_path / "once")
    for file in ("embeddings.npy", "passages/text.bin"):
        assert (again / file).read_bytes() == (tmp_path / "once" / file).read_bytes()
    index_fails([*argv, "--shards", 2], "holds something else than an index; choose a new folder")
    index_fails([*argv[:-1], tmp_path / "no", "--shards", 241], "--shards 241: must be 1 to 240")


@pytest.mark.parametrize("kind", ["flat", "ivfflat", "ivfsq", "ivfpq", "pq"])
def test_compress_prints_recall_and_bytes_of_every_type(run_index, flat, tmp_path, kind, monkeypatch):
    """Recall is 1 for exact types and less for fewer bytes; the compressed index has no vectors and needs none."""
    options = ["--faiss_index_type", kind, *(["--faiss_code_size", 4] if "pq" in kind else [])]
    out = run_index("compress", "--load_index_path", flat, "--output", tmp_path / "small", "--k", 10, *options)
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
    metadata = read_metadata(tmp_path / "small")
    assert (metadata["retriever"], metadata["max_length"]) == ("r1", 200)
    loaded = FaissIndex.load(tmp_path / "small", metadata)
    assert loaded.search(np.ones((1, DIM), np.float32), 3).numbers.shape == (1, 3)
    assert parse_inspection(run_index("inspect", tmp_path / "small"))["kind"] == f"faiss {kind}"


def test_a_compressed_index_does_not_need_the_flat_one(run_index, tmp_path):
    """A compressed index has hard links to, or copies of, the passage files, not paths into the flat index."""
    convert(TopicPassages(), tmp_path / "flat", TopicPassages.origin)
    run_index(
        "compress", "--load_index_path", tmp_path / "flat", "--output", tmp_path / "sq", "--faiss_index_type", "ivfsq"
    )
    shutil.rmtree(tmp_path / "flat")
    assert parse_inspection(run_index("inspect", tmp_path / "sq"))["first passage"] == "0"


def test_recall_is_measured_with_questions_of_a_file(run_index, index_fails, golden, tmp_path):
    """The model that built the index embeds the questions; rows without one, and another model, are refused."""
    run_index("convert", "--load_index_path", golden / "index_1shard", *MODEL_FLAGS, "--output", tmp_path / "flat")
    query_flags = ["--sample", 5, *MODEL_FLAGS]
    argv = [
        "compress",
        "--load_index_path",
        tmp_path / "flat",
        "--faiss_index_type",
        "ivfflat",
        "--output",
        tmp_path / "o",
    ]
    out = run_index(*argv, "--queries", SAMPLE / "mmlu.jsonl", *query_flags)
    assert float(out.splitlines()[2].split()[3]) > 0.99
    index_fails([*argv, "--queries", golden / "passages.jsonl", *query_flags], "passages.jsonl:", "no `question`")
    (tmp_path / "flat" / "index.json").write_text(json.dumps(read_metadata(tmp_path / "flat") | {"retriever": "r2"}))
    index_fails([*argv, "--queries", SAMPLE / "mmlu.jsonl", *query_flags], "built by another retriever than this one")


def test_exact_search_finds_the_best_of_all_chunks_but_the_own_passage(monkeypatch):
    """The result is NumPy's without the query's own passage, also if that passage is not among the best."""
    vectors = TopicPassages().vectors
    monkeypatch.setattr(compressing, "CHUNK_ROWS", 70)
    own = np.array([3, 599, 0])
    queries = np.stack([vectors[3], vectors[599], -vectors[0]]).astype(np.float32)  # the third's own passage scores low
    scores = queries @ vectors.T.astype(np.float32)
    scores[np.arange(3), own] = -np.inf
    expected = np.argsort(-scores, axis=1)[:, :10]
    np.testing.assert_array_equal(exact_search(vectors, RecallQueries(queries, own), 10)[0], expected)
    numbers = np.array([[4, 5, 6], [4, 5, 6]])
    np.testing.assert_array_equal(drop_own_passage(numbers, np.array([5, -1])), [[4, 6], [4, 5]])


def test_inspect_prints_the_figures_of_the_files(run_index, flat, golden):
    """Figures of an index folder and of the published shards."""
    folder = parse_inspection(run_index("inspect", flat))
    assert (folder["form"], folder["kind"], folder["passages"], folder["dim"]) == ("ours", "flat (exact)", "600", "16")
    assert (folder["retriever"], folder["max_length"]) == ("r1", "200")
    assert int(folder["bytes"]) == sum(path.stat().st_size for path in flat.rglob("*") if path.is_file())
    shards = parse_inspection(run_index("inspect", golden / "index_4shards"))
    assert (shards["form"], shards["passages"], shards["dim"]) == ("published", "240", "48")
    assert shards["shards"] == "4 of 60 to 60 passages"
    assert int(shards["bytes of vectors"]) == sum(f.stat().st_size for f in (golden / "index_4shards").glob("emb*"))


@pytest.mark.parametrize("form", ["flat", "ivfpq", "published"])
def test_inspect_names_truncated_and_missing_files(run_index, index_fails, flat, golden, tmp_path, form):
    """Each file in turn is missing, cut in half and empty; with all files intact `inspect` succeeds."""
    folder = tmp_path / "index"
    if form == "ivfpq":
        run_index(
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
        index_fails(["inspect", folder], "" if file.name == "index.json" else file.name)
        for cut in (whole[: len(whole) // 2], b""):
            file.write_bytes(cut)
            index_fails(["inspect", folder], file.name)
        file.write_bytes(whole)
    run_index("inspect", folder)


def test_merge_concatenates_indexes(run_index, index_fails, flat, golden, tmp_path):
    """Merging indexes has the passages of both, in order; --output may not be one of the indexes that are merged."""
    other = copy_with_ids(flat, tmp_path / "other", lambda passage: passage | {"id": f"other {passage['id']}"})
    run_index("merge", other, flat, "--output", tmp_path / "twice")
    merged = FlatIndexFolder(tmp_path / "twice")
    np.testing.assert_array_equal(merged.read(0, 2 * COUNT), np.concatenate([TopicPassages().vectors] * 2))
    assert merged.store.take([COUNT + 7])[0]["id"] == "7"
    index_fails(["merge", flat, tmp_path / "twice", "--output", tmp_path / "twice"], "is the folder that is read")
    index_fails(["merge", flat, golden / "index_1shard", "--output", tmp_path / "no"], "no index of ours", "convert")
    assert len(read_vectors(tmp_path / "twice", read_metadata(tmp_path / "twice"))) == 2 * COUNT


def copy_with_ids(index: Path, copy: Path, change: Callable[[dict], dict]) -> Path:
    """Copies an index, with its passages changed."""
    shutil.copytree(index, copy)
    store = PassageStore.open(index / "passages")
    PassageStore.build(map(change, store.take(np.arange(len(store)))), copy / "passages")
    return copy


def test_merge_names_passages_that_are_in_two_parts(run_index, index_fails, flat, tmp_path, caplog):
    """An index and itself, by whatever path, a copy, or a part of it are refused; an id for another text is logged."""
    output = ["--output", tmp_path / "merged"]
    (tmp_path / "link").symlink_to(flat)
    index_fails(["merge", flat, flat, *output], f"{flat}: is to be merged with itself")
    index_fails(["merge", flat, tmp_path / "link", *output], "is to be merged with itself", "link")
    copy = copy_with_ids(flat, tmp_path / "copy", lambda passage: passage)
    index_fails(["merge", flat, copy, *output], f"{copy}: ids of {COUNT} of its passages", "with the same text")
    new_ids = copy_with_ids(flat, tmp_path / "a", lambda p: p if p["id"] == "7" else p | {"id": f"new {p['id']}"})
    index_fails(["merge", flat, new_ids, *output], "ids of 1 of its passages, such as '7',")
    other = copy_with_ids(flat, tmp_path / "b", lambda passage: passage | {"text": f"other {passage['text']}"})
    run_index("merge", flat, other, *output)
    assert f"{other}: ids of {COUNT} of its passages, such as " in caplog.text
    assert FlatIndexFolder(tmp_path / "merged").count == 2 * COUNT


def test_bad_arguments_are_refused(index_fails, flat, golden, tmp_path):
    """One line with the value and a remedy; nothing is written and existing files are unchanged."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    compress = ["compress", "--load_index_path", flat, "--output", tmp_path / "o"]
    output = ["--output", tmp_path / "o"]
    index_fails(["compres"], "did you mean compress?")
    index_fails(["build", *MODEL_FLAGS, *output], "no passages")
    index_fails(["build", *MODEL_FLAGS, *output, "--passages", "gone.jsonl"], "--passages gone.jsonl: no such file")
    index_fails(["build", *output, "--passages", golden / "passages.jsonl"], "--reader_model_type is missing")
    index_fails(["convert", "--load_index_path", tmp_path / "gone", *output], "gone: no such folder")
    index_fails(["convert", "--load_index_path", flat, "--output", flat], "is the folder that is read; choose another")
    index_fails(
        ["convert", "--load_index_path", flat, "--output", tmp_path / "thesis"], "holds something else than an index"
    )
    index_fails(
        ["convert", "--load_index_path", tmp_path / "thesis", *output], "neither index.json nor embeddings.0.pt"
    )
    index_fails(compress, "--faiss_index_type is missing")
    index_fails([*compress, "--faiss_index_type", "pq"], "needs --faiss_code_size")
    index_fails([*compress, "--faiss_index_type", "pq", "--faiss_code_size", 5], "divisor of the vectors' width, 16")
    index_fails([*compress, "--faiss_index_type", "ivfsq", "--k", COUNT], "--k 600: must be 1 to 599")
    index_fails([*compress, "--faiss_index_type", "ivfsq", "--sample", 0], "--sample 0: must be at least 1")
    index_fails([*compress, "--faiss_index_type", "ivfsq", "--colour"], "--colour")
    index_fails(["inspect", tmp_path / "gone"], "gone: no such folder")
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "o").exists()


def test_a_compressed_index_is_no_source_of_other_commands(run_index, index_fails, flat, tmp_path):
    """compress, convert and merge refuse it, since it has no vectors."""
    run_index("compress", "--load_index_path", flat, "--output", tmp_path / "sq", "--faiss_index_type", "ivfsq")
    for command in (["compress", "--faiss_index_type", "ivfsq"], ["convert"]):
        argv = [*command, "--load_index_path", tmp_path / "sq", "--output", tmp_path / "o"]
        index_fails(argv, "sq: a faiss ivfsq index, without the vectors; take the flat one")
    index_fails(["merge", flat, tmp_path / "sq", "--output", tmp_path / "o"], "without the vectors")
    with pytest.raises(UserError, match="without the vectors"):
        FlatIndexFolder(tmp_path / "sq")


@pytest.mark.parametrize("name", ["build", "convert", "compress", "inspect", "merge"])
def test_help_has_an_example_of_each_command(run_index, name):
    """Each command's --help has an example of itself; `atlas index --help` names all commands."""
    assert f"atlas index {name} " in run_index(name, "--help").split("example")[1]
    assert name in run_index("--help")
    assert "atlas index --help" in USAGE
