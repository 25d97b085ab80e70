"""The zip of a torch.save file: wrong names, sizes and offsets are refused, and never followed."""

import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.checkpoints.formats import torch_reader
from atlas_jax.checkpoints.formats.torch_reader import load_torch
from tests.checkpoints.formats.pickles import program, refusal, storage, tensor, tuple_of, write

FIRST, SECOND = (tensor(storage("FloatStorage", key, 6), 0, (6,), (1,)) for key in "01")
SIX = np.arange(6, dtype=np.float32)


def write_with_directory(path: Path, change: Callable[[list[zipfile.ZipInfo]], None]) -> Path:
    """Writes a valid file whose zip directory `change` has altered; it is written as zip64 where needed."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", program(tuple_of(FIRST, SECOND)))
        archive.writestr("model/data/0", SIX.tobytes())
        archive.writestr("model/data/1", (SIX + 1).tobytes())
        change(archive.filelist)
    return path


def set_fields(**fields: int | str) -> Callable[[list[zipfile.ZipInfo]], None]:
    """Returns a change that sets fields of the second of the three members."""
    return lambda members: [setattr(members[1], field, value) for field, value in fields.items()] and None


def test_a_correct_directory_is_read_in_any_order(path):
    """Both storages are read from a correct directory, whatever the order of its members."""
    for change in (lambda members: None, list.reverse):
        first, second = load_torch(write_with_directory(path, change))
        np.testing.assert_array_equal(first, SIX)
        np.testing.assert_array_equal(second, SIX + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_fields(header_offset=2**40), "not where the zip directory says"),  # more than 32 bits: zip64
        (set_fields(header_offset=2**63 - 1), "not where the zip directory says"),
        (set_fields(header_offset=1), "not where the zip directory says"),
        (
            set_fields(header_offset=0),
            "not where the zip directory says",
        ),  # the header of data.pkl, which has another name
        (set_fields(filename="model/data/7"), "not where the zip directory says"),
        (set_fields(file_size=2**40, compress_size=2**40), "reaches into what follows"),
        (set_fields(file_size=25, compress_size=25), "reaches into what follows"),
        (set_fields(file_size=2**40), "compressed or encrypted"),
        (set_fields(compress_size=1), "compressed or encrypted"),
        (set_fields(compress_type=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
        (set_fields(flag_bits=1), "compressed or encrypted"),
        (set_fields(file_size=20, compress_size=20), "has 20 bytes for storage '0' of 6"),
        (lambda members: members.append(members[1]), "two members 'data/0'"),
        (lambda members: members.pop(1), "has no bytes for storage '0'"),
        (lambda members: members.pop(0), "0 data.pkl"),
    ],
)
def test_a_wrong_directory_is_refused(path, change, message):
    """Wrong offsets, sizes and names, with 32 bits or 64, and duplicate or missing members are refused."""
    assert message in refusal(load_torch, write_with_directory(path, change))


def test_overlapping_storages_are_refused(path):
    """Two members over the same bytes, each with a local header of its own, are refused."""
    inner = struct.pack("<4s22xHH", b"PK\x03\x04", 12, 0) + b"model/data/1"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", program(tuple_of(FIRST, SECOND)))
        archive.writestr("model/data/0", inner + SIX.tobytes())
        archive.writestr("model/data/1", SIX.tobytes())
        outer, other = archive.filelist[1:]
        other.header_offset = outer.header_offset + 42
    assert "'data/0' reaches into what follows" in refusal(load_torch, path)


def test_invalid_archives_are_refused(path):
    """Compressed, duplicate or foreign members, big-endian files and TorchScript are refused, each with its message."""
    assert "compressed" in refusal(load_torch, write(path, b"N", zipfile.ZIP_DEFLATED))
    assert "little-endian" in refusal(load_torch, write(path, b"N", byteorder=b"big"))
    assert "TorchScript" in refusal(load_torch, write(path, b"N", **{"constants.pkl": b""}))
    assert "TorchScript" in refusal(load_torch, write(path, b"N", **{"code/a.py": b""}))
    assert "2 data.pkl" in refusal(load_torch, write(path, b"N", **{"x/data.pkl": b""}))
    with pytest.warns(UserWarning, match="Duplicate"):
        write(path, b"N", version=b"4")
    assert "two members 'version'" in refusal(load_torch, path)
    write(path, FIRST)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("data/0", SIX.tobytes())  # outside of the folder `model/`
    assert "'data/0' is outside of 'model/'" in refusal(load_torch, path)


def test_nothing_is_extracted(path, tmp_path):
    """Member names with `..` write nothing: nothing is extracted, and a storage's name is a key, not a path."""
    names = {"../../above": b"x", "../model.pth.tar": b"x", "data/../../x": b"y" * 24}
    assert load_torch(write(path, b"N", **names)) is None
    upward = tensor(storage("FloatStorage", "../../x", 6), 0, (6,), (1,))
    assert load_torch(write(path, upward, **names)).tobytes() == b"y" * 24
    outward = tensor(storage("FloatStorage", "../../model.pth.tar", 6), 0, (6,), (1,))
    assert "no bytes" in refusal(load_torch, write(path, outward, **names))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("member", ["_0", "byteorder"])
def test_unused_members_are_not_read(path, member):
    """Neither an unused storage of 8 MB nor a `byteorder` of 8 MB takes memory."""
    write(path, b"N", **{member: b"little" + bytes(8 << 20)})
    tracemalloc.start()
    try:
        if member == "_0":
            assert load_torch(path) is None
        else:
            assert "little-endian" in refusal(load_torch, path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_too_large_directory_is_not_read(path, monkeypatch):
    """The size of the zip directory is checked before it is read; a limit one byte below it refuses the file."""
    write(path, b"N")
    size = len(path.read_bytes()) - path.read_bytes().index(b"PK\x01\x02") - 22
    monkeypatch.setattr(torch_reader, "MAX_DIRECTORY", size)
    assert load_torch(path) is None
    monkeypatch.setattr(torch_reader, "MAX_DIRECTORY", size - 1)
    assert f"in {size} bytes, more than {size - 1}" in refusal(load_torch, path)
