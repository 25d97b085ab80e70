"""Long work is visible: lines in a log file, a bar on a terminal."""

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
    """A clock that the test sets; starts anywhere."""
    now = types.SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now.seconds))
    return now


@pytest.fixture
def said(caplog):
    """The lines that were logged."""
    caplog.set_level(logging.INFO, logger="atlas_jax")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_line_now_and_then(clock, said):
    """Every 30 seconds at most, with what is done, the rate, the time and the time left; the last one says the end."""
    with progress("embedding", "passages", 400) as more:
        for _ in range(40):
            clock.seconds += 2
            more(10)
    assert said() == [
        "embedding: 160 of 400 passages, 5.0/s, 32 s, 48 s left",
        "embedding: 320 of 400 passages, 5.0/s, 64 s, 16 s left",
        "embedding: 400 of 400 passages, 5.0/s, 80 s",
    ]


def test_without_a_total(clock, said):
    """What is left is unknown, so nothing is said of it."""
    with progress("reading", "passages") as more:
        clock.seconds += 31
        more(62)
        clock.seconds += 31
    assert said() == ["reading: 62 passages, 2.0/s, 31 s", "reading: 62 passages, 1.0/s, 62 s"]


def test_short_work_says_its_end_alone(said):
    """One line, also when it took no time at all; none where there was nothing to do."""
    with progress("reading", "rows", 3) as more:
        more(1)
        more(2)
    with progress("reading", "rows", 0):
        pass
    assert len(said()) == 1
    assert said()[0].startswith("reading: 3 of 3 rows, ")
    assert said()[0].endswith("/s, 0 s")


def test_work_that_fails_has_no_end(said):
    """The error goes through, and no line claims that the work was done."""

    def work():
        with progress("reading", "rows", 3) as more:
            more(1)
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        work()
    assert said() == []


def read_all(terminal):
    """What was written to a terminal that is closed on the other side."""
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that it is over
        while more := os.read(terminal, 4096):
            shown += more
    os.close(terminal)
    return shown.decode()


def test_a_bar_on_a_terminal(monkeypatch, caplog):
    """Its text, count, time left and rate; a log message meanwhile gets a line of its own, and progress logs none."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (25, 100))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        handler = logging.StreamHandler(terminal)
        logging.getLogger().addHandler(handler)
        caplog.set_level(logging.INFO)
        try:
            with progress("embedding", "passages", 8) as more:
                more(4)
                logging.getLogger("atlas_jax").info("said meanwhile")
                time.sleep(0.11)  # tqdm draws ten times a second
                more(2)
                more(2)
        finally:
            logging.getLogger().removeHandler(handler)
    lines = read_all(ours).replace("\r\n", "\n").split("\n")
    assert lines[0].split("\r")[-1].strip() == "said meanwhile"
    bars = lines[1].split("\r")
    assert any(re.fullmatch(r"embedding: +75%.*6/8 \[\d\d:\d\d<\d\d:\d\d, +[0-9.]+ passages/s\]", bar) for bar in bars)
    assert re.fullmatch(r"embedding: 100%.*8/8 \[\d\d:\d\d<00:00, +[0-9.]+ passages/s\]", bars[-1])
    assert lines[2:] == [""]
    assert module.__name__ not in {record.name for record in caplog.records}
