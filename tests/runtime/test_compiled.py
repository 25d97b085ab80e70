"""Programs: one for each shape, with the results of the function."""

import logging
import os
import signal
import threading
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.runtime.compiled import CompiledFunction, enable_compilation_cache


@pytest.fixture
def traced():
    """A program of `state * x (+ y)`, and how often Python ran its function."""
    calls = []

    def function(state, x, y=None):
        calls.append(1)
        return {"z": state["w"] * x if y is None else state["w"] * x + y}

    return CompiledFunction("line", function), calls


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
    program = CompiledFunction("double", lambda state, x: state * x)
    doubled = program(state, put_batch(mesh, np.arange(16, dtype=np.float32)))
    assert len({shard.device for shard in doubled.addressable_shards}) == jax.device_count() == 8
    assert {shard.data.shape for shard in doubled.addressable_shards} == {(2,)}
    np.testing.assert_array_equal(doubled, 2 * np.arange(16))


@pytest.mark.parametrize("donate", [True, False])
def test_a_donated_state_is_used_up(donate):
    """Its memory holds the next state; the other arguments stay, and so does a state that is not donated."""
    program = CompiledFunction("add", lambda state, x: ({"w": state["w"] + x}, x.sum()), donate=donate)
    first, x = {"w": jnp.zeros(4)}, jnp.ones(4)
    place = first["w"].unsafe_buffer_pointer()
    second, _ = program(first, x)
    assert first["w"].is_deleted() == donate
    assert (second["w"].unsafe_buffer_pointer() == place) == donate
    third, _ = program(second, x)
    np.testing.assert_array_equal(third["w"], np.full(4, 2.0))
    assert not x.is_deleted()
    assert program.count == 1


def test_prepared_programs_do_not_compile_again(traced):
    """Nothing runs and nothing is used up; a call of other shapes still compiles."""
    _, calls = traced
    ran = []

    def function(state, x):
        calls.append(1)
        jax.debug.callback(lambda: ran.append(1))
        return state * x

    program = CompiledFunction("scale", function, donate=True)
    state = jnp.ones(4)
    for _ in range(2):
        program.compile_for(state, np.ones(4, np.float32))
    jax.effects_barrier()
    assert (program.count, len(calls), ran, state.is_deleted()) == (1, 1, [], False)
    program(state, np.ones(4, np.float32))
    jax.effects_barrier()
    assert (program.count, len(calls), ran, state.is_deleted()) == (1, 1, [1], True)
    program(jnp.ones(4), np.ones((), np.float32))
    assert (program.count, len(calls)) == (2, 2)


class State(NamedTuple):
    """A state as training has one."""

    weights: dict[str, jax.Array]
    moments: jax.Array | None


def test_keys_and_trees_as_arguments():
    """A PRNG key is an argument like another: its bits make no other program, and a number in its place does."""

    def function(state, batch, key):
        noise = 0.0 if key is None else jax.random.normal(key, (4,))
        return State({"w": state.weights["w"] + batch["x"] + noise}, state.moments)

    program = CompiledFunction("noise", function, donate=True)
    state, batch = State({"w": jnp.zeros(4)}, None), {"x": jnp.ones(4), "none": None}
    for seed in (1, 2):
        key = jax.random.key(seed)
        before = np.asarray(state.weights["w"]).copy()
        state = program(state, batch, key)
        np.testing.assert_allclose(state.weights["w"], before + 1 + jax.random.normal(key, (4,)), rtol=1e-6)
        assert state.moments is None
    assert program.count == 1
    program(state, batch, None)
    assert program.count == 2


def test_an_error_of_xla_s_is_the_caller_s():
    """It is raised by the call, the thread that compiled is gone, and what failed does not count as compiled."""
    target = jax.ShapeDtypeStruct((4,), np.float32)
    program = CompiledFunction("broken", lambda state, x: state * jax.ffi.ffi_call("no_such_target", target)(x))
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_target"):
            program(jnp.ones(1), jnp.ones(4))
    assert (program.count, program.compile_seconds) == (0, 0.0)
    for thread in compiling("broken"):  # which told of it just before its end
        thread.join(10)
    assert not compiling("broken")


def compiling(name):
    """The threads that compile this program."""
    return [thread for thread in threading.enumerate() if thread.name == f"compile {name}"]


class Stop(BaseException):
    """What a signal handler raises."""


def test_what_a_signal_handler_raises_gets_through(monkeypatch):
    """While XLA compiles the caller waits and nothing else: it can be stopped, and compile the program later."""
    begun, end = threading.Event(), threading.Event()
    compile_ = jax.stages.Lowered.compile

    def slow(lowered):
        begun.set()
        end.wait(20)
        return compile_(lowered)

    def handler(*_):
        raise Stop

    def send():
        begun.wait()
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(jax.stages.Lowered, "compile", slow)
    before = signal.signal(signal.SIGUSR1, handler)
    program = CompiledFunction("slow", lambda state, x: state * x)
    threading.Thread(target=send).start()
    try:
        with pytest.raises(Stop):
            program(jnp.ones(1), jnp.ones(4))
        assert (len(compiling("slow")), program.count) == (1, 0)
    finally:
        signal.signal(signal.SIGUSR1, before)
        end.set()
    for thread in compiling("slow"):
        thread.join()
    assert program.count == 0
    np.testing.assert_array_equal(program(jnp.ones(1), jnp.ones(4)), np.ones(4))


def test_where_programs_are_kept(monkeypatch, tmp_path, caplog):
    """In the folder named, else where the environment says, else in the user's cache; or nowhere; and it is said."""
    before = jax.config.jax_compilation_cache_dir
    try:
        with caplog.at_level(logging.INFO, logger="atlas_jax"):
            enable_compilation_cache(str(tmp_path / "here"))
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "here")
            monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "there"))
            enable_compilation_cache("auto")
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "there")
            monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
            enable_compilation_cache("auto")
            assert Path(jax.config.jax_compilation_cache_dir).parent == tmp_path / "atlas_jax"
            enable_compilation_cache("none")
            assert jax.config.jax_compilation_cache_dir is None
        assert [message.split(" in ")[0] for message in caplog.messages] == ["compiled programs are kept"] * 3
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
