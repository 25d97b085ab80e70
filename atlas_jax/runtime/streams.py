"""Standard streams that a program can write to whatever its environment is: closed, full, or not in UTF-8."""

import contextlib
import io
import os
import sys


def prepare_streams() -> None:
    """Opens standard streams that the program was started without, and writes what their encoding lacks as escapes.

    A closed one would be the number of the next file that is opened, and text that is printed would go there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_unwritable_stdout() -> None:
    """Discards what cannot be written to stdout, or else the interpreter would complain about it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
