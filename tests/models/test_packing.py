"""Packed texts: nothing but rounding differs from padded ones, in values, gradients and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from atlas_jax.models.contriever import Contriever, ContrieverConfig
from atlas_jax.models.dropout import Seeds
from atlas_jax.models.fid import FiD, ReaderBatch
from atlas_jax.models.packing import make_packing, packed_order
from atlas_jax.models.t5 import T5Config

LENGTHS = np.asarray([[3, 7, 0, 5], [7, 7, 1, 2]])  # tokens of each passage of two queries
N, LENGTH, PACKED = 4, 7, 20
MASK = jnp.asarray(np.arange(LENGTH) < LENGTHS[..., None])
IDS = jnp.asarray(np.random.default_rng(0).integers(1, 50, MASK.shape), jnp.int32)
ORDER = jnp.asarray(packed_order(LENGTHS, LENGTH, PACKED))


def test_tokens_are_packed_one_text_after_the_other():
    """`unpack` is the inverse of `pack`, but for the padding, which becomes 0; `places` names text and position."""
    packing = make_packing(ORDER, N, LENGTH)
    x = jnp.arange(MASK.size * 2, dtype=jnp.float32).reshape(2 * N, LENGTH, 2) + 1
    packed = packing.pack(x)
    for row, lengths in enumerate(LENGTHS):
        texts = [x[row * N + n, :length] for n, length in enumerate(lengths)]
        np.testing.assert_array_equal(
            packed[row], jnp.pad(jnp.concatenate(texts), ((0, PACKED - sum(lengths)), (0, 0)))
        )
    np.testing.assert_array_equal(packing.unpack(packed), jnp.where(MASK.reshape(2 * N, LENGTH, 1), x, 0.0))
    texts, positions = packing.places()
    np.testing.assert_array_equal(texts[0, :15], [0] * 3 + [1] * 7 + [3] * 5)
    np.testing.assert_array_equal(positions[1, 7:17], [*range(7), 0, 0, 1])
    assert texts[1, 0] == N


def test_the_first_texts_of_a_packing():
    """`make_packing` of fewer texts than the order has leaves out the tokens of the others."""
    first = make_packing(ORDER, 2, LENGTH)
    x = jnp.ones((4, LENGTH, 3))
    np.testing.assert_array_equal(first.unpack(first.pack(x)), jnp.where(MASK[:, :2].reshape(4, LENGTH, 1), x, 0.0))


def test_gradients_go_back_to_the_tokens():
    """Those of `pack` are unpacked and those of `unpack` are packed, as of the plain indexing."""
    packing = make_packing(ORDER, N, LENGTH)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2 * N, LENGTH, 3)), jnp.float32)
    gradient = jax.grad(lambda x: jnp.sin(packing.unpack(jnp.cos(packing.pack(x)))).sum())(x)
    mask = MASK.reshape(2 * N, LENGTH, 1)
    expected = jax.grad(lambda x: jnp.where(mask, jnp.sin(jnp.cos(x)), 0.0).sum())(x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize("for_cpu", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("gated", [False, True])
def test_the_reader_encodes_packed_passages_as_padded_ones(for_cpu, rate, gated):
    """T5 1.0 and 1.1, with dropout too: the masks belong to text and position, not to the place in the array."""
    cfg = T5Config(8, 2, 4, 16, 2, 1, vocab_size=50, gated=gated, tied=not gated, dropout=rate, for_cpu=for_cpu)
    reader = FiD(cfg, rngs=nnx.Rngs(0))

    def states(reader: FiD, order: jax.Array | None) -> jax.Array:
        batch = ReaderBatch(IDS, MASK, IDS[:, 0], MASK[:, 0], order)
        seeds = Seeds.of_key(jax.random.key(1)) if rate else None
        return jnp.where(MASK[..., None], reader.encoder_states(batch, seeds=seeds), 0.0)

    np.testing.assert_allclose(states(reader, ORDER), states(reader, None), rtol=1e-5, atol=1e-5)
    packed, padded = (
        nnx.grad(lambda reader, order=order: (states(reader, order) ** 2).sum())(reader) for order in (ORDER, None)
    )
    for left, right in zip(jax.tree.leaves(packed), jax.tree.leaves(padded), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", ["average", "sqrt", "cls"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_retriever_embeds_packed_passages_as_padded_ones(pooling, rate):
    """A text without tokens too, but for `cls`, whose vector of it means nothing."""
    cfg = ContrieverConfig(8, 2, 16, 2, 50, 16, pooling=pooling, dropout=rate)
    encoder = Contriever(cfg, rngs=nnx.Rngs(0))
    ids, mask = IDS.reshape(2 * N, LENGTH), MASK.reshape(2 * N, LENGTH)

    def vectors(packing):
        return encoder(ids, mask, seeds=Seeds.of_key(jax.random.key(1)) if rate else None, packing=packing)

    kept = np.arange(2 * N) != 2 if pooling == "cls" else slice(None)
    packed, padded = vectors(make_packing(ORDER, N, LENGTH)), vectors(None)
    np.testing.assert_allclose(packed[kept], padded[kept], rtol=1e-5, atol=1e-5)
