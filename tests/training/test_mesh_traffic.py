"""Collectives in the compiled programs of `test_mesh_step` and of generation."""

import collections
import dataclasses

import numpy as np
import pytest
from flax import nnx

from atlas_jax.evaluation.batches import put_reader_batch
from atlas_jax.evaluation.evaluator import compiled_reader
from atlas_jax.evaluation.generation import GenerationSettings
from atlas_jax.mesh import PARAM_AXES, make_mesh, param_spec, put_parameter, replicate
from atlas_jax.models.atlas import build_model
from atlas_jax.plan import hlo
from tests.training.test_mesh_step import TOGETHER, program, put_doubled_batch
from tests.training.test_step import batch, config

__all__ = ["batch"]  # the fixture
pytestmark = pytest.mark.usefixtures("quick_compiler")

QUESTIONS, N, WIDTH, TARGET = 8, 5, 64, 16


def collectives(spec, weights, batch):
    mesh = make_mesh(spec)
    params = {path: put_parameter(mesh, path, array) for path, array in weights.params.items()}
    text = (
        program(spec, config(weights, averaging=TOGETHER)).compile_for(params, put_doubled_batch(mesh, batch)).as_text()
    )
    sharded = {path: x.shape for path, x in params.items() if not x.sharding.is_fully_replicated}
    return hlo.count(hlo.parse(text)).collectives, sharded


def uses(path):
    """Number of uses of a parameter by the losses: decoder for loss and gold scores, retriever for both sides."""
    return 3 if path == "reader/embed/embedding" else 1 if path.startswith("reader/encoder") else 2


def layer(path, shape):
    """Returns (number of layers of a parameter, shape of one layer)."""
    return (shape[0], shape[1:]) if "/layers/" in path else (1, shape)


def by_shape(operations):
    total = collections.Counter()
    for collective in operations:
        for array in collective.shapes:
            total[array.sizes] += collective.times
    return total


def test_fsdp_gathers_parameters_and_scatters_gradients(tiny_weights, batch):
    """Each use gathers each layer of each sharded parameter once, and nothing else; activations are not sent."""
    found, sharded = collectives("fsdp=8", tiny_weights, batch)
    gathers = [collective for collective in found if collective.kind == "all-gather"]
    assert {len(collective.group) for collective in found} == {8}
    expected = collections.Counter()
    for path, shape in sharded.items():
        layers, sizes = layer(path, shape)
        expected[sizes] += layers * uses(path)
    assert by_shape(collective for collective in gathers if "transpose(" not in collective.op_name) == expected
    assert by_shape(gathers).keys() == expected.keys()  # gathered again in the backward pass

    assert {collective.kind for collective in found} <= {"all-gather", "reduce-scatter", "all-reduce"}
    returned = by_shape(
        collective for collective in found if collective.kind != "all-gather"
    )  # a CPU's compiler makes no reduce-scatter
    reduced = collections.Counter()
    for sizes, times in returned.items():
        reduced[tuple(sorted(sizes))] += times  # the gradient of the output matrix is transposed
    heads, length, width = 4, 160, 48
    parameters = {layer(path, array.shape)[1] for path, array in tiny_weights.params.items()}
    biases = {(heads, length, length), (heads, TARGET, TARGET)}  # position bias of each head
    assert reduced.keys() <= {tuple(sorted(sizes)) for sizes in parameters | biases | {(length, width), (), (1,)}}
    for path, shape in sharded.items():
        layers, sizes = layer(path, shape)
        used = (length, width) if path.endswith("positions/embedding") else sizes  # the first of 512 positions
        assert reduced[tuple(sorted(used))] >= layers, path


def test_gradients_are_reduce_scattered_over_fsdp_before_they_are_summed_over_data(tiny_weights, batch):
    """Gradients of products are reduce-scattered over `fsdp`, and only shards are all-reduced over `data`."""
    found, sharded = collectives("data=2,fsdp=4", tiny_weights, batch)
    summed = collections.defaultdict(collections.Counter)
    for collective in found:
        if collective.kind != "all-gather":  # a CPU's compiler makes no reduce-scatter
            summed[collective.group].update(
                {tuple(sorted(sizes)): times for sizes, times in by_shape([collective]).items()}
            )
    over_fsdp, over_data, over_all = summed[0, 1, 2, 3], summed[0, 4], summed[tuple(range(8))]
    for path, shape in sharded.items():
        layers, sizes = layer(path, shape)
        shard = list(sizes)
        shard[param_spec(path, len(sizes)).index(PARAM_AXES)] //= 4
        if path.endswith("kernel"):
            assert over_fsdp[tuple(sorted(sizes))] >= layers, path
            assert over_data[tuple(sorted(shard))] >= layers, path
            assert path == "reader/lm_head/kernel" or tuple(sorted(sizes)) not in over_all, (
                path
            )  # has the embedding's shape


def test_the_model_axis_sends_only_the_residual_stream(tiny_weights, batch):
    """No all-gather; all-reduces of the residual stream, and of softmaxes over the sharded vocabulary."""
    found, sharded = collectives("model=4", tiny_weights, batch)
    assert {collective.kind for collective in found} == {"all-reduce"}
    rows = {QUESTIONS, QUESTIONS * N}
    for collective in found:
        for array in collective.shapes:
            is_residual = array.sizes[0] in rows and array.sizes[-1] == WIDTH
            is_softmax = array.sizes[0] in rows and array.sizes[1:] in ((TARGET,), (TARGET, 1))
            assert is_residual or is_softmax, collective
    assert not by_shape(found).keys() & {layer(path, shape)[1] for path, shape in sharded.items()}


def test_generation_gathers_parameters_once(tiny_weights):
    """Under fsdp no token gathers a parameter again: each is gathered once, for the encoder or for the decoder.

    A gather within the loop over tokens would add one to the counts.
    """
    mesh = make_mesh("fsdp=8")
    reader = build_model(
        {path: x for path, x in tiny_weights.params.items() if path.startswith("reader/")},
        dataclasses.replace(tiny_weights.cfg, retriever=None),
        lambda path, array: put_parameter(mesh, path, array),
    ).reader
    ids, target = np.zeros((8, 2, 32), np.int32), np.zeros((8, 4), np.int32)
    reader_batch = put_reader_batch(mesh, ids, ids > 0, target, target > 0)
    text = (
        compiled_reader(reader, GenerationSettings(max_length=4), mesh)
        .compile_for(nnx.state(reader), reader_batch, replicate(mesh, np.zeros(1, np.int32)), None, None)
        .as_text()
    )
    found = hlo.count(hlo.parse(text))
    assert found.unknown_loops == 1
    expected = collections.Counter()
    for path, x in tiny_weights.params.items():
        if path.startswith("reader/") and any(param_spec(path, x.ndim)):
            layers, sizes = layer(path, x.shape)
            if path.startswith("reader/encoder") or "cross_attn/k" in path or "cross_attn/v" in path:
                expected[sizes] += layers
            elif "/decoder/layers/" in path:
                expected[x.shape] += 1
            else:
                expected[sizes] += 2 if "embed" in path else 1
    gathers = by_shape(collective for collective in found.collectives if collective.kind == "all-gather")
    results = {(8,), (8, 1), (8, 4)}
    assert {sizes: times for sizes, times in gathers.items() if sizes not in results} == expected
