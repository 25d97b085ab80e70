"""What processes tell each other, without their devices."""

import signal
import socket

import pytest

from atlas_jax.runtime.process_group import ProcessGroup
from tests.runtime.processes import ends


@pytest.mark.parametrize("count", [2, 3])
def test_what_processes_tell_each_other(processes, count):
    """Every value comes to all, in order, on two channels from two threads, also megabytes; one key a channel is left.

    What one leads all know; who fails is named to the others; one that shall stop stops all; process 0 goes first.
    """
    started = processes.start("talk", range(count), count)
    for index, (status, lines) in enumerate(process.end() for process in started.values()):
        assert status == 0, lines
        error = "integer division or modulo by zero"
        assert lines[lines.index("up") + 1 : -1] == [
            f"max {[count - 1, 0, 7]}",
            f"large {[6_000_000 + one for one in range(count)]}",
            "led by 0",
            f"error {error}" if index == 1 else f"error process 1 ({socket.gethostname()}): {error}",
            f"stop {signal.SIGUSR1.value}",
            "marked True",
            "keys 5",
        ]


def test_who_does_not_answer_is_named(processes):
    """On each process that waits."""
    started = processes.start("late", range(3), 3)
    late = started.pop(1)
    ended = ends(started)
    late.end()
    what = "did not answer within 0.5 s (main)"
    assert all("process 1 (" in line and what in line for _, line in ended.values()), ended


def test_one_process_needs_nobody():
    alone = ProcessGroup()
    assert alone.all_gather(b"x") == [b"x"]
    assert alone.all_max(3, -1) == [3, -1]
    alone.barrier()
