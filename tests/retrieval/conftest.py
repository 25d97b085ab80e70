"""Golden passages, the embedders that encoded them, and an index of them."""

import json

import numpy as np
import pytest


@pytest.fixture(scope="session")
def make_embedder(tiny_weights):
    """Function (side, mesh, max_length) -> `Embedder` with the golden weights."""
    from atlas_jax.mesh import replicate
    from atlas_jax.models.atlas import build_model
    from atlas_jax.retrieval.embedder import Embedder

    def make(side, mesh, max_length=160):
        model = build_model(tiny_weights.params, tiny_weights.cfg, lambda _, array: replicate(mesh, array))
        return Embedder(model.retriever, side, tiny_weights.retriever_tokenizer, mesh, max_length)

    return make


@pytest.fixture(scope="session")
def query_embedder(make_embedder, mesh):
    """Embedder of queries, on all devices."""
    return make_embedder("query", mesh)


@pytest.fixture(scope="session")
def passage_embedder(make_embedder, mesh):
    """Embedder of passages, on all devices."""
    return make_embedder("passage", mesh)


@pytest.fixture(scope="session")
def store(golden, tmp_path_factory):
    """Store of the 240 golden passages."""
    from atlas_jax.retrieval.passage_store import build_passages

    return build_passages([golden / "passages.jsonl"], tmp_path_factory.mktemp("golden") / "passages")


@pytest.fixture(scope="session")
def retriever_tokens(store, passage_embedder):
    """Token ids of the golden passages for the retriever."""
    return store.tokens(passage_embedder.tokenizer, "{title} {text}", "retriever")


@pytest.fixture(scope="session")
def golden_batch(golden):
    """Arrays that the reference computed for the first four questions, by name."""
    return np.load(golden / "batch.npz")


@pytest.fixture(scope="session")
def golden_texts(golden):
    """Texts of the same batch: `query` of each question, and `passages` of each."""
    return json.loads((golden / "batch.json").read_text())


@pytest.fixture(scope="session")
def golden_index(golden_batch, mesh):
    """Flat index of the reference's vectors of the 240 golden passages."""
    from atlas_jax.retrieval.flat_index import FlatIndex

    return FlatIndex.from_array(np.ascontiguousarray(golden_batch["index_embeddings"].T, np.float16), mesh)


@pytest.fixture(scope="session")
def make_retriever(query_embedder, passage_embedder, retriever_tokens, store):
    """Function (index, candidates) -> `PassageRetriever` for 8 queries at a time; 0 candidates: no reranking."""
    from atlas_jax.retrieval.passage_index import PassageIndex
    from atlas_jax.retrieval.passage_retriever import PassageRetriever
    from atlas_jax.retrieval.rerank import Reranker

    def make(index, candidates=0, embedder=passage_embedder):
        reranker = Reranker(embedder, retriever_tokens, candidates, 8) if candidates else None
        index = PassageIndex(index, store, "fingerprint")
        return PassageRetriever(index, query_embedder, passage_embedder, 8, reranker)

    return make


@pytest.fixture(scope="session")
def retriever(golden_index, make_retriever):
    """`PassageRetriever` over the golden index, without reranking."""
    return make_retriever(golden_index)


@pytest.fixture(scope="session")
def passage_ids(store):
    """Function from passage numbers "q k" to the passages' `id` fields."""

    def ids(numbers):
        return [[passage["id"] for passage in store.take(row)] for row in numbers]

    return ids
