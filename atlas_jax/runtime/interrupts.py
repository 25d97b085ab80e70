"""Signals that stop a run at once, as an exception in the main thread, and the requeueing of its SLURM job."""

import contextlib
import functools
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupted(BaseException):
    """A signal asked the run to stop. Not an `Exception`, so that no `except Exception` takes it for an error."""

    def __init__(self, signum: int):
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def status(self) -> int:
        """Exit status, as a shell reports it for a program killed by this signal: 128 plus its number."""
        return 128 + self.signum


class Interrupts:
    """Within the block, in the main thread, SIGTERM, SIGUSR1 and Ctrl-C (SIGINT) raise `Interrupted` at once.

    Only the first signal does; further ones are logged, but a second Ctrl-C raises KeyboardInterrupt. Ctrl-C stays
    ignored if it was, as in a shell's background job. With `deferred=True` no `Interrupted` is raised; the caller
    polls `first()`.
    """

    def __init__(self, *, deferred: bool = False) -> None:
        self._received: list[int] = []
        self._is_due = False  # whether `Interrupted` is yet to be raised
        self._hold_depth = int(deferred)
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> "Interrupts":
        self._restore.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        sys.unraisablehook = functools.partial(self._on_unraisable, sys.unraisablehook)
        for signum in SIGNALS:
            if signum != signal.SIGINT or signal.getsignal(signum) is not signal.SIG_IGN:
                previous = signal.signal(signum, self._on_signal) or signal.SIG_DFL  # None: not installed by Python
                self._restore.callback(signal.signal, signum, previous)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore.close()

    def first(self) -> int:
        """Returns the number of the first signal received, or 0."""
        return next(iter(self._received), 0)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Defers `Interrupted` to the end of the block. If the block raises, its own error propagates instead."""
        self._hold_depth += 1
        try:
            yield
        finally:
            self._hold_depth -= 1
        self._raise_due()

    def check(self) -> None:
        """Raises `Interrupted` again if a signal came, as an `except:` in other code may have swallowed it.

        Not for use while stopping.
        """
        self._is_due = bool(self._received)
        self._raise_due()

    def _raise_due(self) -> None:
        if self._is_due and not self._hold_depth:
            self._is_due = False
            raise Interrupted(self._received[0])

    def _on_signal(self, signum: int, frame: types.FrameType | None) -> None:
        again = signum in self._received
        self._is_due = self._is_due or not self._received
        self._received.append(signum)
        with contextlib.suppress(RuntimeError):  # the signal interrupted a write to the same stream
            name, first = (signal.Signals(s).name for s in (signum, self._received[0]))
            logger.warning("%s: %s", name, "stopping" if len(self._received) == 1 else f"already stopping for {first}")
        if again and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._raise_due()

    def _on_unraisable(self, previous: Callable[..., Any], unraisable: "sys.UnraisableHookArgs") -> None:
        """Sends a signal again if Python dropped its `Interrupted`, as it does in `__del__` and garbage collection."""
        if not isinstance(unraisable.exc_value, Interrupted):
            previous(unraisable)
            return
        self._is_due = True
        timer = threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
        timer.daemon = True
        self._restore.callback(timer.join)  # then no signal is pending, and the handlers may be restored
        self._restore.callback(timer.cancel)
        timer.start()


def exit_while_compiling(status: int) -> int:
    """Returns the status, for `sys.exit`; while XLA compiles, ends the process at once, as Python would wait for it."""
    if any(thread.name.startswith("compile ") for thread in threading.enumerate()):  # named so by `CompiledFunction`
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)
    return status


def requeue(signum: int) -> None:
    """Requeues this SLURM job. Does nothing after Ctrl-C, outside SLURM, or in a process other than the first.

    SIGTERM is sent on preemption, after which the job is to be requeued, and by `scancel`, after which it must not be.
    SLURM may kill the job as soon as it is requeued, so call this last.
    """
    if not (job := _slurm_job()) or signum not in (signal.SIGUSR1, signal.SIGTERM):
        return
    try:
        # While the processes of a cancelled job have time to stop, SLURM calls it COMPLETING
        if signum == signal.SIGTERM and re.search(r"JobState=(CANCELLED|COMPLETING)", _scontrol("show", "job", job)):
            logger.info("job %s was cancelled or its time is over; to queue it again: scontrol requeue %s", job, job)
            return
        _scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "output", None) or error
        logger.warning("job %s is not queued again (%s); try: scontrol requeue %s", job, reason, job)
    else:
        logger.info("job %s is queued again", job)


def _slurm_job() -> str | None:
    """Returns the id of this job (in a job array `ARRAY_TASK`); None outside SLURM and in all but the first process."""
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return None
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, timeout=30)
    return done.stdout.strip()
