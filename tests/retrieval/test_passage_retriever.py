"""Search and rerank against the reference; passages that come with the rows."""

import json

import jax
import numpy as np
import pytest

from atlas_jax.data.tokens import Tokenizer
from atlas_jax.retrieval.embedder import Embedder, embed_corpus
from atlas_jax.retrieval.flat_index import FlatIndex
from atlas_jax.retrieval.passage_index import PassageIndex
from atlas_jax.retrieval.passage_retriever import PassageRetriever
from atlas_jax.retrieval.passage_source import PassageSource, RowPassages
from atlas_jax.retrieval.rerank import Reranker
from atlas_jax.tasks import Example


@pytest.fixture(scope="module")
def index(batch, mesh):
    """The reference's vectors of the 240 golden passages."""
    return FlatIndex.from_array(np.ascontiguousarray(batch["index_embeddings"].T, np.float16), mesh)


@pytest.fixture(scope="module")
def make(queries, passages, tokens, store):
    """(index, candidates) to a retriever that embeds eight questions at a time, and reranks so many candidates."""

    def make(index, candidates=0, embedder=passages):
        reranker = Reranker(embedder, tokens, candidates, 8) if candidates else None
        return PassageRetriever(PassageIndex(index, store, "fingerprint"), queries, passages, 8, reranker)

    return make


@pytest.fixture(scope="module")
def retriever(index, make):
    """Without reranking."""
    return make(index)


def ids(store, numbers):
    return [[passage["id"] for passage in store.take(row)] for row in numbers]


def example(*passages):
    return Example("who?", None, [], passages=[{"title": "", "text": text} for text in passages])


def test_search_finds_what_the_reference_finds(retriever, store, batch, questions):
    """Text in, the reference's passages and scores out; fewer questions than a batch holds are no different."""
    found = retriever.begin_search(questions["query"], 5)()
    np.testing.assert_allclose(found.scores, batch["retrieved_scores"], rtol=0, atol=2e-2)
    assert ids(store, found.numbers) == batch["retrieved_ids"].astype(str).tolist()
    alone = retriever.begin_search(questions["query"][2:3], 5)()
    np.testing.assert_array_equal(alone.numbers, found.numbers[2:3])
    np.testing.assert_allclose(alone.scores, found.scores[2:3], rtol=1e-6)


def test_reranking_equals_the_reference(index, make, store, golden, questions):
    """20 candidates, then 5: its scores, and its passages where no score is within the error of its float16."""
    expected = json.loads((golden / "meta.json").read_text())["rerank"]
    retriever = make(index, 20)
    found = retriever.begin_search(questions["query"], 5)()
    np.testing.assert_allclose(found.scores, expected["scores"], rtol=0, atol=2e-2)
    gaps = -np.diff(retriever.begin_search(questions["query"], 6)().scores, axis=1)
    apart = np.minimum(gaps, np.pad(gaps, ((0, 0), (1, 0)), constant_values=np.inf)[:, :-1]) > 5e-3
    assert (np.asarray(ids(store, found.numbers)) == np.asarray(expected["ids"]))[apart].all()
    assert apart.sum() >= 18  # of 20
    assert found.scores.dtype == np.float32
    assert found.numbers.dtype == np.int64


def test_reranking_all_candidates_permutes_them(index, make, retriever, questions):
    """The passages of the plain search in the order of their new scores; more candidates can only raise a score."""
    plain = retriever.begin_search(questions["query"], 20)()
    found = make(index, 20).begin_search(questions["query"], 20)()
    np.testing.assert_array_equal(np.sort(found.numbers), np.sort(plain.numbers))
    assert (np.diff(found.scores) <= 0).all()
    more = make(index, 60).begin_search(questions["query"], 20)()
    assert (more.scores >= found.scores - 1e-5).all()


def test_reranking_corrects_a_stale_index(make, passages, tokens, mesh, questions):
    """An index of noise has the candidates in a wrong order; the new vectors give the order of a fresh index."""
    fresh = np.empty((240, 48), np.float16)
    embed_corpus(passages, tokens, fresh, 8, lambda more: None)
    noise = np.random.default_rng(0).standard_normal(fresh.shape).astype(np.float16)
    good, stale = (FlatIndex.from_array(array, mesh) for array in (fresh, noise))
    wanted = make(good).begin_search(questions["query"], 5)()
    found = make(stale, 240).begin_search(questions["query"], 5)()
    np.testing.assert_array_equal(found.numbers, wanted.numbers)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=0, atol=2e-2)
    assert not np.array_equal(make(stale).begin_search(questions["query"], 5)().numbers, wanted.numbers)


class Rounding(Embedder):
    """The vector of passage `n` is `(n // 10, 0, 0, ..)`: tens of passages score alike."""

    def __init__(self, like):
        self.program, self.dim = like.program, like.dim

    def batches(self, tokens, parts, batch):
        (numbers,) = parts
        for at in range(0, len(numbers), 7):
            part = np.append(numbers[at : at + 7][::-1], -1)
            yield part, jax.numpy.asarray(np.pad(part[:, None] // 10, ((0, 0), (0, 47))).astype(np.float32))


def test_equal_scores_keep_the_order_of_the_index(index, make, retriever, passages, questions):
    """Whatever order that was; the counter-case is the order of the numbers."""
    query = questions["query"][:1]
    sign = np.sign(np.asarray(retriever.queries.embed_queries(query, 8))[0, 0])
    plain = retriever.begin_search(query, 60)().numbers[0]
    found = make(index, 60, Rounding(passages)).begin_search(query, 60)().numbers[0]
    assert found.tolist() == sorted(plain.tolist(), key=lambda number: -sign * (number // 10))  # sorted() is stable
    assert found.tolist() != sorted(plain.tolist(), key=lambda number: (-sign * (number // 10), number))


def test_a_retriever_is_a_passage_source(retriever, store, questions):
    """Every example has all its n passages."""
    assert isinstance(retriever, PassageSource)
    found = retriever.begin_retrieval([Example(query, None, []) for query in questions["query"]], 3)()
    np.testing.assert_array_equal(found.numbers, retriever.begin_search(questions["query"], 3)().numbers)
    assert found.store is store
    assert found.valid.all()
    assert found.valid.shape == (4, 3)
    assert retriever.programs == (retriever.queries.program,)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_rows_bring_their_own(golden, n):
    """The first n of each in their order; where there are fewer, `valid` says so."""
    given = [["a", "b", "c"], ["d"], [], ["e", "f"]]
    found = RowPassages().begin_retrieval([example(*texts) for texts in given], n)()
    assert isinstance(RowPassages(), PassageSource)
    assert found.numbers.shape == found.valid.shape == (4, n)
    assert found.valid.sum(axis=1).tolist() == [min(len(texts), n) for texts in given]
    for texts, numbers, there in zip(given, found.numbers, found.valid, strict=True):
        assert [passage["text"] for passage in found.store.take(numbers[there])] == texts[:n]
        assert len(found.store.take(numbers)) == n  # the others are of some passage, and masked
    tokenizer = Tokenizer.load(golden / "assets" / "reader")
    first = found.store.tokens(tokenizer, "{text}", "reader").take(found.numbers[0])
    assert [ids.tolist() for ids in first[:3]] == tokenizer.ids(["a", "b", "c"][:n])


@pytest.mark.parametrize("passages", [None, []])
def test_rows_without_any_passage(passages):
    """Nothing is there, and there is still something to take."""
    found = RowPassages().begin_retrieval([Example("who?", None, [], passages=passages)] * 2, 3)()
    assert not found.valid.any()
    assert found.valid.shape == (2, 3)
    assert found.store.take(found.numbers[0]) == [{"title": "", "text": ""}] * 3


def test_rows_are_left_as_they_are():
    """A passage is a copy: what a reader's format adds does not get into the row."""
    one = example("a")
    RowPassages().begin_retrieval([one], 1)().store.take([0])[0]["text"] = "changed"
    assert one.passages[0]["text"] == "a"
