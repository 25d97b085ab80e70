"""Dot-product attention with a gradient of its own, whose matrix products are in the layouts that CPUs are fast at.

Axes: `b` batch, `h` heads, `t` queries, `s` source, `k` head width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from atlas_jax.models.dropout import drop
from atlas_jax.models.linear import row_major, transpose

SWAP = (0, 1, 3, 2)  # the last two axes
FEW_QUERIES = 32  # below, as in decoding, copying the keys takes longer than multiplying them
MASKED_LOGIT = float(jnp.finfo(jnp.float32).min)


def attention_logits(
    queries: Float[Array, "b h t k"],
    keys: Float[Array, "b h s k"],
    bias: Float[Array, "#b #h t s"] | None,
    mask: Bool[Array, "#b 1 #t s"],
) -> Float[Array, "b h t s"]:
    """Returns the float32 input of the softmax: `bias` is added, masked positions are MASKED_LOGIT."""
    logits = _product_with_transposed(queries, keys)
    return jnp.where(mask, logits if bias is None else logits + bias, MASKED_LOGIT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def attend(
    queries: Float[Array, "b h t k"],
    keys: Float[Array, "b h s k"],
    values: Float[Array, "b h s k"],
    bias: Float[Array, "#b #h t s"] | None,
    mask: Bool[Array, "#b 1 #t s"],
    seed: UInt32[Array, " 2"] | None,
    rate: float,
) -> Float[Array, "b h t k"]:
    """Returns the values averaged with the softmax of the logits, with dropout of `rate` if there is a `seed`.

    Logits are not scaled: scale the queries. Keeps for the gradient the attention weights before dropout.
    """
    return _attend(queries, keys, values, bias, mask, seed, rate)[0]


def _attend(
    queries: Array, keys: Array, values: Array, bias: Array | None, mask: Array, seed: Array | None, rate: float
) -> tuple[Array, Any]:
    weights = jax.nn.softmax(attention_logits(queries, keys, bias, mask))
    result = jnp.einsum("bhts,bhsk->bhtk", _dropped(weights, seed, rate).astype(values.dtype), values)
    bias_shape = None if bias is None else jnp.zeros((0, *bias.shape))  # its shape alone, as residuals are arrays
    return result, (queries, keys, values, weights.astype(values.dtype), result, bias_shape, mask, seed)


def _attend_backward(rate: float, residuals: Any, gradient: Float[Array, "b h t k"]) -> tuple[Array | None, ...]:
    queries, keys, values, weights, result, bias_shape, mask, seed = residuals
    values_gradient = _transposed_product(_dropped(weights, seed, rate), gradient)
    weights_gradient = _product_with_transposed(gradient, values)
    # The sum over s of weights times their gradient, by the definition of `result`
    mean = jnp.einsum("bhtk,bhtk->bht", gradient, result, preferred_element_type=jnp.float32)[..., None]
    logits_gradient = jnp.where(mask, weights * (_dropped(weights_gradient, seed, rate) - mean), 0.0)
    bias_gradient = None
    if bias_shape is not None:
        shared = [axis for axis, length in enumerate(bias_shape.shape[1:]) if length < logits_gradient.shape[axis]]
        bias_gradient = logits_gradient.sum(shared, keepdims=True)
    logits_gradient = logits_gradient.astype(values.dtype)
    queries_gradient = jnp.einsum("bhts,bhsk->bhtk", logits_gradient, keys)
    keys_gradient = _transposed_product(logits_gradient, queries)
    return queries_gradient, keys_gradient, values_gradient, bias_gradient, None, None


attend.defvjp(_attend, _attend_backward)


def _dropped(x: Float[Array, "b h t s"], seed: UInt32[Array, " 2"] | None, rate: float) -> Float[Array, "b h t s"]:
    return x if seed is None else drop(x, seed, None, rate)


def _product_with_transposed(x: Float[Array, "b h t k"], y: Float[Array, "b h s k"]) -> Float[Array, "b h t s"]:
    """Returns `bhtk,bhsk->bhts` in float32."""
    if x.shape[2] < FEW_QUERIES:
        return jnp.einsum("bhtk,bhsk->bhts", x, y, preferred_element_type=jnp.float32)
    return jnp.einsum("bhtk,bhks->bhts", x, transpose(y, SWAP), preferred_element_type=jnp.float32)


def _transposed_product(x: Float[Array, "b h t s"], y: Float[Array, "b h t k"]) -> Float[Array, "b h s k"]:
    """Returns `bhts,bhtk->bhsk`."""
    return row_major(jnp.einsum("bhkt,bhts->bhks", transpose(y, SWAP), x)).swapaxes(2, 3)
