"""The order of training examples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas_jax.data.order import Order


@pytest.mark.parametrize("shuffle", [False, True])
@given(count=st.integers(1, 40), seed=st.integers(0, 9))
def test_every_example_comes_exactly_once_an_epoch(shuffle, count, seed):
    """In each of three epochs; a position tells its epoch, and batches need not divide the count."""
    order = Order(count, seed, shuffle=shuffle)
    for epoch in range(3):
        places = [order[position] for position in range(epoch * count, (epoch + 1) * count)]
        assert {place_on_mesh.epoch for place_on_mesh in places} == {epoch}
        assert sorted(place_on_mesh.number for place_on_mesh in places) == list(range(count))


def test_the_order_is_a_pure_function_of_seed_epoch_and_position():
    """Asked backwards and by another object the same; another seed or epoch gives another order."""
    first, again, other = Order(50, 1, shuffle=True), Order(50, 1, shuffle=True), Order(50, 2, shuffle=True)
    forwards = [first[position] for position in range(150)]
    assert [again[position] for position in reversed(range(150))] == forwards[::-1]
    numbers = [place_on_mesh.number for place_on_mesh in forwards]
    assert numbers[:50] != numbers[50:100] != numbers[100:]
    assert numbers != [other[position].number for position in range(150)]


def test_without_shuffle_the_rows_come_as_they_are():
    """File order, again and again."""
    order = Order(3, 5, shuffle=False)
    assert [order[position].number for position in range(7)] == [0, 1, 2, 0, 1, 2, 0]
