"""The jitted programs of an `atlas train` run, lowered and compiled from shapes alone, without arrays."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import ShapeDtypeStruct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from atlas_jax.checkpoints.pretrained import reader_config, retriever_config
from atlas_jax.config import Config
from atlas_jax.data.tokens import bucket
from atlas_jax.evaluation.batches import put_reader_batch
from atlas_jax.evaluation.evaluator import compiled_reader, generation_settings
from atlas_jax.mesh import global_batch_size, put_parameter, put_rows, replicate
from atlas_jax.models.atlas import AtlasConfig, AtlasModel, build_model, param_shapes
from atlas_jax.retrieval.embedder import Side, compiled_encoder, encoder_rows
from atlas_jax.retrieval.flat_index import best_rows, chunk_rows, padded_queries, padded_rows
from atlas_jax.runtime.compiled import CompiledFunction
from atlas_jax.tasks import make_task
from atlas_jax.training.batches import put_training_batch
from atlas_jax.training.resume import averaging_of_flags, init_state, put_state
from atlas_jax.training.setup import compiled_step, step_config, training_mesh
from atlas_jax.training.step import Batch, StepConfig, TrainState

PAD_ID, EOS_ID = 0, 1  # token ids of every published T5
DEFAULT_TARGET_TOKENS = 32  # length of a target when --target_maxlength sets no limit


class PlannedProgram(NamedTuple):
    """A program that a run calls repeatedly."""

    name: str
    compile: Callable[[], jax.stages.Compiled]
    batch_bytes: int  # per device, of the arguments that are not resident
    tokens: int  # tokens that the reader's encoder or the retriever reads in one call, all devices together


class Plan(NamedTuple):
    """A run: the arrays that stay on each device throughout, and its programs."""

    resident: dict[str, int]  # bytes per device, by kind of array: parameters, optimizer, index
    programs: tuple[PlannedProgram, ...]

    @property
    def resident_bytes(self) -> int:
        """Bytes per device of all resident arrays."""
        return sum(self.resident.values())


def make_plan(config: Config, mesh: Mesh, passages_count: int) -> Plan:
    """Plans the run of `config` on a mesh, with a flat index of `passages_count` passages; 0: without an index."""
    model = _model_config(config)
    params = {path: put_parameter(mesh, path, shape) for path, shape in param_shapes(model).items()}
    cfg = step_config(config, model, averaging_of_flags(config), mesh, PAD_ID, EOS_ID)
    state = put_state(mesh, jax.eval_shape(functools.partial(init_state, config), params))
    atlas = build_model(params, cfg.model)
    index = _index_shape(atlas, mesh, passages_count) if config.index.index_mode == "flat" else None
    resident = {
        "parameters": _bytes_per_device(params),
        "optimizer": _bytes_per_device(state) - _bytes_per_device(params),
    }
    if index is not None:
        resident["index"] = _bytes_per_device(index)
    return Plan(resident, tuple(_programs(config, mesh, cfg, state, atlas, index, passages_count)))


def planned_mesh(config: Config, devices: Sequence[Any]) -> Mesh:
    """The mesh that `atlas train` would use on these devices."""
    return training_mesh(config, _model_config(config), devices)


def _model_config(config: Config) -> AtlasConfig:
    has_retriever = not config.retrieval.use_file_passages
    return AtlasConfig(
        reader_config(config.model.reader_model_type),
        retriever_config(config.model.retriever_model_path) if has_retriever else None,
        untied=has_retriever and config.retrieval.query_side_retriever_training,
    )


def _programs(
    config: Config,
    mesh: Mesh,
    cfg: StepConfig,
    state: TrainState,
    atlas: AtlasModel,
    index: ShapeDtypeStruct | None,
    passages_count: int,
) -> Iterator[PlannedProgram]:
    batch, key = _largest_batch(config, mesh), replicate(mesh, jax.eval_shape(lambda: jax.random.key(0)))
    arguments = batch, key, replicate(mesh, ShapeDtypeStruct((), jnp.int32))
    tokens = math.prod(batch.reader.passages.shape)
    update = compiled_step(cfg, mesh, update=True)
    yield _planned_program(update, state, arguments, tokens)
    if config.optim.accumulation_steps > 1:
        gradient = compiled_step(cfg, mesh, update=False)
        yield _planned_program(gradient, state, arguments, tokens)
    assert atlas.reader is not None
    reader_batch = _largest_batch(config, mesh, config.retrieval.n_context).reader
    choices = replicate(mesh, ShapeDtypeStruct((len(make_task(config.task).choices),), jnp.int32))
    reader = compiled_reader(atlas.reader, generation_settings(config.generation, PAD_ID, EOS_ID), mesh)
    tokens = math.prod(reader_batch.passages.shape)
    yield _planned_program(reader, nnx.state(atlas.reader), (reader_batch, choices, None, None), tokens)
    if atlas.retriever is None:
        return
    length = config.text.retriever_maxlength
    rows = global_batch_size(mesh, config.run.per_gpu_batch_size)
    passage_rows = encoder_rows(mesh, length, config.index.per_gpu_embedder_batch_size)
    sides: tuple[tuple[Side, int], ...] = (("query", rows), ("passage", passage_rows))
    for side, texts in sides:
        ids_and_mask = tuple(
            put_rows(mesh, ShapeDtypeStruct((texts, length), dtype)) for dtype in (jnp.int32, jnp.bool_)
        )
        program = compiled_encoder(atlas.retriever, side, mesh)
        yield _planned_program(program, nnx.state(atlas.retriever), ids_and_mask, texts * length)
    if index is not None:
        yield _search_program(config, mesh, index, rows, passages_count)


def _planned_program(program: CompiledFunction, state: Any, arguments: tuple[Any, ...], tokens: int) -> PlannedProgram:
    compile_program = functools.partial(program.compile_for, state, *arguments)
    return PlannedProgram(program.name, compile_program, _bytes_per_device(arguments), tokens)


def _search_program(
    config: Config, mesh: Mesh, index: ShapeDtypeStruct, rows: int, passages_count: int
) -> PlannedProgram:
    retrieval, chunk = config.retrieval, chunk_rows(passages_count)
    query_rows, k = rows, config.passages_a_query
    if retrieval.retrieve_with_rerank:
        query_rows, k = padded_queries(rows), retrieval.searched[1]
    queries, count = ShapeDtypeStruct((query_rows, index.shape[1]), jnp.float32), ShapeDtypeStruct((), jnp.int32)

    def compile_search() -> jax.stages.Compiled:
        return best_rows.lower(index, queries, count, k=k, chunk=chunk, mesh=mesh).compile()

    return PlannedProgram("search", compile_search, _bytes_per_device((queries, count)), 0)


def _largest_batch(config: Config, mesh: Mesh, n: int = 0) -> Batch:
    """Shapes of the largest batch: every text has its maximum length, every query `n` passages (0: as in training)."""
    rows, length = global_batch_size(mesh, config.run.per_gpu_batch_size), config.text.text_maxlength
    n = n or config.passages_a_query
    target = bucket(limit := config.text.target_maxlength or DEFAULT_TARGET_TOKENS, limit)
    reader_batch = put_reader_batch(mesh, *_ids_and_mask(rows, n, length), *_ids_and_mask(rows, target))
    lengths = ShapeDtypeStruct((rows,), jnp.int32)
    if not config.distill.train_retriever:
        return put_training_batch(mesh, reader_batch, lengths)
    retriever_length = config.text.retriever_maxlength
    return put_training_batch(
        mesh, reader_batch, lengths, *_ids_and_mask(rows, retriever_length), *_ids_and_mask(rows, n, retriever_length)
    )


def _ids_and_mask(*shape: int) -> tuple[ShapeDtypeStruct, ShapeDtypeStruct]:
    """Shapes of token ids and of their mask."""
    return ShapeDtypeStruct(shape, jnp.int32), ShapeDtypeStruct(shape, jnp.bool_)


def _index_shape(atlas: AtlasModel, mesh: Mesh, passages_count: int) -> ShapeDtypeStruct | None:
    if atlas.retriever is None or not passages_count:
        return None
    shape = padded_rows(passages_count, mesh), atlas.retriever.encoder_of("passage").cfg.d_model
    return ShapeDtypeStruct(shape, jnp.float16, sharding=NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def _bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of arrays on each device; an array without a sharding is whole on every device."""

    def shard_bytes(x: ShapeDtypeStruct) -> int:
        shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
        return math.prod(shape) * int(x.dtype.itemsize)

    return sum(shard_bytes(leaf) for leaf in jax.tree.leaves(tree))
