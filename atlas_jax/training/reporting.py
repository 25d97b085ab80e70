"""Reports training: metrics.jsonl, TensorBoard events, log lines, and a progress bar on a terminal."""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from atlas_jax.storage.files import atomic_file

logger = logging.getLogger(__name__)

LAST_VALUE = ("lr", "lr_retriever", "skipped_steps")  # reported as their last value; all others as the mean


class MetricsReporter:
    """Collects the metrics of each step, and writes a line every `log_freq` steps.

    A run resumed after `start_step` drops later lines; with the `pending()` saved at that step its metrics.jsonl
    becomes that of an uninterrupted run. Hold signals while calling `step`, which is not atomic.
    """

    def __init__(
        self,
        run: Path,
        total_steps: int,
        log_freq: int,
        start_step: int,
        pending: Mapping[str, Any] | None = None,
    ):
        from tensorboardX import SummaryWriter  # only training needs it

        self._total, self._log_freq = total_steps, log_freq
        # Sum and count of each metric since the last line
        self._sums = {name: (math.nan if total is None else total, n) for name, (total, n) in (pending or {}).items()}
        self._line_step, self._line_time = start_step, time.monotonic()
        self._step_time = self._line_time
        path = run / "metrics.jsonl"
        _cut(path, start_step)
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(path.open("a", encoding="utf-8"))
            # purge_step hides events of an earlier attempt at the same steps; the suffix keeps its file, even if it
            # was made in the same second
            attempt = {"purge_step": start_step and start_step + 1, "filename_suffix": f".{start_step}"}
            board = SummaryWriter(str(run), flush_secs=10, **attempt)
            self._board = stack.enter_context(board)
            if sys.stderr.isatty():
                stack.enter_context(logging_redirect_tqdm())
            bar = tqdm(total=total_steps, initial=start_step, unit=" steps", dynamic_ncols=True, disable=None)
            self._bar = stack.enter_context(bar)
            self._open = stack.pop_all()

    def __enter__(self) -> "MetricsReporter":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of a finished step. Steps may have different metrics."""
        for name, value in metrics.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (value, 1) if name in LAST_VALUE else (total + value, count + 1)
        now = time.monotonic()
        loss = metrics.get("loss/train_loss", math.nan)
        self._bar.set_postfix_str(f"loss {loss:.3g}, {now - self._step_time:.3g} s/step", refresh=False)
        self._bar.update(step - self._bar.n)
        self._step_time = now
        if step % self._log_freq == 0:
            self._write(step, {name: total / count for name, (total, count) in self._sums.items()})
            self._sums = {}

    def scores(self, step: int, name: str, scores: Mapping[str, float]) -> None:
        """Writes the scores of an evaluated file to TensorBoard."""
        self._show(step, {f"{name}/{metric}": score for metric, score in scores.items()})

    def pending(self) -> dict[str, tuple[float | None, int]]:
        """Sums and counts of the metrics since the last line, as a checkpoint holds them in JSON."""
        return {name: (_finite(float(total)), count) for name, (total, count) in self._sums.items()}

    def _write(self, step: int, means: Mapping[str, float]) -> None:
        line = {"step": step} | {name: _finite(mean) for name, mean in means.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        self._show(step, means)
        now = time.monotonic()
        pace = (now - self._line_time) / max(step - self._line_step, 1)
        self._line_step, self._line_time = step, now
        parts = [f"{step} / {self._total}", *(f"{name}: {mean:.3g}" for name, mean in means.items())]
        left = tqdm.format_interval((self._total - step) * pace)
        logger.info("%s", " | ".join([*parts, f"{pace:.3g} s/step", f"{left} left"]))

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):  # tensorboardX warns of each other value
                self._board.add_scalar(name, value, step)


def _finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def _cut(path: Path, step: int) -> None:
    """Removes lines after `step` and an incomplete last line; at step 0 deletes the file."""
    if not step:
        path.unlink(missing_ok=True)
    elif path.exists():
        kept = []
        for line in path.read_bytes().splitlines(keepends=True):
            with contextlib.suppress(ValueError):  # an incomplete line
                if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
        with atomic_file(path) as draft:
            draft.write_bytes(b"".join(kept))
