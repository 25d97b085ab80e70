"""The mesh: --mesh parsing, refusals and array placement."""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from atlas_jax.config import RetrievalConfig, RunConfig
from atlas_jax.errors import UserError
from atlas_jax.evaluation.loop import evaluation_mesh
from atlas_jax.mesh import (
    AXES,
    PARAM_SPECS,
    auto_sizes,
    global_batch_size,
    in_host_memory,
    make_mesh,
    param_spec,
    put_batch,
    put_parameter,
    put_passages,
    put_rows,
    replicate,
    sharded_sizes,
)
from atlas_jax.models.atlas import AtlasConfig, param_shapes
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5_CONFIGS
from atlas_jax.training.setup import training_mesh


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("auto", (8, 1, 1, 1)),
        ("data=8", (8, 1, 1, 1)),
        ("data=4,model=2", (4, 1, 1, 2)),
        ("model=2, data=2 ,fsdp=2", (2, 2, 1, 2)),
        ("passages=4,data=2", (2, 1, 4, 1)),
        ("fsdp=8", (1, 8, 1, 1)),
    ],
)
def test_a_mesh_has_the_sizes_asked_for(spec, shape):
    """All eight devices, each once, on four axes in a fixed order; how arrays are sharded is left to XLA."""
    mesh = make_mesh(spec)
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == shape
    assert len({device.id for device in mesh.devices.flat}) == 8
    assert mesh.axis_types == (AxisType.Auto,) * 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data=8,model=2", "16 devices, but there are 8"),
        ("tensor=8", "'tensor=8' is not one of data=N, fsdp=N, passages=N, model=N"),
        ("data=0", "'data=0' is not one of"),
        ("data=-8", "'data=-8' is not one of"),
        ("data=\u00b2", "is not one of"),  # a digit, but no number
        ("data", "'data' is not one of"),
        ("data=8,", "'' is not one of"),
        ("", "'' is not one of"),
        ("data=2,data=8", "data is there twice"),
    ],
)
def test_an_impossible_mesh_is_refused(spec, message):
    """The message is one line that begins with the flag and its value."""
    with pytest.raises(UserError, match=message) as error:
        make_mesh(spec)
    assert str(error.value).startswith(f"--mesh {spec}: ")
    assert "\n" not in str(error.value)


GB = 10**9


@pytest.mark.parametrize(
    ("count", "memory", "widths", "nbytes", "sizes"),
    [
        (64, 40 * GB, {4096, 768}, 46 * GB, {"data": 1, "fsdp": 64}),  # XXL in float32
        (512, 40 * GB, {4096, 768}, 46 * GB, {"data": 2, "fsdp": 256}),
        (24, 40 * GB, {4096, 768}, 46 * GB, {"data": 3, "fsdp": 8}),  # three nodes
        (6, 40 * GB, {768}, 1 * GB, {"data": 1, "fsdp": 6}),
        (8, 80 * GB, (), 23 * GB, {"data": 8, "model": 1}),  # XXL in bfloat16
        (8, 40 * GB, (), 23 * GB, {"data": 4, "model": 2}),
        (8, 16 * GB, (), 23 * GB, {"data": 1, "model": 8}),
        (6, 16 * GB, (), 23 * GB, {"data": 3, "model": 2}),  # 4 does not divide six devices
        (8, 0, (), 23 * GB, {"data": 8, "model": 1}),  # a CPU device does not report its memory
    ],
)
def test_auto_sizes(count, memory, widths, nbytes, sizes):
    """Training shards over fsdp; inference replicates the model, or shards it as little as its size demands."""
    assert auto_sizes(count, memory, widths=widths, nbytes=nbytes) == sizes


@pytest.mark.parametrize(
    ("spec", "problem", "remedy"),
    [
        ("fsdp=6,passages=1", "fsdp=6 does not divide 4096 (width)", "fsdp=2"),
        ("model=7", "model=7 does not divide 64, 10240, 32100 (heads, MLP or vocabulary)", "model=1"),
        ("model=8", "model=8 does not divide 32100 (heads, MLP or vocabulary)", "model=4"),
        ("passages=8", "passages=8 does not divide 15, 30 (passages a query)", "passages=1"),
        ("passages=6", "passages=6 does not divide 15 (passages a query)", "passages=3"),
        (
            "passages=2,fsdp=3",
            "passages=2 does not divide 15 (passages a query) and fsdp=3 does not divide 4096 (width)",
            "passages=1,fsdp=1",
        ),
        *((spec, "", "") for spec in ("auto", "fsdp=8", "data=8", "model=4", "passages=3,model=2", "passages=5")),
    ],
)
def test_sizes_that_do_not_divide_are_warned_of(caplog, spec, problem, remedy):
    """T5-XXL has width 4096, Contriever 768. Axes that the warning names are replicated; the last meshes divide all."""
    reader = dataclasses.replace(T5_CONFIGS["google/t5-xxl-lm-adapt"], vocab_size=32100)
    widths = sharded_sizes(param_shapes(AtlasConfig(reader, ContrieverConfig(), untied=True)))
    assert widths == {"fsdp": {768, 4096}, "model": {64, 10240, 32100}}
    mesh = make_mesh(spec, widths=widths | {"passages": {15, 30}})
    found = [message for message in caplog.messages if "does not divide" in message]
    expected = (
        f"--mesh {spec}: {problem}, so what has such a size stays whole on every device; {remedy} would divide all"
    )
    assert found == ([f"{expected}, with the other devices on data"] if problem else [])
    put = {
        "fsdp": put_parameter(mesh, "reader/lm_head/kernel", np.zeros((4096, 1))),
        "passages": put_passages(mesh, np.zeros((1, 15))),
        "model": put_parameter(mesh, "reader/embed/embedding", np.zeros((32100, 1))),
    }
    for axis, array in put.items():
        if mesh.shape[axis] > 1:
            assert (f"'{axis}'" in str(array.sharding.spec)) == (f"{axis}={mesh.shape[axis]} " not in problem)


def test_a_run_checks_its_mesh_against_parameters_and_passages(tiny_config, tiny_weights, caplog):
    """Widths of parameters, passages in training and in evaluation; without a reader no passages.

    The golden model has widths of 48 and 64, and four heads.
    """

    def warnings(make, weights, mesh, **flags):
        caplog.clear()
        run, retrieval = RunConfig(mesh=mesh), RetrievalConfig(**flags)
        make(dataclasses.replace(tiny_config, run=run, retrieval=retrieval), weights)
        return re.findall(r"(\w+=\d) does not divide ([\d, ]+)", caplog.text)

    shapes, passages = tiny_weights.cfg, {"n_context": 4, "retriever_n_context": 6}
    assert warnings(training_mesh, shapes, "fsdp=3,passages=2", **passages) == [("fsdp=3", "64 ")]
    assert warnings(training_mesh, shapes, "passages=4", n_context=8, retriever_n_context=6) == [("passages=4", "6 ")]
    assert warnings(training_mesh, shapes, "passages=3", **passages) == [("passages=3", "4 ")]
    assert warnings(training_mesh, shapes, "fsdp=4,passages=2", **passages) == []
    assert warnings(evaluation_mesh, tiny_weights, "model=8", **passages) == [("model=8", "4 ")]
    assert warnings(evaluation_mesh, tiny_weights, "passages=3", **passages) == [("passages=3", "4 ")]
    assert warnings(evaluation_mesh, tiny_weights, "passages=4,model=2", **passages) == []
    retriever_only = dataclasses.replace(tiny_weights, cfg=dataclasses.replace(shapes, reader=None))
    assert warnings(evaluation_mesh, retriever_only, "passages=3", **passages) == []
    assert evaluation_mesh(tiny_config, tiny_weights).shape["data"] == 8  # not fsdp: nothing is trained


def test_a_smaller_mesh_warns_of_idle_devices(caplog):
    """The first devices are used. With several processes this is refused, see tests/runtime/test_cluster.py."""
    mesh = make_mesh("data=3")
    assert [device.id for device in mesh.devices.flat] == [0, 1, 2]
    assert caplog.messages == ["--mesh data=3: 3 of 8 devices are used"]


def test_a_batch_is_sharded_over_the_batch_axes_only():
    """`per_device` rows for each index of data and fsdp; devices along `model` hold the same rows."""
    for spec, rows in (("auto", 24), ("data=2,fsdp=2,model=2", 12), ("model=8", 3)):
        mesh = make_mesh(spec)
        assert global_batch_size(mesh, 3) == rows
        array = np.arange(rows * 2).reshape(rows, 2)
        split, whole = put_batch(mesh, array), replicate(mesh, array)
        assert {shard.data.shape for shard in split.addressable_shards} == {(3, 2)}
        assert {shard.data.shape for shard in whole.addressable_shards} == {(rows, 2)}
        np.testing.assert_array_equal(split, array)
        np.testing.assert_array_equal(whole, array)
        assert len({shard.index[0].start for shard in split.addressable_shards}) == rows // 3


def test_an_axis_that_does_not_divide_is_left_out():
    """Five passages are not split over two devices; six rows are split over the first axis only; the others divide."""
    mesh = make_mesh("data=2,passages=2,model=2")
    for put, shape, shard_shape in (
        (put_passages, (4, 5, 3), (2, 5, 3)),
        (put_passages, (4, 6, 3), (2, 3, 3)),
        (put_rows, (6, 3), (3, 3)),
        (put_rows, (5, 3), (5, 3)),
        (put_rows, (16, 3), (2, 3)),
    ):
        array = np.arange(np.prod(shape)).reshape(shape)
        found = put(mesh, array)
        assert {shard.data.shape for shard in found.addressable_shards} == {shard_shape}
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("reader", T5_CONFIGS)
def test_every_parameter_matches_one_row_of_param_specs(reader):
    """All published readers, encoders tied and untied; every row is used, and replicated parameters are small."""
    used, replicated, total = set(), 0, 0
    for untied in (False, True):
        for path, x in param_shapes(AtlasConfig(T5_CONFIGS[reader], ContrieverConfig(), untied)).items():
            rows = [pattern for pattern, _ in PARAM_SPECS if re.fullmatch(pattern, path)]
            assert len(rows) == 1, path
            used.update(rows)
            total += x.size
            if not any(param_spec(path, x.ndim)):
                replicated += x.size
                assert x.size <= 24 * 4096, path
    assert replicated < 0.005 * total
    assert len(used) == len(PARAM_SPECS) - (T5_CONFIGS[reader].tied)  # a tied reader has no lm_head


def test_a_parameter_without_a_row_is_an_error():
    """A parameter that matches no row raises KeyError."""
    with pytest.raises(KeyError, match="reader/new/kernel: 0 rows"):
        param_spec("reader/new/kernel", 2)


def test_parameters_are_sharded_as_param_specs_says():
    """Both axes at once, with or without stacked layers; each device holds its slice of the array."""
    mesh = make_mesh("fsdp=2,passages=2,model=2")
    for path, shape, shard_shape in (
        ("reader/encoder/layers/attn/q/kernel", (3, 8, 4, 5), (3, 2, 2, 5)),
        ("reader/decoder/layers/mlp/down/kernel", (3, 6, 8), (3, 3, 2)),
        ("reader/lm_head/kernel", (8, 10), (2, 5)),
        ("retriever/encoder/layers/q/kernel", (3, 8, 4, 5), (3, 2, 4, 5)),
        ("reader/encoder/final_norm/scale", (8,), (8,)),
    ):
        array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        found = put_parameter(mesh, path, array)
        assert {shard.data.shape for shard in found.addressable_shards} == {shard_shape}, path
        np.testing.assert_array_equal(found, array)


def test_importing_starts_no_device():
    """Several hosts have to find each other before JAX looks for devices; the counter-case initialises them."""
    program = """
import importlib, pkgutil, atlas_jax, jax
for module in pkgutil.walk_packages(atlas_jax.__path__, "atlas_jax."):
    importlib.import_module(module.name)
jax.config.update("jax_num_cpu_devices", 3)  # JAX refuses this once it has devices
print("none yet", flush=True)
jax.devices()
jax.config.update("jax_num_cpu_devices", 4)
"""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    completed = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert completed.stdout == "none yet\n", completed.stderr
    assert "before backends are initialized" in completed.stderr


def test_arrays_made_in_host_memory_are_on_the_cpu():
    """Even if another device is the default; the counter-case is the same array made outside of the block."""
    with jax.default_device(jax.devices()[3]):
        with in_host_memory():
            inside = jnp.zeros(2)
        outside = jnp.zeros(2)
    assert inside.devices() == {jax.local_devices(backend="cpu")[0]}
    assert outside.devices() == {jax.devices()[3]}
