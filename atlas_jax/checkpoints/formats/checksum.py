"""A checksum of an array that is the same on the host, on a device and split over a mesh."""

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32

from atlas_jax.storage.lazy_array import chunk_shape, parts

PIECE = 4 << 20  # bytes of a host's array that go to the device at a time, which a cache holds


def checksum(array: np.ndarray | jax.Array) -> str:
    """16 hexadecimal digits that depend on dtype, shape and bits alone; any one flipped bit changes them.

    An array in the host's memory is read in pieces, and copied only if it is not contiguous.
    """
    if isinstance(array, jax.Array):
        return _digits(array.dtype, array.shape, np.asarray(_sums(array, np.uint32(0))))
    whole = Checksum(array.dtype, array.shape)
    whole.add((), array)
    return whole.digits()


class Checksum:
    """The checksum of an array that arrives in parts, in any order, and perhaps to several processes."""

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...]):
        self.dtype, self.shape = dtype, shape
        self.seen = 0  # elements
        self.sums = np.zeros(2, np.uint32)  # those of several processes add up to that of all parts

    def add(self, corner: tuple[int, ...], part: np.ndarray) -> None:
        """A part whose first element has this index; axes that `corner` leaves out are at 0."""
        words = max(part.itemsize // 4, 1)
        strides = [math.prod(self.shape[axis + 1 :]) * words for axis in range(part.ndim)]
        steps = np.array([stride % 2**32 for stride in (*strides, 1)], np.uint32)
        start = first(corner, self.shape) * words
        for index in parts(part.shape, chunk_shape(part.shape, part.itemsize, PIECE)):
            piece, at = part[index], start + sum(i.start * n for i, n in zip(index, strides, strict=True))
            bits = np.ascontiguousarray(piece).view(f"u{min(part.itemsize, 4)}")
            if _is_run(piece.shape, self.shape):
                added = _sums(bits.reshape(-1), np.uint32(at % 2**32))
            else:
                added = _spread_sums(bits.reshape(*piece.shape, words), np.uint32(at % 2**32), steps)
            self.sums += np.asarray(added)
        self.seen += part.size

    def join(self, other: "Checksum") -> None:
        """Counts what has been added to another checksum of this array."""
        self.sums += other.sums
        self.seen += other.seen

    def digits(self) -> str:
        """That of the whole, once all parts have been added."""
        return _digits(self.dtype, self.shape, self.sums)


def first(corner: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The number of an element in C order; axes that `corner` leaves out are at 0."""
    number = 0
    for axis, n in enumerate(shape):
        number = number * n + (corner[axis] if axis < len(corner) else 0)
    return number


def _is_run(part: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether the elements of such a part follow each other in the whole."""
    axis = next((axis for axis, n in enumerate(part) if n != 1), len(part))
    return part[axis + 1 :] == whole[axis + 1 :]


def _digits(dtype: np.dtype[Any], shape: tuple[int, ...], sums: np.ndarray) -> str:
    kind = hashlib.blake2b(f"{dtype}{shape}".encode(), digest_size=8).digest()
    return (sums ^ np.frombuffer(kind, np.uint32)).tobytes().hex()


@jax.jit
def _sums(array: Shaped[Array, "..."], start: UInt32[Array, ""]) -> UInt32[Array, "2"]:
    """Two sums of the words, each first mixed with its index: sums do not depend on how the array is split.

    Mixing is one-to-one, so a changed word changes both. A product with an odd weight would be that too, but cannot
    see two changed signs: 2**31 times any odd number is 2**31.
    """
    words = _words(array)
    strides = [math.prod(words.shape[axis + 1 :]) % 2**32 for axis in range(words.ndim)]
    return _mixed(words, start, np.array(strides, np.uint32))


@jax.jit
def _spread_sums(words: Shaped[Array, "..."], start: UInt32[Array, ""], strides: UInt32[Array, " n"]) -> Any:
    """The same of a part whose elements lie apart in the whole, by `strides` words along each axis."""
    return _mixed(words.astype(jnp.uint32), start, strides)


def _mixed(words: UInt32[Array, "..."], start: Any, strides: Any) -> UInt32[Array, "2"]:
    index = start
    for axis in range(words.ndim):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * strides[axis]
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
