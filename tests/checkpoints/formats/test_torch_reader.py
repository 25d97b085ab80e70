"""The torch.save reader reads valid files and refuses all others in one line, without running anything in them.

Torch is not installed: the files are composed by hand, opcode by opcode, as torch.save writes them.
"""

import gc
import json
import mmap
import pickle
import struct
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from atlas_jax.checkpoints.formats import torch_reader
from atlas_jax.checkpoints.formats.safe_pickle import load_pickle
from atlas_jax.checkpoints.formats.torch_reader import load_torch
from atlas_jax.checkpoints.formats.torch_writer import write_tensor
from tests.checkpoints.formats.pickles import MAGIC, call, name, number, refusal, storage, tensor, text, tuple_of, write

STORAGE_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


# -- Valid files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORAGE_DTYPES)
def test_each_storage_type_gives_its_dtype(path, kind):
    """Each storage type gives a tensor of its dtype with its values, as a read-only view of the file."""
    values = np.arange(6).astype(STORAGE_DTYPES[kind])
    value = load_torch(write(path, tensor(storage(kind, "0", 6), 0, (2, 3), (3, 1)), _0=values.tobytes()))
    assert value.dtype == STORAGE_DTYPES[kind]
    assert not value.flags.writeable
    assert not value.flags.owndata
    np.testing.assert_array_equal(value, values.reshape(2, 3))


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "float32", "bfloat16"])
def test_an_untyped_storage_takes_the_dtype_of_its_tensor(path, dtype):
    """In newer files a storage is untyped and counted in bytes, and the tensor names its dtype."""
    values = np.arange(4).astype(torch_reader.TORCH_DTYPES[f"torch.{dtype}"])
    storage_id = storage("storage.UntypedStorage", "0", values.nbytes)
    value = load_torch(write(path, tensor(storage_id, 1, (3,), (1,), name(f"torch.{dtype}"), v=3), _0=values.tobytes()))
    assert value.dtype == values.dtype
    np.testing.assert_array_equal(value, values[1:])


def test_tensors_of_one_storage_share_memory(path):
    """Offset and strides mean what they mean in torch; tensors share memory exactly if they share a storage."""
    values = np.arange(24, dtype=np.float32)
    storage_id, other_storage_id = storage("FloatStorage", "0", 24), storage("FloatStorage", "1", 24)
    body = tuple_of(
        tensor(storage_id, 0, (4, 6), (6, 1)),
        tensor(storage_id, 7, (5, 3), (1, 6)),  # x[1:, 1:].T
        tensor(storage_id, 23, (), ()),
        tensor(storage_id, 3, (2, 4), (0, 1)),  # expanded
        tensor(storage_id, 24, (0, 3), (3, 1)),
        tensor(other_storage_id, 0, (24,), (1,)),
        call("torch._utils._rebuild_parameter", tensor(storage_id, 0, (1, 2), (999, 1)), b"\x88", b"N"),
    )
    value = load_torch(write(path, body, _0=values.tobytes(), _1=values.tobytes()))
    x = values.reshape(4, 6)
    expected = (x, x[1:, 1:].T, x[3, 5], np.stack([values[3:7]] * 2), np.empty((0, 3)), values, x[:1, :2])
    for array, expected_array in zip(value, expected, strict=True):
        assert array.shape == expected_array.shape
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, expected_array)
    assert np.shares_memory(value[0], value[1])
    assert not np.shares_memory(value[0], value[5])


def test_containers_become_plain_python(path):
    """Namespace, OrderedDict, defaultdict, set, bytes of protocol 2, Size, dtype and device become plain Python."""
    build = b"}" + text("lr") + b"G" + struct.pack(">d", 0.5) + b"sb"
    body = tuple_of(
        name("argparse.Namespace") + b")\x81" + build,
        call("collections.OrderedDict") + text("w") + b"K\x01s" + b"}" + text("_metadata") + b"}sb",
        call("collections.defaultdict", name("__builtin__.list")) + b"K\x05]s",
        call("__builtin__.set", b"](K\x01K\x02e"),
        call("_codecs.encode", text("a\u00ff"), text("latin1")),
        call("torch.Size", tuple_of(b"K\x02", b"K\x03")),
        name("torch.bfloat16"),
        call("torch.device", text("cuda"), b"K\x01"),
    )
    value = load_torch(write(path, body))
    assert value == ({"lr": 0.5}, {"w": 1}, {5: []}, {1, 2}, b"a\xff", (2, 3), "torch.bfloat16", "cuda:1")
    assert [type(item) for item in value[:3]] == [dict] * 3


def test_a_file_stays_mapped_only_while_its_tensors_live(tmp_path):
    """Deleting the last tensor unmaps the file at once, without the garbage collector."""
    write_tensor(tmp_path / "x.pt", np.arange(6, dtype=np.float32))
    gc.disable()
    try:
        array = load_torch(tmp_path / "x.pt")
        mapped = weakref.ref(array.base)
        assert isinstance(mapped(), mmap.mmap)
        del array
        assert mapped() is None
    finally:
        gc.enable()


def test_a_reference_checkpoint_is_read(golden):
    """The reference's own checkpoint has options, step and finite weights, and tied weights share memory."""
    value = load_torch(golden / "checkpoint_initial" / "model.pth.tar")
    assert type(value) is dict
    assert type(value["opt"]) is dict
    assert value["step"] == 0
    assert value["opt"]["n_context"] == 5
    arrays = value["model"].values()
    assert len(arrays) == 131
    assert {array.dtype.name for array in arrays} == {"float32", "int64"}
    assert all(np.isfinite(array).all() and not array.flags.writeable for array in arrays)
    shared, tied = value["model"]["reader.encoder.embed_tokens.weight"], value["model"]["reader.shared.weight"]
    assert shared.shape == (2048, 64)
    assert np.shares_memory(shared, tied)


def test_a_reference_index_is_read(golden):
    """The reference's own index has finite float16 vectors as columns, and as many passages."""
    embeddings = load_torch(golden / "index_1shard" / "embeddings.0.pt")
    passages = load_pickle(golden / "index_1shard" / "passages.0.pt")
    assert embeddings.dtype == np.float16
    assert embeddings.shape == (48, len(passages))
    assert np.isfinite(embeddings).all()
    assert passages == pickle.loads((golden / "index_1shard" / "passages.0.pt").read_bytes())
    assert set(passages[0]) >= {"id", "title", "text"}


# -- Refused files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (tensor(storage("FloatStorage", "0", 1), 0, (1,), (1,), b"}" + text("neg") + b"\x88s"), "resolve_neg"),
        (name("os.system") + tuple_of(text("true")) + b"R", "os.system"),
        (name("torch._utils._rebuild_sparse_tensor") + b")R", "torch._utils._rebuild_sparse_tensor"),
        (b"(" + name("argparse.Namespace") + b"o", "OBJ"),
        (name("argparse.Namespace") + b")}\x92", "NEWOBJ_EX"),
        (name("argparse.Namespace"), "argparse.Namespace"),  # the class itself as a value
        (storage("FloatStorage", "0", 1), "_Storage"),
        (b"]" + b"}b", "list"),
    ],
)
def test_unexpected_globals_and_opcodes_are_refused_by_name(path, body, named):
    """Globals and opcodes that a checkpoint does not need, and classes left as values, are refused by name."""
    assert named in refusal(load_torch, write(path, body, _0=b"\0" * 4))


STORAGE = storage("FloatStorage", "0", 6)


@pytest.mark.parametrize(
    "body",
    [
        storage("FloatStorage", "0", 7),  # longer than its member
        storage("FloatStorage", "0", 2**100),
        storage("FloatStorage", "0", -1),
        tensor(storage("FloatStorage", "1", -1), 0, (0,), (1,)),  # no such member, whose size is -1 for the reader
        storage("DoubleStorage", "0", 6),
        storage("FloatStorage", "1", 6),  # no such member
        storage("FloatStorage", "../../etc/passwd", 6),
        tuple_of(text("module"), text("x")) + b"Q",
        text("storage") + b"Q",
        tensor(STORAGE, 0, (7,), (1,)),
        tensor(STORAGE, 1, (2, 3), (3, 1)),
        tensor(STORAGE, 0, (2, 3), (4, 1)),
        tensor(STORAGE, -1, (2,), (1,)),
        tensor(STORAGE, 5, (6,), (-1,)),
        tensor(STORAGE, 0, (-2, -3), (3, 1)),
        tensor(STORAGE, 0, (2, 3), (3,)),
        tensor(STORAGE, 0, (10**9,), (0,)),  # one value, a billion times
        tensor(STORAGE, 0, (0, 2**47, 2**47), (1, 1, 1)),
        tensor(STORAGE, 2**62, (1,), (1,)),
        tensor(STORAGE, 0, (1,) * 65, (1,) * 65),
        tensor(STORAGE, 0, (1,), (1,), name("torch.float64"), v=3)[:-1],
        tensor(STORAGE, 0, (4,), (1,), name("torch.float64"), v=3),
        tensor(STORAGE, 0, (1,), (1,), text("float128"), v=3),
        tensor(tensor(STORAGE, 0, (6,), (1,)), 0, (6,), (1,)),
        call("torch._utils._rebuild_tensor_v2", STORAGE, b"G" + b"\0" * 8, b"K\x01\x85", b"K\x01\x85", b"\x89", b"N"),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(path, body):
    """A storage must be as long as its member, and a tensor must lie inside its storage."""
    refusal(load_torch, write(path, body, _0=b"\0" * 24))


def test_repeated_copies_are_refused(path):
    """A short pickle cannot copy a long list over and over."""
    words = b"](" + b"".join(text(str(i)) for i in range(1000)) + b"e\x94"
    copy = name("__builtin__.set") + b"h\x00\x85R"
    assert len(load_torch(write(path, b"(" + words + copy + b"t"))[1]) == 1000
    assert "copy after copy" in refusal(load_torch, write(path, b"(" + words + copy * 1000 + b"t"))


@pytest.mark.parametrize("kind", ["set", "frozenset"])
def test_sets_of_protocol_2_refuse_tuples(path, kind):
    """A set of protocol 2 holds keys only, so no tuple: hashing one of 50 nested pairs takes 2**50 steps."""
    pairs = b"N\x85\x94" + b"h\x00h\x00\x86" + b"".join(b"\x94h%ch%c\x86" % (i, i) for i in range(1, 50))
    assert load_torch(write(path, call(f"__builtin__.{kind}", b"]" + text("a") + b"a"))) == {"a"}
    assert "tuple as the key" in refusal(load_torch, write(path, call(f"__builtin__.{kind}", b"](" + pairs + b"e")))


def test_copied_number_keys_count_again(path):
    """A dict of numbers with equal hashes, which is slow to fill, cannot fill a Namespace over and over."""
    keys = b"}\x94(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(2000)) + b"u"
    copy = name("argparse.Namespace") + b")\x81h\x00b"
    assert len(load_torch(write(path, b"(" + keys + copy + b"t"))[1]) == 2000
    assert "numbers as keys" in refusal(load_torch, write(path, b"(" + keys + copy * 10 + b"t"))


def write_small_file(path: Path) -> Path:
    values = np.arange(6, dtype=np.float32)
    body = b"}(" + text("w") + tensor(STORAGE, 0, (2, 3), (3, 1)) + text("n") + name("argparse.Namespace") + b")\x81}bu"
    return write(path, body, _0=values.tobytes(), byteorder=b"little")


def test_every_truncation_is_refused(path):
    """A file cut short anywhere is refused in one line."""
    whole = write_small_file(path).read_bytes()
    assert load_torch(path)["w"].shape == (2, 3)
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert ("is empty" if end == 0 else "") in refusal(load_torch, path)


def test_files_of_other_formats_are_refused(path, tmp_path, monkeypatch):
    """A missing file, a file of PyTorch < 1.6, JSON and too large files are refused with a remedy."""
    refusal(load_torch, tmp_path / "missing")
    path.write_bytes(pickle.dumps(MAGIC, 2) + pickle.dumps(1001, 2))
    assert "`torch.save(torch.load(p, weights_only=True), p)`" in refusal(load_torch, path)
    path.write_text(json.dumps({"id": 1}))
    assert "torch.save" in refusal(load_torch, path)
    write_small_file(path)
    monkeypatch.setattr(torch_reader, "MAX_TORCH_PICKLE", 10)
    assert "more than 10" in refusal(load_torch, path)
    monkeypatch.setattr(torch_reader, "MAX_TORCH_PICKLE", 1 << 20)
    monkeypatch.setattr(torch_reader, "MAX_TENSORS", 0)
    assert "more than 0 tensors" in refusal(load_torch, path)
