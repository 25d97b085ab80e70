"""Vectors equal the reference's, do not depend on the batch, and every passage of a corpus is embedded once."""

import dataclasses

import jax
import numpy as np
import pytest

from atlas_jax.checkpoints.restore import restore
from atlas_jax.data.ragged import RaggedArray
from atlas_jax.data.tokens import bucket
from atlas_jax.mesh import make_mesh
from atlas_jax.models.atlas import build_model
from atlas_jax.retrieval import embedder as module
from atlas_jax.retrieval.embedder import Embedder, embed_corpus
from atlas_jax.retrieval.passage_store import PassageTokens

MAX_LENGTH = 64  # tokens in the tests of small corpora: two length buckets


@pytest.fixture(scope="module")
def short_embedder(make_embedder, mesh):
    """Embedder of passages cut at 64 tokens."""
    return make_embedder("passage", mesh, MAX_LENGTH)


def corpus(size):
    """Token ids of texts of 0 to 89 tokens: the first is empty, some are longer than the embedder's max_length."""
    rng = np.random.default_rng(size)
    rows = [rng.integers(5, 900, rng.integers(0, 90)).astype(np.uint16) for _ in range(size)]
    rows[0] = rows[0][:0]
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.uint64)
    return PassageTokens(RaggedArray(np.concatenate(rows), offsets))


def embed_one_by_one(embedder, tokens):
    """Vectors of all texts, each embedded in a batch of its own in the longest bucket."""
    texts = tokens.take(range(len(tokens)))
    return np.concatenate([np.asarray(embedder([text], embedder.max_length, 8))[:1] for text in texts])


def test_query_vectors_equal_the_reference(query_embedder, golden_batch, golden_texts):
    """Equal within 1e-5, though the reference pads to 160 tokens and the embedder to 32."""
    vectors = np.asarray(query_embedder.embed_queries(golden_texts["query"], 8))
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[:4], golden_batch["query_emb"], rtol=0, atol=1e-5)
    assert golden_batch["query_mask"].sum(-1).max() <= 32
    assert not np.allclose(vectors[:3], golden_batch["query_emb"][1:], atol=1e-2)  # counter-case: the next query


def test_passage_vectors_equal_the_reference(passage_embedder, golden_batch, golden_texts):
    """Equal within 1e-5, in several batches or in one; some passages are cut, so they are cut at the same token."""
    rendered = [passage for row in golden_texts["passages"] for passage in row]
    texts = passage_embedder.tokenizer.ids([f"{passage['title']} {passage['text']}" for passage in rendered])
    assert max(map(len, texts)) > 160
    for rows in (8, 64):
        parts = [texts[start : start + rows] for start in range(0, len(texts), rows)]
        vectors = np.concatenate([np.asarray(passage_embedder(part, 160, rows))[: len(part)] for part in parts])
        np.testing.assert_allclose(vectors, golden_batch["passage_emb"], rtol=0, atol=1e-5)


def test_a_vector_depends_on_its_text_only(make_embedder, short_embedder):
    """Other batches, rows, length buckets and meshes give the same vector; counter-case: one more token does not."""
    texts = short_embedder.tokenizer.ids(["A tribe", "Polymers are large molecules", "", "x " * 20, "Nudity"])
    expected = np.asarray(short_embedder(texts, 32, 8))[:5]
    assert np.abs(expected).max() > 0.5
    others = [
        np.asarray(short_embedder(texts[::-1], 32, 8))[:5][::-1],
        np.asarray(short_embedder([*texts[1:], texts[0]], 64, 64))[[4, 0, 1, 2, 3]],
    ]
    for spec in ("data=1", "data=2,model=2"):
        others.append(np.asarray(make_embedder("passage", make_mesh(spec), MAX_LENGTH)(texts, 32, 6))[:5])
    for other in others:
        np.testing.assert_allclose(other, expected, rtol=0, atol=2e-6)
    longer = np.asarray(short_embedder([[*text, 7] for text in texts], 32, 8))[:5]
    assert (np.abs(longer - expected).max(axis=1) > 1e-2).all()


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_every_passage_of_a_corpus_is_embedded_once(short_embedder, monkeypatch, size, rows):
    """In one window or several, each row is the float16 vector that its text has in a batch of its own."""
    tokens = corpus(size)
    expected = embed_one_by_one(short_embedder, tokens)
    for window in (module.WINDOW, 16):
        monkeypatch.setattr(module, "WINDOW", window)
        out, done, embedded = np.full((size, 48), np.nan, np.float16), [], []
        batches = short_embedder.batches

        def record_batches(*args, batches=batches, embedded=embedded):
            for numbers, vectors in batches(*args):
                embedded.extend(numbers[numbers >= 0].tolist())
                yield numbers, vectors

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(short_embedder, "batches", record_batches)
            embed_corpus(short_embedder, tokens, out, rows, done.append)
        assert sorted(embedded) == list(range(size))
        assert sum(done) == size
        np.testing.assert_allclose(out, expected.astype(np.float16), rtol=2**-10, atol=1e-5)


def test_batches_are_sorted_by_length(make_embedder, mesh, short_embedder):
    """Longest first, and corpora of any size compile one program per length bucket."""
    tokens = corpus(100)
    lengths = np.minimum(tokens.lengths(np.arange(100)) + 2, MAX_LENGTH)
    order = np.concatenate(
        [numbers[numbers >= 0] for numbers, _ in short_embedder.batches(tokens, [np.arange(100)], 1)]
    )
    assert (np.diff(tokens.lengths(order)) <= 0).all()
    fresh = make_embedder("passage", mesh, MAX_LENGTH)
    for size in (100, 7, 1, 100):
        embed_corpus(fresh, corpus(size), np.empty((size, 48), np.float16), 8, lambda count: None)
    assert fresh.program.count == len({bucket(int(length), MAX_LENGTH) for length in lengths}) == 2


def test_tokens_per_device_limit_the_batch(query_embedder, monkeypatch):
    """At most `batch` texts per device, fewer when they are long, but at least one."""
    monkeypatch.setitem(module.TOKENS_PER_DEVICE, "cpu", 1000)
    cases = [(32, 512), (32, 4), (128, 512), (512, 512), (2000, 512)]
    assert [query_embedder.batch_rows(length, batch) for length, batch in cases] == [8 * 31, 8 * 4, 8 * 7, 8, 8]


def test_update_changes_the_parameters_without_compiling(tiny_weights, mesh):
    """Vectors before `update` are those of the old parameters, after it those of the new ones; one program."""
    cfg = dataclasses.replace(tiny_weights.cfg, reader=None)
    params = {path: array for path, array in tiny_weights.params.items() if path.startswith("retriever/")}
    changed = {path: 1.5 * array if path.endswith("words/embedding") else array for path, array in params.items()}
    old, new = (build_model(p, cfg, lambda _, array: jax.numpy.asarray(array)).retriever for p in (params, changed))
    tokenizer = tiny_weights.retriever_tokenizer
    embedder = Embedder(old, "query", tokenizer, make_mesh(), MAX_LENGTH)
    before = np.asarray(embedder.embed_queries(["who?"], 8))
    embedder.update(new)
    after = np.asarray(embedder.embed_queries(["who?"], 8))
    np.testing.assert_array_equal(
        after, np.asarray(Embedder(new, "query", tokenizer, mesh, MAX_LENGTH).embed_queries(["who?"], 8))
    )
    assert np.abs(after - before)[0].max() > 1e-2
    assert embedder.program.count == 1


def test_untied_sides_use_their_own_encoders(tiny_config, golden, mesh, passage_embedder):
    """After query-side training in the reference, passages keep their vectors and queries do not."""
    model = dataclasses.replace(tiny_config.model, model_path=str(golden / "checkpoint_fixed_queryside"))
    weights = restore(dataclasses.replace(tiny_config, model=model)).load()
    retriever = build_model(weights.params, weights.cfg, lambda _, array: jax.numpy.asarray(array)).retriever
    texts = ["A tribe", "Polymers"]
    vectors = {
        side: np.asarray(
            Embedder(retriever, side, weights.retriever_tokenizer, mesh, MAX_LENGTH).embed_queries(texts, 8)
        )[:2]
        for side in ("query", "passage")
    }
    expected = np.asarray(passage_embedder.embed_queries(texts, 8))[:2]
    np.testing.assert_allclose(vectors["passage"], expected, rtol=0, atol=1e-5)
    assert np.abs(vectors["query"] - expected).max() > 1e-2


def test_corpus_vectors_equal_the_reference_index(passage_embedder, retriever_tokens, golden_batch):
    """All 240 golden passages, within 2e-2: the reference embeds its index in float16."""
    out = np.empty((240, 48), np.float16)
    embed_corpus(passage_embedder, retriever_tokens, out, 8, lambda count: None)
    np.testing.assert_allclose(out.T, golden_batch["index_embeddings"], rtol=0, atol=2e-2)
    assert not np.allclose(np.roll(out, 1, axis=0).T, golden_batch["index_embeddings"], atol=2e-2)
