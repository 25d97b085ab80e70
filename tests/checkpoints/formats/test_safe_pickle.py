"""The reader of plain pickles: what `pickle` reads, and of any other file one clear line and nothing run."""

import json
import math
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from atlas_jax.checkpoints.formats import safe_pickle
from atlas_jax.checkpoints.formats.safe_pickle import load_pickle
from atlas_jax.checkpoints.formats.torch_reader import load_torch
from tests.checkpoints.formats.pickles import (
    MAGIC,
    name,
    number,
    program,
    refusal,
    storage,
    text,
    tuple_of,
    write,
)

scalars = (
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False) | st.text(max_size=300)
)
plain = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.booleans() | st.none(), inner, max_size=5)
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=plain, protocol=st.integers(2, 5))
@example(value=[{"id": str(i), "text": "\ud800" + "x" * 70_000 * (i == 7)} for i in range(2500)], protocol=4)
@example(value=[{"id": str(i), "text": "x" * i} for i in range(1200)], protocol=2)
def test_a_pickle_equals_pickle(path, value, protocol):
    """Plain data comes back as pickle itself would give it, types included, in every protocol."""
    path.write_bytes(pickle.dumps(value, protocol))
    got = load_pickle(path)
    assert got == value
    assert repr(got) == repr(value)


@pytest.mark.parametrize(
    "value", [b"", b"x" * 300, [{1, 2}, frozenset({"a"}), set()], bytearray(b"ab"), {b"k": math.inf}]
)
def test_the_opcodes_of_later_protocols(path, value):
    """Bytes, bytearrays and sets have opcodes of their own; before protocol 5, pickle names functions instead."""
    path.write_bytes(pickle.dumps(value, 5))
    assert load_pickle(path) == value
    assert type(load_pickle(path)) is type(value)


def test_shared_values_stay_shared(path):
    """One list in two places is one list again, as in pickle."""
    shared: list[int] = [1]
    path.write_bytes(pickle.dumps([shared, shared]))
    first, second = load_pickle(path)
    assert first is second


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_program_is_refused_by_name_and_not_run(tmp_path, path, protocol):
    """`os.system` is named in the refusal (GLOBAL or STACK_GLOBAL) and has not run; pickle itself would run it."""
    marker = tmp_path / "ran"
    evil = pickle.dumps(Evil(marker), protocol)
    path.write_bytes(evil)
    assert "'posix.system'" in refusal(load_pickle, path)
    assert "'posix.system'" in refusal(load_torch, write(path, evil[2:-1]))
    assert not marker.exists()
    pickle.loads(evil)
    assert marker.exists()


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (name("os.system") + tuple_of(text("true")) + b"R", "os.system"),
        (b"\x8c\x02os\x8c\x06system\x93", "os.system"),
        (name("builtins.eval") + tuple_of(text("1")) + b"\x81", "builtins.eval"),
        (name("pathlib.PosixPath") + b")R", "pathlib.PosixPath"),
        (name("os.sys\u2028tem"), r"os.sys\u2028tem"),
        (b"(ios\nsystem\n", "INST"),
        (b"\x82\x01", "EXT1"),
        (b"\x83\x01\x00", "EXT2"),
        (b"\x84\x01\x00\x00\x00", "EXT4"),
        (b"Pid\n", "PERSID"),
        (b"\xff", "0xff"),
        (b"]" + b"}b", "list"),  # BUILD on what takes no attributes
    ],
)
def test_what_is_not_plain_is_refused_by_name(path, body, named):
    """Every class and function, and every opcode that makes one, is refused, and the message says which."""
    path.write_bytes(program(body))
    assert named in refusal(load_pickle, path)


@pytest.mark.parametrize(
    "body", [name("collections.OrderedDict") + b")R", name("torch.float32"), storage("FloatStorage", "0", 1)]
)
def test_a_plain_pickle_may_name_nothing(path, body):
    """What load_torch allows, load_pickle does not."""
    path.write_bytes(program(body))
    assert "which is not among the names allowed" in refusal(load_pickle, path)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"Nr\xff\xff\xff\xff", "memo number 4294967295"),
        (b"N\x94h\x07", "damaged"),
        (b"]" * 101 + b"a" * 100, None),
        (b"]" * 102 + b"a" * 101, "nests values"),
        (b"N" + b"\x85" * 100_000, "nests values"),
        (b"(" * 1000 + b"t" * 1000, "nests values"),
        (b"]\x94h\x00a", "nests values"),  # a list in itself
        (b"(N\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(16)) + b"t", None),  # 2**18 places
        (b"(N\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(40)) + b"t", "too many places"),
        (b"](" + b"]" * 20_000 + b"e\x94" + b"h\x00\x86" * 98, "too many places"),  # a long list on each level
        (b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(20_000)) + b"u", "numbers as keys"),  # one hash
        (b"\x8f(" + b"G\0\0\0\0\0\0\0\0" * 10_000 + b"\x90", None),
        (b"\x8f(" + b"G\0\0\0\0\0\0\0\0" * 10_001 + b"\x90", "numbers as keys"),
        (b"}" + text("x" * 1000) + b"Ns", None),
        (b"}" + text("x" * 1001) + b"Ns", "a key of more than 1000"),  # long to compare with an equal one
        (b"(C\x01a" + b"B\xe9\x03\0\0" + b"x" * 1001 + b"\x91", "a key of more than 1000"),
        (b"}" + b"N" + b"\x85" * 100_000 + b"Ns", "tuple as the key"),
        (b"\x8f(]\x90", "list as the key"),
        (b"}(NNNu", "damaged"),
        (b"N(Ne", "damaged"),
        (b"](NNu", "damaged"),
        (b"a", "damaged"),
        (b"\x87", "damaged"),
        (b"NN", "too early"),
        (b"(N", "too early"),
        (b"N.N", "too early"),
        (b"\x8d" + b"\xff" * 8, "cut short"),
        (b"\x8a\xff", "cut short"),
        (b"\x8c\x02\xff\xfe", "damaged"),
        (b"K\x05\x95" + b"\xff" * 8, None),  # the length of a frame is a hint, not used
        (b"]]\x93", "damaged"),
        (b"N)R", "damaged"),
    ],
)
def test_a_hostile_pickle_is_refused(path, body, said):
    """Huge memo numbers, endless nesting, costly keys, wrong counts and types end in one line (None: read)."""
    path.write_bytes(program(body))
    if said is None:
        load_pickle(path)
    else:
        assert said in refusal(load_pickle, path)


def test_every_truncation_is_refused(path):
    """A copy that broke off anywhere is refused in one line."""
    whole = pickle.dumps([{"id": "7", "title": "t", "text": "x" * 300}], pickle.HIGHEST_PROTOCOL)
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert ("is empty" if end == 0 else "") in refusal(load_pickle, path)
    path.write_bytes(whole)
    assert load_pickle(path)[0]["id"] == "7"


def test_other_files_are_refused(path, tmp_path, monkeypatch):
    """A folder, a torch file old or new, JSON, too much: the remedy is in the line."""
    refusal(load_pickle, tmp_path)
    refusal(load_pickle, tmp_path / "missing")
    path.write_bytes(pickle.dumps(MAGIC, 2) + pickle.dumps(1001, 2))
    assert "torch.save" in refusal(load_pickle, path)
    assert "torch.save" in refusal(load_pickle, write(path, b"N"))
    path.write_text(json.dumps({"id": 1}))
    assert "not a pickle of protocol 2 to 5" in refusal(load_pickle, path)
    path.write_bytes(pickle.dumps([1], 4))
    monkeypatch.setattr(safe_pickle, "MAX_PLAIN_PICKLE", 10)
    assert "more than 10" in refusal(load_pickle, path)
