"""`--profile_steps A-B`: a trace of some steps of a run, which TensorBoard and Perfetto open."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

logger = logging.getLogger(__name__)


class StepProfiler:
    """Writes a trace of the steps `first` to `last` into the folder `profile` of a run; of no step if `steps` is None.

    Close it at the end of the run, which may come before that of the trace.
    """

    def __init__(self, steps: tuple[int, int] | None, run: Path):
        self.folder = run / "profile"
        self._steps = steps
        self._is_tracing = False

    @contextlib.contextmanager
    def step(self, number: int, wait: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Traces the block if it is one of the steps. `wait` waits for the devices, before and after the trace."""
        if self._steps and not self._is_tracing and self._steps[0] <= number <= self._steps[1]:
            wait()
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self._is_tracing = True
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if self._steps and number >= self._steps[1]:
            wait()
            self.close()

    def close(self) -> None:
        """Ends the trace and names its files, if one has begun."""
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()
            trace = max(self.folder.glob("plugins/profile/*/perfetto_trace.json.gz"), key=os.path.getmtime)
            logger.info("profile: open %s at https://ui.perfetto.dev, or tensorboard --logdir %s", trace, self.folder)


NO_PROFILER = StepProfiler(None, Path())
