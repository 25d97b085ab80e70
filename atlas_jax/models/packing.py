"""Texts of a batch without their padding: what works token by token is computed for packed tokens only.

Axes: `b` rows of packed tokens, `p` packed tokens, `n` texts of a row, `l` tokens of a text, `f` any features.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32


class Packing(NamedTuple):
    """Where packed tokens stand in the padded texts, and the inverse; an index beyond the last is of no token."""

    order: Int[Array, "b p"]  # index in n * l of each packed token
    slots: Int[Array, "b n l"]  # index in p of each position

    def pack(self, x: Float[Array, "bn l *f"]) -> Float[Array, "b p *f"]:
        """Returns the tokens of padded texts, one text after the other; 0 at the end."""
        slots = self.slots.reshape(len(self.order), -1)
        return _take(x.reshape(*slots.shape, *x.shape[2:]), self.order, slots)

    def unpack(self, x: Float[Array, "b p *f"]) -> Float[Array, "bn l *f"]:
        """Returns padded texts; 0 at the padding."""
        padded = _take(x, self.slots.reshape(len(self.order), -1), self.order)
        return padded.reshape(-1, self.slots.shape[2], *x.shape[2:])

    def places(self) -> tuple[Int[Array, "b p"], Int[Array, "b p"]]:
        """The text and the position in it of each packed token."""
        row, position = jnp.divmod(self.order, self.slots.shape[2])
        return row + jnp.arange(len(row))[:, None] * self.slots.shape[1], position


def make_packing(order: Int[Array, "b p"] | None, n: int, length: int) -> Packing | None:
    """Returns the packing of the first `n` texts of each row in this `order`; None without one."""
    if order is None:
        return None
    positions = n * length
    order = jnp.minimum(order, positions)
    rows, packed = (jnp.broadcast_to(x, order.shape) for x in jnp.indices(order.shape, sparse=True))
    slots = jnp.full((len(order), positions), order.shape[1]).at[rows, order].set(packed, mode="drop")
    return Packing(order, slots.reshape(len(order), n, length))


def packed_order(lengths: Int[np.ndarray, "b n"], length: int, packed: int) -> Int32[np.ndarray, "b p"]:
    """Returns the `order` of `Packing`, on the host: texts of these lengths, padded to `length`, in `packed` tokens."""
    real = np.arange(length) < lengths[..., None]
    order = np.full((len(lengths), packed), lengths.shape[1] * length, np.int32)
    for row, positions in zip(order, real.reshape(len(lengths), -1), strict=True):
        found = np.flatnonzero(positions)
        row[: len(found)] = found
    return order


@jax.custom_vjp
def _take(x: Float[Array, "b i *f"], index: Int[Array, "b j"], inverse: Int[Array, "b i"]) -> Float[Array, "b j *f"]:
    """Returns `x` at each index, 0 where it is beyond the last. `inverse`, for the gradient, is the inverse of it."""
    return jax.vmap(lambda x, index: jnp.take(x, index, axis=0, mode="fill", fill_value=0))(x, index)


def _take_forward(x: Array, index: Array, inverse: Array) -> tuple[Array, tuple[Array, Array]]:
    return _take(x, index, inverse), (index, inverse)


def _take_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    index, inverse = residuals
    return _take(gradient, inverse, index), None, None


_take.defvjp(_take_forward, _take_backward)
