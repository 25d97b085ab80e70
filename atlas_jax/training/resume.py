"""Resuming a run exactly: from weights to a training state, from a state to a checkpoint and back."""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from atlas_jax.checkpoints import store
from atlas_jax.checkpoints.formats.orbax_arrays import verify_shards
from atlas_jax.checkpoints.restore import check_finite, restore
from atlas_jax.checkpoints.run_checkpoints import DifferentRun, RunCheckpoints
from atlas_jax.checkpoints.store import ResumeState, Weights
from atlas_jax.config import Config, resume_rules, to_dict
from atlas_jax.mesh import ArrayOrShape, global_batch_size, put_parameter, replicate
from atlas_jax.storage.lazy_array import ArrayLike, LazyArray, LocalShards
from atlas_jax.storage.lazy_array import read as read_array
from atlas_jax.training.best_step import Scores
from atlas_jax.training.optimizer import init_optimizer
from atlas_jax.training.step import Averaging, TrainState

logger = logging.getLogger(__name__)

INDEX_PREFIX = "index/"  # in a checkpoint's training arrays: parameters of the passage encoder that built the index


@dataclasses.dataclass
class Progress:
    """Progress of a run, saved with each checkpoint. Field names are part of the checkpoint format."""

    step: int = 0
    position: int = 0  # in the order of examples
    skipped: int = 0  # steps whose loss or gradient was not finite
    pending: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # sums for the next line of metrics.jsonl
    index: str | None = None  # fingerprint of the passage encoder that built the index in use
    loaded: str | None = None  # fingerprint of the passage encoder that built the index of --load_index_path
    scores: Scores = dataclasses.field(default_factory=dict)  # of the evaluations so far


@dataclasses.dataclass(frozen=True)
class RunStart:
    """Initial weights and, if the run is resumed, its saved state."""

    weights: Weights
    resume_state: ResumeState | None  # None: a new run

    @property
    def progress(self) -> Progress:
        """The progress that the checkpoint holds; that of a new run is at step 0."""
        return Progress(**self.resume_state.metadata["progress"]) if self.resume_state else Progress()

    def averaging(self, config: Config, queries: int) -> Averaging:
        """How the run averages its loss and clips: as its checkpoint says, or the flags; `queries` are those of a step.

        Checkpoints of older versions do not say: their runs have one group and one norm for both models.
        """
        if self.resume_state is None:
            return averaging_of_flags(config)
        saved = self.resume_state.metadata
        return Averaging(saved.get("loss_group", queries), saved.get("separate_clip", False))

    @property
    def index_params(self) -> dict[str, np.ndarray]:
        """Parameters of the passage encoder that built the index, by path; empty unless the run built it itself."""
        arrays = self.resume_state.arrays if self.resume_state else {}
        return {
            path.removeprefix(INDEX_PREFIX): read_array(x)
            for path, x in arrays.items()
            if path.startswith(INDEX_PREFIX)
        }


def averaging_of_flags(config: Config) -> Averaging:
    """How a new run averages its loss and clips its gradients."""
    return Averaging(config.optim.loss_group or config.run.per_gpu_batch_size, config.optim.shard_optim)


def restore_or_init(config: Config, checkpoints: RunCheckpoints, mesh: Mesh) -> tuple[RunStart, TrainState]:
    """Restores the run's newest complete checkpoint, or else starts from the weights that the flags name.

    Returns the start and the state on the devices. `DifferentRun` if the checkpoint is of a run with other flags.
    """

    def read(folder: Path) -> tuple[RunStart, TrainState]:
        resume_state = store.load_resume_state(folder)
        start = RunStart(
            store.open_checkpoint(folder).load("retriever/"), resume_state and resume_state.load(INDEX_PREFIX)
        )
        check_same_run(start, config, folder, global_batch_size(mesh, config.run.per_gpu_batch_size))
        return start, make_state(config, start, mesh)

    if restored := checkpoints.restore(read, _verify):
        logger.info("going on from %s", restored[1])
        return restored[0]
    start = RunStart(restore(config), None)
    state = make_state(config, start, mesh)
    _verify((start, state))
    return start, state


def _verify(restored: tuple[RunStart, TrainState]) -> None:
    start, _ = restored
    verify_shards(start.weights.params)
    verify_shards(start.resume_state.arrays if start.resume_state else {})


def check_same_run(start: RunStart, config: Config, folder: Path, queries: int) -> None:
    """`DifferentRun` if flags that must stay the same have changed, or the number of queries in a step has."""
    flags, rules = to_dict(config), resume_rules()
    saved_flags = start.resume_state.metadata["flags"] if start.resume_state else {}
    if unknown := [f"--{flag}" for flag in saved_flags if flag not in rules]:
        raise DifferentRun(
            f"{folder}: written by another version, which has {', '.join(unknown)}; resume with that version or choose "
            "another --name"
        )
    changed = {
        flag: value
        for flag, value in saved_flags.items()
        if rules[flag] != "changeable" and _as_json(flags[flag]) != value
    }
    for flag in [flag for flag in rules if rules[flag] == "warned" and flag in changed]:
        logger.warning(
            "--%s was %s until step %d, now it is %s", flag, changed.pop(flag), start.weights.step, flags[flag]
        )
    # Checkpoints of older versions do not hold the number of queries
    saved_queries = start.resume_state.metadata.get("queries", queries) if start.resume_state else queries
    if saved_queries != queries:
        raise DifferentRun(
            f"{folder}: a run of {saved_queries} queries a step, not {queries}; go on with "
            f"{batch_flags(saved_queries, jax.device_count())}, or choose another --name"
        )
    loss_group = start.averaging(config, queries).loss_group
    if start.resume_state and config.optim.loss_group not in (None, loss_group):
        changed["loss_group"] = loss_group
    if changed:
        listed = ", ".join(f"--{flag} {flags[flag]} (was {value})" for flag, value in changed.items())
        raise DifferentRun(f"{folder}: a run with other flags: {listed}; choose another --name, or remove this folder")


def batch_flags(queries: int, devices: int) -> str:
    """Flags with which this number of devices has this number of queries in a step."""
    fsdp = math.gcd(queries, devices)
    others = f",passages={devices // fsdp}" if fsdp < devices else ""
    return f"--per_gpu_batch_size {queries // fsdp} --mesh fsdp={fsdp}{others}"


def _as_json(value: Any) -> Any:
    """A value of a flag as it is after writing it to JSON and reading it."""
    return list(value) if isinstance(value, tuple) else value


def is_trained(config: Config, path: str) -> bool:
    """Whether training changes the parameter at this path."""
    if not path.startswith("retriever/"):
        return True
    frozen = config.retrieval.query_side_retriever_training and path.startswith("retriever/passage_encoder/")
    return config.distill.train_retriever and not frozen


def make_state(config: Config, start: RunStart, mesh: Mesh) -> TrainState:
    """The training state on the mesh: that of the checkpoint, or a new one around the weights."""
    params = start.weights.params
    float32 = {path: jax.ShapeDtypeStruct(x.shape, np.float32) for path, x in params.items()}
    shapes = jax.eval_shape(functools.partial(init_state, config), float32)
    # Zeros that nothing writes to take no memory
    state: TrainState = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    if start.resume_state is not None and start.progress.step < config.optim.total_steps:
        state = _with_saved_arrays(state, start.resume_state.arrays, start.weights.step)
    placed = put_state(mesh, _with_params(state, params))
    check_finite(placed.params)
    return placed


def init_state(config: Config, params: Mapping[str, Array]) -> TrainState:
    """The state of a run before its first step."""
    parts = {
        part: {path: x for path, x in params.items() if path.startswith(part) and is_trained(config, path)}
        for part in ("reader/", "retriever/")
    }
    trained = parts["reader/"] | parts["retriever/"]
    zeros = {path: jnp.zeros_like(x) for path, x in trained.items()} if config.optim.accumulation_steps > 1 else None
    return TrainState(
        init_optimizer(parts["reader/"]),
        init_optimizer(parts["retriever/"]) if parts["retriever/"] else None,
        {path: x for path, x in params.items() if path not in trained},
        zeros,
        jnp.int32(0),
    )


def put_state(mesh: Mesh, state: TrainState) -> TrainState:
    """Puts the state on the mesh: parameters and arrays of their shape as PARAM_SPECS says, numbers replicated."""
    return jax.tree_util.tree_map_with_path(functools.partial(_put_leaf, mesh), state)


def _put_leaf(mesh: Mesh, keys: tuple[Any, ...], x: ArrayOrShape | LazyArray) -> Any:
    """Leaves in dicts are parameters, moments and gradients, by the parameter's path; all others are numbers."""
    if isinstance(keys[-1], jax.tree_util.DictKey):
        return put_parameter(mesh, keys[-1].key, x)
    return replicate(mesh, read_array(x) if isinstance(x, LazyArray) else x)


def snapshot(state: TrainState, weights: Weights, *, weights_only: bool) -> tuple[Weights, dict[str, ArrayLike]]:
    """Copies on the host of this process's shards: the parameters, and all other arrays of the state by name."""
    params = {path: LocalShards(x) for path, x in state.params.items()}
    others = {} if weights_only else {name: LocalShards(x) for name, x in _named_leaves(_non_params(state))[0].items()}
    return dataclasses.replace(weights, params=params), dict(others)


def _with_params(state: TrainState, params: Mapping[str, Any]) -> TrainState:
    def select(part: Mapping[str, Any]) -> dict[str, Any]:
        return {path: params[path] for path in part}

    return state._replace(
        reader=state.reader._replace(params=select(state.reader.params)),
        retriever=state.retriever and state.retriever._replace(params=select(state.retriever.params)),
        frozen=select(state.frozen),
    )


def _with_saved_arrays(state: TrainState, arrays: Mapping[str, ArrayLike], step: int) -> TrainState:
    """The state with a checkpoint's moments, gradients and count of updates; `DifferentRun` if they do not fit."""
    leaves, structure = _named_leaves(_non_params(state))
    if not any(name in arrays for name in leaves):
        raise DifferentRun(
            f"step {step}: this run was finished and kept its weights only; go on from them with --model_path and "
            "another --name, or next time train with --save_optimizer"
        )
    for name, x in leaves.items():
        if name not in arrays or arrays[name].shape != x.shape:
            raise DifferentRun(f"step {step}: its checkpoint has no {name} of this shape; is it one of this run?")
    saved = jax.tree.unflatten(structure, [arrays[name] for name in leaves])
    return state._replace(
        reader=state.reader._replace(moments=saved["reader"]),
        retriever=state.retriever and state.retriever._replace(moments=saved["retriever"]),
        gradients=saved["gradients"],
        updates=saved["updates"],
    )


def _non_params(state: TrainState) -> dict[str, Any]:
    """Everything in the state but parameters. The keys are part of the checkpoint format."""
    moments = {"reader": state.reader.moments, "retriever": state.retriever and state.retriever.moments}
    return moments | {"gradients": state.gradients, "updates": state.updates}


def _named_leaves(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of a tree by name, as in "reader/mu/reader/embed/embedding", and its structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}, structure
