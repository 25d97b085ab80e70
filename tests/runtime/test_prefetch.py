"""Working ahead: in order, not too far, and never alone."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas_jax.runtime.prefetch import map_in_order, prefetch


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith(("prefetch", "in-order"))]


@given(st.lists(st.none() | st.integers()), st.integers(1, 5))
def test_items_come_in_order(items, depth):
    """All of them, None too, and the thread ends with them."""
    assert list(prefetch(iter(items), depth)) == items
    assert not workers()


def test_nothing_starts_before_it_is_asked_for():
    """The first `next` starts the thread."""
    started = []
    items = prefetch(started.append(i) for i in range(3))
    assert (started, workers()) == ([], [])
    next(items)
    assert started[0] == 0
    items.close()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_at_most_depth_ahead(depth):
    """While the consumer holds item i, the thread makes those up to i + depth, and no more; it does get there."""
    made, condition = [], threading.Condition()

    def items():
        for i in range(12):
            with condition:
                made.append(threading.current_thread())
                condition.notify()
            yield i

    for i in prefetch(items(), depth):
        with condition:
            wanted = min(i + 1 + depth, 12)
            assert condition.wait_for(lambda wanted=wanted: len(made) >= wanted, timeout=10)
            assert not condition.wait_for(lambda wanted=wanted: len(made) > wanted, timeout=0.02)
    assert len(made) == 12
    assert len(set(made)) == 1
    assert made[0] is not threading.current_thread()


def test_the_consumer_does_not_wait_for_the_next():
    """It has an item while the next is being made; the counter-case, a plain iterator, would never return."""
    first_is_taken = threading.Event()

    def items():
        yield 0
        assert first_is_taken.wait(timeout=10)
        yield 1

    ahead = prefetch(items())
    assert next(ahead) == 0
    first_is_taken.set()
    assert list(ahead) == [1]


def test_an_error_is_raised_where_its_item_would_be():
    """Itself, after the items before it; then it is over and the thread has ended."""
    error = OSError("disk")

    def items():
        yield 0
        yield 1
        raise error

    ahead, seen = prefetch(items(), 3), []
    with pytest.raises(OSError, match="disk") as raised:
        seen.extend(item for item in ahead)  # as far as it goes
    assert raised.value is error
    assert next(ahead, "over") == "over"
    assert not workers()
    ahead = prefetch(items(), 3)
    assert (next(ahead), next(ahead)) == (0, 1)
    with pytest.raises(OSError, match="disk"):
        next(ahead)


@pytest.mark.parametrize("how", ["close", "forget"])
def test_an_abandoned_iterator_stops_the_thread(how):
    """Left and closed, or left and forgotten: the item under way is finished, those that wait are not begun."""
    made, second, gate = [], threading.Event(), threading.Event()

    def items():
        for i in range(10**9):
            made.append(i)
            if i == 1:
                second.set()
                assert gate.wait(timeout=10)
            yield i

    ahead = prefetch(items(), 3)
    for _ in ahead:
        break
    assert second.wait(timeout=10)
    threading.Timer(0.3, gate.set).start()  # closing waits for the second item
    if how == "close":
        ahead.close()
    del ahead
    assert not workers()
    assert made == [0, 1]


@given(st.lists(st.integers()), st.integers(1, 5))
def test_work_of_several_comes_in_order(items, several):
    """As `map` has it, and the threads end with it."""
    assert list(map_in_order(lambda item: item + 1, items, several)) == [item + 1 for item in items]
    assert not workers()


def test_several_work_at_a_time_and_not_far_ahead():
    """Two items meet, which one thread alone could not do; only the next two have been asked for when one comes."""
    meeting, asked = threading.Barrier(2), []

    def items():
        for i in range(8):
            asked.append(i)
            yield i

    for i in map_in_order(lambda item: (meeting.wait(timeout=10), item)[1], items(), 2):
        assert len(asked) <= i + 3
    assert asked == list(range(8))


def test_an_error_ends_all_work():
    """It is raised here; what was not begun never is, what was has ended."""
    done = []

    def work(item):
        if item == 1:
            raise OSError("the disk")
        done.append(item)
        return item

    ahead = map_in_order(work, range(100), 2)
    with pytest.raises(OSError, match="the disk"):
        list(ahead)
    assert len(done) < 6
    assert not workers()
