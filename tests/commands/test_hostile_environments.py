"""Commands in hostile environments: whatever is closed, missing or not writable, a command ends as it promises.

That is: no traceback, exit status 0 or 2, and after status 2 one line on stderr beside the log.
"""

import io
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atlas_jax.commands.main import main
from tests.commands.sample_evaluation import CLOSED_BOOK, PASSAGES, ROOT, SAMPLE, evaluate_argv, to_jsonl, write_file

LOG_LINE = re.compile(r"\[\d\d:\d\d:\d\d\] |compiled |$")
MODEL = ["--model_path", str(SAMPLE / "model"), "--reader_model_type", str(SAMPLE / "reader")]
MODEL += ["--retriever_model_path", str(SAMPLE / "retriever")]
pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    """An index of eight passages, one of them in Greek and with a character beyond 16 bits."""
    folder = tmp_path_factory.mktemp("index")
    rows = [*PASSAGES[:7], PASSAGES[7] | {"title": "Ἀριστοτέλης \N{GRINNING FACE}"}]
    passages = write_file(folder / "passages.jsonl", to_jsonl(rows))
    argv = ["index", "build", *MODEL, "--passages", passages, "--text_maxlength", "64"]
    assert main([*argv, "--output", str(folder / "index")]) == 0
    return folder / "index"


def assert_promise(status: int, err: str, accepted: tuple[int, ...] = (0, 2)) -> None:
    """Asserts what the module's docstring says of a command's exit status and stderr."""
    assert "Traceback" not in err, err
    assert "Exception ignored" not in err, err
    assert status in accepted, err
    lines = [line for line in err.splitlines() if not LOG_LINE.match(line)]
    assert len(lines) == (status == 2), err
    assert all(re.match("atlas: .*[;:] ", line) for line in lines)


def inspect(index: Path) -> list[str]:
    return ["index", "inspect", str(index)]


def build(index: Path) -> list[str]:
    passages = str(index.with_name("passages.jsonl"))
    return ["index", "build", *MODEL, "--passages", passages, "--output", "built", "--text_maxlength", "64"]


def convert(index: Path) -> list[str]:
    return ["index", "convert", "--load_index_path", str(index), "--to", "published", "--shards", "1"]


def help_of_index(index: Path) -> list[str]:
    return ["index"]


# Name: command, what the shell does around it, exit status and text of the line on stderr. `exec "$@"` is the command.
SHELLS: dict[str, tuple[Callable[[Path], list[str]], str, int, str]] = {
    "stdout closed": (inspect, 'exec "$@" >&-', 0, ""),
    "stderr closed": (inspect, 'exec "$@" 2>&-', 0, ""),
    "all closed": (inspect, 'exec "$@" <&- >&- 2>&-', 0, ""),
    "stdout full": (inspect, 'exec "$@" >/dev/full', 2, "standard output: cannot be written (No space left on device)"),
    "stdout full, unbuffered": (inspect, 'PYTHONUNBUFFERED=1 exec "$@" >/dev/full', 2, "No space left on device"),
    "stderr full": (inspect, 'exec "$@" 2>/dev/full', 0, ""),
    "reader exits": (help_of_index, 'set -o pipefail; "$@" | true', 141, ""),
    "ASCII": (inspect, 'PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 LC_ALL=C exec "$@"', 0, ""),
    "no such locale": (inspect, 'exec env LC_ALL=xx_YY.KOI8-R PYTHONUTF8=0 "$@"', 0, ""),
    "name not in UTF-8": (convert, "exec \"$@\" --output $'\\xff'", 0, ""),
    "no home": (build, 'unset HOME; exec "$@"', 0, ""),
    "no temporary folder": (inspect, 'TMPDIR=/nowhere exec "$@"', 0, ""),
    "folder deleted": (inspect, 'mkdir gone; cd gone; rmdir ../gone; exec "$@"', 0, ""),
    "no GPU": (build, 'JAX_PLATFORMS=cuda exec "$@"', 2, "JAX_PLATFORMS cuda: JAX cannot start its devices (no such"),
    "no such backend": (build, 'JAX_PLATFORMS=abacus exec "$@"', 2, "'abacus' is not in the list of known backends"),
    "no such XLA flag": (build, 'XLA_FLAGS=--xla_nonsense=1 exec "$@"', 2, "XLA_FLAGS --xla_nonsense=1: Unknown flag"),
    "XLA flag's value": (build, 'XLA_FLAGS=--xla_cpu_enable_fast_math=x exec "$@"', 2, "value x for flag xla_cpu"),
    "known XLA flag": (build, 'XLA_FLAGS=--xla_cpu_enable_fast_math=false exec "$@"', 0, ""),
    "JAX variable": (build, 'JAX_ENABLE_X64=maybe exec "$@"', 2, "invalid truth value 'maybe' for environment 'JAX_"),
    "no TPU": (build, 'JAX_PLATFORMS=tpu TPU_SKIP_MDS_QUERY=1 exec "$@"', 2, "JAX_PLATFORMS tpu: JAX cannot start"),
}


@pytest.fixture(scope="module")
def started(index, tmp_path_factory) -> Iterator[dict[str, subprocess.Popen]]:
    """A process for each of SHELLS, with a folder of its own, all at work at the same time."""
    environment = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    removed = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "PYTHONUNBUFFERED")
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    processes = {}
    for name, (command, shell, *_) in SHELLS.items():
        home = tmp_path_factory.mktemp("home")
        argv = ["bash", "-c", shell, "bash", sys.executable, "-m", "atlas_jax", *command(index)]
        options = {"cwd": home, "env": kept | environment | {"HOME": str(home)}}
        processes[name] = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", SHELLS)
def test_a_command_in_a_hostile_environment(started, name):
    """Each environment with a command that meets it, in a process of its own."""
    _, _, status, text = SHELLS[name]
    err = started[name].communicate(timeout=120)[1].decode(errors="backslashreplace")
    assert_promise(started[name].returncode, err, (status,))
    assert text in err


# Each ends after it has read its flags and, where it takes any, weights or an index
COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "evaluate": lambda folder, index: evaluate_argv(folder, load_index_path=index, n_context=9),
    "evaluate, closed book": lambda folder, index: evaluate_argv(folder, name="Ω run", **CLOSED_BOOK),
    "train": lambda folder, index: [
        *("train", "--name", "Ω run", "--checkpoint_dir", str(folder), "--task", "multiple_choice", *MODEL),
        *("--train_data", str(folder / "eval.jsonl"), "--load_index_path", str(index), "--n_context", "9"),
    ],
    "plan": lambda folder, index: ["plan", "--topology", "abacus:1", "--reader_model_type", "t5-small"],
    "index build": lambda folder, index: [*build(index)[:-3], str(folder / "built"), "--text_maxlength", "64"],
    "index convert": lambda folder, index: [
        *("index", "convert", "--load_index_path", str(index), "--output", str(folder / "Ω run")),
        *("--to", "published", "--shards", "1"),
    ],
    "index compress": lambda folder, index: [
        *("index", "compress", "--load_index_path", str(index), "--output", str(folder / "c")),
        *("--faiss_index_type", "ivfsq", "--k", "2"),
    ],
    "index inspect": lambda folder, index: ["index", "inspect", str(index)],
    "index merge": lambda folder, index: ["index", "merge", str(index), "--output", str(folder / "merged")],
    "convert": lambda folder, index: ["convert", "--inspect", str(SAMPLE / "model")],
    "help": lambda folder, index: ["convert", "--help"],
}


def no_home(monkeypatch) -> None:
    def unknown(*_: object) -> None:
        raise KeyError("uid not found")

    for variable in ("HOME", "XDG_CACHE_HOME", "ATLAS_CACHE", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    for function in ("getpwuid", "getpwnam"):
        monkeypatch.setattr(pwd, function, unknown)


def ascii_stdout(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))


def full_stdout(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w", encoding="utf-8"))  # noqa: SIM115


@pytest.mark.parametrize("environment", [no_home, ascii_stdout, full_stdout])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_three_hostile_environments(command, environment, index, tmp_path, monkeypatch, capsys):
    """In this process, for speed; folders have names that are not ASCII. Nothing named `~` appears."""
    evaluate_argv(tmp_path)  # writes the questions
    argv = COMMANDS[command](tmp_path, index)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with monkeypatch.context() as patch:
        environment(patch)
        status = main(argv)
        if environment is full_stdout:
            sys.stdout.close()
    assert_promise(status, capsys.readouterr().err)
    assert not list(tmp_path.glob("~*"))


@pytest.mark.parametrize(("variable", "value"), [("HOME", "/dev/null"), ("ATLAS_CACHE", "/dev/null/cache")])
def test_a_cache_that_cannot_be_written_is_no_error(index, tmp_path, monkeypatch, capsys, caplog, variable, value):
    """It is a convenience: a warning says that programs are not kept, and the command goes on."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    assert_promise(main(build(index)), capsys.readouterr().err, (0,))
    assert "compiled programs are not kept: /dev/null/" in caplog.text


def test_the_promise_can_be_broken():
    """The counter-case: a traceback, a second line, another status, and a line without a remedy are seen."""
    assert_promise(2, "[10:00:00] log\natlas: x: no such file; check the path\n")
    two_lines = "atlas: a; b\natlas: c; d\n"
    for status, err in ((2, "Traceback ..\n"), (2, two_lines), (1, ""), (2, "atlas: oh\n"), (0, "x\n")):
        with pytest.raises(AssertionError):
            assert_promise(status, err)
