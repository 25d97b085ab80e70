"""What we write for others: a torch file that PyTorch's strictest loader opens, safetensors, config.json."""

import io
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from atlas_jax.checkpoints.export import reader_json, retriever_json, write_huggingface, write_reference
from atlas_jax.checkpoints.formats.safe_pickle import Names, unpickle
from atlas_jax.checkpoints.formats.safetensors_file import open_safetensors, write_safetensors
from atlas_jax.checkpoints.formats.torch_reader import load_torch
from atlas_jax.checkpoints.formats.torch_writer import ALIGNMENT, Attributes, dump, write_torch
from atlas_jax.checkpoints.pretrained import reader_config, retriever_config
from atlas_jax.checkpoints.store import Weights
from atlas_jax.errors import UserError
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5_CONFIGS
from atlas_jax.storage.files import write_json

ALLOWED = {  # of what a pickle may name, all that ours do; torch.load(weights_only=True) allows each
    *("torch FloatStorage", "torch LongStorage", "torch HalfStorage"),
    *("torch._utils _rebuild_tensor_v2", "collections OrderedDict"),
}


def ignore(count: int) -> None:
    """Hears of bytes."""


@pytest.fixture
def opened(tiny_weights) -> Weights:
    """The golden checkpoint."""
    w = tiny_weights
    return Weights(w.params, w.cfg, w.tokenizer, w.retriever_tokenizer, 12)


def members(file: Path) -> dict[str, tuple[int, zipfile.ZipInfo]]:
    """Where the bytes of each member begin."""
    content = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None  # every CRC is right
        infos = archive.infolist()
    found = {}
    for info in infos:
        name, extra = struct.unpack_from("<HH", content, info.header_offset + 26)
        found[info.filename.removeprefix("archive/")] = info.header_offset + 30 + name + extra, info
    return found


def test_the_zip_is_as_torch_writes_it(opened, tmp_path):
    """Uncompressed members of PyTorch's names, their bytes aligned, little-endian, version 3."""
    write_reference(tmp_path / "out", opened, ignore)
    file = tmp_path / "out/model.pth.tar"
    found = members(file)
    content = file.read_bytes()
    for start, info in found.values():
        assert (info.compress_type, info.compress_size) == (zipfile.ZIP_STORED, info.file_size)
        assert start % ALIGNMENT == 0
    assert content[found["version"][0] :][:2] == b"3\n"
    assert content[found["byteorder"][0] :][:6] == b"little"
    storages = [name for name in found if name.startswith("data/")]
    assert sorted(found) == sorted(["data.pkl", "version", "byteorder", *storages])
    model = load_torch(file)["model"]
    assert len(storages) == len(model) - 2  # embed_tokens, twice, are the shared embedding
    assert np.shares_memory(model["reader.shared.weight"], model["reader.decoder.embed_tokens.weight"])


def test_the_pickle_names_only_tensors(opened, tmp_path):
    """Its opcodes, one by one: no name but those of tensors, no call of anything else, well-formed to the end."""
    write_reference(tmp_path / "out", opened, ignore)
    with zipfile.ZipFile(tmp_path / "out/model.pth.tar") as archive:
        program = archive.read("archive/data.pkl")
    pickletools.dis(program, out=io.StringIO())
    operations = [(op.name, value) for op, value, _ in pickletools.genops(program)]
    named = {value for op, value in operations if op == "GLOBAL"}
    assert named <= ALLOWED
    assert "torch LongStorage" in named
    assert {op for op, _ in operations if op in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ")} == set()
    assert [op for op, _ in operations].count("BUILD") == 1  # the attributes of `opt`


def test_opt_has_the_attribute_that_the_reference_asks_for(opened, tmp_path):
    """Python's pickle, given only OrderedDict: `opt.query_side_retriever_training` is whether the encoders are two."""
    for untied in (False, True):
        program = dump({"opt": Attributes({"query_side_retriever_training": untied})})
        assert pickle.loads(program)["opt"].query_side_retriever_training is untied


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=9,
)


@given(PLAIN)
def test_plain_values_come_back(value):
    """By Python's pickle and by our own reader."""
    assert pickle.loads(dump(value)) == value
    assert unpickle(dump(value), Names()) == value


def test_nothing_else_is_pickled():
    """A list, a set or an array is refused: the file would need names that nobody allows."""
    for value in ([1], {1}, np.zeros(2), object()):
        with pytest.raises(TypeError, match="has no place in a checkpoint"):
            dump({"x": value})


@pytest.mark.parametrize(("limit", "long"), [(zipfile.ZIP64_LIMIT, set()), (1050, {"data/4", "data/5"})])
def test_members_beyond_four_gigabytes(tmp_path, monkeypatch, limit, long):
    """With the limit of the short form lowered, larger members get the long one: readable, and aligned all the same."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    arrays = {f"x{n}": np.arange(n, dtype=np.float32).reshape(-1, 1) for n in (0, 1, 249, 250, 251, 5000)}
    write_torch(tmp_path / "file", arrays, {"step": -3}, ignore)
    found = load_torch(tmp_path / "file")
    assert found["step"] == -3
    for name, array in arrays.items():
        np.testing.assert_array_equal(found["model"][name], array)
    content = (tmp_path / "file").read_bytes()
    fields = {name: content[start - 20 : start - 16] for name, (start, _) in members(tmp_path / "file").items()}
    assert {name for name, field in fields.items() if field == b"\1\0\x10\0"} == long
    assert all(start % ALIGNMENT == 0 for start, _ in members(tmp_path / "file").values())


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int8", "bool"])
def test_safetensors_are_theirs(tmp_path, dtype):
    """The library that made the format reads what we write, and we read it too: matrices, numbers, empty arrays."""
    arrays = {"a": np.arange(6).reshape(2, 3).astype(dtype), "b": np.ones((), dtype), "c": np.zeros((0, 4), dtype)}
    arrays["d"] = np.asfortranarray(arrays["a"])
    write_safetensors(tmp_path / "x.safetensors", arrays, ignore)
    for found in (load_file(tmp_path / "x.safetensors"), open_safetensors(tmp_path / "x.safetensors")):
        assert set(found) == set(arrays)
        for name, array in arrays.items():
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("name", T5_CONFIGS)
def test_config_json_of_readers(tmp_path, name):
    """Hugging Face's T5Config takes every field, and ours comes back from the file."""
    cfg = T5_CONFIGS[name]
    write_json(tmp_path / "config.json", reader_json(cfg))
    assert reader_config(str(tmp_path)) == cfg
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.T5Config)
    for field, value in reader_json(cfg).items():
        if field not in ("torch_dtype", "architectures", "tie_word_embeddings"):
            assert getattr(theirs, field) == value, field
    assert theirs.scale_decoder_outputs == cfg.tied  # what transformers 5 makes of tie_word_embeddings
    assert (theirs.is_gated_act, theirs.dense_act_fn) == (cfg.gated, "gelu_new" if cfg.gated else "relu")


@pytest.mark.parametrize("fields", [{}, {"norm": "standard", "pooling": "sqrt", "normalize": True, "d_ff": 96}])
def test_config_json_of_retrievers(tmp_path, fields):
    """BERT's fields, and beside them what Atlas computes otherwise."""
    cfg = ContrieverConfig(**fields)
    write_json(tmp_path / "config.json", retriever_json(cfg))
    assert retriever_config(str(tmp_path)) == cfg
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.BertConfig)
    assert (theirs.hidden_size, theirs.intermediate_size) == (cfg.d_model, cfg.d_ff)
    write_json(tmp_path / "config.json", retriever_json(cfg) | {"normalize": "yes"})
    with pytest.raises(UserError, match="normalize is 'yes'; this program knows True, False"):
        retriever_config(str(tmp_path))


def test_transformers_loads_the_tokenizers(opened, tmp_path):
    """AutoTokenizer of each folder gives our ids, and the file has none of this machine's fields."""
    write_huggingface(tmp_path / "out", opened, ignore)
    for name, ours in (("reader", opened.tokenizer), ("retriever", opened.retriever_tokenizer)):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / name)
        for text in ("question: Who? answer: <extra_id_0>", "naïve 25 x 6", ""):
            assert theirs(text)["input_ids"] == ours.finish(ours.ids([text])[0])
        assert "local" not in (tmp_path / "out" / name / "tokenizer_config.json").read_text()
