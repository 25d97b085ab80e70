"""Builds what a training run works with, before its first step: mesh, compiled steps, index, batches, evaluator."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from atlas_jax.checkpoints.restore import compute_dtype
from atlas_jax.config import Config, require
from atlas_jax.data.jsonl import JsonlRows
from atlas_jax.evaluation.evaluator import Evaluator
from atlas_jax.mesh import global_batch_size, is_single_cpu, make_mesh, replicate, sharded_sizes
from atlas_jax.models.atlas import AtlasConfig, param_shapes
from atlas_jax.runtime.compiled import CompiledFunction
from atlas_jax.tasks import make_task
from atlas_jax.training.batches import TrainingBatcher, TrainingExamples
from atlas_jax.training.clock import Clock
from atlas_jax.training.index_refresh import RefreshableIndex
from atlas_jax.training.lookahead import Lookahead
from atlas_jax.training.resume import RunStart
from atlas_jax.training.step import Averaging, Batch, Metrics, StepConfig, TrainState, train_step


@dataclasses.dataclass(frozen=True)
class TrainingSetup:
    """The parts of a run that stay the same objects from its first step to its last."""

    mesh: Mesh
    cfg: StepConfig
    update_step: CompiledFunction  # changes the parameters
    gradient_step: CompiledFunction  # only adds up gradients, for --accumulation_steps
    index: RefreshableIndex
    batcher: TrainingBatcher
    lookahead: Lookahead
    evaluator: Evaluator
    clock: Clock
    key: Key[Array, ""]  # of the run; each step folds in its number


def build_setup(
    config: Config, start: RunStart, training_rows: Sequence[JsonlRows], mesh: Mesh, scratch: Path
) -> TrainingSetup:
    """Opens or builds the index, and makes everything else from the flags and the restored weights."""
    tokenizer, retriever_tokenizer = start.weights.tokenizer, start.weights.retriever_tokenizer
    queries = global_batch_size(mesh, config.run.per_gpu_batch_size)
    averaging = start.averaging(config, queries)
    remedy = f"must divide the {queries} questions of a step"
    require(queries % averaging.loss_group == 0, config.optim, "loss_group", remedy)
    cfg = step_config(config, start.weights.cfg, averaging, mesh, tokenizer.pad_id, tokenizer.suffix[0])
    index = RefreshableIndex(config, start, mesh, scratch)
    batcher = TrainingBatcher(config, tokenizer, retriever_tokenizer, mesh)
    steps = {update: compiled_step(cfg, mesh, update=update) for update in (True, False)}
    compiled = (*steps.values(), *index.source.programs)
    clock = Clock(lambda: sum(function.compile_seconds for function in compiled))
    examples = TrainingExamples(
        config.run, make_task(config.task, config.run.seed, train=True), training_rows, tokenizer
    )
    return TrainingSetup(
        mesh,
        cfg,
        update_step=steps[True],
        gradient_step=steps[False],
        index=index,
        batcher=batcher,
        lookahead=Lookahead(config, examples, index, batcher, clock, start.progress.position),
        evaluator=Evaluator(config, make_task(config.task, config.run.seed), index.source, tokenizer, mesh),
        clock=clock,
        key=replicate(mesh, jax.random.key(config.run.seed)),
    )


def training_mesh(config: Config, model: AtlasConfig, described: Sequence[Any] | None = None) -> Mesh:
    """The mesh of --mesh over this process group's devices, or over `described` ones that are only compiled for."""
    passages = {config.passages_a_query, config.retrieval.n_context}  # in training, and in evaluation
    sizes: Mapping[str, set[int]] = sharded_sizes(param_shapes(model)) | {"passages": passages}
    return make_mesh(config.run.mesh, widths=sizes, described=described)


def compiled_step(cfg: StepConfig, mesh: Mesh, *, update: bool) -> CompiledFunction:
    """`train_step` as a function of (state, batch, the run's key, the step's number); the state is donated."""

    def step(
        state: TrainState, batch: Batch, key: Key[Array, ""], number: Int[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        return train_step(state, batch, jax.random.fold_in(key, number), cfg, update=update)

    name = "train step" if update else "gradient step"
    return CompiledFunction(name, step, mesh, donate=True, gather=True)


def step_config(
    config: Config, model: AtlasConfig, averaging: Averaging, mesh: Mesh, pad_id: int, eos_id: int
) -> StepConfig:
    """The constants of the compiled step, from the flags, the shapes of the models and the reader's special tokens."""
    rate = config.model.dropout
    return StepConfig(
        model.with_computation(dtype=compute_dtype(config.model), dropout=rate, for_cpu=is_single_cpu(mesh)),
        config.optim,
        config.distill.gold,
        config.distill.temperature_score,
        config.distill.temperature_gold,
        averaging,
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
