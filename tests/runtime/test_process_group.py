"""Collectives of a process group: gather, maximum, barrier and errors, between real processes."""

import signal
import socket

import pytest

from atlas_jax.runtime.process_group import ProcessGroup
from tests.runtime.processes import exit_lines


@pytest.mark.parametrize("count", [2, 3])
def test_collectives_give_every_process_the_values_of_all(processes, count):
    """Values arrive in order, on two channels from two threads, also megabytes; one key per channel remains.

    The result of process 0 reaches all; an error names its process to the others; a stop signal of one process stops
    all; `process_0_first` lets process 0 go first.
    """
    started = processes.start("collectives", range(count), count)
    for index, (status, lines) in enumerate(process.end() for process in started.values()):
        assert status == 0, lines
        error = "integer division or modulo by zero"
        assert lines[lines.index("up") + 1 : -1] == [
            f"max {[count - 1, 0, 7]}",
            f"large {[6_000_000 + index for index in range(count)]}",
            "first is 0",
            f"error {error}" if index == 1 else f"error process 1 ({socket.gethostname()}): {error}",
            f"stop {signal.SIGUSR1.value}",
            "marked True",
            "keys 5",
        ]


def test_a_process_that_does_not_answer_is_named(processes):
    """Each waiting process's error names the missing process."""
    started = processes.start("late", range(3), 3)
    late = started.pop(1)
    results = exit_lines(started)
    late.end()
    message = "did not answer within 0.5 s (main)"
    assert all("process 1 (" in line and message in line for _, line in results.values()), results


def test_a_group_of_one_returns_its_own_values():
    """A group of one process needs no key-value store."""
    group = ProcessGroup()
    assert group.all_gather(b"x") == [b"x"]
    assert group.all_max(3, -1) == [3, -1]
    group.barrier()
