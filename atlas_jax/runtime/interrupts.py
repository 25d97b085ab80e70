"""A run that is told to stop stops at once, whatever it is doing, and may go back to SLURM's queue."""

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
    """A signal tells the run to stop. Not an `Exception`, so that nobody takes it for an error to recover from."""

    def __init__(self, signum: int):
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def status(self) -> int:
        """The exit status: what a shell reports of a program that this signal ends."""
        return 128 + self.signum


class Interrupts:
    """Within the block, which is the main thread's, SIGTERM, SIGUSR1 or Ctrl-C raises `Interrupted` at once.

    Only the first signal does; further ones are logged, but a second Ctrl-C is a KeyboardInterrupt. Ctrl-C stays
    ignored where it was, as in a shell's background job. `later`: nothing is raised; who asks for `first` raises it.
    """

    def __init__(self, *, later: bool = False) -> None:
        self._seen: list[int] = []
        self._due = False  # it is still to be raised
        self._holds = int(later)
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "Interrupts":
        self._undo.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        sys.unraisablehook = functools.partial(self._on_unraisable, sys.unraisablehook)
        for signum in SIGNALS:
            if signum != signal.SIGINT or signal.getsignal(signum) is not signal.SIG_IGN:
                before = signal.signal(signum, self._on_signal) or signal.SIG_DFL  # None: not Python's own
                self._undo.callback(signal.signal, signum, before)
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def first(self) -> int:
        """The first signal that came; 0 if none has."""
        return next(iter(self._seen), 0)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A signal within the block waits for its end. If the block fails, its error goes first."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        self._raise_due()

    def check(self) -> None:
        """Raises again what was raised and got lost in an `except:` of somebody's; not for use while stopping."""
        self._due = bool(self._seen)
        self._raise_due()

    def _raise_due(self) -> None:
        if self._due and not self._holds:
            self._due = False
            raise Interrupted(self._seen[0])

    def _on_signal(self, signum: int, frame: types.FrameType | None) -> None:
        again = signum in self._seen
        self._due = self._due or not self._seen
        self._seen.append(signum)
        with contextlib.suppress(RuntimeError):  # it came in the midst of writing to the same stream
            name, first = (signal.Signals(one).name for one in (signum, self._seen[0]))
            logger.warning("%s: %s", name, "stopping" if len(self._seen) == 1 else f"already stopping for {first}")
        if again and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._raise_due()

    def _on_unraisable(self, before: Callable[..., Any], lost: "sys.UnraisableHookArgs") -> None:
        """Python drops what is raised in a `__del__` or in a callback of the garbage collector: send it once more."""
        if not isinstance(lost.exc_value, Interrupted):
            before(lost)
            return
        self._due = True
        timer = threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
        timer.daemon = True
        self._undo.callback(timer.join)  # after that none is on its way, and the handlers may go
        self._undo.callback(timer.cancel)
        timer.start()


def exit_while_compiling(status: int) -> int:
    """Returns the status, for `sys.exit`, unless XLA still compiles: Python would wait for it, so ends here and now."""
    if any(thread.name.startswith("compile ") for thread in threading.enumerate()):  # so `CompiledFunction` calls it
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)
    return status


def requeue(signum: int) -> None:
    """Puts this SLURM job back into the queue, from its first process; elsewhere and after Ctrl-C does nothing.

    SIGTERM comes from a preemption, whereupon the job shall come back, and from `scancel`, whereupon it must not. SLURM
    may stop the job when it is queued again, so this comes last.
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
    """The number of this job, for its first process."""
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return None
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, timeout=30)
    return done.stdout.strip()
