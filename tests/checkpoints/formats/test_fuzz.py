"""The readers survive hostile files, and the watch of `make fuzz` detects readers that break its rules."""

import math
import subprocess
import sys
import tracemalloc
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlas_jax.errors import UserError
from tests.checkpoints.formats import fuzzing
from tests.checkpoints.formats.hostile import (
    CHECKPOINT,
    SEEDS,
    archive_with_wrong_directory,
    composed_pickle,
    hostile_file,
    mutated,
)
from tests.checkpoints.formats.pickles import name, program, storage, tensor, write

ROOT = Path(__file__).parents[3]
HARNESS = Path(fuzzing.__file__)

fuzz_settings = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def check_reader(kind: str, path: Path, data: bytes) -> bool:
    """Returns whether the reader reads the file, after checking the value, also against `pickle`, or the message."""
    path.write_bytes(data)
    try:
        value = fuzzing.READERS[kind](path)
    except UserError as error:
        fuzzing.check_message(str(error), path)
        return False
    fuzzing.check_value(value)
    if kind == "pickle":
        fuzzing.check_agreement(value, data)
    return True


@fuzz_settings
@given(rng=st.randoms(use_true_random=False))
def test_composed_pickles_are_read_as_by_pickle_or_refused(path, rng):
    """A composed pickle, valid or not, gives the same data as `pickle` or a one-line refusal."""
    check_reader("pickle", path, composed_pickle(rng, global_rate=rng.choice([0, 0, 0.1])))


@fuzz_settings
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["pickle", "torch"]))
def test_hostile_files_are_read_or_refused(path, seed, kind):
    """Composed files, and valid ones with bits, sizes and parts mutated, give plain data or a one-line refusal."""
    check_reader(kind, path, hostile_file(Random(seed), kind))


@fuzz_settings
@given(seed=st.integers(0, 2**32))
def test_wrong_zip_directories_are_read_or_refused(path, seed):
    """A zip directory with one or two wrong fields gives plain data or a one-line refusal."""
    check_reader("torch", path, archive_with_wrong_directory(Random(seed)))


def test_rules_make_readable_and_refused_files(path):
    """Between 10 and 150 of 200 hostile files are read: the rules reach the code behind the first checks."""
    for kind in ("pickle", "torch"):
        read = sum(check_reader(kind, path, hostile_file(Random(seed), kind)) for seed in range(200))
        assert 10 <= read <= 150
    assert all(check_reader(kind, path, seed) for kind in ("pickle", "torch") for seed in SEEDS[kind])
    assert check_reader("torch", path, CHECKPOINT)


def test_rules_are_reproducible():
    """One seed always gives one file, so a file that breaks a reader can be made again."""
    for kind in ("pickle", "torch"):
        assert hostile_file(Random(7), kind) == hostile_file(Random(7), kind)
    assert mutated(Random(7), CHECKPOINT, SEEDS["torch"]) != mutated(Random(8), CHECKPOINT, SEEDS["torch"])


# -- Memory ------------------------------------------------------------------------------------------------------------

ROW = b"\x8c\x01a\x94"
BUILD = name("torch._utils._rebuild_tensor_v2") + b"\x94"
ARGUMENTS = tensor(storage("FloatStorage", "0", 6), 0, (1,) * 64, (1,) * 64)[len(BUILD) - 1 : -1] + b"\x94"
MEMORY_CASES = {  # opcodes done once, and opcodes repeated: the most memory per byte of pickle
    "empty sets": (b"", b"\x8f"),
    "empty lists": (b"", b"]"),
    "empty dicts": (b"", b"}"),
    "frozensets": (b"", b"(N\x91"),
    "lists of one": (b"", b"]Na"),
    "dicts of one": (b"", b"}NNs"),
    "tuples": (ROW, b"h\x00\x85"),
    "bytearrays": (b"", b"\x96" + bytes(8)),
    "wide characters": (b"", b"\x8c\x05\xf0\x9f\x91\x8da"),
    "memo": (ROW, b"\x94"),
    "namespaces": (name("argparse.Namespace") + b"\x94", b"h\x00)\x81"),
    "sets by name": (name("__builtin__.set") + b"\x94]\x85\x94", b"h\x00h\x01R"),
    "tensors of 64 dimensions": (BUILD + ARGUMENTS, b"h\x00h\x01R"),
}


def peak_memory(kind: str, path: Path, data: bytes) -> int:
    """Returns the most bytes that Python allocated while a reader tried a file."""
    tracemalloc.start()
    try:
        check_reader(kind, path, data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", MEMORY_CASES)
def test_memory_is_bounded_by_the_pickle(path, case):
    """Whatever is repeated, a byte of pickle takes at most 300 of memory; a torch.save pickle has at most 4 MB."""
    setup, repeated = MEMORY_CASES[case]
    body = b"(" + setup + repeated * (20_000 // len(repeated)) + b"t"
    baseline, total = (
        peak_memory("torch", path, write(path, b"(" + setup + rest + b"t", _0=bytes(24)).read_bytes())
        for rest in (b"", body[1:-1])
    )
    assert 2 * len(body) < total - baseline < 300 * len(body)


@pytest.mark.parametrize("opcode", [b"X\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8, b"\x8e" + b"\xff" * 8, b"\x8a\xff"])
def test_a_wrong_size_allocates_nothing(path, opcode):
    """A length of 4 GB or 2**64 bytes with ten bytes left in the file reads those ten."""
    assert peak_memory("pickle", path, program(opcode + b"x" * 10)) < 1 << 16


# -- The watch ---------------------------------------------------------------------------------------------------------


def test_a_thousand_files_break_no_rule(tmp_path):
    """With 1000 files under watch no code runs, nothing is imported, opened or written; their number is printed."""
    command = [sys.executable, str(HARNESS), "--only", "rules", "--inputs", "1000", "--seed", "1"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("1000 files: ")
    assert "pickle read" in run.stdout
    assert list(tmp_path.iterdir()) == []


BROKEN_READER = """
import sys
from tests.checkpoints.formats import fuzzing
fuzzing.READERS["pickle"] = lambda path: path.read_bytes()[10**6]
sys.argv[1:] = ["--only", "rules", "--inputs", "100", "--seed", "1"]
fuzzing.main()
"""


def test_a_file_that_breaks_a_reader_is_kept(tmp_path):
    """A reader that raises an unexpected error fails the run, which prints where the file is kept."""
    environment = {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", BROKEN_READER], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stdout.startswith("FAILED: pickle reader, IndexError")
    assert [str(file) for file in tmp_path.iterdir()] == [run.stdout.rsplit(" ", 1)[1].strip()]


FORBIDDEN_READERS = """
import os, pathlib, pickle, sys, socket, subprocess
from tests.checkpoints.formats.fuzzing import READERS, Violation, Watch

class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)

culprits = {
    "unpickles": lambda path: pickle.loads(path.read_bytes()),
    "writes": lambda path: path.write_bytes(b""),
    "writes beside": lambda path: path.with_name("beside").write_bytes(b""),
    "reads another": lambda path: pathlib.Path("/etc/passwd").read_bytes(),
    "removes": lambda path: path.unlink(),
    "imports": lambda path: __import__("imaplib"),
    "evaluates": lambda path: eval("1"),
    "starts": lambda path: subprocess.run(["true"]),
    "connects": lambda path: socket.socket().connect(("127.0.0.1", 9)),
    "makes an object": lambda path: Evil(),
    "loads": READERS["pickle"],
}
path = pathlib.Path("file").absolute()
path.write_bytes(pickle.dumps(Evil()))
watch = Watch()
for name, culprit in culprits.items():
    try:
        watch.attempt(culprit, path)
        print(name)
    except Violation:
        pass
"""


def test_the_watch_catches_forbidden_actions(tmp_path):
    """Readers that execute, write, import, start a process or connect raise Violation; only `load_pickle` does not."""
    run = subprocess.run(
        [sys.executable, "-c", FORBIDDEN_READERS],
        env={"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "loads\n"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "message",
    ["no file; remedy", "/f: no remedy", "/f: two\nlines; remedy", "/f: \x1b[31m; red", "/f: long; " + "x" * 999],
)
def test_check_message_rejects_bad_messages(message):
    """A message without path or remedy, of two lines, unprintable or too long is rejected; a good one passes."""
    fuzzing.check_message("/f: is empty; copy it again", Path("/f"))
    with pytest.raises(fuzzing.Violation):
        fuzzing.check_message(message, Path("/f"))


@pytest.mark.parametrize("value", [object(), [print], {1: {2: 1j}}, {3: np.zeros(2)}, (np.float32(1),), range(3)])
def test_check_value_rejects_non_plain_values(value):
    """Values that are not plain data, and writable arrays, are rejected at any depth; plain data passes."""
    fuzzing.check_value({"a": [(1, 2.5, None, b"", {"x"})]})
    with pytest.raises(fuzzing.Violation):
        fuzzing.check_value(value)


@pytest.mark.parametrize("value", [[True], [1.0], (1,), [[1]], [-1], "1", math.nan, {1: 0}])
def test_check_agreement_rejects_other_values_than_pickles(value):
    """A value that differs from `pickle`'s, if only in type, is rejected; an equal one or a failing `pickle` passes."""
    data = program(b"](K\x01e")
    fuzzing.check_agreement([1], data)
    fuzzing.check_agreement([1], data[:-1])
    with pytest.raises(fuzzing.Violation):
        fuzzing.check_agreement(value, data)
