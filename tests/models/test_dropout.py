"""Dropout: the quality of its hashed masks, and that they depend on nothing but the seed and an element's place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from atlas_jax.models.dropout import Seeds, drop, dropout, keep_mask

SHAPE = (8, 10, 500, 625)  # 25 million elements; the tests of quality take 10^8 draws
DRAWS = 25_000_000
SIGMAS = 4.5  # 1 in 150,000 samples of a normal distribution is further off
mask_of = jax.jit(keep_mask, static_argnums=(1, 2))


def seeds(number: int) -> Seeds:
    return Seeds.of_key(jax.random.key(number))


def seed(number: int) -> jax.Array:
    return seeds(number).next()


def deviations(number: int, rate: float) -> jax.Array:
    """Dropped minus the rate, in standard deviations of one element: mean 0 and variance 1 if all is well."""
    return (jnp.where(mask_of(seed(number), rate, SHAPE), 0.0, 1.0) - rate) / (rate * (1 - rate)) ** 0.5


def sigmas(products: jax.Array) -> float:
    """The sum of independent values of mean 0 and variance 1, in its standard deviations."""
    return float(jnp.abs(products.sum(dtype=jnp.float32)) / products.size**0.5)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.003])
def test_the_fraction_dropped_is_the_rate(rate):
    """In all, in each plane and along both axes of a plane (chi-square); kept elements are scaled up."""
    deviation = deviations(0, rate)
    assert sigmas(deviation) < SIGMAS
    for axes in ((2, 3), (3,), (2,), (0, 1)):
        sums = deviation.sum(axes) / np.prod([SHAPE[axis] for axis in axes]) ** 0.5
        kurtosis = 2.0 + (1 / (rate * (1 - rate)) - 6) / np.prod([SHAPE[axis] for axis in axes])  # variance of a square
        assert sigmas((sums**2 - 1) / kurtosis**0.5) < SIGMAS, axes
    x = dropout(jnp.ones((2, 40, 50)), rate, seeds(0))
    assert set(np.unique(np.asarray(x)).tolist()) == {0.0, float(jnp.float32(1) / jnp.float32(1 - rate))}


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_neighbours_are_independent(rate):
    """Serial correlations: the next columns, rows, planes and batches, diagonals, and lags of powers of two."""
    x = deviations(1, rate)
    pairs = [(x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), (x[:, :, 1:], x[:, :, :-1]), (x[:, :, 1:, 1:], x[:, :, :-1, :-1])]
    pairs += [(x[:, :, 1:, :-1], x[:, :, :-1, 1:])]
    pairs += [(x[..., lag:], x[..., :-lag]) for lag in (1, 2, 3, 16, 256)]
    found = [sigmas(left * right) for left, right in pairs]
    assert max(found) < SIGMAS, found


def test_eight_neighbours_have_all_patterns_equally_often():
    """Chi-square over the 256 patterns of eight neighbours in a row at rate 0.5."""
    bits = np.asarray(mask_of(seed(2), 0.5, SHAPE)).reshape(-1, 8)
    counts = np.bincount(np.packbits(bits, axis=1)[:, 0], minlength=256)
    expected = len(bits) / 256
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < SIGMAS * (2 * 255) ** 0.5


def test_seeds_are_independent():
    """Cross correlations of the masks of steps (a key folded with the step), of layers and of calls."""
    key = jax.random.key(3)
    steps = [Seeds.of_key(jax.random.fold_in(key, step)) for step in (1, 2)]
    found_seeds = [step.next() for step in (*steps, *steps)]
    found_seeds += [Seeds(layer).next() for layer in steps[0].for_layers(3)]
    found_seeds += [found_seeds[0] + jnp.asarray([0, 1], jnp.uint32), found_seeds[0] + jnp.asarray([1, 0], jnp.uint32)]
    shape = (*SHAPE[:2], 100, SHAPE[3])
    masks = [jnp.where(mask_of(seed, 0.5, shape), 1.0, -1.0) for seed in found_seeds]
    found = [sigmas(masks[i] * masks[j]) for i in range(len(masks)) for j in range(i)]
    assert max(found) < SIGMAS, found


def test_a_linear_hash_would_fail():
    """The counter-case of the tests above: a product with an odd number alone, whose neighbours are dependent."""
    indices = jnp.arange(DRAWS, dtype=jnp.uint32)
    x = jnp.where(indices * np.uint32(0x9E3779B9) >= np.uint32(2**31), 1.0, -1.0)
    assert sigmas(x[1:] * x[:-1]) > 100


@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 4, 1, 6), (1, 2, 8, 3), (9,)])
def test_padding_changes_no_element(shape):
    """An element of a longer array has the same bit, on whichever axes the array is longer."""
    longer = keep_mask(seed(4), 0.3, tuple(2 * length for length in shape))
    np.testing.assert_array_equal(keep_mask(seed(4), 0.3, shape), longer[tuple(map(slice, shape))])


@pytest.mark.parametrize("spec", [("data",), (None, "data"), (None, None, "data"), (None, None, None, "data")])
def test_eight_devices_have_the_bits_of_one(spec):
    """Whichever axis is divided over the devices."""
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    assert mesh.size == 8
    shape = (8, 16, 8, 24)
    sharded = jax.jit(keep_mask, static_argnums=(1, 2), out_shardings=NamedSharding(mesh, PartitionSpec(*spec)))
    np.testing.assert_array_equal(sharded(seed(5), 0.1, shape), keep_mask(seed(5), 0.1, shape))


def test_the_gradient_is_dropped_as_the_values_are():
    """And in an array of the gradient's dtype; no mask is kept for it."""
    x = jnp.ones((2, 3, 40), jnp.bfloat16)
    y, backward = jax.vjp(lambda x: drop(x, seed(6), None, 0.2), x)
    np.testing.assert_array_equal(backward(x)[0], y)
    assert y.dtype == backward(x)[0].dtype == jnp.bfloat16
    assert all(leaf.size == 2 for leaf in jax.tree.leaves(backward))


def test_without_rngs_or_at_rate_0_dropout_is_the_identity():
    """Returns the very array that was passed in."""
    x = jnp.ones((1, 2, 3))
    assert dropout(x, 0.1, None) is x
    assert dropout(x, 0.0, seeds(0)) is x
