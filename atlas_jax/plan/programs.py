"""The programs of a training run on shapes without arrays: what `atlas train` would compile, compiled now."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from atlas_jax.checkpoints.pretrained import reader_config, retriever_config
from atlas_jax.config import Config
from atlas_jax.data.tokens import bucket
from atlas_jax.evaluation.batches import put_reader_batch
from atlas_jax.evaluation.evaluator import generation_settings, reader_program
from atlas_jax.mesh import global_batch_size, put_parameter, put_rows, replicate
from atlas_jax.models.atlas import AtlasConfig, AtlasModel, build_model, param_shapes
from atlas_jax.retrieval.embedder import Side, encoder_program, encoder_rows
from atlas_jax.retrieval.flat_index import best_rows, chunk_rows, padded_queries, padded_rows
from atlas_jax.runtime.compiled import CompiledFunction
from atlas_jax.tasks import make_task
from atlas_jax.training.batches import put_training_batch
from atlas_jax.training.resume import init_state, put_state
from atlas_jax.training.setup import compiled_step, step_config, training_mesh
from atlas_jax.training.step import Batch, StepConfig, TrainState

PAD_ID, EOS_ID = 0, 1  # of every published T5
TARGET_TOKENS = 32  # of an answer, where --target_maxlength sets no limit

Shape = jax.ShapeDtypeStruct


class Step(NamedTuple):
    """One of the programs that a run calls over and over."""

    name: str
    compile: Callable[[], jax.stages.Compiled]
    uses: tuple[str, ...]  # what of `Plan.resident` it is given
    batch: int  # bytes a device, of its other arguments
    tokens: int  # that the reader's encoder or the retriever reads in it, on all devices


class Plan(NamedTuple):
    """A run: what stays on each device all the time, and the programs that work on it."""

    resident: dict[str, int]  # bytes a device
    steps: tuple[Step, ...]
    parameters: int  # of both models, on all devices together
    largest: int  # elements of the largest parameter, its layers stacked

    @property
    def held(self) -> int:
        """Bytes a device of all that stays there."""
        return sum(self.resident.values())


def make_plan(config: Config, mesh: Mesh, passages: int) -> Plan:
    """The run of these flags on a mesh, with an index of so many passages; 0: none."""
    model = _shapes(config)
    params = {path: put_parameter(mesh, path, shape) for path, shape in param_shapes(model).items()}
    cfg = step_config(config, model, mesh, PAD_ID, EOS_ID)
    state = put_state(mesh, jax.eval_shape(functools.partial(init_state, config), params))
    atlas = build_model(params, cfg.model)
    index = _index(atlas, mesh, passages) if config.index.index_mode == "flat" else None
    resident = {"parameters": _nbytes(params), "optimizer": _nbytes(state) - _nbytes(params)}
    if index is not None:
        resident["index"] = _nbytes(index)
    return Plan(
        resident,
        tuple(_steps(config, mesh, cfg, state, atlas, index, passages)),
        sum(math.prod(shape.shape) for shape in params.values()),
        max(math.prod(shape.shape) for shape in params.values()),
    )


def planned_mesh(config: Config, devices: Sequence[Any]) -> Mesh:
    """What `atlas train` would make of these devices."""
    return training_mesh(config, _shapes(config), devices)


def _shapes(config: Config) -> AtlasConfig:
    has_retriever = not config.retrieval.use_file_passages
    return AtlasConfig(
        reader_config(config.model.reader_model_type),
        retriever_config(config.model.retriever_model_path) if has_retriever else None,
        untied=has_retriever and config.retrieval.query_side_retriever_training,
    )


def _steps(
    config: Config,
    mesh: Mesh,
    cfg: StepConfig,
    state: TrainState,
    atlas: AtlasModel,
    index: Shape | None,
    passages: int,
) -> Iterator[Step]:
    batch, key = _batch(config, mesh), replicate(mesh, jax.eval_shape(lambda: jax.random.key(0)))
    learns_from = batch, key, replicate(mesh, Shape((), jnp.int32))
    tokens = math.prod(batch.reader.passages.shape)
    update = compiled_step(cfg, mesh, update=True)
    yield _step(update, state, learns_from, ("parameters", "optimizer"), tokens)
    if config.optim.accumulation_steps > 1:
        gradient = compiled_step(cfg, mesh, update=False)
        yield _step(gradient, state, learns_from, ("parameters", "optimizer"), tokens)
    assert atlas.reader is not None
    read = _batch(config, mesh, config.retrieval.n_context).reader
    choices = replicate(mesh, Shape((len(make_task(config).choices),), jnp.int32))
    reader = reader_program(atlas.reader, generation_settings(config, PAD_ID, EOS_ID), mesh)
    tokens = math.prod(read.passages.shape)
    yield _step(reader, nnx.state(atlas.reader), (read, choices, None), ("parameters",), tokens)
    if atlas.retriever is None:
        return
    longest = config.text.retriever_maxlength
    rows = global_batch_size(mesh, config.run.per_gpu_batch_size)
    many = encoder_rows(mesh, longest, config.index.per_gpu_embedder_batch_size)
    sides: tuple[tuple[Side, int], ...] = (("query", rows), ("passage", many))
    for side, texts in sides:
        arguments = tuple(put_rows(mesh, Shape((texts, longest), dtype)) for dtype in (jnp.int32, jnp.bool_))
        program = encoder_program(atlas.retriever, side, mesh)
        yield _step(program, nnx.state(atlas.retriever), arguments, ("parameters",), texts * longest)
    if index is not None:
        yield _search(config, mesh, index, rows, passages)


def _step(
    program: CompiledFunction, state: Any, arguments: tuple[Any, ...], uses: tuple[str, ...], tokens: int
) -> Step:
    compiling = functools.partial(program.compile_for, state, *arguments)
    return Step(program.name, compiling, uses, _nbytes(arguments), tokens)


def _search(config: Config, mesh: Mesh, index: Shape, rows: int, passages: int) -> Step:
    retrieval, chunk = config.retrieval, chunk_rows(passages)
    asked, wanted = rows, config.passages_a_query
    if retrieval.retrieve_with_rerank:
        asked, wanted = padded_queries(rows), retrieval.searched[1]
    queries, count = Shape((asked, index.shape[1]), jnp.float32), Shape((), jnp.int32)

    def compiling() -> jax.stages.Compiled:
        return best_rows.lower(index, queries, count, k=wanted, chunk=chunk, mesh=mesh).compile()

    return Step("search", compiling, ("index",), _nbytes((queries, count)), 0)


def _batch(config: Config, mesh: Mesh, n: int = 0) -> Batch:
    """The largest batch: every text as long as it may be, of `n` passages a query or as many as training has."""
    rows, length = global_batch_size(mesh, config.run.per_gpu_batch_size), config.text.text_maxlength
    n = n or config.passages_a_query
    target = bucket(limit := config.text.target_maxlength or TARGET_TOKENS, limit)
    read = put_reader_batch(mesh, *_masked(rows, n, length), *_masked(rows, target))
    lengths = Shape((rows,), jnp.int32)
    if not config.distill.train_retriever:
        return put_training_batch(mesh, read, lengths)
    longest = config.text.retriever_maxlength
    return put_training_batch(mesh, read, lengths, *_masked(rows, longest), *_masked(rows, n, longest))


def _masked(*shape: int) -> tuple[Shape, Shape]:
    """Ids and their mask."""
    return Shape(shape, jnp.int32), Shape(shape, jnp.bool_)


def _index(atlas: AtlasModel, mesh: Mesh, passages: int) -> Shape | None:
    if atlas.retriever is None or not passages:
        return None
    shape = padded_rows(passages, mesh), atlas.retriever.encoder_of("passage").cfg.d_model
    return Shape(shape, jnp.float16, sharding=NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def _nbytes(tree: Any) -> int:
    """Bytes that a device holds of these arrays; of one without a sharding all."""

    def of(x: Shape) -> int:
        shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
        return math.prod(shape) * int(x.dtype.itemsize)

    return sum(of(leaf) for leaf in jax.tree.leaves(tree))
