"""The `atlas` command: dispatch, help, log handlers, and the exit status of runs that fail or are interrupted."""

import errno
import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from atlas_jax.commands.main import main
from tests.commands.sample_evaluation import (
    CLOSED_BOOK,
    ROOT,
    ROWS,
    evaluate_argv,
    to_jsonl,
    unfinished_files,
    write_file,
)

EVALUATOR_CALL = "atlas_jax.evaluation.evaluator.Evaluator.__call__"


def test_unknown_commands_are_refused(assert_refused):
    """The nearest command is suggested; if none is near, all are named."""
    assert_refused(["evalaute"], "atlas evalaute: no such command", "did you mean evaluate?")
    assert_refused(["--version"], "choose from train, evaluate, index, convert")


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["evaluate", "--help"], ["convert", "--help"]])
def test_help_is_printed_to_stdout(capsys, argv):
    """Help has status 0 and names the commands, or the flags of a command."""
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for word in ("evaluate", "convert") if len(argv) < 2 else ("--model_path", "--reader_model_type"):
        assert word in captured.out


def test_a_run_folder_that_cannot_be_created_is_refused(assert_refused, tmp_path, no_weights):
    """--checkpoint_dir below a file: the message names the folder and the flag."""
    write_file(tmp_path / "file", b"")
    assert_refused(
        evaluate_argv(tmp_path, checkpoint_dir=tmp_path / "file"), tmp_path / "file", "choose another --checkpoint_dir"
    )


def test_a_folder_where_a_result_goes_is_refused_at_the_start(capsys, tmp_path, no_weights):
    """Scores and predictions are written at the end, which may be after hours."""
    folder = tmp_path / "runs/run/eval-step-1.metrics.json"
    folder.mkdir(parents=True)
    assert main(evaluate_argv(tmp_path)) == 2
    message = f"atlas: {folder}: is a folder, where the run writes a file; move it, or choose another --name\n"
    assert capsys.readouterr().err == message


def test_log_handlers_are_removed_after_a_command(capsys, tmp_path):
    """A second command in the same process logs each line once, and not into the run.log of the first."""
    before = list(logging.getLogger().handlers)
    for name in ("one", "two"):
        assert main(evaluate_argv(tmp_path, name=name, n_context=31, max_passages=3, load_index_path=tmp_path)) == 2
        assert logging.getLogger().handlers == before
        assert capsys.readouterr().err.count("million parameters") == 1
    assert "million" in (tmp_path / "runs/one/run.log").read_text()
    assert (tmp_path / "runs/one/run.log").read_text().count("million") == 1


def failing_evaluator(error: BaseException) -> Callable:
    """A replacement for `Evaluator.__call__` that writes one line and raises `error`."""

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
def test_a_failed_run_prints_one_line_and_leaves_no_predictions(
    assert_refused, tmp_path, monkeypatch, error, status, parts
):
    """Ctrl-C, out of memory, out of disk space and a failing disk each have their exit status and message."""
    monkeypatch.setattr(EVALUATOR_CALL, failing_evaluator(error))
    assert_refused(evaluate_argv(tmp_path, **CLOSED_BOOK), *parts, status=status)


def test_an_internal_error_keeps_its_traceback(tmp_path, monkeypatch):
    """Exceptions that no user can remedy are raised, not reported as bad input; unfinished files are still removed."""
    for error in (ValueError("a bug"), RuntimeError("a bug"), OSError("without a number")):
        monkeypatch.setattr(EVALUATOR_CALL, failing_evaluator(error))
        with pytest.raises(type(error)):
            main(evaluate_argv(tmp_path, **CLOSED_BOOK))
        assert unfinished_files(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_names_the_predictions_file(assert_refused, tmp_path, monkeypatch):
    """The predictions go to /dev/full, so the kernel fails the write: out of disk space."""
    original_open = Path.open

    def open_full(path: Path, mode: str = "r", *args, **kwargs) -> io.IOBase:
        is_predictions = "eval-step-1.jsonl" in path.name and mode == "w"
        return original_open(Path("/dev/full") if is_predictions else path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    monkeypatch.setattr(EVALUATOR_CALL, lambda self, rows, reader, write: write("x" * 100_000))
    assert_refused(
        evaluate_argv(tmp_path, **CLOSED_BOOK), "eval-step-1.jsonl: cannot be written (No space left on device)"
    )


def start_atlas(*argv: str, **options) -> subprocess.Popen:
    """Starts `atlas` as a process of its own, in which SIGINT raises KeyboardInterrupt."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment} | options
    # A background job of a shell ignores SIGINT, as do the processes that it starts: the tests may run in one
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from atlas_jax.commands.main import main; "
    return subprocess.Popen([sys.executable, "-c", f"{code}sys.exit(main(sys.argv[1:]))", *argv], **options)


def test_a_process_with_a_bad_flag_exits_with_status_2(tmp_path):
    """A bad flag prints one line on stderr and nothing on stdout."""
    process = start_atlas(*evaluate_argv(tmp_path, n_contxt=3))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err == "atlas: --n_contxt: no such flag; did you mean --n_context?\n"


@pytest.mark.parametrize("argv", [[], ["evaluate", "--help"]])
def test_a_closed_stdout_is_no_error(argv):
    """`atlas | head -0`: nothing on stderr, and the exit status of SIGPIPE (but 0 with argparse, which ignores it)."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = start_atlas(*argv, stdout=write_end)
    os.close(write_end)
    _, err = process.communicate(timeout=120)
    assert err == ""
    assert process.returncode == (0 if argv else 141)


@pytest.mark.parametrize(
    ("name", "moment"),
    [("SIGINT", "million parameters"), ("SIGTERM", "million parameters"), ("SIGTERM", "embedding: 30")],
)
def test_a_process_that_gets_a_signal_leaves_nothing(tmp_path, name, moment):
    """While passages are prepared, or a model is compiled: no traceback, the status of shells, no scratch folder.

    The run would last for minutes, and has its index in its scratch folder.
    """
    write_file(tmp_path / "eval.jsonl", to_jsonl(ROWS * 2000))
    process = start_atlas(*evaluate_argv(tmp_path))
    assert process.stderr
    line = ""
    while moment not in line:
        line = process.stderr.readline()
        assert line, "ended by itself"
    process.send_signal(getattr(signal, name))
    errors = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 128 + getattr(signal, name)
    assert errors[-1] == f"atlas: interrupted by {name}"
    assert "Traceback" not in " ".join(errors)
    assert unfinished_files(tmp_path) == []
    assert not list((tmp_path / "runs" / "run").glob("eval-step-1*"))


INTERRUPT_AT = """
import atexit, os, runpy, signal, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "{moment}":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
if "{moment}" == "exit":
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
runpy.run_module("atlas_jax", run_name="__main__")
"""


@pytest.mark.parametrize("moment", ["atlas_jax.commands.main", "atlas_jax.commands.flags", "jax", "exit"])
def test_ctrl_c_at_the_start_and_at_the_end_is_one_line(tmp_path, moment):
    """While the command or JAX is imported, and when Python exits: no traceback, the status of shells."""
    code = INTERRUPT_AT.format(moment=moment)
    argv = ["--help"] if moment == "exit" else evaluate_argv(tmp_path)
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1].startswith("atlas: interrupted")
    assert "Traceback" not in done.stderr


def test_what_a_library_makes_of_a_signal_is_an_interruption(capsys, tmp_path, monkeypatch):
    """An error after a signal ends with the signal's status. The counter-case is an error without a signal, above."""

    def translate(self, rows, reader, write):
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            raise RuntimeError("computation interrupted") from None

    monkeypatch.setattr(EVALUATOR_CALL, translate)
    assert main(evaluate_argv(tmp_path, **CLOSED_BOOK)) == 143
    assert capsys.readouterr().err.splitlines()[-1] == "atlas: interrupted by SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("command", ["train", "evaluate", "plan"])
def test_a_wrong_flag_is_refused_before_jax_is_imported(command):
    """Importing JAX takes seconds. The counter-case: the command's own module imports it later."""
    code = f"""
import sys
from atlas_jax.commands.main import main
assert main([{command!r}, "--no_such_flag"]) == 2
assert "jax" not in sys.modules
import atlas_jax.training.loop
assert "jax" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith("atlas: --no_such_flag: no such flag")
