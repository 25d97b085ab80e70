"""Attention: values and gradients equal those of the plain formula, with masks, biases and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.models.attention import attend
from atlas_jax.models.dropout import Seeds, drop

B, H, T, S, K = 2, 3, 5, 7, 4
RATE = 0.3


def plain(queries, keys, values, bias, mask, seed, rate):
    """The formula, for JAX to differentiate."""
    logits = jnp.einsum("bhtk,bhsk->bhts", queries, keys)
    logits = jnp.where(mask, logits if bias is None else logits + bias, -1e30)
    weights = jax.nn.softmax(logits)
    return jnp.einsum("bhts,bhsk->bhtk", weights if seed is None else drop(weights, seed, None, rate), values)


@pytest.fixture
def arrays() -> list[jax.Array]:
    draw = np.random.default_rng(0).normal
    return [jnp.asarray(draw(size=(B, H, length, K)), jnp.float32) for length in (T, S, S)]


@pytest.mark.parametrize("bias_shape", [None, (1, H, T, S), (B, H, T, S), (1, 1, T, S)])
@pytest.mark.parametrize("mask_shape", [(B, 1, 1, S), (1, 1, T, S), (B, 1, T, S)])
@pytest.mark.parametrize("rate", [0.0, RATE])
def test_values_and_gradients_equal_the_plain_formula(arrays, bias_shape, mask_shape, rate):
    """For every shape of bias and mask; one query of the masks has nothing to attend to."""
    rng = np.random.default_rng(1)
    bias = None if bias_shape is None else jnp.asarray(rng.normal(size=bias_shape), jnp.float32)
    mask = jnp.asarray(rng.random(mask_shape) < 0.6).at[0, 0, 0].set(False)
    seed = Seeds.of_key(jax.random.key(2)).next() if rate else None
    weights = jnp.asarray(rng.normal(size=(B, H, T, K)), jnp.float32)

    def outcome(function):
        def weighted_sum(queries, keys, values, bias):
            result = function(queries, keys, values, bias, mask, seed, rate)
            return (result * weights).sum(), result

        return jax.jit(jax.grad(weighted_sum, argnums=(0, 1, 2, *([] if bias is None else [3])), has_aux=True))(
            *arrays, bias
        )

    for actual, expected in zip(jax.tree.leaves(outcome(attend)), jax.tree.leaves(outcome(plain)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_only_rounding_differs(arrays):
    """Values and gradients of bfloat16 arrays are bfloat16, within its precision of those in float32."""
    mask = jnp.ones((1, 1, 1, S), bool)

    def outcome(arrays):
        def total(*arrays):
            return (attend(*arrays, None, mask, None, 0.0).astype(jnp.float32) ** 2).sum()

        return jax.grad(total, argnums=(0, 1, 2))(*arrays)

    low = outcome([x.astype(jnp.bfloat16) for x in arrays])
    assert {x.dtype for x in low} == {jnp.dtype(jnp.bfloat16)}
    for actual, expected in zip(low, outcome(arrays), strict=True):
        np.testing.assert_allclose(actual.astype(jnp.float32), expected, atol=0.03 * float(jnp.abs(expected).max()))
