"""Dropout whose mask is a hash of the key and of the element's place, made again in the backward pass, never stored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

# Odd numbers whose multiples are spread over 2^32, one for each axis: xxHash's
PRIMES = tuple(map(np.uint32, (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)))


class Seeds:
    """The seeds of a model's dropouts in one step, another for each."""

    def __init__(self, seed: UInt32[Array, " 2"]):
        self._seed, self._count = seed, 0

    @classmethod
    def of_key(cls, key: Key[Array, ""]) -> "Seeds":
        """Returns the seeds that a key of JAX determines."""
        return cls(jax.random.key_data(key).reshape(-1)[-2:])

    def next(self) -> UInt32[Array, " 2"]:
        """Returns another seed in each call."""
        self._count += 1
        return _mix(self._seed + np.uint32(self._count * int(PRIMES[0]) % 2**32), self._seed[::-1])

    def for_layers(self, depth: int) -> UInt32[Array, "depth 2"]:
        """Returns another seed for the `Seeds` of each layer."""
        seed = self.next()[None]
        return _mix(seed + jnp.arange(depth, dtype=jnp.uint32)[:, None] * PRIMES[1], seed[:, ::-1])


Places = tuple[Int[Array, "..."], ...]  # indices of elements, for each axis but the last


def dropout(
    x: Float[Array, "*shape"], rate: float, seeds: Seeds | None, places: Places | None = None
) -> Float[Array, "*shape"]:
    """Inverted dropout with the next of `seeds`; the identity without them or at rate 0. `places`: see `keep_mask`."""
    if seeds is None or rate == 0.0:
        return x
    return drop(x, seeds.next(), places, rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def drop(
    x: Float[Array, "*shape"], seed: UInt32[Array, " 2"], places: Places | None, rate: float
) -> Float[Array, "*shape"]:
    """Sets elements to 0 with probability `rate` and divides the others by 1 - `rate`; its gradient does the same."""
    return jnp.where(keep_mask(seed, rate, x.shape, places), x / (1.0 - rate), 0.0).astype(x.dtype)


def _drop_forward(
    x: Array, seed: Array, places: Places | None, rate: float
) -> tuple[Array, tuple[Array, Places | None]]:
    return drop(x, seed, places, rate), (seed, places)


def _drop_backward(rate: float, residuals: tuple[Array, Places | None], gradient: Array) -> tuple[Array, None, None]:
    return drop(gradient, *residuals, rate), None, None


drop.defvjp(_drop_forward, _drop_backward)


def keep_mask(
    seed: UInt32[Array, " 2"], rate: float, shape: tuple[int, ...], places: Places | None = None
) -> Bool[Array, "*shape"]:
    """Returns a mask that is true for the elements to keep, each with probability 1 - `rate` to within 2^-32.

    An element's bit depends on the seed and on its index along each axis, not on the shape: padding and the number of
    devices change nothing. `places` has other indices for all axes but the last, of packed tokens in the padded array.
    """
    if places is None:
        places = tuple(jnp.indices(shape[:-1], dtype=jnp.int32, sparse=True))
    rows = [index.astype(jnp.uint32) * prime for index, prime in zip(places, PRIMES[1:], strict=False)]
    row = _mix(functools.reduce(jnp.add, rows, seed[0].reshape((1,) * len(shape[:-1]))), seed[1])
    row, salt = jax.lax.optimization_barrier((row, _mix(row, seed[0])))  # computed once for all elements of a row
    column = jax.lax.iota(jnp.uint32, shape[-1]).reshape(*[1] * len(shape[:-1]), shape[-1])
    bits = _mix(row[..., None] + column * PRIMES[0], salt[..., None])
    return bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def _mix(x: UInt32[Array, "*shape"], salt: UInt32[Array, "*#shape"]) -> UInt32[Array, "*shape"]:
    """Returns hashes of `x`: MurmurHash3's 32-bit finalizer, with `salt` between its steps.

    Its last step, which changes the low bits only, is left out: they hardly matter in a comparison.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = x ^ salt
    return (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
