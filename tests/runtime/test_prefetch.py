"""`prefetch` and `map_in_order`: items in order, a bounded number ahead, and no thread left behind."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas_jax.runtime.prefetch import map_in_order, prefetch


def workers():
    """Returns the threads of `prefetch` and `map_in_order` that are alive."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(("prefetch", "in-order"))]


@given(st.lists(st.none() | st.integers()), st.integers(1, 5))
def test_items_come_in_order(items, depth):
    """All items, None included; the thread ends with the last."""
    assert list(prefetch(iter(items), depth)) == items
    assert not workers()


def test_nothing_starts_before_the_first_next():
    """The first `next` starts the thread."""
    started = []
    items = prefetch(started.append(i) for i in range(3))
    assert (started, workers()) == ([], [])
    next(items)
    assert started[0] == 0
    items.close()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_thread_works_depth_items_ahead(depth):
    """While the consumer holds item i, the thread computes the items up to i + depth, and no more."""
    computed, condition = [], threading.Condition()

    def items():
        for i in range(12):
            with condition:
                computed.append(threading.current_thread())
                condition.notify()
            yield i

    for i in prefetch(items(), depth):
        with condition:
            expected = min(i + 1 + depth, 12)
            assert condition.wait_for(lambda expected=expected: len(computed) >= expected, timeout=10)
            assert not condition.wait_for(lambda expected=expected: len(computed) > expected, timeout=0.02)
    assert len(computed) == 12
    assert len(set(computed)) == 1
    assert computed[0] is not threading.current_thread()


def test_the_consumer_does_not_wait_for_the_next_item():
    """The consumer gets an item while the next is being computed; if it had to wait for that one, this would fail."""
    first_is_received = threading.Event()

    def items():
        yield 0
        assert first_is_received.wait(timeout=10)
        yield 1

    iterator = prefetch(items())
    assert next(iterator) == 0
    first_is_received.set()
    assert list(iterator) == [1]


def test_an_error_is_raised_in_place_of_its_item():
    """The original error object, after the items before it; then the iterator is exhausted and the thread has ended."""
    error = OSError("disk")

    def items():
        yield 0
        yield 1
        raise error

    iterator, seen = prefetch(items(), 3), []
    with pytest.raises(OSError, match="disk") as raised:
        seen.extend(item for item in iterator)  # keeps the items before the error
    assert raised.value is error
    assert next(iterator, "over") == "over"
    assert not workers()
    iterator = prefetch(items(), 3)
    assert (next(iterator), next(iterator)) == (0, 1)
    with pytest.raises(OSError, match="disk"):
        next(iterator)


@pytest.mark.parametrize("how", ["close", "delete"])
def test_an_abandoned_iterator_stops_the_thread(how):
    """Closed or garbage-collected: the item being computed is finished, later ones are not begun."""
    computed, second, gate = [], threading.Event(), threading.Event()

    def items():
        for i in range(10**9):
            computed.append(i)
            if i == 1:
                second.set()
                assert gate.wait(timeout=10)
            yield i

    iterator = prefetch(items(), 3)
    for _ in iterator:
        break
    assert second.wait(timeout=10)
    threading.Timer(0.3, gate.set).start()  # closing waits for the second item
    if how == "close":
        iterator.close()
    del iterator
    assert not workers()
    assert computed == [0, 1]


@given(st.lists(st.integers()), st.integers(1, 5))
def test_map_in_order_equals_map(items, count):
    """The results are equal for any number of threads, all of which have ended by the last result."""
    assert list(map_in_order(lambda item: item + 1, items, count)) == [item + 1 for item in items]
    assert not workers()


def test_map_in_order_runs_in_parallel_and_not_far_ahead():
    """Two items wait at a barrier for each other, as one thread could not; at most two later items have been drawn."""
    barrier, drawn = threading.Barrier(2), []

    def items():
        for i in range(8):
            drawn.append(i)
            yield i

    for i in map_in_order(lambda item: (barrier.wait(timeout=10), item)[1], items(), 2):
        assert len(drawn) <= i + 3
    assert drawn == list(range(8))


def test_an_error_ends_map_in_order():
    """The consumer gets the error; items not yet begun are never begun, those begun have ended."""
    done = []

    def work(item):
        if item == 1:
            raise OSError("the disk")
        done.append(item)
        return item

    iterator = map_in_order(work, range(100), 2)
    with pytest.raises(OSError, match="the disk"):
        list(iterator)
    assert len(done) < 6
    assert not workers()
