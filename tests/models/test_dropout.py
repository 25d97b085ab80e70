"""Dropout: the rate, the independence of masks, and equal masks from the CPU's and the other platforms' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from atlas_jax.models.dropout import dropout, keep_mask


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.003])
def test_the_fraction_dropped_is_the_rate(rate):
    """Within five standard errors, in either half of the random words and in every row; kept elements are scaled up."""
    kept = np.asarray(keep_mask(jax.random.key(0), rate, (4, 3, 200, 150)))
    for part in (kept, kept[:, :, :100], kept[:, :, 100:], *kept):
        assert abs(1 - part.mean() - rate) < 5 * (rate * (1 - rate) / part.size) ** 0.5
    x = dropout(jnp.ones((2, 40, 50)), rate, nnx.Rngs(dropout=0))
    assert set(np.unique(np.asarray(x)).tolist()) == {0.0, float(jnp.float32(1) / jnp.float32(1 - rate))}


def test_masks_of_rows_halves_and_keys_are_independent():
    """At rate 0.5, two rows, the halves of the words and two keys agree in half of the elements; one key in all."""
    first, other = (np.asarray(keep_mask(jax.random.key(n), 0.5, (2, 100, 100))) for n in (0, 1))
    pairs = [(first[0], first[1]), (first[0, :50], first[0, 50:]), (first, other)]
    for left, right in pairs:
        assert 0.45 < (left == right).mean() < 0.55
    np.testing.assert_array_equal(first, keep_mask(jax.random.key(0), 0.5, (2, 100, 100)))


@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 4, 1, 6), (1, 2, 8, 3)])
def test_the_mask_is_the_same_on_every_platform(shape, monkeypatch):
    """The row by row code for CPUs gives the mask of the code for other platforms, also for odd lengths."""
    cpu = keep_mask(jax.random.key(3), 0.3, shape)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda keys, *, cpu, default: default(keys))
    assert cpu.shape == shape
    np.testing.assert_array_equal(cpu, keep_mask(jax.random.key(3), 0.3, shape))


def test_without_rngs_or_at_rate_0_dropout_is_the_identity():
    """Returns the very array that was passed in."""
    x = jnp.ones((1, 2, 3))
    assert dropout(x, 0.1, None) is x
    assert dropout(x, 0.0, nnx.Rngs(dropout=0)) is x
