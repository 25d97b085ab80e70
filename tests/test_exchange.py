"""What processes tell each other, without their devices."""

import pytest

from atlas_jax.exchange import Exchange
from tests.test_hosts import last_lines, start


@pytest.mark.parametrize("count", [2, 3])
def test_every_process_gets_every_value(count):
    """In order, on two channels from two threads, also megabytes; one key a channel is left."""
    processes = start("talk", range(count), count)
    for process in processes.values():
        lines = process.communicate(timeout=40)[0].splitlines()
        assert process.returncode == 0, lines
        assert lines[-4:-1] == [
            f"max {[count - 1, 0, 7]}",
            f"large {[6_000_000 + index for index in range(count)]}",
            "keys 5",
        ]


def test_who_does_not_answer_is_named():
    """On each process that waits."""
    processes = start("late", range(3), 3)
    ended = last_lines({index: processes[index] for index in (0, 2)})
    last_lines({1: processes[1]})
    assert all("process 1 (" in line and "did not answer within 1 s (main)" in line for _, line in ended.values()), (
        ended
    )


def test_one_process_needs_nobody():
    alone = Exchange()
    assert alone.gather(b"x") == [b"x"]
    assert alone.agree_max([3, -1]) == [3, -1]
    alone.barrier("end")
