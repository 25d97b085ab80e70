"""Watchdog of this process: detects that it is stuck, as in a call to a file system that no longer answers."""

import importlib.util
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

PACKAGE = Path(__file__).parents[1]
JAX_FOLDER = os.path.dirname(getattr(importlib.util.find_spec("jax"), "origin", None) or "jax") + os.sep
# A thread inside these files waits for other processes or for devices, which may wait for others in turn
WAITING_CODE = (
    JAX_FOLDER,
    *(str(PACKAGE / name) for name in ("runtime/process_group.py", "runtime/compiled.py", "retrieval/flat_index.py")),
    str(PACKAGE / "storage" / "file_lock.py"),
)
BUSY_SHARE = 0.02  # share of one CPU; a process that only sends heartbeats uses a tenth of it


class Watchdog:
    """Measures how long this process has been idle: all its threads, daemons aside, asleep.

    A thread that waits for another process or for a device does not count as idle. Whether a thread ran is read from
    its context switches in /proc, which only Linux has; elsewhere a process is never idle.
    """

    def __init__(self) -> None:
        self._active, self._switches, self._cpu = time.monotonic(), self._context_switches(), time.process_time()

    def idle_seconds(self) -> float:
        """Returns the seconds since the last activity, as seen by the calls of this method: call it regularly."""
        now, switches, cpu = time.monotonic(), self._context_switches(), time.process_time()
        busy = cpu - self._cpu > BUSY_SHARE * (1 + now - self._active)  # includes threads that are not Python's
        if busy or not switches or switches != self._switches or any(map(_is_waiting, _thread_frames().values())):
            self._active, self._switches, self._cpu = now, switches, cpu
        return now - self._active

    def location(self) -> str:
        """Returns the file and line in this package that the main thread is executing."""
        frame = _thread_frames().get(threading.main_thread())
        own = next((f for f in _outwards(frame) if f.f_code.co_filename.startswith(str(PACKAGE))), frame)
        return f"{Path(own.f_code.co_filename).name}, line {own.f_lineno}" if own else "an unknown place"

    def _context_switches(self) -> dict[int, str]:
        """Returns, for each native thread id, the lines of /proc that count its context switches."""
        switches = {}
        for thread in _thread_frames():
            try:
                status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
            except OSError:  # the thread has just ended, or this is not Linux
                continue
            switches[thread.native_id or 0] = status[status.find("voluntary_ctxt_switches") :]
        return switches


def _thread_frames() -> dict[threading.Thread, FrameType]:
    """Returns the innermost frame of each thread that is not a daemon."""
    frames = sys._current_frames()
    threads = (thread for thread in threading.enumerate() if not thread.daemon)
    return {thread: frames[thread.ident] for thread in threads if thread.ident in frames}


def _is_waiting(frame: FrameType) -> bool:
    return any(f.f_code.co_filename.startswith(WAITING_CODE) for f in _outwards(frame))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """Yields a frame and its callers, innermost first."""
    while frame:
        yield frame
        frame = frame.f_back
