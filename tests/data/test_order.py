"""The order of training examples: complete epochs, reproducible, shuffled or not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas_jax.data.order import ExampleOrder


@pytest.mark.parametrize("shuffle", [False, True])
@given(count=st.integers(1, 40), seed=st.integers(0, 9))
def test_every_example_comes_exactly_once_per_epoch(shuffle, count, seed):
    """Each of three epochs is complete for any count and seed, and each position has the right epoch."""
    order = ExampleOrder(count, seed, shuffle=shuffle)
    for epoch in range(3):
        entries = [order[position] for position in range(epoch * count, (epoch + 1) * count)]
        assert {entry.epoch for entry in entries} == {epoch}
        assert sorted(entry.number for entry in entries) == list(range(count))


def test_the_order_is_a_pure_function_of_seed_epoch_and_position():
    """Another object, read backwards, gives the same order; another seed or epoch gives another one."""
    first, same_seed, other_seed = (
        ExampleOrder(50, 1, shuffle=True),
        ExampleOrder(50, 1, shuffle=True),
        ExampleOrder(50, 2, shuffle=True),
    )
    forwards = [first[position] for position in range(150)]
    assert [same_seed[position] for position in reversed(range(150))] == forwards[::-1]
    numbers = [entry.number for entry in forwards]
    assert numbers[:50] != numbers[50:100] != numbers[100:]
    assert numbers != [other_seed[position].number for position in range(150)]


def test_without_shuffle_every_epoch_is_in_file_order():
    """Positions past the first epoch start again at example 0."""
    order = ExampleOrder(3, 5, shuffle=False)
    assert [order[position].number for position in range(7)] == [0, 1, 2, 0, 1, 2, 0]
