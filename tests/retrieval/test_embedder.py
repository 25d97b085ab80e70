"""Vectors: the reference's, alike in every batch, and every passage of a corpus once."""

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

CUT = 64  # tokens, in the tests of small corpora: two buckets


@pytest.fixture(scope="module")
def short(make_embedder, mesh):
    """Embeds passages cut at 64 tokens."""
    return make_embedder("passage", mesh, CUT)


def corpus(size):
    """Ids of texts of 0 to 89 tokens: some are empty, some are longer than what is embedded."""
    rng = np.random.default_rng(size)
    rows = [rng.integers(5, 900, rng.integers(0, 90)).astype(np.uint16) for _ in range(size)]
    rows[0] = rows[0][:0]
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.uint64)
    return PassageTokens(RaggedArray(np.concatenate(rows), offsets))


def one_by_one(embedder, tokens):
    """Each text in a batch of its own, in the longest bucket."""
    texts = tokens.take(range(len(tokens)))
    return np.concatenate([np.asarray(embedder([text], embedder.max_length, 8))[:1] for text in texts])


def test_query_vectors_are_the_reference_s(queries, batch, questions):
    """Within 1e-5, though the reference pads to 160 tokens and this to 32."""
    vectors = np.asarray(queries.embed_queries(questions["query"], 8))
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[:4], batch["query_emb"], rtol=0, atol=1e-5)
    assert batch["query_mask"].sum(-1).max() <= 32
    assert not np.allclose(vectors[:3], batch["query_emb"][1:], atol=1e-2)  # the counter-case: another's


def test_passage_vectors_are_the_reference_s(passages, batch, questions):
    """Within 1e-5, in several batches or in one; some are cut, so the cut is the same too."""
    found = [passage for row in questions["passages"] for passage in row]
    texts = passages.tokenizer.ids([f"{passage['title']} {passage['text']}" for passage in found])
    assert max(map(len, texts)) > 160
    for rows in (8, 64):
        parts = [texts[at : at + rows] for at in range(0, len(texts), rows)]
        vectors = np.concatenate([np.asarray(passages(part, 160, rows))[: len(part)] for part in parts])
        np.testing.assert_allclose(vectors, batch["passage_emb"], rtol=0, atol=1e-5)


def test_a_vector_is_the_text_s_alone(make_embedder, short):
    """Not of its batch, its place there, its bucket, or the devices; the counter-case is one token more."""
    texts = short.tokenizer.ids(["A tribe", "Polymers are large molecules", "", "x " * 20, "Nudity"])
    expected = np.asarray(short(texts, 32, 8))[:5]
    assert np.abs(expected).max() > 0.5
    others = [
        np.asarray(short(texts[::-1], 32, 8))[:5][::-1],
        np.asarray(short([*texts[1:], texts[0]], 64, 64))[[4, 0, 1, 2, 3]],
    ]
    for spec in ("data=1", "data=2,model=2"):
        others.append(np.asarray(make_embedder("passage", make_mesh(spec), CUT)(texts, 32, 6))[:5])
    for other in others:
        np.testing.assert_allclose(other, expected, rtol=0, atol=2e-6)
    longer = np.asarray(short([[*text, 7] for text in texts], 32, 8))[:5]
    assert (np.abs(longer - expected).max(axis=1) > 1e-2).all()


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_corpus_is_embedded_whole(short, monkeypatch, size, rows):
    """Every row once, in windows too, with the vector that its text has alone, in float16."""
    tokens = corpus(size)
    expected = one_by_one(short, tokens)
    for window in (module.WINDOW, 16):
        monkeypatch.setattr(module, "WINDOW", window)
        out, done, seen = np.full((size, 48), np.nan, np.float16), [], []
        batches = short.batches

        def watched(*args, batches=batches, seen=seen):
            for numbers, vectors in batches(*args):
                seen.extend(numbers[numbers >= 0].tolist())
                yield numbers, vectors

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(short, "batches", watched)
            embed_corpus(short, tokens, out, rows, done.append)
        assert sorted(seen) == list(range(size))
        assert sum(done) == size
        np.testing.assert_allclose(out, expected.astype(np.float16), rtol=2**-10, atol=1e-5)


def test_batches_are_of_like_length(make_embedder, mesh, short):
    """Longest first, and no more programs than length buckets, whatever the corpora."""
    tokens = corpus(100)
    lengths = np.minimum(tokens.lengths(np.arange(100)) + 2, CUT)
    order = np.concatenate([numbers[numbers >= 0] for numbers, _ in short.batches(tokens, [np.arange(100)], 1)])
    assert (np.diff(tokens.lengths(order)) <= 0).all()
    fresh = make_embedder("passage", mesh, CUT)
    for size in (100, 7, 1, 100):
        embed_corpus(fresh, corpus(size), np.empty((size, 48), np.float16), 8, lambda more: None)
    assert fresh.program.count == len({bucket(int(length), CUT) for length in lengths}) == 2


def test_a_batch_has_so_many_tokens(queries, monkeypatch):
    """At most `batch` texts a device, fewer when they are long, but always one."""
    monkeypatch.setitem(module.TOKENS_PER_DEVICE, "cpu", 1000)
    asked = [(32, 512), (32, 4), (128, 512), (512, 512), (2000, 512)]
    assert [queries.rows(length, batch) for length, batch in asked] == [8 * 31, 8 * 4, 8 * 7, 8, 8]


def test_the_present_parameters_count(tiny_weights, mesh):
    """`update` takes them without compiling again; before it, the old ones are used."""
    cfg = dataclasses.replace(tiny_weights.cfg, reader=None)
    params = {path: array for path, array in tiny_weights.params.items() if path.startswith("retriever/")}
    changed = {path: 1.5 * array if path.endswith("words/embedding") else array for path, array in params.items()}
    old, new = (build_model(p, cfg, lambda _, array: jax.numpy.asarray(array)).retriever for p in (params, changed))
    tokenizer = tiny_weights.retriever_tokenizer
    embedder = Embedder(old, "query", tokenizer, make_mesh(), CUT)
    before = np.asarray(embedder.embed_queries(["who?"], 8))
    embedder.update(new)
    after = np.asarray(embedder.embed_queries(["who?"], 8))
    np.testing.assert_array_equal(
        after, np.asarray(Embedder(new, "query", tokenizer, mesh, CUT).embed_queries(["who?"], 8))
    )
    assert np.abs(after - before)[0].max() > 1e-2
    assert embedder.program.count == 1


def test_sides_have_their_own_encoders(tiny_config, golden, mesh, passages):
    """Trained on the query side alone, the reference's passages keep their vectors and its queries do not."""
    model = dataclasses.replace(tiny_config.model, model_path=str(golden / "checkpoint_fixed_queryside"))
    weights = restore(dataclasses.replace(tiny_config, model=model)).load()
    retriever = build_model(weights.params, weights.cfg, lambda _, array: jax.numpy.asarray(array)).retriever
    texts = ["A tribe", "Polymers"]
    vectors = {
        side: np.asarray(Embedder(retriever, side, weights.retriever_tokenizer, mesh, CUT).embed_queries(texts, 8))[:2]
        for side in ("query", "passage")
    }
    expected = np.asarray(passages.embed_queries(texts, 8))[:2]
    np.testing.assert_allclose(vectors["passage"], expected, rtol=0, atol=1e-5)
    assert np.abs(vectors["query"] - expected).max() > 1e-2


def test_the_index_of_the_reference(passages, tokens, batch):
    """All 240 golden passages, to the float16 that it embedded them in."""
    out = np.empty((240, 48), np.float16)
    embed_corpus(passages, tokens, out, 8, lambda more: None)
    np.testing.assert_allclose(out.T, batch["index_embeddings"], rtol=0, atol=2e-2)
    assert not np.allclose(np.roll(out, 1, axis=0).T, batch["index_embeddings"], atol=2e-2)
