"""`progress`: lines in a log file, a bar on a terminal."""

import contextlib
import logging
import os
import pty
import re
import sys
import termios
import time
import types

import pytest

import atlas_jax.runtime.progress as module
from atlas_jax.runtime.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """A fake `time.monotonic`, in seconds, that the test sets."""
    now = types.SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now.seconds))
    return now


@pytest.fixture
def logged(caplog):
    """Returns the lines logged so far."""
    caplog.set_level(logging.INFO, logger="atlas_jax")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_line_at_most_every_30_seconds(clock, logged):
    """Lines have units done, rate, time and time left; the last line is logged at the end."""
    with progress("embedding", "passages", 400) as advance:
        for _ in range(40):
            clock.seconds += 2
            advance(10)
    assert logged() == [
        "embedding: 160 of 400 passages, 5.0/s, 32 s, 48 s left",
        "embedding: 320 of 400 passages, 5.0/s, 64 s, 16 s left",
        "embedding: 400 of 400 passages, 5.0/s, 80 s",
    ]


def test_without_a_total_no_time_left_is_logged(clock, logged):
    """Lines have units done, rate and time only."""
    with progress("reading", "passages") as advance:
        clock.seconds += 31
        advance(62)
        clock.seconds += 31
        advance(62)
    assert logged() == ["reading: 62 passages, 2.0/s, 31 s", "reading: 124 passages, 2.0/s, 62 s"]


@pytest.mark.parametrize("last", [1, 31])
def test_the_last_line_is_logged_once(clock, logged, last):
    """Whether the last units were logged when they were done, or too soon after the line before."""
    with progress("reading", "passages", 3) as advance:
        clock.seconds += 31
        advance(2)
        clock.seconds += last
        advance(1)
    assert [line.split(" passages")[0] for line in logged()] == ["reading: 2 of 3", "reading: 3 of 3"]


def test_short_work_logs_one_line_at_its_end(logged):
    """One line even if the work took no time at all; work without any units logs none."""
    with progress("reading", "rows", 3) as advance:
        advance(1)
        advance(2)
    with progress("reading", "rows", 0):
        pass
    assert len(logged()) == 1
    assert logged()[0].startswith("reading: 3 of 3 rows, ")
    assert logged()[0].endswith("/s, 0 s")


def test_work_that_fails_logs_no_last_line(logged):
    """The error propagates, and no line claims that the work was done."""

    def work():
        with progress("reading", "rows", 3) as advance:
            advance(1)
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        work()
    assert logged() == []


def read_all(terminal):
    """Returns everything written to a pseudo-terminal whose other end is closed; closes it."""
    output = b""
    with contextlib.suppress(OSError):  # Linux raises EIO at the end
        while data := os.read(terminal, 4096):
            output += data
    os.close(terminal)
    return output.decode()


def test_a_bar_on_a_terminal(monkeypatch, caplog):
    """Description, count, time left and rate; a log message meanwhile has its own line; `progress` itself logs none."""
    controller, device = pty.openpty()
    termios.tcsetwinsize(device, (25, 100))
    with os.fdopen(device, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        handler = logging.StreamHandler(terminal)
        logging.getLogger().addHandler(handler)
        caplog.set_level(logging.INFO)
        try:
            with progress("embedding", "passages", 8) as advance:
                advance(4)
                logging.getLogger("atlas_jax").info("said meanwhile")
                time.sleep(0.11)  # tqdm draws ten times a second
                advance(2)
                advance(2)
        finally:
            logging.getLogger().removeHandler(handler)
    lines = read_all(controller).replace("\r\n", "\n").split("\n")
    assert lines[0].split("\r")[-1].strip() == "said meanwhile"
    bars = lines[1].split("\r")
    assert any(re.fullmatch(r"embedding: +75%.*6/8 \[\d\d:\d\d<\d\d:\d\d, +[0-9.]+ passages/s\]", bar) for bar in bars)
    assert re.fullmatch(r"embedding: 100%.*8/8 \[\d\d:\d\d<00:00, +[0-9.]+ passages/s\]", bars[-1])
    assert lines[2:] == [""]
    assert module.__name__ not in {record.name for record in caplog.records}
