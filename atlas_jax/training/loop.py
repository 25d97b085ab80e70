"""`atlas train`: checks the rows, restores or initialises, then runs step after step. Start at `Trainer.run`."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from atlas_jax.checkpoints.restore import model_config
from atlas_jax.checkpoints.run_checkpoints import RunCheckpoints
from atlas_jax.checkpoints.store import ResumeState
from atlas_jax.config import Config, to_dict
from atlas_jax.data.jsonl import JsonlRows
from atlas_jax.errors import UserError
from atlas_jax.evaluation.loop import CONFIG, checked_files, evaluate_file, result_stem
from atlas_jax.mesh import global_batch_size, replicate
from atlas_jax.models.atlas import AtlasModel, build_model
from atlas_jax.retrieval.passage_index import check_passage_index
from atlas_jax.runtime.compiled import enable_compilation_cache
from atlas_jax.runtime.interrupts import Interrupted, Interrupts, requeue
from atlas_jax.runtime.process_group import process_group
from atlas_jax.storage.cache import cache_folder
from atlas_jax.storage.file_lock import sole_writer
from atlas_jax.storage.files import write_json
from atlas_jax.storage.shared_files import shared_scratch
from atlas_jax.tasks import make_task
from atlas_jax.tasks.row_checks import checked_rows
from atlas_jax.training.best_step import BestStep, is_evaluation_due, missing_evaluations
from atlas_jax.training.checkpoint_space import report_checkpoint_space
from atlas_jax.training.index_refresh import is_refresh_due, report_unused_refresh
from atlas_jax.training.lookahead import ReadyBatch, can_look_ahead
from atlas_jax.training.metrics_buffer import MetricsBuffer
from atlas_jax.training.reporting import MetricsReporter
from atlas_jax.training.resume import RunStart, restore_or_init, snapshot
from atlas_jax.training.setup import TrainingSetup, build_setup, training_mesh
from atlas_jax.training.step import TrainState

logger = logging.getLogger(__name__)

SCRATCH = ".scratch-train-"


def train(config: Config, run: Path) -> None:
    """Trains until --total_steps, resuming from the newest complete checkpoint. Saves on `Interrupted`.

    `run` is the run's folder on process 0 and a temporary folder on the others; checkpoints, which all processes write,
    go to --checkpoint_dir.
    """
    task = make_task(config.task, config.run.seed)
    best = BestStep(run, config.run, task.metrics)
    training_task = make_task(config.task, config.run.seed, train=True)
    training_rows = [checked_rows(path, training_task) for path in config.run.train_data]
    eval_rows = checked_files(config.run.eval_data, task)
    check_passage_index(config)
    enable_compilation_cache(config.run.compile_cache, cache_folder(config.run.cache_dir))
    lock = sole_writer(run, f"{run}: another process trains there now; wait for it or choose another --name")
    with contextlib.ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts(deferred=process_group().count > 1))
        process_group().stop_signal = interrupts.first
        stack.push(_requeue)
        stack.enter_context(lock)
        scratch = stack.enter_context(shared_scratch(config.run_folder, SCRATCH))
        folder = config.run_folder / "checkpoint"
        checkpoints = stack.enter_context(RunCheckpoints(folder, config.run.keep, config.run.save_freq))
        mesh = training_mesh(config, model_config(config))
        start, state = restore_or_init(config, checkpoints, mesh)
        queries = global_batch_size(mesh, config.run.per_gpu_batch_size)
        write_json(run / CONFIG, to_dict(config) | {"loss_group": start.averaging(config, queries).loss_group})
        progress, total = start.progress, config.optim.total_steps
        best.restore(config, progress.step, progress.scores, eval_rows)
        checkpoints.link_best(best.step)
        if progress.step >= total:
            logger.info("step %d of %d: the run is finished", progress.step, total)
        else:
            report_unused_refresh(config)
            report_checkpoint_space(config, progress.step, state)
        if progress.step < total or config.index.save_index_path or missing_evaluations(run, eval_rows, progress.step):
            setup = build_setup(config, start, training_rows, mesh, scratch)
            reporter = stack.enter_context(
                MetricsReporter(run, total, config.run.log_freq, progress.step, progress.pending)
            )
            Trainer(config, run, setup, start, state, eval_rows, best, reporter, checkpoints, interrupts).run()
        if config.run.keep == 0:
            checkpoints.remove()
        elif not config.run.save_optimizer:
            checkpoints.remove_best_optimizer()
        best.log()
    if checkpoints.save_error:
        raise UserError(checkpoints.save_error)


class Trainer:
    """A run: its state, its progress and its components."""

    def __init__(
        self,
        config: Config,
        run: Path,
        setup: TrainingSetup,
        start: RunStart,
        state: TrainState,
        eval_rows: Mapping[str, JsonlRows],
        best: BestStep,
        reporter: MetricsReporter,
        checkpoints: RunCheckpoints,
        interrupts: Interrupts,
    ):
        self.config, self.run_folder, self.setup, self.state = config, run, setup, state
        self.progress = start.progress
        self.weights = dataclasses.replace(start.weights, params={})  # the arrays are in the state, and only there
        self.eval_rows, self.best = eval_rows, best
        self.reporter, self.checkpoints, self.interrupts = reporter, checkpoints, interrupts
        self.metrics = MetricsBuffer(config, setup.clock, reporter, self.progress.skipped)
        self.saved_step = self.progress.step if start.resume_state else -1

    def run(self) -> None:
        """Runs the remaining steps: refresh the index, take a batch, update, save, evaluate."""
        config, total = self.config.run, self.config.optim.total_steps
        try:
            self.evaluate_missing()
            with contextlib.closing(self.setup.lookahead):
                batch: ReadyBatch | None = None
                while self.progress.step < total:
                    step = self.progress.step + 1
                    if is_refresh_due(self.config, step - 1):
                        self.refresh_index()
                    if batch is None:  # the step before changed the retriever or the index, so nothing was prefetched
                        batch = self.begin_batch(step, wait_for_previous_step=True)()
                    finish_next_batch = None
                    if step < total and can_look_ahead(self.config, step):
                        finish_next_batch = self.begin_batch(
                            step + 1, wait_for_previous_step=self.setup.index.begin_retrieval_blocks
                        )
                    self.update(step, batch)
                    batch = finish_next_batch() if finish_next_batch else None  # while the devices compute the step

                    if self.metrics.skipped_in_a_row >= config.max_bad_steps:
                        self.stop_after_bad_steps()
                    if step % config.save_freq == 0 or step == total:
                        self.save()
                    if is_evaluation_due(self.config, step):
                        with self.timed("evaluate"):
                            self.evaluate(list(self.eval_rows))
                        self.save_best()
                    self.interrupts.check()
        except Interrupted:
            self.save()
            raise

    def model(self) -> AtlasModel:
        """The model with the current parameters."""
        return build_model(self.state.params, self.setup.cfg.model)

    def begin_batch(self, step: int, *, wait_for_previous_step: bool) -> Callable[[], ReadyBatch]:
        """Starts to search the passages of a step, if asked after the devices have finished the previous one."""
        if wait_for_previous_step and self.setup.index.uses_devices:
            self.metrics.wait_for_devices()
        return self.setup.lookahead.begin(self.model(), step)

    def update(self, step: int, ready: ReadyBatch) -> None:
        """Dispatches one training step; signals are deferred until the state is consistent."""
        setup = self.setup
        step_function = setup.update_step
        if step % self.config.optim.accumulation_steps:
            step_function = setup.gradient_step
        with setup.clock(ready.seconds):
            arguments = ready.batch, setup.key, replicate(setup.mesh, np.asarray(step, np.int32))
            step_function.compile_for(self.state, *arguments)
        with self.interrupts.held():
            with setup.clock(ready.seconds):
                self.state, metrics = step_function(self.state, *arguments)
            self.progress.step, self.progress.position = step, self.progress.position + setup.batcher.size
            self.metrics.push(step, metrics, ready.seconds)

    def refresh_index(self) -> None:
        """Embeds all passages again with the current parameters."""
        with self.timed("refresh_index"):
            self.setup.index.refresh(self.model(), self.state.params)

    def save(self) -> None:
        """Copies the state to the host and starts to write it as a checkpoint, while training continues."""
        progress, index = self.progress, self.setup.index
        if self.saved_step == progress.step and not self.checkpoints.save_error:
            return
        with self.timed("save"), self.interrupts.held():
            self.metrics.flush()
            finished = progress.step >= self.config.optim.total_steps
            weights_only = finished and not self.config.run.save_optimizer
            weights, arrays = snapshot(self.state, self.weights, weights_only=weights_only)
            progress.skipped, progress.pending = self.metrics.skipped, self.reporter.pending()
            progress.index, progress.loaded = index.fingerprint, index.loaded_fingerprint
            progress.scores = self.best.scores
            metadata = {"progress": dataclasses.asdict(progress), "flags": to_dict(self.config)}
            metadata = metadata | {"queries": self.setup.batcher.size, **self.setup.cfg.averaging._asdict()}
            resume_state = ResumeState(arrays | index.resume_arrays(), metadata)
            weights = dataclasses.replace(weights, index=progress.index)
            self.checkpoints.save(progress.step, weights, resume_state)
            self.saved_step = progress.step

    def save_best(self) -> None:
        """Saves the current step if it is the best, which no later one of equal score replaces; not with --keep 0."""
        if self.best.step == self.progress.step and self.config.run.keep != 0:
            self.save()
        self.checkpoints.link_best(self.best.step)

    def evaluate(self, names: list[str]) -> None:
        """Scores files of --eval_data with the current parameters, and reports the scores."""
        with self.interrupts.held():
            self.metrics.flush()
        if not names:
            return
        step, model = self.progress.step, self.model()
        self.setup.index.update(model)
        for name in names:
            rows = self.eval_rows[name]
            result = evaluate_file(self.setup.evaluator, rows, model.reader, self.run_folder, result_stem(name, step))
            self.reporter.scores(step, Path(rows.path).name, result.scores)
            self.best.add(step, Path(rows.path).name, result.scores)
        self.best.write()

    def evaluate_missing(self) -> None:
        """After a resume: evaluates what the interruption left without scores at this step."""
        step = self.progress.step
        if is_evaluation_due(self.config, step):
            self.evaluate(missing_evaluations(self.run_folder, self.eval_rows, step))
            self.save_best()

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Reports the seconds of the block with the next step; first waits, to leave out the pending step."""
        if self.setup.index.uses_devices:
            self.metrics.wait_for_devices()
        with self.metrics.timed(name):
            yield

    def stop_after_bad_steps(self) -> None:
        """Saves, and ends the run with a UserError: --max_bad_steps steps in a row were not finite."""
        skipped, step = self.metrics.skipped_in_a_row, self.progress.step
        self.save()
        self.checkpoints.wait()
        raise UserError(
            f"step {step}: loss or gradient was not finite in {skipped} steps in a row, which "
            "changed nothing; the state is saved; lower --lr or --lr_retriever under another --name"
        )


def _requeue(_: object, error: BaseException | None, __: object) -> None:
    """Requeues an interrupted SLURM job, after everything is saved; further signals are only logged by now."""
    if isinstance(error, Interrupted):
        requeue(error.signum)
