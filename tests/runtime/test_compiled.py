"""`CompiledFunction` compiles once per argument shape and gives the results of its function; the compilation cache."""

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
    """A compiled `state["w"] * x (+ y)`, and a list with one element for each time JAX traced it."""
    calls = []

    def function(state, x, y=None):
        calls.append(1)
        return {"z": state["w"] * x if y is None else state["w"] * x + y}

    return CompiledFunction("line", function), calls


def test_results_equal_the_function(traced):
    """Results are those for the state and the arguments of each call, not of the call that compiled the program."""
    program, calls = traced
    for w in (2.0, 3.0):
        for x in (np.arange(4.0, dtype=np.float32), np.full(4, 7, np.float32)):
            np.testing.assert_array_equal(program({"w": jnp.float32(w).reshape(1)}, x)["z"], w * x)
    assert (program.count, len(calls)) == (1, 1)


def test_compiles_once_for_each_shape(traced):
    """Another length, dtype or number of arguments compiles another program; shapes seen before do not."""
    program, calls = traced
    state, seconds = {"w": jnp.ones(1)}, [program.compile_seconds]
    assert (program.count, seconds) == (0, [0.0])
    four, five = np.ones(4, np.float32), np.ones(5, np.float32)
    integers = np.ones(4, np.int32)
    for arguments in ((four,), (five,), (integers,), (four, None), (four, four), (four, five[:1])):
        for _ in range(2):
            program(state, *arguments)
        seconds.append(program.compile_seconds)
    for arguments in ((four,), (four, four), (integers,)):
        program(state, *arguments)
    assert program.count == len(calls) == 6
    assert seconds == sorted(set(seconds))  # only the first call of each adds to the time
    assert program.compile_seconds == seconds[-1]


def test_a_state_of_another_shape_is_an_error(traced):
    """The shape of the state does not choose the program, so the call has to fail instead of computing."""
    program, _ = traced
    program({"w": jnp.ones(1)}, np.ones(4, np.float32))
    with pytest.raises(TypeError, match="compiled"):
        program({"w": jnp.ones(4)}, np.ones(4, np.float32))
    assert program.count == 1


def test_each_compilation_is_logged(traced, caplog):
    """Name, shape with the most axes, time and number of programs; calls of a compiled program log nothing."""
    program, _ = traced
    with caplog.at_level(logging.INFO, logger="atlas_jax"):
        for size in (4, 4, 5):
            program({"w": jnp.ones((1, 1))}, np.ones((2, size), np.float32), np.ones((1, 1), np.float32))
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" in ")[0] for line in lines] == ["compiled line for 2 x 4", "compiled line for 2 x 5"]
    assert lines[1].endswith(" s (program 2)")


def test_results_keep_the_sharding_of_the_arguments(mesh):
    """An argument sharded over eight devices gives a result with the same sharding."""
    from atlas_jax.mesh import put_batch, replicate

    state = replicate(mesh, np.full(1, 2.0, np.float32))
    program = CompiledFunction("double", lambda state, x: state * x)
    doubled = program(state, put_batch(mesh, np.arange(16, dtype=np.float32)))
    assert len({shard.device for shard in doubled.addressable_shards}) == jax.device_count() == 8
    assert {shard.data.shape for shard in doubled.addressable_shards} == {(2,)}
    np.testing.assert_array_equal(doubled, 2 * np.arange(16))


@pytest.mark.parametrize("donate", [True, False])
def test_a_donated_state_is_deleted(donate):
    """The next state reuses the buffer; without `donate` the state stays. Other arguments always stay."""
    program = CompiledFunction("add", lambda state, x: ({"w": state["w"] + x}, x.sum()), donate=donate)
    first, x = {"w": jnp.zeros(4)}, jnp.ones(4)
    pointer = first["w"].unsafe_buffer_pointer()
    second, _ = program(first, x)
    assert first["w"].is_deleted() == donate
    assert (second["w"].unsafe_buffer_pointer() == pointer) == donate
    third, _ = program(second, x)
    np.testing.assert_array_equal(third["w"], np.full(4, 2.0))
    assert not x.is_deleted()
    assert program.count == 1


def test_compile_for_compiles_without_running(traced):
    """`compile_for` donates nothing; a later call compiles only if its shapes are others."""
    _, calls = traced
    runs = []

    def function(state, x):
        calls.append(1)
        jax.debug.callback(lambda: runs.append(1))
        return state * x

    program = CompiledFunction("scale", function, donate=True)
    state = jnp.ones(4)
    for _ in range(2):
        program.compile_for(state, np.ones(4, np.float32))
    jax.effects_barrier()
    assert (program.count, len(calls), runs, state.is_deleted()) == (1, 1, [], False)
    program(state, np.ones(4, np.float32))
    jax.effects_barrier()
    assert (program.count, len(calls), runs, state.is_deleted()) == (1, 1, [1], True)
    program(jnp.ones(4), np.ones((), np.float32))
    assert (program.count, len(calls)) == (2, 2)


class State(NamedTuple):
    """A state shaped like that of training."""

    weights: dict[str, jax.Array]
    moments: jax.Array | None


def test_prng_keys_and_trees_are_arguments():
    """Another PRNG key does not compile another program; None in its place does."""

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


def test_a_compilation_error_is_raised_by_the_call():
    """The compiling thread ends, and the failed program does not count as compiled."""
    target = jax.ShapeDtypeStruct((4,), np.float32)
    program = CompiledFunction("broken", lambda state, x: state * jax.ffi.ffi_call("no_such_target", target)(x))
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_target"):
            program(jnp.ones(1), jnp.ones(4))
    assert (program.count, program.compile_seconds) == (0, 0.0)
    for thread in compiling("broken"):  # a thread reports the error just before it ends
        thread.join(10)
    assert not compiling("broken")


def compiling(name):
    """Returns the threads that compile the program of this name."""
    return [thread for thread in threading.enumerate() if thread.name == f"compile {name}"]


class Stop(BaseException):
    """The exception that the signal handler raises."""


def test_an_exception_of_a_signal_handler_ends_the_wait_for_xla(monkeypatch):
    """The exception propagates from the call while XLA still compiles; a later call compiles the program."""
    started, finish = threading.Event(), threading.Event()
    compile_ = jax.stages.Lowered.compile

    def slow(lowered):
        started.set()
        finish.wait(20)
        return compile_(lowered)

    def handler(*_):
        raise Stop

    def send():
        started.wait()
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
        finish.set()
    for thread in compiling("slow"):
        thread.join()
    assert program.count == 0
    np.testing.assert_array_equal(program(jnp.ones(1), jnp.ones(4)), np.ones(4))


def test_folder_of_the_compilation_cache(monkeypatch, tmp_path, caplog):
    """A named folder; for `auto` JAX_COMPILATION_CACHE_DIR or the cache; for `none` no folder. It is logged."""
    before = jax.config.jax_compilation_cache_dir
    try:
        with caplog.at_level(logging.INFO, logger="atlas_jax"):
            enable_compilation_cache(str(tmp_path / "here"), tmp_path / "cache")
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "here")
            monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "there"))
            enable_compilation_cache("auto", tmp_path / "cache")
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "there")
            monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
            enable_compilation_cache("auto", tmp_path / "cache")
            assert Path(jax.config.jax_compilation_cache_dir).parent == tmp_path / "cache"
            enable_compilation_cache("none", tmp_path / "cache")
            assert jax.config.jax_compilation_cache_dir is None
        assert [message.split(" in ")[0] for message in caplog.messages] == ["compiled programs are kept"] * 3
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
