"""The best step of a run, by one score of one file of --eval_data; the run's folder names it in best.json."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from atlas_jax.config import Config, RunConfig, require
from atlas_jax.data.jsonl import JsonlRows
from atlas_jax.evaluation.loop import result_stem
from atlas_jax.runtime.process_group import process_group
from atlas_jax.storage.files import read_json, write_json
from atlas_jax.tasks.metrics import higher_is_better

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, dict[str, float | None]]]  # by step, file name and metric; None: not finite


class Criterion(NamedTuple):
    """The score that decides which step is the best."""

    file: str  # name of one of --eval_data; "" without --eval_data
    metric: str


def select_criterion(run: RunConfig, metrics: Sequence[str]) -> Criterion:
    """What --select_by names, else the first of --eval_data and of the task's metrics.

    UserError, with the choices, if the flag does not name one file and one metric.
    """
    names = [Path(path).name for path in run.eval_data]
    if run.select_by is None:
        return Criterion(names[0] if names else "", metrics[0])
    file, _, metric = run.select_by.rpartition(":")
    found = [name for name, path in zip(names, run.eval_data, strict=True) if file in (path, name, Path(path).stem)]
    choices = f"FILE one of {', '.join(names) or '--eval_data, which is missing'}; METRIC one of {', '.join(metrics)}"
    require(len(found) == 1 and metric in metrics, run, "select_by", f"expected FILE:METRIC, {choices}")
    return Criterion(found[0], metric)


class BestStep:
    """The scores of a run's evaluations, and the step that is best by one of them.

    Each checkpoint holds the `scores` so far, so that a resumed run knows the evaluations before its step, and no later
    ones. UserError if --select_by does not name a file and a metric.
    """

    def __init__(self, folder: Path, run: RunConfig, metrics: Sequence[str]):
        self.scores: Scores = {}
        self._folder, self._metrics, self._criterion = folder, metrics, select_criterion(run, metrics)

    @property
    def step(self) -> int | None:
        """The step with the best score, the earliest of equal ones; None if no step has one. NaN is no score."""
        values = {int(step): self._value(step) for step in self.scores}
        sign = -1 if higher_is_better(self._criterion.metric) else 1
        ranks = {step: (sign * value, step) for step, value in values.items() if value is not None}
        return min(ranks, key=ranks.__getitem__, default=None)

    def add(self, step: int, file: str, scores: Mapping[str, float]) -> None:
        """Adds the scores of a file at a step."""
        finite = {metric: value if math.isfinite(value) else None for metric, value in scores.items()}
        self.scores.setdefault(str(step), {})[file] = finite

    def restore(self, config: Config, step: int, scores: Scores, eval_rows: Mapping[str, JsonlRows]) -> None:
        """Takes over the scores of the checkpoint at `step`, and from the run's folder those that it does not hold.

        It may be older than the evaluation of its step, and checkpoints of older versions hold no scores.
        """
        self.scores = {step: dict(files) for step, files in scores.items()}

        def read() -> list[tuple[int, str, dict[str, float]]]:
            found = []
            for evaluated in (number for number in range(1, step + 1) if is_evaluation_due(config, number)):
                for name, rows in eval_rows.items():
                    file, path = Path(rows.path).name, scores_path(self._folder, name, evaluated)
                    if file not in self.scores.get(str(evaluated), {}) and path.exists():
                        values = read_json(path)
                        found.append((evaluated, file, {m: values[m] for m in self._metrics if m in values}))
            return found

        for evaluated, file, values in process_group().run_on_first(read):
            self.add(evaluated, file, values)
        self.write()

    def write(self) -> None:
        """Makes best.json name the best step; removes the file if there is none."""
        path, step = self._folder / "best.json", str(self.step)
        if self.step is None:
            path.unlink(missing_ok=True)
        else:
            best = {"step": self.step, **self._criterion._asdict(), "value": self._value(step)}
            write_json(path, best | {"scores": self.scores[step]})

    def log(self) -> None:
        """Logs the best step and its score."""
        file, metric = self._criterion
        if self.step is not None:
            logger.info("best step: %d, with %.3f %s of %s", self.step, self._value(str(self.step)), metric, file)
        elif file:
            logger.info("no best step: no evaluation of %s has a finite %s", file, metric)

    def _value(self, step: str) -> float | None:
        """The deciding score of a step; None if the step has none."""
        return self.scores[step].get(self._criterion.file, {}).get(self._criterion.metric)


def is_evaluation_due(config: Config, step: int) -> bool:
    """Whether the run evaluates after this step."""
    return step > 0 and (step % config.run.eval_freq == 0 or step == config.optim.total_steps)


def scores_path(folder: Path, name: str, step: int) -> Path:
    """The file with the scores of an evaluation."""
    return folder / f"{result_stem(name, step)}.metrics.json"


def missing_evaluations(folder: Path, eval_rows: Mapping[str, JsonlRows], step: int) -> list[str]:
    """The files of --eval_data without scores of this step in the run's folder; the same on every process."""
    missing = [name for name in eval_rows if not scores_path(folder, name, step).exists()]
    names: list[str] = process_group().run_on_first(lambda: missing)
    return names
