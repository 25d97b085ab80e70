"""Dropout: how much stays, by which key, and that it does not matter how the random bits are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from atlas_jax.models.dropout import dropout, keep_mask


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.003])
def test_the_share_that_is_dropped(rate):
    """Within five standard errors of the rate, in both halves of the words and in every row; the rest is scaled up."""
    there = np.asarray(keep_mask(jax.random.key(0), rate, (4, 3, 200, 150)))
    for part in (there, there[:, :, :100], there[:, :, 100:], *there):
        assert abs(1 - part.mean() - rate) < 5 * (rate * (1 - rate) / part.size) ** 0.5
    x = dropout(jnp.ones((2, 40, 50)), rate, nnx.Rngs(dropout=0))
    assert set(np.unique(np.asarray(x)).tolist()) == {0.0, float(jnp.float32(1) / jnp.float32(1 - rate))}


def test_nothing_is_drawn_twice():
    """Rows, the two halves of a word and two keys have nothing in common: about half of their places agree."""
    first, other = (np.asarray(keep_mask(jax.random.key(n), 0.5, (2, 100, 100))) for n in (0, 1))
    pairs = [(first[0], first[1]), (first[0, :50], first[0, 50:]), (first, other)]
    for one, two in pairs:
        assert 0.45 < (one == two).mean() < 0.55
    np.testing.assert_array_equal(first, keep_mask(jax.random.key(0), 0.5, (2, 100, 100)))


@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 4, 1, 6), (1, 2, 8, 3)])
def test_row_by_row_is_all_at_once(shape, monkeypatch):
    """A CPU draws the bits that other platforms draw; an odd length loses half a word."""
    cpu = keep_mask(jax.random.key(3), 0.3, shape)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda keys, *, cpu, default: default(keys))
    assert cpu.shape == shape
    np.testing.assert_array_equal(cpu, keep_mask(jax.random.key(3), 0.3, shape))


def test_without_a_key_or_a_rate_nothing_changes():
    """The same array."""
    x = jnp.ones((1, 2, 3))
    assert dropout(x, 0.1, None) is x
    assert dropout(x, 0.0, nnx.Rngs(dropout=0)) is x
