"""Retrieval without reranking against the reference."""

import numpy as np

from atlas_jax.retrieval.passage_source import PassageSource
from atlas_jax.tasks import Example


def test_search_finds_the_reference_passages(retriever, passage_ids, golden_batch, golden_texts):
    """Question texts give the reference's passages and scores; one question gives the same as in a batch of four."""
    found = retriever.begin_search(golden_texts["query"], 5)()
    np.testing.assert_allclose(found.scores, golden_batch["retrieved_scores"], rtol=0, atol=2e-2)
    assert passage_ids(found.numbers) == golden_batch["retrieved_ids"].astype(str).tolist()
    single = retriever.begin_search(golden_texts["query"][2:3], 5)()
    np.testing.assert_array_equal(single.numbers, found.numbers[2:3])
    np.testing.assert_allclose(single.scores, found.scores[2:3], rtol=1e-6)


def test_a_retriever_is_a_passage_source(retriever, store, golden_texts):
    """`begin_retrieval` gives the passages of `begin_search`, all n of them valid for every example."""
    assert isinstance(retriever, PassageSource)
    found = retriever.begin_retrieval([Example(query, None, []) for query in golden_texts["query"]], 3)()
    np.testing.assert_array_equal(found.numbers, retriever.begin_search(golden_texts["query"], 3)().numbers)
    assert found.store is store
    assert found.valid.all()
    assert found.valid.shape == (4, 3)
    assert retriever.programs == (retriever.query_embedder.program,)
