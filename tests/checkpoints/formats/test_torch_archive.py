"""The zip around a PyTorch file: where a lie about names, sizes and places is refused, and none is followed."""

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

F, G = (tensor(storage("FloatStorage", key, 6), 0, (6,), (1,)) for key in "01")
SIX = np.arange(6, dtype=np.float32)


def lying(path: Path, lie: Callable[[list[zipfile.ZipInfo]], None]) -> Path:
    """An honest file, but for its directory: `lie` changes it before it is written, as zip64 where needed."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", program(tuple_of(F, G)))
        archive.writestr("model/data/0", SIX.tobytes())
        archive.writestr("model/data/1", (SIX + 1).tobytes())
        lie(archive.filelist)
    return path


def put(**fields: int | str) -> Callable[[list[zipfile.ZipInfo]], None]:
    """The lie that the second of three members is otherwise."""
    return lambda members: [setattr(members[1], field, value) for field, value in fields.items()] and None


def test_an_honest_directory_is_read(path):
    """Told nothing but the truth, in any order, both storages are read."""
    for truth in (lambda members: None, list.reverse):
        first, second = load_torch(lying(path, truth))
        np.testing.assert_array_equal(first, SIX)
        np.testing.assert_array_equal(second, SIX + 1)


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (put(header_offset=2**40), "not where the zip directory says"),  # more than 32 bits: zip64
        (put(header_offset=2**63 - 1), "not where the zip directory says"),
        (put(header_offset=1), "not where the zip directory says"),
        (put(header_offset=0), "not where the zip directory says"),  # the header of data.pkl: another name
        (put(filename="model/data/7"), "not where the zip directory says"),
        (put(file_size=2**40, compress_size=2**40), "reaches into what follows"),
        (put(file_size=25, compress_size=25), "reaches into what follows"),
        (put(file_size=2**40), "compressed or encrypted"),
        (put(compress_size=1), "compressed or encrypted"),
        (put(compress_type=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
        (put(flag_bits=1), "compressed or encrypted"),
        (put(file_size=20, compress_size=20), "has 20 bytes for storage '0' of 6"),
        (lambda members: members.append(members[1]), "two members 'data/0'"),
        (lambda members: members.pop(1), "has no bytes for storage '0'"),
        (lambda members: members.pop(0), "0 data.pkl"),
    ],
)
def test_a_directory_that_lies_is_refused(path, lie, said):
    """Places, sizes and names that are not so, with 32 bits or 64, and members that are there twice or not at all."""
    assert said in refusal(load_torch, lying(path, lie))


def test_storages_that_overlap_are_refused(path):
    """Two members over the same bytes, each with a header of its own: the first reaches over the second."""
    inner = struct.pack("<4s22xHH", b"PK\x03\x04", 12, 0) + b"model/data/1"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", program(tuple_of(F, G)))
        archive.writestr("model/data/0", inner + SIX.tobytes())
        archive.writestr("model/data/1", SIX.tobytes())
        outer, other = archive.filelist[1:]
        other.header_offset = outer.header_offset + 42
    assert "'data/0' reaches into what follows" in refusal(load_torch, path)


def test_other_archives_are_refused(path):
    """Compressed, duplicated or foreign members, big-endian, TorchScript: each has its own message."""
    assert "compressed" in refusal(load_torch, write(path, b"N", zipfile.ZIP_DEFLATED))
    assert "little-endian" in refusal(load_torch, write(path, b"N", byteorder=b"big"))
    assert "TorchScript" in refusal(load_torch, write(path, b"N", **{"constants.pkl": b""}))
    assert "TorchScript" in refusal(load_torch, write(path, b"N", **{"code/a.py": b""}))
    assert "2 data.pkl" in refusal(load_torch, write(path, b"N", **{"x/data.pkl": b""}))
    with pytest.warns(UserWarning, match="Duplicate"):
        write(path, b"N", version=b"4")
    assert "two members 'version'" in refusal(load_torch, path)
    write(path, F)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("data/0", SIX.tobytes())  # beside the folder, not in it
    assert "'data/0' is outside of 'model/'" in refusal(load_torch, path)


def test_nothing_is_written(path, tmp_path):
    """Names that lead out of a folder lead nowhere: nothing is extracted, and a storage is looked up, not opened."""
    names = {"../../above": b"x", "../model.pth.tar": b"x", "data/../../x": b"y" * 24}
    assert load_torch(write(path, b"N", **names)) is None
    upward = tensor(storage("FloatStorage", "../../x", 6), 0, (6,), (1,))
    assert load_torch(write(path, upward, **names)).tobytes() == b"y" * 24
    outward = tensor(storage("FloatStorage", "../../model.pth.tar", 6), 0, (6,), (1,))
    assert "no bytes" in refusal(load_torch, write(path, outward, **names))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("member", ["_0", "byteorder"])
def test_what_is_not_needed_is_not_read(path, member):
    """Neither eight megabytes of a storage nor a `byteorder` that is as long take memory."""
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


def test_a_huge_directory_is_not_read(path, monkeypatch):
    """How long the list of members may be is asked before it is read; one byte less is too short for this one."""
    write(path, b"N")
    size = len(path.read_bytes()) - path.read_bytes().index(b"PK\x01\x02") - 22
    monkeypatch.setattr(torch_reader, "MAX_DIRECTORY", size)
    assert load_torch(path) is None
    monkeypatch.setattr(torch_reader, "MAX_DIRECTORY", size - 1)
    assert f"in {size} bytes, more than {size - 1}" in refusal(load_torch, path)
