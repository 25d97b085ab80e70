"""`atlas train`: check the rows, restore or begin, then step after step; evaluate and save on the way."""

import contextlib
import dataclasses
import fcntl
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from atlas_jax.checkpoints.restore import model_shapes
from atlas_jax.checkpoints.run_checkpoints import RunCheckpoints
from atlas_jax.checkpoints.store import ResumeState
from atlas_jax.checkpoints.weights import build_model, param_shapes
from atlas_jax.config import Config, to_dict
from atlas_jax.data.jsonl import JsonlRows
from atlas_jax.errors import UserError
from atlas_jax.evaluation.evaluator import Evaluator
from atlas_jax.evaluation.loop import checked_files, checked_rows, compute_type, evaluate_file
from atlas_jax.mesh import is_single_cpu, make_mesh, replicate, sharded_sizes
from atlas_jax.models.atlas import Atlas, AtlasConfig
from atlas_jax.retrieval.passage_index import check_passage_index
from atlas_jax.runtime.compiled import CompiledFunction, enable_compilation_cache
from atlas_jax.runtime.interrupts import Interrupted, Interrupts, requeue
from atlas_jax.runtime.process_group import process_group
from atlas_jax.storage.shared_files import shared_scratch
from atlas_jax.tasks import make_task
from atlas_jax.training.batches import TrainingBatcher, TrainingExamples
from atlas_jax.training.clock import Clock, Seconds
from atlas_jax.training.index_refresh import RefreshableIndex
from atlas_jax.training.lookahead import Lookahead, ReadyBatch, can_look_ahead
from atlas_jax.training.optimizer import rate
from atlas_jax.training.reporting import MetricsReporter
from atlas_jax.training.resume import Start, restore_or_init, snapshot
from atlas_jax.training.step import Batch, Metrics, StepConfig, TrainState, train_step

logger = logging.getLogger(__name__)

SCRATCH = ".scratch-train-"


def train(config: Config, run: Path) -> None:
    """Trains until --total_steps; goes on where the run's folder has checkpoints. `Interrupted`, it has saved.

    What one process writes goes into the folder `run`; checkpoints, which all write, into --checkpoint_dir's.
    """
    files = [checked_rows(path, make_task(config, train=True)) for path in config.run.train_data]
    evaluated = checked_files(config.run.eval_data, make_task(config))
    check_passage_index(config)
    enable_compilation_cache(config.run.compile_cache)
    with contextlib.ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts(later=process_group().count > 1))
        process_group().stop_signal = interrupts.first
        stack.push(_requeue)
        stack.enter_context(_alone(run))
        scratch = stack.enter_context(shared_scratch(config.run_folder, SCRATCH))
        checkpoints = stack.enter_context(RunCheckpoints(config.run_folder / "checkpoint", config.run.keep))
        mesh = training_mesh(config, model_shapes(config))
        start, state = restore_or_init(config, checkpoints, mesh)
        done, total = start.progress, config.optim.total_steps
        if done.step >= total:
            logger.info("step %d of %d: the run is finished", done.step, total)
        if done.step < total or config.index.save_index_path or _unscored(run, evaluated, done.step):
            trainer = Trainer(config, run, start, state, files, evaluated, mesh, scratch)
            report = MetricsReporter(run, total, config.run.log_freq, done.step, done.pending)
            trainer.run(stack.enter_context(report), checkpoints, interrupts)
        if config.run.keep == 0:
            checkpoints.remove()
    if checkpoints.failed:
        raise UserError(checkpoints.failed)


def _requeue(_: object, error: BaseException | None, __: object) -> None:
    """Back into the queue, when everything is saved and while further signals are only logged."""
    if isinstance(error, Interrupted):
        requeue(error.signum)


@contextlib.contextmanager
def _alone(run: Path) -> Iterator[None]:
    """No other process may train in this folder."""
    with (run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{run}: another process trains there now; wait for it or choose another --name") from None
        yield


class Untold(NamedTuple):
    """A step that the report lacks."""

    step: int
    metrics: dict[str, Array]  # perhaps still under way
    seconds: Seconds
    before: Seconds  # of what the run did in front of it


class Trainer:
    """A run: its state, where it is, and what it works with."""

    def __init__(
        self,
        config: Config,
        run: Path,
        start: Start,
        state: TrainState,
        files: Sequence[JsonlRows],
        evaluated: Mapping[str, JsonlRows],
        mesh: Mesh,
        scratch: Path,
    ):
        self.config, self.run_folder, self.mesh, self.progress = config, run, mesh, start.progress
        self.state = state
        self.weights = dataclasses.replace(start.weights, params={})  # they are in the state, once
        tokenizer, retriever_tokenizer = start.weights.tokenizer, start.weights.retriever_tokenizer
        self.cfg = step_config(config, start.weights.cfg, mesh, tokenizer.pad_id, tokenizer.suffix[0])
        self.index = RefreshableIndex(config, start, mesh, scratch)
        self.batches = TrainingBatcher(config, tokenizer, retriever_tokenizer, mesh)
        self.evaluator = Evaluator(config, make_task(config), self.index.source, tokenizer, mesh)
        self.evaluated = evaluated
        self.programs = {update: step_program(self.cfg, mesh, update=update) for update in (True, False)}
        compiling = *self.programs.values(), *self.index.source.programs
        self.clock = Clock(lambda: sum(program.compile_seconds for program in compiling))
        examples = TrainingExamples(config, make_task(config, train=True), files, tokenizer)
        self.upcoming = Lookahead(config, examples, self.index, self.batches, self.clock, self.progress.position)
        self.key = replicate(mesh, jax.random.key(config.run.seed))
        self.saved = self.progress.step if start.resume_state else -1
        self.bad_in_a_row = 0
        self._untold: list[Untold] = []
        self._between: Seconds = {}  # what came since the last step, which the next one reports

    def run(self, report: MetricsReporter, checkpoints: RunCheckpoints, interrupts: Interrupts) -> None:
        """Until the last step."""
        freq, total = self.config.run, self.config.optim.total_steps
        try:
            if self.progress.step and (self.progress.step % freq.eval_freq == 0 or self.progress.step == total):
                self.evaluate(report, interrupts, only_missing=True)  # which a stop may have cut short
            with contextlib.closing(self.upcoming):
                ready: ReadyBatch | None = None
                while self.progress.step < total:
                    ready = self.step(ready, report, interrupts)
                    if self.bad_in_a_row >= freq.max_bad_steps:
                        self._give_up(report, checkpoints, interrupts)
                    last = self.progress.step == total
                    if self.progress.step % freq.save_freq == 0 or last:
                        with self._timed("save"):
                            self.save(report, checkpoints, interrupts)
                    if self.progress.step % freq.eval_freq == 0 or last:
                        with self._timed("evaluate"):
                            self.evaluate(report, interrupts)
                    interrupts.check()
        except Interrupted:
            self.save(report, checkpoints, interrupts)
            raise

    def model(self) -> Atlas:
        """The model with the present parameters."""
        return build_model(self.state.params, self.cfg.model)

    def step(self, ready: ReadyBatch | None, report: MetricsReporter, interrupts: Interrupts) -> ReadyBatch | None:
        """One training step, with what is ready for it; returns the same for the next step, where that is possible.

        Passages are found by the retriever that the step before left. Where this step leaves it as it is, the next
        one's are looked for now, and arranged while the devices are busy with this one.
        """
        step = self.progress.step + 1
        if ready is None:
            if self.index.is_due(step - 1):
                with self._timed("refresh_index"):
                    self.index.refresh(self.model(), self.state.params)
            self._wait()
            ready = self.upcoming.begin(self.model(), step)()
        ahead = step < self.config.optim.total_steps and can_look_ahead(self.config, step)
        if ahead and self.index.waits:
            self._wait()
        look = self.upcoming.begin(self.model(), step + 1) if ahead else None
        program = self.programs[step % self.config.optim.accumulation_steps == 0]
        with self.clock(ready.seconds):
            arguments = ready.batch, self.key, replicate(self.mesh, np.asarray(step, np.int32))
            program.prepare(self.state, *arguments)
        with interrupts.held():
            with self.clock(ready.seconds):
                self.state, metrics = program(self.state, *arguments)
            self.progress.step, self.progress.position = step, self.progress.position + self.batches.size
            self._untold.append(Untold(step, metrics, ready.seconds, self._between))
            self._between = {}
            self._tell(report, but=1)  # the devices are busy with this step meanwhile
        return look() if look else None

    def _wait(self) -> None:
        """For the devices to end the last step, if they have to search next: that is time of the step's own."""
        if self._untold and self.index.searches:
            last = self._untold[-1]
            with self.clock(last.seconds, "device"):
                jax.block_until_ready(last.metrics)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """What the block takes is reported with the next step, as `runtime/what`."""
        self._wait()
        began = time.perf_counter()
        yield
        self._between[f"runtime/{what}"] = time.perf_counter() - began

    def _tell(self, report: MetricsReporter, but: int = 0) -> None:
        """Reports the steps that are done, but for the last few."""
        while len(self._untold) > but:
            step, metrics, seconds, before = self._untold.pop(0)
            with self.clock(seconds, "device"):
                jax.block_until_ready(metrics)
            values = {name: float(value) for name, value in metrics.items()}
            bad, updates = int(values.pop("bad")), int(values.pop("updates"))
            self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
            self.progress.skipped += bad
            optim = self.config.optim
            values["lr"] = rate(optim, optim.lr, updates)
            if self.config.distill.train_retriever:
                values["lr_retriever"] = rate(optim, optim.lr_retriever, updates)
            report.step(step, values | seconds | before | {"skipped_steps": self.progress.skipped})

    def save(self, report: MetricsReporter, checkpoints: RunCheckpoints, interrupts: Interrupts) -> None:
        """Hands the state over to be written while the run goes on."""
        if self.saved == self.progress.step and not checkpoints.failed:
            return
        with interrupts.held():
            self._tell(report)
            finished = self.progress.step >= self.config.optim.total_steps
            weights, arrays = snapshot(
                self.state, self.weights, weights_only=finished and not self.config.run.save_optimizer
            )
            self.progress.pending = report.pending()
            self.progress.index, self.progress.loaded = self.index.fingerprint, self.index.loaded
            resume_state = ResumeState(
                arrays | self.index.arrays(),
                {
                    "progress": dataclasses.asdict(self.progress),
                    "flags": to_dict(self.config),
                    "queries": self.batches.size,
                },
            )
            weights = dataclasses.replace(weights, index=self.progress.index)
            checkpoints.save(self.progress.step, weights, resume_state)
            self.saved = self.progress.step

    def evaluate(self, report: MetricsReporter, interrupts: Interrupts, *, only_missing: bool = False) -> None:
        """Scores the files of --eval_data with the present parameters."""
        step, run = self.progress.step, self.run_folder
        with interrupts.held():
            self._tell(report)
        names = _unscored(run, self.evaluated, step) if only_missing else list(self.evaluated)
        if not names:
            return
        model = self.model()
        self.index.update(model)
        for name in names:
            rows = self.evaluated[name]
            result = evaluate_file(self.evaluator, rows, model.reader, run, _stem(name, step))
            report.scores(step, Path(rows.path).name, result.scores)

    def _give_up(self, report: MetricsReporter, checkpoints: RunCheckpoints, interrupts: Interrupts) -> None:
        bad, step = self.bad_in_a_row, self.progress.step
        self.save(report, checkpoints, interrupts)
        checkpoints.wait()
        raise UserError(
            f"step {step}: loss or gradient was not finite in {bad} steps in a row, which "
            "changed nothing; the state is saved; lower --lr or --lr_retriever under another --name"
        )


def _stem(name: str, step: int) -> str:
    """What the names of the files begin with that an evaluation writes."""
    return f"{name}-step-{step}"


def _unscored(run: Path, evaluated: Mapping[str, JsonlRows], step: int) -> list[str]:
    """Files of --eval_data whose scores of a step the run's folder lacks."""
    lacks = [name for name in evaluated if not (run / f"{_stem(name, step)}.metrics.json").exists()]
    return process_group().run_on_first(lambda: lacks)


def training_mesh(config: Config, model: AtlasConfig, described: Sequence[Any] | None = None) -> Mesh:
    """The devices of a run, or those described, and how they share its work."""
    passages = {config.passages_a_query, config.retrieval.n_context}  # to learn from, and to be evaluated with
    widths = sharded_sizes(param_shapes(model)) | {"passages": passages}
    return make_mesh(config.run.mesh, widths=widths, described=described)


def step_program(cfg: StepConfig, mesh: Mesh, *, update: bool) -> CompiledFunction:
    """A step that changes the parameters, or one that only adds up gradients.

    It takes the state, a batch, the run's key and the number of the step, from which the step's own key is made.
    """

    def step(
        state: TrainState, batch: Batch, key: Key[Array, ""], number: Int[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        return train_step(state, batch, jax.random.fold_in(key, number), cfg, update=update)

    name = "train step" if update else "gradient step"
    return CompiledFunction(name, step, mesh, donate=True, gather=True)


def step_config(config: Config, model: AtlasConfig, mesh: Mesh, pad_id: int, eos_id: int) -> StepConfig:
    """What is constant over the run."""
    rate = config.model.dropout
    return StepConfig(
        model.computing(dtype=compute_type(config), dropout=rate, for_cpu=is_single_cpu(mesh)),
        config.optim,
        config.distill.gold,
        config.distill.temperature_score,
        config.distill.temperature_gold,
        config.retrieval.n_context,
        pad_id,
        eos_id,
        config.text.text_maxlength,
        dropout=rate > 0,
        query_side=config.retrieval.query_side_retriever_training,
        remat_reader=config.model.use_gradient_checkpoint_reader,
        remat_retriever=config.model.use_gradient_checkpoint_retriever,
        stats=config.distill.compute_crossattention_stats,
    )
