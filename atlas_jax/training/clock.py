"""Where the time of a run goes: `runtime/*` of metrics.jsonl."""

import contextlib
import time
from collections.abc import Callable, Iterator

Seconds = dict[str, float]  # by the name of the metric


class Clock:
    """Counts what the host spends on a step, which may be in pieces, and the parts of that."""

    def __init__(self, compiled: Callable[[], float]):
        """`compiled`: the seconds that all programs have taken to compile so far."""
        self._compiled = compiled

    @contextlib.contextmanager
    def __call__(self, seconds: Seconds, part: str = "") -> Iterator[None]:
        """Adds what the block takes to `train_step` and to a part of it; its compilation is told apart."""
        began, compiled = time.perf_counter(), self._compiled()
        yield
        compiling = self._compiled() - compiled
        took = time.perf_counter() - began - compiling
        for name, more in (("train_step", took), (part, took), ("compile", compiling)):
            if name and more:
                seconds[f"runtime/{name}"] = seconds.get(f"runtime/{name}", 0.0) + more
