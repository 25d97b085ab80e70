"""Reranking against the reference, and its effect on the order of passages."""

import json

import jax
import numpy as np

from atlas_jax.retrieval.embedder import Embedder, embed_corpus
from atlas_jax.retrieval.flat_index import FlatIndex


def test_reranking_equals_the_reference(golden_index, make_retriever, passage_ids, golden, golden_texts):
    """The best 5 of 20 candidates: the reference's scores, and its passages where float16 rounding cannot swap two."""
    expected = json.loads((golden / "meta.json").read_text())["rerank"]
    retriever = make_retriever(golden_index, 20)
    found = retriever.begin_search(golden_texts["query"], 5)()
    np.testing.assert_allclose(found.scores, expected["scores"], rtol=0, atol=2e-2)
    gaps = -np.diff(retriever.begin_search(golden_texts["query"], 6)().scores, axis=1)
    distinct = np.minimum(gaps, np.pad(gaps, ((0, 0), (1, 0)), constant_values=np.inf)[:, :-1]) > 5e-3
    assert (np.asarray(passage_ids(found.numbers)) == np.asarray(expected["ids"]))[distinct].all()
    assert distinct.sum() >= 18  # of 20
    assert found.scores.dtype == np.float32
    assert found.numbers.dtype == np.int64


def test_reranking_all_candidates_permutes_them(golden_index, make_retriever, retriever, golden_texts):
    """The passages of the plain search, sorted by their new scores; more candidates can only raise a score."""
    plain = retriever.begin_search(golden_texts["query"], 20)()
    found = make_retriever(golden_index, 20).begin_search(golden_texts["query"], 20)()
    np.testing.assert_array_equal(np.sort(found.numbers), np.sort(plain.numbers))
    assert (np.diff(found.scores) <= 0).all()
    wider = make_retriever(golden_index, 60).begin_search(golden_texts["query"], 20)()
    assert (wider.scores >= found.scores - 1e-5).all()


def test_reranking_corrects_a_stale_index(make_retriever, passage_embedder, retriever_tokens, mesh, golden_texts):
    """An index of random vectors has the candidates in a wrong order; reranking gives the order of a fresh index."""
    fresh = np.empty((240, 48), np.float16)
    embed_corpus(passage_embedder, retriever_tokens, fresh, 8, lambda count: None)
    noise = np.random.default_rng(0).standard_normal(fresh.shape).astype(np.float16)
    fresh_index, stale_index = (FlatIndex.from_array(array, mesh) for array in (fresh, noise))
    expected = make_retriever(fresh_index).begin_search(golden_texts["query"], 5)()
    found = make_retriever(stale_index, 240).begin_search(golden_texts["query"], 5)()
    np.testing.assert_array_equal(found.numbers, expected.numbers)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=2e-2)
    not_reranked = make_retriever(stale_index).begin_search(golden_texts["query"], 5)()
    assert not np.array_equal(not_reranked.numbers, expected.numbers)


class TiedEmbedder(Embedder):
    """Embeds passage number `n` as `(n // 10, 0, 0, ..)`: groups of ten passages have equal scores."""

    def __init__(self, like):
        self.program, self.dim = like.program, like.dim

    def batches(self, tokens, parts, batch):
        (numbers,) = parts
        for start in range(0, len(numbers), 7):
            part = np.append(numbers[start : start + 7][::-1], -1)
            yield part, jax.numpy.asarray(np.pad(part[:, None] // 10, ((0, 0), (0, 47))).astype(np.float32))


def test_equal_scores_keep_the_order_of_the_search(
    golden_index, make_retriever, retriever, passage_embedder, golden_texts
):
    """Candidates with equal new scores stay in the order of the search, which here is not that of their numbers."""
    query = golden_texts["query"][:1]
    sign = np.sign(np.asarray(retriever.query_embedder.embed_queries(query, 8))[0, 0])
    plain = retriever.begin_search(query, 60)().numbers[0]
    found = make_retriever(golden_index, 60, TiedEmbedder(passage_embedder)).begin_search(query, 60)().numbers[0]
    assert found.tolist() == sorted(plain.tolist(), key=lambda number: -sign * (number // 10))  # sorted() is stable
    assert found.tolist() != sorted(plain.tolist(), key=lambda number: (-sign * (number // 10), number))
