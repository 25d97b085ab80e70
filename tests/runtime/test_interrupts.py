"""Signals stop a run at once, wherever it is, and SLURM is asked to queue it again when it shall come back."""

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

signal.signal(SIGINT, signal.default_int_handler)  # else the test, as a shell's background job, might ignore it
"""


def run(code: str) -> tuple[int, list[str], str]:
    """The status, the lines on stdout and stderr of a program of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
@pytest.mark.parametrize("waiting", ["time.sleep(60)", "threading.Event().wait()"])
def test_a_signal_ends_a_wait(name, waiting):
    """The run gets the signal while it waits, and ends with the status that a shell would report."""
    status, said, _ = run(f"""
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
    assert (status, said) == (128 + getattr(signal, name), [f"interrupted by {name} True"])


def test_handlers_are_those_of_before_afterwards():
    """SIGTERM kills again, an own handler is back, and a SIGINT that was ignored never was anything else."""
    status, said, _ = run("""
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
    assert (status, said) == (-signal.SIGTERM, ["goes on", "own handler"])


def test_a_held_signal_waits_for_the_end_of_the_block():
    """Of the outermost one; `check` within does not raise it; outside of a block nothing waits."""
    _, said, _ = run("""
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
    assert said == ["inner", "outer", "interrupted", "held", "interrupted"]


def test_an_error_in_a_held_block_goes_first():
    """It is not hidden by the signal, which `check` raises if the error was no reason to end."""
    _, said, _ = run("""
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
    assert said == ["bad", "interrupted"]


def test_while_it_stops_a_run_is_left_in_peace():
    """Other signals and blocks that hold them raise nothing more; they are logged, with the first one's name."""
    status, said, err = run("""
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
    assert (status, said) == (130, ["saved"])
    assert err.splitlines() == [
        "SIGINT: stopping",
        "SIGTERM: already stopping for SIGINT",
        *["SIGUSR1: already stopping for SIGINT"] * 2,
    ]


@pytest.mark.parametrize("place", ["contextlib.nullcontext()", "interrupts.held()"])
def test_a_second_ctrl_c_ends_the_stopping_too(place):
    """Also where signals are held: whoever asks twice does not want to wait."""
    _, said, _ = run(f"""
        import contextlib
        with Interrupts() as interrupts:
            try:
                send(SIGINT)
            except Interrupted:
                try:
                    with {place}:
                        send(SIGINT)
                        say("saved")
                except KeyboardInterrupt:
                    say("gave up")
    """)
    assert said == ["gave up"]


def test_a_signal_that_python_drops_comes_again():
    """What is raised in a `__del__` gets lost, and is sent once more; others' errors are reported as ever."""
    status, said, err = run("""
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
    assert (status, said) == (0, ["goes on", "interrupted by SIGTERM"])
    assert err.count("Exception ignored in") == err.count("ValueError: bad") == 1


def test_a_run_may_end_before_a_dropped_signal_comes_again():
    """It is not sent to a process whose handlers are gone, which it would kill."""
    status, said, _ = run("""
        class Dying:
            def __del__(self):
                send(SIGTERM)

        with Interrupts():
            Dying()
        time.sleep(0.2)
        say("done")
    """)
    assert (status, said) == (0, ["done"])


def test_check_raises_what_somebody_swallowed():
    """As often as that happens; it raises nothing where no signal came."""
    _, said, _ = run("""
        with Interrupts() as interrupts:
            interrupts.check()
            for doing in (lambda: send(SIGTERM), interrupts.check):
                try:
                    doing()
                except:
                    say("swallowed")
            try:
                interrupts.check()
            except Interrupted as stop:
                say(stop)
    """)
    assert said == ["swallowed", "swallowed", "interrupted by SIGTERM"]


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
    """The run stops while XLA still compiles, and the process ends without the interpreter's orderly end."""
    status, said, err = run(COMPILE.replace("END", "exit_while_compiling"))
    assert (status, said) == (143, ["compiling", "interrupted 0 1"])
    assert err == "SIGTERM: stopping\n"


def test_the_interpreter_outlives_xla():
    """A process that ends in the usual way has its own status too: it is no crash, but takes longer."""
    status, said, err = run(COMPILE.replace("END", ""))
    assert (status, said) == (143, ["compiling", "interrupted 0 1", "the end 0"])
    assert err == "SIGTERM: stopping\n"


def test_leaving_in_the_usual_way():
    """Where nothing compiles the status is handed on, for others to end as they like."""
    assert exit_while_compiling(Interrupted(signal.SIGTERM).status) == 143


@pytest.fixture
def slurm(tmp_path, monkeypatch, caplog):
    """Makes us a job, and returns the calls of `scontrol`, which says that the job is in this state."""
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
def test_which_signals_bring_a_job_back(slurm, caplog, name, state):
    """SIGUSR1 does, SIGTERM unless the job is being cancelled, Ctrl-C never."""
    calls = slurm(state)
    requeue(getattr(signal, name))
    runs = state == "RUNNING"
    show = ["show job 7"] if name == "SIGTERM" else []
    again = ["requeue 7"] if name == "SIGUSR1" or (name == "SIGTERM" and runs) else []
    assert calls() == show + again
    assert ("job 7 is queued again" in caplog.messages) == bool(again)
    assert ("scontrol requeue 7" in caplog.text) == (name == "SIGTERM" and not runs)


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
def test_which_job_comes_back(slurm, variables, expected):
    """The job, or the task of an array; the first process asks for it, and none outside of SLURM."""
    calls = slurm(**variables)
    requeue(signal.SIGUSR1)
    assert calls() == expected


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
@pytest.mark.parametrize("missing", [False, True])
def test_a_job_that_cannot_be_queued_again(slurm, caplog, monkeypatch, name, missing):
    """A failing or missing `scontrol` is said, with the command to type by hand; the run ends as it would."""
    calls = slurm("Access/permission denied", status=1)
    if missing:
        monkeypatch.setenv("PATH", "")
    requeue(getattr(signal, name))
    assert len(calls()) == (not missing)  # nor is a job requeued whose state is not known
    (message,) = caplog.messages
    assert ("No such file" if missing else "permission denied") in message
    assert message.endswith("; try: scontrol requeue 7")
