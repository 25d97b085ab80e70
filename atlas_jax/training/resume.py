"""From weights to the state of a run and from a state to a checkpoint, and back again exactly."""

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
from atlas_jax.checkpoints.restore import restore
from atlas_jax.checkpoints.run_checkpoints import DifferentRun, RunCheckpoints
from atlas_jax.checkpoints.store import ResumeState, Weights
from atlas_jax.config import Config, to_dict
from atlas_jax.mesh import ArrayOrShape, global_batch_size, put_parameter, replicate
from atlas_jax.storage.lazy_array import ArrayLike, LazyArray, LocalShards
from atlas_jax.storage.lazy_array import read as read_array
from atlas_jax.training.optimizer import init_optimizer
from atlas_jax.training.step import TrainState

logger = logging.getLogger(__name__)

INDEX_PREFIX = "index/"  # in a checkpoint: the parameters that built the index
MAY_DIFFER = (  # flags that a run may be continued with others of: they do not enter what it learns
    *("name", "checkpoint_dir", "eval_data", "log_freq", "eval_freq", "save_freq", "save_optimizer", "keep"),
    *(
        "max_bad_steps",
        "write_results",
        "dont_write_passages",
        "mesh",
        "per_gpu_batch_size",
        "compile_cache",
        "model_path",
    ),
    *("reader_model_type", "retriever_model_path", "multiple_choice_eval_permutations", "per_gpu_embedder_batch_size"),
    *("generation_max_length", "generation_min_length", "generation_length_penalty", "generation_num_beams"),
    *("coordinator", "num_processes", "process_id", "host_timeout"),
    *("local_rank", "main_port", "shard_optim", "shard_grads", "save_index_n_shards", "scheduler_steps", "alpha"),
)
SHAPES_THE_REST = ("total_steps", "load_index_path", "save_index_path", "passages", "train_data")  # may, but it matters


@dataclasses.dataclass
class Progress:
    """Where a run is: what a checkpoint holds besides arrays."""

    step: int = 0
    position: int = 0  # in the order of examples
    skipped: int = 0  # steps that were not finite
    pending: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the next line of metrics
    index: str | None = None  # fingerprint of the encoder that built the index in use
    loaded: str | None = None  # the same of --load_index_path


@dataclasses.dataclass(frozen=True)
class RunStart:
    """What a run begins or goes on with."""

    weights: Weights
    resume_state: ResumeState | None  # none: it begins

    @property
    def progress(self) -> Progress:
        """Where it is."""
        return Progress(**self.resume_state.about["progress"]) if self.resume_state else Progress()

    @property
    def index_params(self) -> dict[str, np.ndarray]:
        """The passage encoder that built the index, where that was done in the run."""
        arrays = self.resume_state.arrays if self.resume_state else {}
        return {
            path.removeprefix(INDEX_PREFIX): read_array(x)
            for path, x in arrays.items()
            if path.startswith(INDEX_PREFIX)
        }


def restore_or_init(config: Config, checkpoints: RunCheckpoints, mesh: Mesh) -> tuple[RunStart, TrainState]:
    """The newest whole checkpoint of this run, or else what the flags name; and the state on the devices."""

    def read(folder: Path) -> tuple[RunStart, TrainState]:
        resume_state = store.load_resume_state(folder)
        start = RunStart(
            store.open_checkpoint(folder).load("retriever/"), resume_state and resume_state.load(INDEX_PREFIX)
        )
        check_same_run(start, config, folder, global_batch_size(mesh, config.run.per_gpu_batch_size))
        return start, make_state(config, start, mesh)

    if found := checkpoints.restore(read, _verify):
        logger.info("going on from %s", found[1])
        return found[0]
    start = RunStart(restore(config), None)
    fresh = start, make_state(config, start, mesh)
    _verify(fresh)
    return fresh


def _verify(found: tuple[RunStart, TrainState]) -> None:
    start, _ = found
    verify_shards(start.weights.params)
    verify_shards(start.resume_state.arrays if start.resume_state else {})


def check_same_run(found: RunStart, config: Config, folder: Path, queries: int) -> None:
    """Refuses to go on with flags, or with `queries` a step, that make it another run."""
    now = to_dict(config)
    before = found.resume_state.about["flags"] if found.resume_state else {}
    differing = {flag: value for flag, value in before.items() if flag not in MAY_DIFFER and _plain(now[flag]) != value}
    for flag in [flag for flag in SHAPES_THE_REST if flag in differing]:
        logger.warning(
            "--%s was %s until step %d, now it is %s", flag, differing.pop(flag), found.weights.step, now[flag]
        )
    before_queries = (
        found.resume_state.about.get("queries", queries) if found.resume_state else queries
    )  # older runs do not say
    if before_queries != queries:
        raise DifferentRun(
            f"{folder}: a run of {before_queries} queries a step, not {queries}; go on with "
            f"{layout(before_queries, jax.device_count())}, or choose another --name"
        )
    if differing:
        said = ", ".join(f"--{flag} {now[flag]} (was {value})" for flag, value in differing.items())
        raise DifferentRun(f"{folder}: a run with other flags: {said}; choose another --name, or remove this folder")


def layout(queries: int, devices: int) -> str:
    """Flags with which so many devices have so many queries a step."""
    fsdp = math.gcd(queries, devices)
    others = f",passages={devices // fsdp}" if fsdp < devices else ""
    return f"--per_gpu_batch_size {queries // fsdp} --mesh fsdp={fsdp}{others}"


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def learns(config: Config, path: str) -> bool:
    """Whether training changes this parameter."""
    if not path.startswith("retriever/"):
        return True
    frozen = config.retrieval.query_side_retriever_training and path.startswith("retriever/passage_encoder/")
    return config.distill.train_retriever and not frozen


def make_state(config: Config, found: RunStart, mesh: Mesh) -> TrainState:
    """The state on the devices: as it was, or at the start."""
    params = found.weights.params
    float32 = {path: jax.ShapeDtypeStruct(x.shape, np.float32) for path, x in params.items()}
    shapes = jax.eval_shape(functools.partial(init_state, config), float32)
    state: TrainState = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)  # no memory: nobody writes to them
    if found.resume_state is not None and found.progress.step < config.optim.total_steps:
        state = _remember(state, found.resume_state.arrays, found.weights.step)
    return put_state(mesh, _with_params(state, params))


def _with_params(state: TrainState, params: Mapping[str, Any]) -> TrainState:
    def of(part: Mapping[str, Any]) -> dict[str, Any]:
        return {path: params[path] for path in part}

    return state._replace(
        reader=state.reader._replace(params=of(state.reader.params)),
        retriever=state.retriever and state.retriever._replace(params=of(state.retriever.params)),
        frozen=of(state.frozen),
    )


def init_state(config: Config, params: Mapping[str, Array]) -> TrainState:
    """The state of a run that has not learnt yet."""
    parts = {
        part: {path: x for path, x in params.items() if path.startswith(part) and learns(config, path)}
        for part in ("reader/", "retriever/")
    }
    learning = parts["reader/"] | parts["retriever/"]
    zeros = {path: jnp.zeros_like(x) for path, x in learning.items()} if config.optim.accumulation_steps > 1 else None
    return TrainState(
        init_optimizer(parts["reader/"]),
        init_optimizer(parts["retriever/"]) if parts["retriever/"] else None,
        {path: x for path, x in params.items() if path not in learning},
        zeros,
        jnp.int32(0),
    )


def put_state(mesh: Mesh, state: TrainState) -> TrainState:
    """The state where the mesh wants it."""
    return jax.tree_util.tree_map_with_path(functools.partial(_put, mesh), state)


def _put(mesh: Mesh, keys: tuple[Any, ...], x: ArrayOrShape | LazyArray) -> Any:
    """A leaf of the state: below a parameter's path what is as large as it, else a number."""
    if isinstance(keys[-1], jax.tree_util.DictKey):
        return put_parameter(mesh, keys[-1].key, x)
    return replicate(mesh, read_array(x) if isinstance(x, LazyArray) else x)


def snapshot(state: TrainState, weights: Weights, *, weights_only: bool) -> tuple[Weights, dict[str, ArrayLike]]:
    """Copies on the host of what this process has to save: the weights, and what else the state holds, by name."""
    params = {path: LocalShards(x) for path, x in state.params.items()}
    arrays = {} if weights_only else {name: LocalShards(x) for name, x in _named(_besides(state))[0].items()}
    parts = weights.cfg, weights.tokenizer, weights.retriever_tokenizer, weights.step, weights.index
    return Weights(params, *parts), dict(arrays)


def _remember(state: TrainState, arrays: Mapping[str, ArrayLike], step: int) -> TrainState:
    """The state with these arrays besides its parameters."""
    names, structure = _named(_besides(state))
    if not any(name in arrays for name in names):
        raise DifferentRun(
            f"step {step}: this run was finished and kept its weights only; go on from them with --model_path and "
            "another --name, or next time train with --save_optimizer"
        )
    for name, x in names.items():
        if name not in arrays or arrays[name].shape != x.shape:
            raise DifferentRun(f"step {step}: its checkpoint has no {name} of this shape; is it one of this run?")
    found = jax.tree.unflatten(structure, [arrays[name] for name in names])
    return state._replace(
        reader=state.reader._replace(moments=found["reader"]),
        retriever=state.retriever and state.retriever._replace(moments=found["retriever"]),
        gradients=found["gradients"],
        updates=found["updates"],
    )


def _besides(state: TrainState) -> dict[str, Any]:
    """Everything but the parameters."""
    moments = {"reader": state.reader.moments, "retriever": state.retriever and state.retriever.moments}
    return moments | {"gradients": state.gradients, "updates": state.updates}


def _named(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves by name, and the structure to put them back into."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}, structure
