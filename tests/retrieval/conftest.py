"""The golden passages and both sides of the retriever that embedded them."""

import json

import numpy as np
import pytest


@pytest.fixture(scope="session")
def make_embedder(tiny_weights):
    """(side, mesh, max_length) to an embedder with the golden weights."""
    from atlas_jax.mesh import replicate
    from atlas_jax.models.atlas import build_model
    from atlas_jax.retrieval.embedder import Embedder

    def make(side, mesh, max_length=160):
        model = build_model(tiny_weights.params, tiny_weights.cfg, lambda _, array: replicate(mesh, array))
        return Embedder(model.retriever, side, tiny_weights.retriever_tokenizer, mesh, max_length)

    return make


@pytest.fixture(scope="session")
def queries(make_embedder, mesh):
    """The side that embeds queries."""
    return make_embedder("query", mesh)


@pytest.fixture(scope="session")
def passages(make_embedder, mesh):
    """The side that embeds passages."""
    return make_embedder("passage", mesh)


@pytest.fixture(scope="session")
def store(golden, tmp_path_factory):
    """The 240 golden passages."""
    from atlas_jax.retrieval.passage_store import build_passages

    return build_passages([golden / "passages.jsonl"], tmp_path_factory.mktemp("golden") / "passages")


@pytest.fixture(scope="session")
def tokens(store, passages):
    """Their ids for the retriever."""
    return store.tokens(passages.tokenizer, "{title} {text}", "retriever")


@pytest.fixture(scope="session")
def batch(golden):
    """The arrays of the first four questions."""
    return np.load(golden / "batch.npz")


@pytest.fixture(scope="session")
def questions(golden):
    """The text of the first four questions."""
    return json.loads((golden / "batch.json").read_text())
