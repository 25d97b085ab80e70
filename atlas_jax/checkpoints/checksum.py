"""A checksum of an array that is the same on the host, on a device and split over a mesh."""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32

PIECE = 2**20  # words of a host's array that go to the device at a time: 4 MB, which a cache holds


def checksum(array: np.ndarray | jax.Array) -> str:
    """16 hexadecimal digits that depend on dtype, shape and bits alone; any one flipped bit changes them.

    An array in the host's memory is read in pieces, and copied only if it is not contiguous.
    """
    if isinstance(array, jax.Array):
        return _digits(array.dtype, array.shape, np.asarray(_sums(array, np.uint32(0))))
    whole = Checksum(array.dtype, array.shape)
    whole.add(0, array)
    return whole.digits()


class Checksum:
    """The checksum of an array that arrives in parts, in any order."""

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...]):
        self.dtype, self.shape = dtype, shape
        self.seen = 0  # elements
        self._sums = np.zeros(2, np.uint32)

    def add(self, start: int, part: np.ndarray) -> None:
        """The elements from number `start` on, counted in C order."""
        first = start * max(part.itemsize // 4, 1)
        for at, piece in _pieces(part):
            self._sums += np.asarray(_sums(piece, np.uint32((first + at) % 2**32)))
        self.seen += part.size

    def digits(self) -> str:
        """That of the whole, once all parts have been added."""
        return _digits(self.dtype, self.shape, self._sums)


def _digits(dtype: np.dtype[Any], shape: tuple[int, ...], sums: np.ndarray) -> str:
    kind = hashlib.blake2b(f"{dtype}{shape}".encode(), digest_size=8).digest()
    return (sums ^ np.frombuffer(kind, np.uint32)).tobytes().hex()


def _pieces(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The bits of an array as unsigned integers of at most 32 bits, each piece with the index of its first."""
    words = array.reshape(-1).view(f"u{min(array.itemsize, 4)}")
    return ((start, words[start : start + PIECE]) for start in range(0, len(words), PIECE))


@jax.jit
def _sums(array: Shaped[Array, "..."], start: UInt32[Array, ""]) -> UInt32[Array, "2"]:
    """Two sums of the words, each first mixed with its index: sums do not depend on how the array is split.

    Mixing is one-to-one, so a changed word changes both. A product with an odd weight would be that too, but cannot
    see two changed signs: 2**31 times any odd number is 2**31.
    """
    words = _words(array)
    index = start
    for axis, stride in enumerate(math.prod(words.shape[axis + 1 :]) for axis in range(words.ndim)):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
    return jnp.stack([_mix(words ^ _mix(index + jnp.uint32(salt))).sum(dtype=jnp.uint32) for salt in (1, 0x9E3779B9)])


def _words(array: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """The bits of each element in 32; a wider one is two words along a last axis."""
    if array.dtype == jnp.bool:
        return array.astype(jnp.uint32)
    bits = jnp.uint32 if array.dtype.itemsize >= 4 else jnp.dtype(f"u{array.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(array, bits).astype(jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A permutation of the 32-bit words, each bit of which depends on all: the end of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
