"""Programs: one for each shape, with the results of the function."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.programs import Program


@pytest.fixture
def traced():
    """A program of `state * x (+ y)`, and how often Python ran its function."""
    calls = []

    def function(state, x, y=None):
        calls.append(1)
        return {"z": state["w"] * x if y is None else state["w"] * x + y}

    return Program("line", function), calls


def test_results_are_the_function_s(traced):
    """With the state and the arguments of each call, not those that it was compiled with."""
    program, calls = traced
    for w in (2.0, 3.0):
        for x in (np.arange(4.0, dtype=np.float32), np.full(4, 7, np.float32)):
            np.testing.assert_array_equal(program({"w": jnp.float32(w).reshape(1)}, x)["z"], w * x)
    assert (program.count, len(calls)) == (1, 1)


def test_compiles_once_for_each_shape(traced):
    """Another length, another type or another argument makes another program; coming back to one does not."""
    program, calls = traced
    state, seconds = {"w": jnp.ones(1)}, [program.compile_seconds]
    assert (program.count, seconds) == (0, [0.0])
    four, five = np.ones(4, np.float32), np.ones(5, np.float32)
    whole = np.ones(4, np.int32)
    for arguments in ((four,), (five,), (whole,), (four, None), (four, four), (four, five[:1])):
        for _ in range(2):
            program(state, *arguments)
        seconds.append(program.compile_seconds)
    for arguments in ((four,), (four, four), (whole,)):
        program(state, *arguments)
    assert program.count == len(calls) == 6
    assert seconds == sorted(set(seconds))  # each took time, and only the first call of each
    assert program.compile_seconds == seconds[-1]


def test_a_state_of_another_shape_is_an_error(traced):
    """It is never looked at to choose a program, so it must not be computed with either."""
    program, _ = traced
    program({"w": jnp.ones(1)}, np.ones(4, np.float32))
    with pytest.raises(TypeError, match="compiled"):
        program({"w": jnp.ones(4)}, np.ones(4, np.float32))
    assert program.count == 1


def test_each_compilation_is_said(traced, caplog):
    """Its name, the largest shape, the time and how many there are; a call of a compiled program says nothing."""
    program, _ = traced
    with caplog.at_level(logging.INFO, logger="atlas_jax"):
        for size in (4, 4, 5):
            program({"w": jnp.ones((1, 1))}, np.ones((2, size), np.float32), np.ones((1, 1), np.float32))
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(" in ")[0] for line in said] == ["compiled line for 2 x 4", "compiled line for 2 x 5"]
    assert said[1].endswith(" s (program 2)")


def test_arrays_stay_where_they_are(mesh):
    """Split over eight devices in, split out: the program is compiled for where its arguments lie."""
    from atlas_jax.mesh import put_batch, replicate

    state = replicate(mesh, np.full(1, 2.0, np.float32))
    program = Program("double", lambda state, x: state * x)
    doubled = program(state, put_batch(mesh, np.arange(16, dtype=np.float32)))
    assert len({shard.device for shard in doubled.addressable_shards}) == jax.device_count() == 8
    assert {shard.data.shape for shard in doubled.addressable_shards} == {(2,)}
    np.testing.assert_array_equal(doubled, 2 * np.arange(16))
