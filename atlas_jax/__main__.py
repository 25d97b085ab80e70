"""The script `atlas`, and `python -m atlas_jax`: `commands.main`, with Ctrl-C answered in one line throughout."""

import os
import signal
import sys
import types
from collections.abc import Callable
from typing import Any

INTERRUPTED = 130  # exit status: 128 + SIGINT, as a shell reports it


def run() -> int:
    """Runs `atlas` with the arguments of this process and returns its exit status.

    Ctrl-C ends the process while the command is imported and after it has ended; meanwhile it raises KeyboardInterrupt,
    which the command handles.
    """
    _on_ctrl_c(_exit)
    from atlas_jax.commands.main import main

    try:
        _on_ctrl_c(signal.default_int_handler)
        status = main()
        _on_ctrl_c(_exit)
    except KeyboardInterrupt:  # in between
        return _exit()
    return status


def _on_ctrl_c(handler: Callable[[int, types.FrameType | None], Any]) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is in a shell's background job
        signal.signal(signal.SIGINT, handler)


def _exit(*_: object) -> int:
    os.write(2, b"atlas: interrupted\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(run())
