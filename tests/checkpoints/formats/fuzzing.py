"""Fuzzes both readers with hostile files and watches what the readers do; `make fuzz MINUTES=10` tries thousands.

    python tests/checkpoints/formats/fuzzing.py --minutes 10

A reader must return plain data or raise a one-line UserError within SECONDS and two gigabytes, and run nothing in the
file; else the file is kept and the run fails. Half of the time goes to files of `hostile.py`, half to atheris, where it
is installed, which searches for files that reach new lines of the readers.
"""

import argparse
import collections
import importlib.util
import io
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3]))
from atlas_jax.checkpoints.formats import safe_pickle, torch_reader
from atlas_jax.errors import UserError
from tests.checkpoints.formats.hostile import INSERTIONS, SEEDS, archive, hostile_file

SECONDS, BYTES = 20, 2 << 30  # limits for one small file; the memory includes Python itself
MAX_MESSAGE = 700  # characters
READERS: dict[str, Callable[[Path], Any]] = {
    "pickle": lambda path: safe_pickle.load_pickle(path),
    "torch": lambda path: torch_reader.load_torch(path),
}


class Violation(BaseException):
    """Raised when a reader breaks a rule; a BaseException, so that no `except Exception` hides it."""


class Watch:
    """An audit hook that lets a reader read and map its file; any other audited event raises Violation.

    Audited events are importing, compiling, executing, starting processes, opening, writing, connecting, unpickling.
    """

    def __init__(self) -> None:
        self.file: str | None = None
        "cp437".encode("cp437")  # zipfile uses this codec, which Python imports at its first use
        sys.addaudithook(self.report)

    def report(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.file is None or event in ("mmap.__new__", "builtins.id"):
            return
        if event == "open" and str(arguments[0]) == self.file and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        description, self.file = f"{event} {arguments!r:.200}", None
        raise Violation(description)

    def attempt(self, load: Callable[[Path], Any], path: Path) -> Any:
        """Runs a reader under watch; returns its value, or None if it refuses the file."""
        self.file = str(path)
        try:
            value = load(path)
        except UserError as error:
            check_message(str(error), path)
            return None
        finally:
            self.file = None
        check_value(value)
        return value


def check_message(message: str, path: Path) -> None:
    """Violation unless the message is one short printable line that starts with the path and has a remedy."""
    rest = message.removeprefix(f"{path}: ")
    if rest == message or "; " not in rest or not rest.isprintable() or len(rest) > MAX_MESSAGE:
        raise Violation(f"the message {message!r:.1000}")


def check_value(value: Any) -> None:
    """Violation unless the value is a small tree of plain types whose arrays are read-only views of the file."""
    budget, pending = 20_000_000, [value]
    while pending:
        value = pending.pop()
        budget -= 1
        if isinstance(value, np.ndarray):
            if value.flags.writeable or value.flags.owndata:
                raise Violation("an array that is no view of the file")
            if value.size:  # outside of the mapped file this kills the process
                value[(0,) * value.ndim].tobytes(), value[(-1,) * value.ndim].tobytes()
        elif type(value) not in safe_pickle.PLAIN_TYPES or budget < 0:
            raise Violation(f"a {type(value).__name__} of {20_000_000 - budget} values")
        elif type(value) in safe_pickle.CONTAINER_TYPES:
            pending.extend(value)
            pending.extend(value.values() if type(value) is dict else ())


class NoGlobalsUnpickler(pickle._Unpickler):
    """Python's own unpickler without globals; the one in C misreads a frame that ends inside a value."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


def check_agreement(value: Any, data: bytes) -> None:
    """Violation if Python's own unpickler reads the pickle and gives another value."""
    try:
        expected = NoGlobalsUnpickler(io.BytesIO(data)).load()
    except Exception:  # it raises every kind
        return
    if typed_repr(value) != typed_repr(expected):
        raise Violation(f"{typed_repr(value):.200}, but pickle reads {typed_repr(expected):.200}")


def typed_repr(value: Any) -> str:
    """Returns a `repr` with sets sorted: unlike `==`, it distinguishes 1 from True, and NaN equals NaN."""
    match value:
        case set() | frozenset():
            parts = sorted(map(typed_repr, value))
        case dict():
            parts = [f"{key!r}: {typed_repr(item)}" for key, item in value.items()]
        case list() | tuple():
            parts = list(map(typed_repr, value))
        case _:
            return repr(value)
    return f"{type(value).__name__}({', '.join(parts)})"


class Run:
    """Tries files one by one and counts the results; keeps a file with which a reader breaks a rule."""

    def __init__(self, folder: Path):
        self.folder, self.path, self.watch = folder, folder / "input", Watch()
        self.counts: collections.Counter[str] = collections.Counter()
        self.slowest = 0.0
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        signal.signal(signal.SIGALRM, self.on_timeout)

    def on_timeout(self, *_: Any) -> None:
        self.watch.file = None
        raise Violation(f"more than {SECONDS} seconds")

    def attempt(self, kind: str, data: bytes) -> None:
        self.path.write_bytes(data)
        start = time.perf_counter()
        signal.alarm(SECONDS)
        try:
            value = self.watch.attempt(READERS[kind], self.path)
            if kind == "pickle" and value is not None:
                check_agreement(value, data)
            self.counts[f"{kind} {'refused' if value is None else 'read'}"] += 1
        except BaseException as error:
            saved = Path(tempfile.gettempdir()) / f"fuzz-{kind}-{os.getpid()}"
            shutil.copy(self.path, saved)
            print(f"FAILED: {kind} reader, {type(error).__name__}: {error!s:.500}; the file is {saved}", flush=True)
            raise
        finally:
            signal.alarm(0)
        self.slowest = max(self.slowest, time.perf_counter() - start)

    def report(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        counts = ", ".join(f"{number} {kind}" for kind, number in sorted(self.counts.items()))
        print(f"{self.counts.total()} files: {counts}; slowest {self.slowest:.2f} s, peak {peak} MB", flush=True)


def run_by_rules(run: Run, seconds: float, max_inputs: float, seed: int) -> None:
    """Tries files of `hostile.py`, reproducible from the seed."""
    rng, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end and run.counts.total() < max_inputs:
        kind = rng.choice(list(READERS))
        run.attempt(kind, hostile_file(rng, kind))
    run.report()


def run_guided(run: Run, seconds: float) -> None:
    """Runs atheris; the first byte of an input chooses the reader, and whether the rest is a file or its data.pkl."""
    import atheris

    with atheris.instrument_imports(include=["atlas_jax.checkpoints", "zipfile"]):
        for module in (zipfile, safe_pickle, torch_reader):
            importlib.reload(module)
    corpus = run.folder / "corpus"
    corpus.mkdir()
    for kind, seeds in SEEDS.items():
        for number, seed in enumerate(seeds):
            (corpus / f"{kind}{number}").write_bytes(kind[:1].encode() + seed)
    dictionary = run.folder / "words"
    dictionary.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in INSERTIONS))

    def run_one(data: bytes) -> None:
        kind = "pickle" if data[:1] == b"p" else "torch"
        run.attempt(kind, archive(data[1:]) if data[:1] == b"d" else data[1:])
        if run.counts.total() % 100_000 == 0:
            run.report()

    options = [f"-max_total_time={seconds:.0f}", f"-dict={dictionary}", "-max_len=65536", f"-timeout={2 * SECONDS}"]
    options += ["-rss_limit_mb=0", "-print_final_stats=1", f"-artifact_prefix={tempfile.gettempdir()}/fuzz-"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], run_one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--inputs", type=float, default=float("inf"), help="maximum number of files composed by rules")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--only", choices=["rules", "guided"], help="run one kind of fuzzing, in this process")
    args = parser.parse_args()
    if args.only:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder))
            if args.only == "guided":
                run_guided(run, args.minutes * 60)
            else:
                run_by_rules(run, args.minutes * 60, args.inputs, args.seed)
        return 0
    halves = ["rules", "guided"] if importlib.util.find_spec("atheris") else ["rules"]
    if len(halves) == 1:
        print("atheris is not installed or has no wheel for this Python: files by rules only", flush=True)
    codes = []
    for half in halves:
        minutes = args.minutes / len(halves)
        print(f"{half}: {minutes:g} minutes, seed {args.seed}", flush=True)
        command = [sys.executable, __file__, "--only", half, "--minutes", str(minutes), "--seed", str(args.seed)]
        codes.append(subprocess.run([*command, "--inputs", str(args.inputs)], check=False).returncode)
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main())
