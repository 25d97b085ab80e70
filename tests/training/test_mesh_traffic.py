"""What travels between devices, read out of compiled programs, those of `test_mesh_step` among them."""

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
from tests.training.test_mesh_step import placed, program
from tests.training.test_step import batch, config

__all__ = ["batch"]  # the fixture
pytestmark = pytest.mark.usefixtures("quick_compiler")

QUESTIONS, N, WIDTH, TARGET = 8, 5, 64, 16


def collectives(spec, weights, batch):
    mesh = make_mesh(spec)
    params = {path: put_parameter(mesh, path, array) for path, array in weights.params.items()}
    text = program(spec, config(weights)).compile_for(params, placed(mesh, batch)).as_text()
    split = {path: x.shape for path, x in params.items() if not x.sharding.is_fully_replicated}
    return hlo.count(hlo.parse(text)).collectives, split


def uses(path):
    """How often the two losses use a parameter: the decoder for loss and gold scores, the retriever for both sides."""
    return 3 if path == "reader/embed/embedding" else 1 if path.startswith("reader/encoder") else 2


def layer(path, shape):
    """(how many layers a parameter has, the shape of one)."""
    return (shape[0], shape[1:]) if "/layers/" in path else (1, shape)


def by_shape(found):
    total = collections.Counter()
    for one in found:
        for array in one.shapes:
            total[array.sizes] += one.times
    return total


def test_fsdp_gathers_parameters_and_scatters_gradients(tiny_weights, batch):
    """Each use gathers each layer of each sharded parameter once, and nothing else; activations are not sent."""
    found, split = collectives("fsdp=8", tiny_weights, batch)
    gathers = [one for one in found if one.kind == "all-gather"]
    assert {len(one.group) for one in found} == {8}
    wanted = collections.Counter()
    for path, shape in split.items():
        layers, sizes = layer(path, shape)
        wanted[sizes] += layers * uses(path)
    assert by_shape(one for one in gathers if "transpose(" not in one.op_name) == wanted
    assert by_shape(gathers).keys() == wanted.keys()  # in the gradient again, where they are not kept

    assert {one.kind for one in found} <= {"all-gather", "reduce-scatter", "all-reduce"}
    returned = by_shape(one for one in found if one.kind != "all-gather")  # a CPU's compiler makes no reduce-scatter
    back = collections.Counter()
    for sizes, times in returned.items():
        back[tuple(sorted(sizes))] += times  # that of the output matrix is transposed
    heads, length, width = 4, 160, 48
    parameters = {layer(path, array.shape)[1] for path, array in tiny_weights.params.items()}
    of_positions = {(heads, length, length), (heads, TARGET, TARGET)}  # what each head adds at each distance
    assert back.keys() <= {tuple(sorted(sizes)) for sizes in parameters | of_positions | {(length, width), ()}}
    for path, shape in split.items():
        layers, sizes = layer(path, shape)
        used = (length, width) if path.endswith("positions/embedding") else sizes  # of 512 positions the first
        assert back[tuple(sorted(used))] >= layers, path


def test_gradients_are_reduce_scattered_over_fsdp_before_they_are_summed_over_data(tiny_weights, batch):
    """Gradients of products are reduce-scattered over `fsdp`, and only shards are all-reduced over `data`."""
    found, split = collectives("data=2,fsdp=4", tiny_weights, batch)
    summed = collections.defaultdict(collections.Counter)
    for one in found:
        if one.kind != "all-gather":  # a CPU's compiler makes no reduce-scatter
            summed[one.group].update({tuple(sorted(sizes)): times for sizes, times in by_shape([one]).items()})
    scattered, added, whole = summed[0, 1, 2, 3], summed[0, 4], summed[tuple(range(8))]
    for path, shape in split.items():
        layers, sizes = layer(path, shape)
        share = list(sizes)
        share[param_spec(path, len(sizes)).index(PARAM_AXES)] //= 4
        if path.endswith("kernel"):
            assert scattered[tuple(sorted(sizes))] >= layers, path
            assert added[tuple(sorted(share))] >= layers, path
            assert path == "reader/lm_head/kernel" or tuple(sorted(sizes)) not in whole, (
                path
            )  # of the embedding's shape


def test_the_model_axis_sends_only_the_residual_stream(tiny_weights, batch):
    """No all-gather; all-reduces of the residual stream, and of softmaxes over the sharded vocabulary."""
    found, split = collectives("model=4", tiny_weights, batch)
    assert {one.kind for one in found} == {"all-reduce"}
    rows = {QUESTIONS, QUESTIONS * N}
    for one in found:
        for array in one.shapes:
            of_stream = array.sizes[0] in rows and array.sizes[-1] == WIDTH
            of_softmax = array.sizes[0] in rows and array.sizes[1:] in ((TARGET,), (TARGET, 1))
            assert of_stream or of_softmax, one
    assert not by_shape(found).keys() & {layer(path, shape)[1] for path, shape in split.items()}


def test_generation_gathers_parameters_once(tiny_weights):
    """Under fsdp no token gathers a parameter again: each is gathered once, for the encoder or for the decoder.

    A loop in which it were would be one more use.
    """
    mesh = make_mesh("fsdp=8")
    reader = build_model(
        {path: x for path, x in tiny_weights.params.items() if path.startswith("reader/")},
        dataclasses.replace(tiny_weights.cfg, retriever=None),
        lambda path, array: put_parameter(mesh, path, array),
    ).reader
    ids, target = np.zeros((8, 2, 32), np.int32), np.zeros((8, 4), np.int32)
    given = put_reader_batch(mesh, ids, ids > 0, target, target > 0)
    text = (
        compiled_reader(reader, GenerationSettings(max_length=4), mesh)
        .compile_for(nnx.state(reader), given, replicate(mesh, np.zeros(1, np.int32)), None)
        .as_text()
    )
    found = hlo.count(hlo.parse(text))
    assert found.unknown_loops == 1
    wanted = collections.Counter()
    for path, x in tiny_weights.params.items():
        if path.startswith("reader/") and any(param_spec(path, x.ndim)):
            layers, sizes = layer(path, x.shape)
            if path.startswith("reader/encoder") or "cross_attn/k" in path or "cross_attn/v" in path:
                wanted[sizes] += layers
            elif "/decoder/layers/" in path:
                wanted[x.shape] += 1
            else:
                wanted[sizes] += 2 if "embed" in path else 1
    gathers = by_shape(one for one in found.collectives if one.kind == "all-gather")
    results = {(8,), (8, 1), (8, 4)}
    assert {sizes: times for sizes, times in gathers.items() if sizes not in results} == wanted
