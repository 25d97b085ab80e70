"""Runs that something from outside ends, in this process and as one of its own."""

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from atlas_jax.commands.main import main
from tests.commands.sample_run import CLOSED_BOOK, ROOT, ROWS, command, leftovers, lines, put

EVALUATING = "atlas_jax.evaluation.evaluator.Evaluator.__call__"


def failing(error: BaseException) -> Callable:
    """Evaluating that fails after its first line."""

    def evaluate(self, rows, reader, write):
        write("{}\n")
        raise error

    return evaluate


@pytest.mark.parametrize(
    ("error", "status", "parts"),
    [
        (KeyboardInterrupt(), 130, ["atlas: interrupted"]),
        (MemoryError("Unable to allocate 7 GiB"), 2, ["out of memory (Unable to allocate 7 GiB)", "batch_size"]),
        (MemoryError(), 2, ["out of memory (of this machine)"]),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmany lines"), 2, ["RESOURCE_EXHAUSTED", "batch_size"]),
        (OSError(errno.ENOSPC, "No space left on device"), 2, ["eval-step-1.jsonl", "No space left", "free some"]),
        (OSError(errno.EIO, "Input/output error", "/data/x.bin"), 2, ["/data/x.bin: Input/output error", "disk"]),
    ],
)
def test_a_run_that_is_cut_off(refused, tmp_path, monkeypatch, error, status, parts):
    """Ctrl-C, no memory, no space, a failing disk: one line, and no half-written predictions."""
    monkeypatch.setattr(EVALUATING, failing(error))
    refused(command(tmp_path, **CLOSED_BOOK), *parts, status=status)


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    """Errors that no user can mend are not disguised as theirs; the files are cleaned up all the same."""
    for error in (ValueError("a bug"), RuntimeError("a bug"), OSError("without a number")):
        monkeypatch.setattr(EVALUATING, failing(error))
        with pytest.raises(type(error)):
            main(command(tmp_path, **CLOSED_BOOK))
        assert leftovers(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk(refused, tmp_path, monkeypatch):
    """A write that really fails for want of space (/dev/full) names the predictions file."""
    opened = Path.open

    def open_full(path: Path, mode: str = "r", *args, **kwargs) -> io.IOBase:
        full = "eval-step-1.jsonl" in path.name and mode == "w"
        return opened(Path("/dev/full") if full else path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    monkeypatch.setattr(EVALUATING, lambda self, rows, reader, write: write("x" * 100_000))
    refused(command(tmp_path, **CLOSED_BOOK), "eval-step-1.jsonl: cannot be written (No space left on device)")


def atlas(*argv: str, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment} | options
    # A shell's background job, which the tests may be, ignores SIGINT, and so would what it starts
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from atlas_jax.commands.main import main; "
    return subprocess.Popen([sys.executable, "-c", f"{code}sys.exit(main(sys.argv[1:]))", *argv], **options)


def test_a_bad_flag_as_a_process(tmp_path):
    """The shell sees status 2, one line on stderr and nothing on stdout."""
    process = atlas(*command(tmp_path, n_contxt=3))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err == "atlas: --n_contxt: no such flag; did you mean --n_context?\n"


@pytest.mark.parametrize("argv", [[], ["evaluate", "--help"]])
def test_a_reader_that_leaves_is_no_error(argv):
    """`atlas | head -0`: nothing on stderr, and the status of a broken pipe (argparse hides it: 0)."""
    read, written = os.pipe()
    os.close(read)
    process = atlas(*argv, stdout=written)
    os.close(written)
    _, err = process.communicate(timeout=120)
    assert err == ""
    assert process.returncode == (0 if argv else 141)


def test_ctrl_c_as_a_process(tmp_path):
    """SIGINT while the weights are read or later: status 130, one line, no traceback, nothing half-written.

    The run would last for minutes. Python loses a SIGINT that comes while it collects garbage: a person presses again.
    """
    put(tmp_path / "eval.jsonl", lines(ROWS * 2000))
    process = atlas(*command(tmp_path, save_index_path=tmp_path / "index"))
    assert process.stderr
    logged = ""
    while "million parameters" not in logged:
        logged = process.stderr.readline()
        assert logged, "ended by itself"
    said = []
    for _ in range(4):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            said = process.communicate(timeout=30)[1].splitlines()
            break
    assert process.returncode == 130
    assert said[-1] == "atlas: interrupted"
    assert leftovers(tmp_path) == []
    assert not list((tmp_path / "runs" / "run").glob("eval-step-1*"))
