"""Signals stop a run at once, wherever it is; the SLURM job is requeued unless it was cancelled."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from atlas_jax.runtime.interrupts import Interrupted, exit_while_compiling, requeue

ROOT = Path(__file__).parents[2]
PRELUDE = """
import os, signal, sys, threading, time
from signal import SIGINT, SIGTERM, SIGUSR1
from atlas_jax.runtime.interrupts import Interrupted, Interrupts, exit_while_compiling

def send(signum):
    os.kill(os.getpid(), signum)

def say(*words):
    print(*words, flush=True)

signal.signal(SIGINT, signal.default_int_handler)  # in a background job of a shell SIGINT is ignored
"""


def run(code: str) -> tuple[int, list[str], str]:
    """Runs `PRELUDE` and the code in a new process; returns its exit status, lines of stdout and stderr."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
@pytest.mark.parametrize("waiting", ["time.sleep(60)", "threading.Event().wait()"])
def test_a_signal_ends_a_wait(name, waiting):
    """`Interrupted` is raised during the wait, is not an `Exception`, and has the exit status of a shell."""
    status, output, _ = run(f"""
        with Interrupts():
            try:
                threading.Timer(0.1, send, ({name},)).start()
                {waiting}
            except Exception:
                say("taken for an error")
            except Interrupted as stop:
                say(stop, stop.signum == {name})
                sys.exit(stop.status)
    """)
    assert (status, output) == (128 + getattr(signal, name), [f"interrupted by {name} True"])


def test_handlers_are_restored_after_the_block():
    """SIGTERM kills again, an earlier handler is back; SIGINT, ignored before, is ignored within the block too."""
    status, output, _ = run("""
        signal.signal(SIGUSR1, lambda *_: say("own handler"))
        signal.signal(SIGINT, signal.SIG_IGN)
        before = sys.unraisablehook
        with Interrupts():
            send(SIGINT)
            say("goes on")
        assert sys.unraisablehook is before
        send(SIGINT)
        send(SIGUSR1)
        send(SIGTERM)
        time.sleep(60)
    """)
    assert (status, output) == (-signal.SIGTERM, ["goes on", "own handler"])


def test_held_defers_interrupted_to_the_end_of_the_outermost_block():
    """`check` inside the block does not raise either; outside such a block the signal raises at once."""
    _, output, _ = run("""
        with Interrupts() as interrupts:
            try:
                with interrupts.held():
                    with interrupts.held():
                        send(SIGTERM)
                        say("inner")
                    interrupts.check()
                    say("outer")
                say("after")
            except Interrupted:
                say("interrupted")
        with Interrupts() as interrupts:
            try:
                with interrupts.held():
                    say("held")
                send(SIGTERM)
                say("after")
            except Interrupted:
                say("interrupted")
    """)
    assert output == ["inner", "outer", "interrupted", "held", "interrupted"]


def test_an_error_in_a_held_block_precedes_interrupted():
    """The error propagates; if it is handled, `check` raises the `Interrupted`."""
    _, output, _ = run("""
        with Interrupts() as interrupts:
            try:
                with interrupts.held():
                    send(SIGTERM)
                    raise ValueError("bad")
            except ValueError as error:
                say(error)
            try:
                interrupts.check()
            except Interrupted:
                say("interrupted")
    """)
    assert output == ["bad", "interrupted"]


def test_further_signals_raise_nothing_while_stopping():
    """Within and outside `held`; they are logged, with the name of the first signal."""
    status, output, errors = run("""
        with Interrupts() as interrupts:
            try:
                send(SIGINT)
            except Interrupted as stop:
                with interrupts.held():
                    send(SIGTERM)
                send(SIGUSR1)
                send(SIGUSR1)
                say("saved")
                sys.exit(stop.status)
    """)
    assert (status, output) == (130, ["saved"])
    assert errors.splitlines() == [
        "SIGINT: stopping",
        "SIGTERM: already stopping for SIGINT",
        *["SIGUSR1: already stopping for SIGINT"] * 2,
    ]


@pytest.mark.parametrize("context", ["contextlib.nullcontext()", "interrupts.held()"])
def test_a_second_ctrl_c_raises_keyboard_interrupt(context):
    """A second Ctrl-C raises within `held` too, where it aborts a save."""
    _, output, _ = run(f"""
        import contextlib
        with Interrupts() as interrupts:
            try:
                send(SIGINT)
            except Interrupted:
                try:
                    with {context}:
                        send(SIGINT)
                        say("saved")
                except KeyboardInterrupt:
                    say("gave up")
    """)
    assert output == ["gave up"]


def test_a_signal_that_python_drops_is_sent_again():
    """Python drops what is raised in `__del__`: an `Interrupted` comes again, other errors are reported as usual."""
    status, output, errors = run("""
        class Dying:
            def __del__(self):
                send(SIGTERM)
                say("never here")

        class Failing:
            def __del__(self):
                raise ValueError("bad")

        with Interrupts():
            Failing()
            try:
                Dying()
                say("goes on")
                time.sleep(60)
            except Interrupted as stop:
                say(stop)
    """)
    assert (status, output) == (0, ["goes on", "interrupted by SIGTERM"])
    assert errors.count("Exception ignored in") == errors.count("ValueError: bad") == 1


def test_a_dropped_signal_is_not_sent_after_the_block():
    """The handlers are restored by then, and the signal would kill the process."""
    status, output, _ = run("""
        class Dying:
            def __del__(self):
                send(SIGTERM)

        with Interrupts():
            Dying()
        time.sleep(0.2)
        say("done")
    """)
    assert (status, output) == (0, ["done"])


def test_check_raises_a_swallowed_interrupted_again():
    """`check` raises at each call; without a signal it raises nothing."""
    _, output, _ = run("""
        with Interrupts() as interrupts:
            interrupts.check()
            for action in (lambda: send(SIGTERM), interrupts.check):
                try:
                    action()
                except:
                    say("swallowed")
            try:
                interrupts.check()
            except Interrupted as stop:
                say(stop)
    """)
    assert output == ["swallowed", "swallowed", "interrupted by SIGTERM"]


COMPILE = """
    import atexit, jax, jax.numpy as jnp
    from atlas_jax.runtime.compiled import CompiledFunction

    def big(state, x):
        for number in range(300):
            x = jnp.sin(x @ state) + jnp.sort(x, axis=number % 2)
        return x

    program = CompiledFunction("big", big)

    def compiling():
        return [thread for thread in threading.enumerate() if thread.name == "compile big" and thread.is_alive()]

    def watch():
        while not compiling():
            time.sleep(0.01)
        say("compiling")
        send(SIGTERM)

    atexit.register(lambda: say("the end", len(compiling())))
    threading.Thread(target=watch).start()
    with Interrupts():
        try:
            program(jnp.ones((8, 8)), jnp.ones((8, 8)))
            say("compiled")
        except Interrupted as stop:
            say("interrupted", program.count, len(compiling()))
            sys.exit(END(stop.status))
"""


def test_a_signal_does_not_wait_for_xla():
    """The run stops while XLA still compiles; `exit_while_compiling` ends the process without its atexit handlers."""
    status, output, errors = run(COMPILE.replace("END", "exit_while_compiling"))
    assert (status, output) == (143, ["compiling", "interrupted 0 1"])
    assert errors == "SIGTERM: stopping\n"


def test_a_normal_exit_waits_for_xla():
    """Without `exit_while_compiling` the process takes longer, and ends with the same status, not with a crash."""
    status, output, errors = run(COMPILE.replace("END", ""))
    assert (status, output) == (143, ["compiling", "interrupted 0 1", "the end 0"])
    assert errors == "SIGTERM: stopping\n"


def test_exit_while_compiling_returns_the_status_when_nothing_compiles():
    """The caller then exits by `sys.exit`."""
    assert exit_while_compiling(Interrupted(signal.SIGTERM).status) == 143


@pytest.fixture
def slurm(tmp_path, monkeypatch, caplog):
    """Returns a function that makes this process SLURM job 7, with a fake `scontrol`; it returns the fake's calls."""
    caplog.set_level(logging.INFO, logger="atlas_jax")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def job(state="RUNNING", status=0, **variables):
        script = tmp_path / "scontrol"
        script.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/calls\necho JobId=7 JobState={state} X=1\nexit {status}\n")
        script.chmod(0o755)
        for name, value in ({"JOB_ID": "7"} | variables).items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        return lambda: (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []

    return job


@pytest.mark.parametrize("state", ["RUNNING", "CANCELLED", "COMPLETING"])
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_a_job_is_requeued_unless_it_is_cancelled(slurm, caplog, name, state):
    """SIGUSR1 requeues the job, SIGTERM does unless the job is being cancelled, Ctrl-C never does."""
    calls = slurm(state)
    requeue(getattr(signal, name))
    is_running = state == "RUNNING"
    show = ["show job 7"] if name == "SIGTERM" else []
    requeued = ["requeue 7"] if name == "SIGUSR1" or (name == "SIGTERM" and is_running) else []
    assert calls() == show + requeued
    assert ("job 7 is queued again" in caplog.messages) == bool(requeued)
    assert ("scontrol requeue 7" in caplog.text) == (name == "SIGTERM" and not is_running)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ["requeue 7"]),
        ({"PROCID": "0"}, ["requeue 7"]),
        ({"PROCID": "1"}, []),
        ({"ARRAY_JOB_ID": "5", "ARRAY_TASK_ID": "0"}, ["requeue 5_0"]),
        ({"ARRAY_JOB_ID": "5"}, ["requeue 7"]),
        ({"JOB_ID": ""}, []),
    ],
)
def test_the_first_process_requeues_its_own_job(slurm, variables, expected):
    """The job, or in a job array its task, is requeued; other processes, and a run outside SLURM, requeue nothing."""
    calls = slurm(**variables)
    requeue(signal.SIGUSR1)
    assert calls() == expected


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
@pytest.mark.parametrize("missing", [False, True])
def test_a_failing_scontrol_is_logged(slurm, caplog, monkeypatch, name, missing):
    """A failing or missing `scontrol` raises nothing; the warning gives the command to type by hand."""
    calls = slurm("Access/permission denied", status=1)
    if missing:
        monkeypatch.setenv("PATH", "")
    requeue(getattr(signal, name))
    assert len(calls()) == (not missing)  # after SIGTERM, a job of unknown state is not requeued
    (message,) = caplog.messages
    assert ("No such file" if missing else "permission denied") in message
    assert message.endswith("; try: scontrol requeue 7")
