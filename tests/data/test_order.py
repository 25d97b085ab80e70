"""The order of training examples: complete epochs, reproducible, shuffled or not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas_jax.data import order as module
from atlas_jax.data.order import ExampleOrder, FeistelPermutation


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


@given(count=st.integers(1, 300), key=st.text(max_size=5))
def test_a_permutation_without_an_array_is_one(count, key):
    """Each number comes once, in another order for another key."""
    numbers = [FeistelPermutation(count, key)[index] for index in range(count)]
    assert sorted(numbers) == list(range(count))
    others = [FeistelPermutation(count, key + "x")[index] for index in range(count)]
    assert count < 20 or numbers != others


def test_an_epoch_of_billions_of_examples_is_shuffled_without_an_array(monkeypatch):
    """As with all orders of ten options; below the limit the order stays that of the array, which is another one."""
    count = 12_000 * 3_628_800
    order = ExampleOrder(count, 1, shuffle=True)
    drawn = [order[position].number for position in range(2000)]
    assert len(set(drawn)) == 2000
    assert 0.45 < sum(number < count // 2 for number in drawn) / 2000 < 0.55
    assert drawn != [order[count + position].number for position in range(2000)]  # the next epoch
    small = [ExampleOrder(50, 1, shuffle=True)[position] for position in range(50)]
    monkeypatch.setattr(module, "LONGEST_ARRAY", 10)
    assert small != [ExampleOrder(50, 1, shuffle=True)[position] for position in range(50)]
