"""The checksum sees dtype, shape and every bit, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from atlas_jax.checkpoints.formats import checksum as module
from atlas_jax.checkpoints.formats.checksum import checksum
from atlas_jax.mesh import make_mesh

RNG = np.random.default_rng(0)
TYPES = (np.float32, np.int32, np.uint32, jnp.bfloat16, np.float16, np.int8, np.bool, np.float64, np.int64)


def flipped(array: np.ndarray, bit: int) -> np.ndarray:
    """With one bit, counted over all elements, changed."""
    words = bytearray(array.tobytes())
    words[bit // 8] ^= 1 << bit % 8
    return np.frombuffer(words, array.dtype).reshape(array.shape)


@given(st.lists(st.floats(width=32), min_size=12, max_size=12), st.integers(0, 12 * 32 - 1))
@settings(max_examples=300)
def test_any_flipped_bit_changes_it(numbers, bit):
    """Whatever the floats, NaN and -0 among them; flipped back, it is as it was."""
    array = np.array(numbers, np.float32).reshape(3, 4)
    other = flipped(array, bit)
    assert checksum(other) != checksum(array)
    assert checksum(flipped(other, bit)) == checksum(array)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_bit_of_every_type(dtype):
    """All positions of the bits of each type, in an array and in a number without axes: all give other checksums."""
    for shape in ((2,), ()):
        array = np.ones(shape, dtype)
        bits = range(0, array.nbytes * 8, 8 if dtype is np.bool else 1)  # a bool has one
        found = {checksum(array), *(checksum(flipped(array, bit)) for bit in bits)}
        assert len(found) == len(bits) + 1


def test_changes_that_a_weighted_sum_would_not_see():
    """Two changed signs, two elements exchanged, zeros moved; products with odd weights lose the signs."""
    array = RNG.normal(size=32).astype(np.float32)
    signs, exchanged = array.copy(), array.copy()
    signs[[3, 17]] *= -1
    exchanged[[3, 17]] = array[[17, 3]]
    assert len({checksum(x) for x in (array, signs, exchanged, np.roll(array, 1))}) == 4
    weights = RNG.integers(0, 2**31, 32).astype(np.uint32) * np.uint32(2) + np.uint32(1)
    assert (signs.view(np.uint32) * weights).sum(dtype=np.uint32) == (array.view(np.uint32) * weights).sum(
        dtype=np.uint32
    )


def test_shape_and_type_count():
    """The same bits in another shape or type are another array, empty ones too; NaN equals itself."""
    zeros = [np.zeros(shape, dtype) for shape in ((), (1,), (6,), (2, 3), (0,), (0, 3), (3, 0)) for dtype in TYPES]
    assert len({checksum(array) for array in zeros}) == len(zeros)
    nan = np.full(3, np.nan, np.float32)
    assert checksum(nan) == checksum(nan.copy())
    assert len(checksum(nan)) == 16
    int(checksum(nan), 16)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8], ids=lambda dtype: np.dtype(dtype).name)
def test_it_is_the_same_wherever_the_array_lies(dtype):
    """On the host, on a device, split over a mesh in any way; the array that one device holds is another."""
    array = (RNG.normal(size=(8, 16)) * 9).astype(dtype)
    expected = checksum(array)
    assert checksum(jnp.asarray(array)) == expected
    mesh = make_mesh("data=2,fsdp=2,model=2")
    for spec in ((), ("data",), (None, "model"), ("model", ("fsdp", "data"))):
        split = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        assert checksum(split) == expected
        if spec:
            assert checksum(np.asarray(split.addressable_shards[0].data)) != expected


def test_a_large_array_goes_in_pieces(monkeypatch):
    """Pieces and a rest give what the whole gives, and so does a view that is not contiguous."""
    array = RNG.normal(size=(10, 7)).astype(np.float32)
    whole, wide = checksum(array), checksum(array.astype(np.float64))
    summed, pieces = module._sums, []
    monkeypatch.setattr(module, "_sums", lambda words, start: (pieces.append(words.size), summed(words, start))[1])
    monkeypatch.setattr(module, "PIECE", 64)
    assert checksum(array) == whole
    assert pieces == [14] * 5
    assert checksum(array.astype(np.float64)) == wide
    assert checksum(np.asfortranarray(array)) == whole
    assert checksum(array.T.copy().T) == whole
    assert checksum(array.T) != whole


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16], ids=lambda dtype: np.dtype(dtype).name)
def test_parts_may_lie_apart_and_come_to_several_processes(dtype):
    """Blocks of all axes, in any order, in two sums that add up; a block in another place is another array."""
    array = (RNG.normal(size=(4, 6, 10)) * 9).astype(dtype)
    blocks = [(i, j, k) for i in (0, 2) for j in (0, 3) for k in (0, 5)]

    def found(places) -> str:
        halves = [module.Checksum(array.dtype, array.shape) for _ in range(2)]
        for number, ((i, j, k), place) in enumerate(zip(blocks[::-1], places[::-1], strict=True)):
            halves[number % 2].add(place, array[i : i + 2, j : j + 3, k : k + 5])
        halves[0].sums += halves[1].sums
        return halves[0].digits()

    assert found(blocks) == checksum(array)
    assert found([blocks[1], blocks[0], *blocks[2:]]) != checksum(array)
