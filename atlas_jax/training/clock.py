"""Seconds of the parts of a step: `runtime/*` in metrics.jsonl."""

import contextlib
import time
from collections.abc import Callable, Iterator

Seconds = dict[str, float]  # metric name to seconds


class Clock:
    """Measures the host's time for a step, which may be spent in several blocks, without compilation."""

    def __init__(self, compiled: Callable[[], float]):
        """`compiled` returns the seconds that all compiled functions have taken to compile so far."""
        self._compiled = compiled

    @contextlib.contextmanager
    def __call__(self, seconds: Seconds, part: str = "") -> Iterator[None]:
        """Adds the block's seconds to `runtime/train_step` and `runtime/{part}`; compilation has its own entry."""
        began, compiled = time.perf_counter(), self._compiled()
        yield
        compiling = self._compiled() - compiled
        took = time.perf_counter() - began - compiling
        for name, more in (("train_step", took), (part, took), ("compile", compiling)):
            if name and more:
                seconds[f"runtime/{name}"] = seconds.get(f"runtime/{name}", 0.0) + more
