"""Files that lie in every way that we could think of, and the watch that `make fuzz` keeps over the readers."""

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
from tests.checkpoints.formats.hostile import CHECKPOINT, SEEDS, changed, composed, hostile_file, lying_archive
from tests.checkpoints.formats.pickles import name, program, storage, tensor, write

ROOT = Path(__file__).parents[3]
HARNESS = Path(fuzzing.__file__)

some = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def tries(kind: str, path: Path, data: bytes) -> bool:
    """Plain data, as Python's own reader makes it if it can, or the one line; never anything else."""
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


@some
@given(rng=st.randoms(use_true_random=False))
def test_composed_pickles(path, rng):
    """Pickles that mean something, with a lie or two: data, the same as `pickle` gives, or one line."""
    tries("pickle", path, composed(rng, named=rng.choice([0, 0, 0.1])))


@some
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["pickle", "torch"]))
def test_hostile_files(path, seed, kind):
    """Files composed by rules, and honest ones with bits, sizes and parts changed: data or one line."""
    tries(kind, path, hostile_file(Random(seed), kind))


@some
@given(seed=st.integers(0, 2**32))
def test_archives_that_lie(path, seed):
    """A zip directory with one or two fields wrong: data or one line."""
    tries("torch", path, lying_archive(Random(seed)))


def test_the_rules_make_both_kinds_of_file(path):
    """Neither is every hostile file refused at once nor every one read: the rules reach what lies behind."""
    for kind in ("pickle", "torch"):
        read = sum(tries(kind, path, hostile_file(Random(seed), kind)) for seed in range(200))
        assert 10 <= read <= 150
    assert all(tries(kind, path, seed) for kind in ("pickle", "torch") for seed in SEEDS[kind])
    assert tries("torch", path, CHECKPOINT)


def test_rules_are_reproducible():
    """One seed, one file: a file that breaks a reader can be made again."""
    for kind in ("pickle", "torch"):
        assert hostile_file(Random(7), kind) == hostile_file(Random(7), kind)
    assert changed(Random(7), CHECKPOINT, SEEDS["torch"]) != changed(Random(8), CHECKPOINT, SEEDS["torch"])


# -- Memory ------------------------------------------------------------------------------------------------------------

ROW = b"\x8c\x01a\x94"
BUILD = name("torch._utils._rebuild_tensor_v2") + b"\x94"
ARGUMENTS = tensor(storage("FloatStorage", "0", 6), 0, (1,) * 64, (1,) * 64)[len(BUILD) - 1 : -1] + b"\x94"
GROWING = {  # what is done once, and what is done over and over: the most memory for the fewest bytes
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


def peak(kind: str, path: Path, data: bytes) -> int:
    """Bytes that Python held at most while it tried a file."""
    tracemalloc.start()
    try:
        tries(kind, path, data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", GROWING)
def test_memory_is_bounded_by_the_pickle(path, case):
    """Whatever is repeated, a byte of pickle takes at most 300 of memory; and the pickle of torch has at most 4 MB."""
    once, over = GROWING[case]
    body = b"(" + once + over * (20_000 // len(over)) + b"t"
    few, many = (
        peak("torch", path, write(path, b"(" + once + more + b"t", _0=bytes(24)).read_bytes())
        for more in (b"", body[1:-1])
    )
    assert 2 * len(body) < many - few < 300 * len(body)


@pytest.mark.parametrize("opcode", [b"X\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8, b"\x8e" + b"\xff" * 8, b"\x8a\xff"])
def test_a_size_that_lies_allocates_nothing(path, opcode):
    """Four gigabytes or 2**64 bytes announced, ten there: what is there is taken."""
    assert peak("pickle", path, program(opcode + b"x" * 10)) < 1 << 16


# -- The watch ---------------------------------------------------------------------------------------------------------


def test_the_harness(tmp_path):
    """A thousand files under watch: no code runs, nothing is imported, opened or written, and the count is told."""
    command = [sys.executable, str(HARNESS), "--only", "rules", "--inputs", "1000", "--seed", "1"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("1000 files: ")
    assert "pickle read" in run.stdout
    assert list(tmp_path.iterdir()) == []


BROKEN = """
import sys
from tests.checkpoints.formats import fuzzing
fuzzing.READERS["pickle"] = lambda path: path.read_bytes()[10**6]
sys.argv[1:] = ["--only", "rules", "--inputs", "100", "--seed", "1"]
fuzzing.main()
"""


def test_a_file_that_breaks_a_reader_is_kept(tmp_path):
    """A reader that raises another error fails the run, which says where the file is."""
    environment = {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", BROKEN], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stdout.startswith("FAILED: pickle reader, IndexError")
    assert [str(file) for file in tmp_path.iterdir()] == [run.stdout.rsplit(" ", 1)[1].strip()]


CULPRITS = """
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


def test_the_watch_sees_culprits(tmp_path):
    """Readers that run, write, import, start or connect are caught in the act; of all these, only ours is not."""
    run = subprocess.run(
        [sys.executable, "-c", CULPRITS],
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
def test_bad_messages_are_found(message):
    """A line without the file or the remedy, two lines, an unprintable or endless one do not pass; a good one does."""
    fuzzing.check_message("/f: is empty; copy it again", Path("/f"))
    with pytest.raises(fuzzing.Violation):
        fuzzing.check_message(message, Path("/f"))


@pytest.mark.parametrize("value", [object(), [print], {1: {2: 1j}}, {3: np.zeros(2)}, (np.float32(1),), range(3)])
def test_bad_values_are_found(value):
    """What is no plain data, or memory that could be written to, does not pass however deep it is; plain data does."""
    fuzzing.check_value({"a": [(1, 2.5, None, b"", {"x"})]})
    with pytest.raises(fuzzing.Violation):
        fuzzing.check_value(value)


@pytest.mark.parametrize("value", [[True], [1.0], (1,), [[1]], [-1], "1", math.nan, {1: 0}])
def test_other_values_than_pickle_makes_are_found(value):
    """What differs from `pickle`, if only in type, does not pass; the same passes, and so does what pickle refuses."""
    data = program(b"](K\x01e")
    fuzzing.check_agreement([1], data)
    fuzzing.check_agreement([1], data[:-1])
    with pytest.raises(fuzzing.Violation):
        fuzzing.check_agreement(value, data)
