"""Whether this process is stuck, as in a call to a file system that has gone: one of its threads can still tell."""

import importlib.util
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

PACKAGE = Path(__file__).parents[1]
JAX = os.path.dirname(getattr(importlib.util.find_spec("jax"), "origin", None) or "jax") + os.sep
# Who is in these waits for other processes or for devices, which may wait for theirs in turn
WAITING = (
    JAX,
    *(str(PACKAGE / name) for name in ("runtime/process_group.py", "runtime/compiled.py", "retrieval/flat_index.py")),
)
BUSY = 0.02  # of a processor; what only beats takes a tenth of it


class Watchdog:
    """Since when all threads but daemons have been asleep, none of them waiting for another process or a device.

    Linux knows how often a thread has been awake; elsewhere no process is ever stuck.
    """

    def __init__(self) -> None:
        self._alive, self._awake, self._worked = time.monotonic(), self._wakings(), time.process_time()

    def idle_seconds(self) -> float:
        """Seconds, if this is asked every now and then."""
        now, awake, worked = time.monotonic(), self._wakings(), time.process_time()
        busy = worked - self._worked > BUSY * (1 + now - self._alive)  # as threads are that are not Python's
        if busy or not awake or awake != self._awake or any(map(_waits, _frames().values())):
            self._alive, self._awake, self._worked = now, awake, worked
        return now - self._alive

    def location(self) -> str:
        """Where the main thread is, in our code."""
        frame = _frames().get(threading.main_thread())
        ours = next((one for one in _outwards(frame) if one.f_code.co_filename.startswith(str(PACKAGE))), frame)
        return f"{Path(ours.f_code.co_filename).name}, line {ours.f_lineno}" if ours else "an unknown place"

    def _wakings(self) -> dict[int, str]:
        """Of each thread, how often it went to sleep or lost the processor."""
        found = {}
        for thread in _frames():
            try:
                status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
            except OSError:  # it has just ended, or this is no Linux
                continue
            found[thread.native_id or 0] = status[status.find("voluntary_ctxt_switches") :]
        return found


def _frames() -> dict[threading.Thread, FrameType]:
    frames = sys._current_frames()
    threads = (thread for thread in threading.enumerate() if not thread.daemon)
    return {thread: frames[thread.ident] for thread in threads if thread.ident in frames}


def _waits(frame: FrameType) -> bool:
    return any(one.f_code.co_filename.startswith(WAITING) for one in _outwards(frame))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame:
        yield frame
        frame = frame.f_back
