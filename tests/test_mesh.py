"""The mesh: what `--mesh` means, what it refuses, and what lies where."""

import os
import subprocess
import sys

import numpy as np
import pytest
from jax.sharding import AxisType

from atlas_jax.errors import UserError
from atlas_jax.mesh import AXES, batch_rows, make_mesh, put_batch, replicate


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("auto", (8, 1, 1)),
        ("data=8", (8, 1, 1)),
        ("data=4,model=2", (4, 1, 2)),
        ("model=2, data=2 ,fsdp=2", (2, 2, 2)),
        ("fsdp=8", (1, 8, 1)),
    ],
)
def test_a_mesh_has_the_sizes_asked_for(spec, shape):
    """All eight devices, each once, on three axes in a fixed order; how arrays are split is left to XLA."""
    mesh = make_mesh(spec)
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == shape
    assert len({device.id for device in mesh.devices.flat}) == 8
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data=3", "3 devices, but there are 8"),
        ("data=4", "4 devices, but there are 8"),
        ("data=8,model=2", "16 devices, but there are 8"),
        ("tensor=8", "'tensor=8' is not one of data=N, fsdp=N, model=N"),
        ("data=0", "'data=0' is not one of"),
        ("data=-8", "'data=-8' is not one of"),
        ("data=\u00b2", "is not one of"),  # a digit, but no number
        ("data", "'data' is not one of"),
        ("data=8,", "'' is not one of"),
        ("", "'' is not one of"),
        ("data=2,data=8", "data is there twice"),
    ],
)
def test_a_mesh_that_cannot_be(spec, message):
    """One line that quotes the flag."""
    with pytest.raises(UserError, match=message) as error:
        make_mesh(spec)
    assert str(error.value).startswith(f"--mesh {spec}: ")
    assert "\n" not in str(error.value)


def test_a_batch_is_split_over_the_batch_axes_alone():
    """`per_device` rows for each place on data and fsdp; devices along `model` share theirs."""
    for spec, rows in (("auto", 24), ("data=2,fsdp=2,model=2", 12), ("model=8", 3)):
        mesh = make_mesh(spec)
        assert batch_rows(mesh, 3) == rows
        array = np.arange(rows * 2).reshape(rows, 2)
        split, whole = put_batch(mesh, array), replicate(mesh, array)
        assert {shard.data.shape for shard in split.addressable_shards} == {(3, 2)}
        assert {shard.data.shape for shard in whole.addressable_shards} == {(rows, 2)}
        np.testing.assert_array_equal(split, array)
        np.testing.assert_array_equal(whole, array)
        assert len({shard.index[0].start for shard in split.addressable_shards}) == rows // 3


def test_importing_starts_no_device():
    """Several hosts have to find each other before JAX looks for devices; the counter-case is a program that looks."""
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
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ended.stdout == "none yet\n", ended.stderr
    assert "before backends are initialized" in ended.stderr
