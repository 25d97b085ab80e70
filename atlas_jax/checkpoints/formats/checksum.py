"""Array checksums that are equal for an array on the host, on a device and sharded over a mesh."""

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32

from atlas_jax.storage.lazy_array import chunk_shape, chunk_slices

CHUNK_BYTES = 4 << 20  # bytes of a host array that are sent to the device at a time: few enough for a CPU cache


def checksum(array: np.ndarray | jax.Array) -> str:
    """Returns 16 hexadecimal digits that depend only on dtype, shape and bits; flipping any one bit changes them.

    A NumPy array is read in chunks of CHUNK_BYTES, which are copied only if they are not contiguous.
    """
    if isinstance(array, jax.Array):
        return _hexdigest(array.dtype, array.shape, np.asarray(_word_sums(array, np.uint32(0))))
    result = Checksum(array.dtype, array.shape)
    result.add((), array)
    return result.hexdigest()


class Checksum:
    """Accumulates the checksum of an array from its parts, in any order and possibly in several processes."""

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...]):
        self.dtype, self.shape = dtype, shape
        self.element_count = 0  # elements added so far
        self.sums = np.zeros(2, np.uint32)  # modulo 2**32; the sums of all processes add up to the array's

    def add(self, start_index: tuple[int, ...], part: np.ndarray) -> None:
        """Adds a part of the array; its first element has the index `start_index`, 0 on axes left out at the end."""
        words = max(part.itemsize // 4, 1)
        strides = [math.prod(self.shape[axis + 1 :]) * words for axis in range(part.ndim)]
        steps = np.array([stride % 2**32 for stride in (*strides, 1)], np.uint32)
        start_word = first(start_index, self.shape) * words
        for index in chunk_slices(part.shape, chunk_shape(part.shape, part.itemsize, CHUNK_BYTES)):
            chunk, word = part[index], start_word + sum(s.start * n for s, n in zip(index, strides, strict=True))
            bits = np.ascontiguousarray(chunk).view(f"u{min(part.itemsize, 4)}")
            if _is_contiguous(chunk.shape, self.shape):
                added = _word_sums(bits.reshape(-1), np.uint32(word % 2**32))
            else:
                added = _strided_word_sums(bits.reshape(*chunk.shape, words), np.uint32(word % 2**32), steps)
            self.sums += np.asarray(added)
        self.element_count += part.size

    def merge(self, other: "Checksum") -> None:
        """Adds the parts that were added to another checksum of this array."""
        self.sums += other.sums
        self.element_count += other.element_count

    def hexdigest(self) -> str:
        """Returns the checksum of the array, once all of its parts have been added."""
        return _hexdigest(self.dtype, self.shape, self.sums)


def first(corner: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Returns the flat index, in C order, of the element at `corner`, which is 0 on axes left out at the end."""
    flat_index = 0
    for axis, n in enumerate(shape):
        flat_index = flat_index * n + (corner[axis] if axis < len(corner) else 0)
    return flat_index


def _is_contiguous(part_shape: tuple[int, ...], array_shape: tuple[int, ...]) -> bool:
    """Whether a part of this shape covers consecutive elements, in C order, of the array."""
    axis = next((axis for axis, n in enumerate(part_shape) if n != 1), len(part_shape))
    return part_shape[axis + 1 :] == array_shape[axis + 1 :]


def _hexdigest(dtype: np.dtype[Any], shape: tuple[int, ...], sums: np.ndarray) -> str:
    """Combines the two sums with a hash of dtype and shape."""
    type_hash = hashlib.blake2b(f"{dtype}{shape}".encode(), digest_size=8).digest()
    return (sums ^ np.frombuffer(type_hash, np.uint32)).tobytes().hex()


@jax.jit
def _word_sums(array: Shaped[Array, "..."], start_word: UInt32[Array, ""]) -> UInt32[Array, "2"]:
    """Returns two sums over the 32-bit words of a contiguous part, each word mixed with its index in the whole array.

    Sums do not depend on how the array is split. Mixing is one-to-one, so one changed word changes both sums.
    Multiplying by an odd weight would be one-to-one too, but would miss two flipped sign bits: 2**31 times any odd
    number is 2**31 modulo 2**32.
    """
    words = _words(array)
    strides = [math.prod(words.shape[axis + 1 :]) % 2**32 for axis in range(words.ndim)]
    return _mixed_sums(words, start_word, np.array(strides, np.uint32))


@jax.jit
def _strided_word_sums(words: Shaped[Array, "..."], start_word: UInt32[Array, ""], strides: UInt32[Array, " n"]) -> Any:
    """Returns the sums of `_word_sums` for a part with gaps in the whole array: `strides` words along each axis."""
    return _mixed_sums(words.astype(jnp.uint32), start_word, strides)


def _mixed_sums(words: UInt32[Array, "..."], start_word: Any, strides: Any) -> UInt32[Array, "2"]:
    index = start_word
    for axis in range(words.ndim):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * strides[axis]
    return jnp.stack([_mix(words ^ _mix(index + jnp.uint32(salt))).sum(dtype=jnp.uint32) for salt in (1, 0x9E3779B9)])


def _words(array: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """Returns each element's bits as uint32; a 64-bit element becomes two words along a new last axis."""
    if array.dtype == jnp.bool:
        return array.astype(jnp.uint32)
    bits = jnp.uint32 if array.dtype.itemsize >= 4 else jnp.dtype(f"u{array.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(array, bits).astype(jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Permutes the 32-bit words so that each output bit depends on all input bits: MurmurHash3's finalizer."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
