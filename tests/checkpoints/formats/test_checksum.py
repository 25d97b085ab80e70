"""The checksum depends on dtype, shape and every bit, and on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from atlas_jax.checkpoints.formats import checksum as checksum_module
from atlas_jax.checkpoints.formats.checksum import checksum
from atlas_jax.mesh import make_mesh

RNG = np.random.default_rng(0)
TYPES = (np.float32, np.int32, np.uint32, jnp.bfloat16, np.float16, np.int8, np.bool, np.float64, np.int64)


def with_flipped_bit(array: np.ndarray, bit: int) -> np.ndarray:
    """Returns a copy with one bit flipped, counted over the bytes of all elements."""
    content = bytearray(array.tobytes())
    content[bit // 8] ^= 1 << bit % 8
    return np.frombuffer(content, array.dtype).reshape(array.shape)


@given(st.lists(st.floats(width=32), min_size=12, max_size=12), st.integers(0, 12 * 32 - 1))
@settings(max_examples=300)
def test_any_flipped_bit_changes_the_checksum(numbers, bit):
    """Flipping any bit of any floats, NaN and -0 included, changes the checksum; flipping it back restores it."""
    array = np.array(numbers, np.float32).reshape(3, 4)
    other = with_flipped_bit(array, bit)
    assert checksum(other) != checksum(array)
    assert checksum(with_flipped_bit(other, bit)) == checksum(array)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_bit_of_every_dtype_counts(dtype):
    """Flipping each bit of an array, and of a 0-d array, of each dtype gives a different checksum each time."""
    for shape in ((2,), ()):
        array = np.ones(shape, dtype)
        bits = range(0, array.nbytes * 8, 8 if dtype is np.bool else 1)  # one bit of a bool counts
        found = {checksum(array), *(checksum(with_flipped_bit(array, bit)) for bit in bits)}
        assert len(found) == len(bits) + 1


def test_changes_that_a_weighted_sum_would_miss_are_seen():
    """Two flipped signs, two swapped elements and a rotation change the checksum; a weighted sum misses the signs."""
    array = RNG.normal(size=32).astype(np.float32)
    signs, exchanged = array.copy(), array.copy()
    signs[[3, 17]] *= -1
    exchanged[[3, 17]] = array[[17, 3]]
    assert len({checksum(x) for x in (array, signs, exchanged, np.roll(array, 1))}) == 4
    weights = RNG.integers(0, 2**31, 32).astype(np.uint32) * np.uint32(2) + np.uint32(1)
    assert (signs.view(np.uint32) * weights).sum(dtype=np.uint32) == (array.view(np.uint32) * weights).sum(
        dtype=np.uint32
    )


def test_shape_and_dtype_change_the_checksum():
    """Equal bits of another shape or dtype give another checksum, also in empty arrays; NaN equals itself."""
    zeros = [np.zeros(shape, dtype) for shape in ((), (1,), (6,), (2, 3), (0,), (0, 3), (3, 0)) for dtype in TYPES]
    assert len({checksum(array) for array in zeros}) == len(zeros)
    nan = np.full(3, np.nan, np.float32)
    assert checksum(nan) == checksum(nan.copy())
    assert len(checksum(nan)) == 16
    int(checksum(nan), 16)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8], ids=lambda dtype: np.dtype(dtype).name)
def test_the_checksum_does_not_depend_on_placement(dtype):
    """An array on the host, on a device and sharded in any way has one checksum; a shard alone has another."""
    array = (RNG.normal(size=(8, 16)) * 9).astype(dtype)
    expected = checksum(array)
    assert checksum(jnp.asarray(array)) == expected
    mesh = make_mesh("data=2,fsdp=2,model=2")
    for spec in ((), ("data",), (None, "model"), ("model", ("fsdp", "data"))):
        split = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        assert checksum(split) == expected
        if spec:
            assert checksum(np.asarray(split.addressable_shards[0].data)) != expected


def test_the_checksum_does_not_depend_on_chunking(monkeypatch):
    """Several chunks with a smaller last one, and views that are not contiguous, give the checksum of one chunk."""
    array = RNG.normal(size=(10, 7)).astype(np.float32)
    expected, expected_float64 = checksum(array), checksum(array.astype(np.float64))
    word_sums, chunk_sizes = checksum_module._word_sums, []
    monkeypatch.setattr(
        checksum_module, "_word_sums", lambda words, start: (chunk_sizes.append(words.size), word_sums(words, start))[1]
    )
    monkeypatch.setattr(checksum_module, "CHUNK_BYTES", 64)
    assert checksum(array) == expected
    assert chunk_sizes == [14] * 5
    assert checksum(array.astype(np.float64)) == expected_float64
    assert checksum(np.asfortranarray(array)) == expected
    assert checksum(array.T.copy().T) == expected
    assert checksum(array.T) != expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16], ids=lambda dtype: np.dtype(dtype).name)
def test_blocks_in_several_processes_add_up(dtype):
    """Blocks along all axes, in any order and in two sums that are added, give the checksum; a moved block does not."""
    array = (RNG.normal(size=(4, 6, 10)) * 9).astype(dtype)
    blocks = [(i, j, k) for i in (0, 2) for j in (0, 3) for k in (0, 5)]

    def checksum_of_blocks_at(starts) -> str:
        halves = [checksum_module.Checksum(array.dtype, array.shape) for _ in range(2)]
        for number, ((i, j, k), start) in enumerate(zip(blocks[::-1], starts[::-1], strict=True)):
            halves[number % 2].add(start, array[i : i + 2, j : j + 3, k : k + 5])
        halves[0].sums += halves[1].sums
        return halves[0].hexdigest()

    assert checksum_of_blocks_at(blocks) == checksum(array)
    assert checksum_of_blocks_at([blocks[1], blocks[0], *blocks[2:]]) != checksum(array)
