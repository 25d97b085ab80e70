"""The plain pickle reader reads what `pickle` reads, and refuses all else in one line, without running anything."""

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
plain_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.booleans() | st.none(), inner, max_size=5)
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=plain_values, protocol=st.integers(2, 5))
@example(value=[{"id": str(i), "text": "\ud800" + "x" * 70_000 * (i == 7)} for i in range(2500)], protocol=4)
@example(value=[{"id": str(i), "text": "x" * i} for i in range(1200)], protocol=2)
def test_plain_data_is_read_as_by_pickle(path, value, protocol):
    """Plain data of every protocol is read as by `pickle` itself, types included."""
    path.write_bytes(pickle.dumps(value, protocol))
    loaded = load_pickle(path)
    assert loaded == value
    assert repr(loaded) == repr(value)


@pytest.mark.parametrize(
    "value", [b"", b"x" * 300, [{1, 2}, frozenset({"a"}), set()], bytearray(b"ab"), {b"k": math.inf}]
)
def test_opcodes_of_later_protocols_are_read(path, value):
    """Bytes, bytearrays and sets have opcodes of their own; before protocol 5, `pickle` calls functions instead."""
    path.write_bytes(pickle.dumps(value, 5))
    assert load_pickle(path) == value
    assert type(load_pickle(path)) is type(value)


def test_shared_values_stay_shared(path):
    """A list that occurs twice is read as one object, as by `pickle`."""
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
def test_a_function_call_is_refused_by_name_and_not_run(tmp_path, path, protocol):
    """The message names `os.system` (GLOBAL or STACK_GLOBAL), which does not run; `pickle` itself would run it."""
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
        (b"]" + b"}b", "list"),  # BUILD on an object without attributes
    ],
)
def test_globals_and_unknown_opcodes_are_refused_by_name(path, body, named):
    """Every class and function, and every opcode that creates one, is refused by name."""
    path.write_bytes(program(body))
    assert named in refusal(load_pickle, path)


@pytest.mark.parametrize(
    "body", [name("collections.OrderedDict") + b")R", name("torch.float32"), storage("FloatStorage", "0", 1)]
)
def test_torch_globals_are_refused_in_a_plain_pickle(path, body):
    """`load_pickle` refuses globals that `load_torch` allows."""
    path.write_bytes(program(body))
    assert "which is not among the names allowed" in refusal(load_pickle, path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"Nr\xff\xff\xff\xff", "memo number 4294967295"),
        (b"N\x94h\x07", "damaged"),
        (b"]" * 101 + b"a" * 100, None),
        (b"]" * 102 + b"a" * 101, "nests values"),
        (b"N" + b"\x85" * 100_000, "nests values"),
        (b"(" * 1000 + b"t" * 1000, "nests values"),
        (b"]\x94h\x00a", "nests values"),  # a list that contains itself
        (b"(N\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(16)) + b"t", None),  # values occur 2**18 times
        (b"(N\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(40)) + b"t", "too many places"),
        (b"](" + b"]" * 20_000 + b"e\x94" + b"h\x00\x86" * 98, "too many places"),  # a long list on each level
        (
            b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(20_000)) + b"u",
            "numbers as keys",
        ),  # equal hashes
        (b"\x8f(" + b"G\0\0\0\0\0\0\0\0" * 10_000 + b"\x90", None),
        (b"\x8f(" + b"G\0\0\0\0\0\0\0\0" * 10_001 + b"\x90", "numbers as keys"),
        (b"}" + text("x" * 1000) + b"Ns", None),
        (b"}" + text("x" * 1001) + b"Ns", "a key of more than 1000"),  # slow to compare with an equal key
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
        (b"K\x05\x95" + b"\xff" * 8, None),  # the length of a frame is a hint, which is ignored
        (b"]]\x93", "damaged"),
        (b"N)R", "damaged"),
    ],
)
def test_a_hostile_pickle_is_refused(path, body, message):
    """Huge memo indices, deep nesting, slow keys, wrong counts and types are refused in one line (None: is read)."""
    path.write_bytes(program(body))
    if message is None:
        load_pickle(path)
    else:
        assert message in refusal(load_pickle, path)


def test_every_truncation_is_refused(path):
    """A file cut short anywhere is refused in one line."""
    whole = pickle.dumps([{"id": "7", "title": "t", "text": "x" * 300}], pickle.HIGHEST_PROTOCOL)
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert ("is empty" if end == 0 else "") in refusal(load_pickle, path)
    path.write_bytes(whole)
    assert load_pickle(path)[0]["id"] == "7"


def test_files_of_other_formats_are_refused(path, tmp_path, monkeypatch):
    """A folder, a torch.save file old or new, JSON and too large files are refused with a remedy."""
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
