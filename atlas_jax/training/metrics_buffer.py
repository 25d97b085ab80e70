"""Metrics of dispatched steps: read back one step late, so that the host does not wait for the devices."""

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jaxtyping import Array

from atlas_jax.config import Config
from atlas_jax.training.clock import Clock, Seconds
from atlas_jax.training.optimizer import learning_rate
from atlas_jax.training.reporting import MetricsReporter


class PendingStep(NamedTuple):
    """A step that was dispatched and is not reported yet."""

    step: int
    metrics: dict[str, Array]  # possibly still being computed
    seconds: Seconds  # of the step itself
    other_seconds: Seconds  # of what the run did before it: saving, evaluating, refreshing the index


class MetricsBuffer:
    """Keeps the metrics of dispatched steps until `flush` hands them to the reporter.

    `skipped` counts the steps whose loss or gradient was not finite, `skipped_in_a_row` those since the last good one.
    """

    def __init__(self, config: Config, clock: Clock, reporter: MetricsReporter, skipped: int):
        self.skipped = skipped
        self.skipped_in_a_row = 0
        self._config, self._clock, self._reporter = config, clock, reporter
        self._pending: list[PendingStep] = []
        self._other_seconds: Seconds = {}  # since the last step; reported with the next one

    def push(self, step: int, metrics: dict[str, Array], seconds: Seconds) -> None:
        """Adds a dispatched step and reports the ones before it, while the devices compute this one."""
        self._pending.append(PendingStep(step, metrics, seconds, self._other_seconds))
        self._other_seconds = {}
        self.flush(keep=1)

    def flush(self, keep: int = 0) -> None:
        """Waits for all pending steps but the last `keep`, and reports them."""
        while len(self._pending) > keep:
            step, metrics, seconds, other_seconds = self._pending.pop(0)
            with self._clock(seconds, "device"):
                jax.block_until_ready(metrics)
            values = {name: float(value) for name, value in metrics.items()}
            bad, updates = int(values.pop("bad")), int(values.pop("updates"))
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if bad else 0
            self.skipped += bad
            optim = self._config.optim
            values["lr"] = learning_rate(optim, optim.lr, updates)
            if self._config.distill.train_retriever:
                values["lr_retriever"] = learning_rate(optim, optim.lr_retriever, updates)
            self._reporter.step(step, values | seconds | other_seconds | {"skipped_steps": self.skipped})

    def wait_for_devices(self) -> None:
        """Waits for the last dispatched step; the time counts as that step's own."""
        if self._pending:
            last = self._pending[-1]
            with self._clock(last.seconds, "device"):
                jax.block_until_ready(last.metrics)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Reports the seconds of the block with the next step, as `runtime/{name}`."""
        began = time.perf_counter()
        yield
        self._other_seconds[f"runtime/{name}"] = time.perf_counter() - began
