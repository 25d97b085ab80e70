"""Exported files: a model.pth.tar for `torch.load(weights_only=True)`, safetensors, config.json."""

import dataclasses
import io
import pickle
import pickletools
import shutil
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
from atlas_jax.checkpoints.formats.safe_pickle import AllowedGlobals, unpickle
from atlas_jax.checkpoints.formats.safetensors_file import open_safetensors, write_safetensors
from atlas_jax.checkpoints.formats.torch_reader import load_torch
from atlas_jax.checkpoints.formats.torch_writer import ALIGNMENT, Attributes, dump, write_torch
from atlas_jax.checkpoints.pretrained import reader_config, retriever_config
from atlas_jax.checkpoints.store import Weights
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.errors import UserError
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5_CONFIGS
from atlas_jax.storage.files import write_json

ALLOWED_GLOBALS = {  # globals of our pickles; torch.load(weights_only=True) allows each
    *("torch FloatStorage", "torch LongStorage", "torch HalfStorage"),
    *("torch._utils _rebuild_tensor_v2", "collections OrderedDict"),
}


def ignore_bytes(count: int) -> None:
    """Does nothing: the `on_bytes` of these tests."""


@pytest.fixture
def weights(tiny_weights) -> Weights:
    """Returns the golden checkpoint's weights at step 12."""
    w = tiny_weights
    return Weights(w.params, w.cfg, w.tokenizer, w.retriever_tokenizer, 12)


def members(file: Path) -> dict[str, tuple[int, zipfile.ZipInfo]]:
    """Returns, for each member, the offset of its bytes and its ZipInfo."""
    content = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None  # every CRC is right
        infos = archive.infolist()
    result = {}
    for info in infos:
        name_size, extra_size = struct.unpack_from("<HH", content, info.header_offset + 26)
        result[info.filename.removeprefix("archive/")] = info.header_offset + 30 + name_size + extra_size, info
    return result


def test_the_zip_is_laid_out_as_by_torch(weights, tmp_path):
    """Members are uncompressed, aligned and named as by PyTorch; little-endian, version 3; aliases share a storage."""
    write_reference(tmp_path / "out", weights, ignore_bytes)
    file = tmp_path / "out/model.pth.tar"
    zip_members = members(file)
    content = file.read_bytes()
    for start, info in zip_members.values():
        assert (info.compress_type, info.compress_size) == (zipfile.ZIP_STORED, info.file_size)
        assert start % ALIGNMENT == 0
    assert content[zip_members["version"][0] :][:2] == b"3\n"
    assert content[zip_members["byteorder"][0] :][:6] == b"little"
    storages = [name for name in zip_members if name.startswith("data/")]
    assert sorted(zip_members) == sorted(["data.pkl", "version", "byteorder", *storages])
    model = load_torch(file)["model"]
    assert len(storages) == len(model) - 2  # embed_tokens, twice, are the shared embedding
    assert np.shares_memory(model["reader.shared.weight"], model["reader.decoder.embed_tokens.weight"])


def test_the_pickle_uses_only_tensor_globals(weights, tmp_path):
    """The pickle is well-formed, uses the globals of tensors only, and sets a state once."""
    write_reference(tmp_path / "out", weights, ignore_bytes)
    with zipfile.ZipFile(tmp_path / "out/model.pth.tar") as archive:
        program = archive.read("archive/data.pkl")
    pickletools.dis(program, out=io.StringIO())
    operations = [(op.name, value) for op, value, _ in pickletools.genops(program)]
    globals_used = {value for op, value in operations if op == "GLOBAL"}
    assert globals_used <= ALLOWED_GLOBALS
    assert "torch LongStorage" in globals_used
    assert {op for op, _ in operations if op in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ")} == set()
    assert [op for op, _ in operations].count("BUILD") == 1  # the attributes of `opt`


def test_opt_has_the_attribute_that_the_reference_asks_for(weights, tmp_path):
    """Unpickled by Python, `opt.query_side_retriever_training` says whether there are two encoders."""
    for untied in (False, True):
        program = dump({"opt": Attributes({"query_side_retriever_training": untied})})
        assert pickle.loads(program)["opt"].query_side_retriever_training is untied


PLAIN_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=9,
)


@given(PLAIN_VALUES)
def test_plain_values_are_pickled(value):
    """Plain values are read back equal by `pickle` and by our own reader."""
    assert pickle.loads(dump(value)) == value
    assert unpickle(dump(value), AllowedGlobals()) == value


def test_other_values_are_refused():
    """A list, a set, an array or an object is refused, since pickling it needs other opcodes or globals."""
    for value in ([1], {1}, np.zeros(2), object()):
        with pytest.raises(TypeError, match="has no place in a checkpoint"):
            dump({"x": value})


@pytest.mark.parametrize(("limit", "long"), [(zipfile.ZIP64_LIMIT, set()), (1050, {"data/4", "data/5"})])
def test_members_over_4_gb_are_aligned_and_readable(tmp_path, monkeypatch, limit, long):
    """With the zip64 limit lowered, larger members get zip64 headers and are still readable and aligned."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    arrays = {f"x{n}": np.arange(n, dtype=np.float32).reshape(-1, 1) for n in (0, 1, 249, 250, 251, 5000)}
    write_torch(tmp_path / "file", arrays, {"step": -3}, ignore_bytes)
    loaded = load_torch(tmp_path / "file")
    assert loaded["step"] == -3
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded["model"][name], array)
    content = (tmp_path / "file").read_bytes()
    fields = {name: content[start - 20 : start - 16] for name, (start, _) in members(tmp_path / "file").items()}
    assert {name for name, field in fields.items() if field == b"\1\0\x10\0"} == long
    assert all(start % ALIGNMENT == 0 for start, _ in members(tmp_path / "file").values())


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int8", "bool"])
def test_safetensors_files_are_read_by_the_library(tmp_path, dtype):
    """The safetensors library and our reader read what we write: matrices, scalars, empty arrays."""
    arrays = {"a": np.arange(6).reshape(2, 3).astype(dtype), "b": np.ones((), dtype), "c": np.zeros((0, 4), dtype)}
    arrays["d"] = np.asfortranarray(arrays["a"])
    write_safetensors(tmp_path / "x.safetensors", arrays, ignore_bytes)
    for found in (load_file(tmp_path / "x.safetensors"), open_safetensors(tmp_path / "x.safetensors")):
        assert set(found) == set(arrays)
        for name, array in arrays.items():
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("name", T5_CONFIGS)
def test_config_json_of_readers_is_read_back(tmp_path, name):
    """Hugging Face's T5Config takes every field, and our config is read back equal."""
    cfg = T5_CONFIGS[name]
    write_json(tmp_path / "config.json", reader_json(cfg))
    assert reader_config(str(tmp_path)) == cfg
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, transformers.T5Config)
    for field, value in reader_json(cfg).items():
        if field not in ("torch_dtype", "architectures", "tie_word_embeddings"):
            assert getattr(config, field) == value, field
    assert config.scale_decoder_outputs == cfg.tied  # transformers 5 derives this from tie_word_embeddings
    assert (config.is_gated_act, config.dense_act_fn) == (cfg.gated, "gelu_new" if cfg.gated else "relu")


@pytest.mark.parametrize("fields", [{}, {"norm": "standard", "pooling": "sqrt", "normalize": True, "d_ff": 96}])
def test_config_json_of_retrievers_is_read_back(tmp_path, fields):
    """Hugging Face's BertConfig takes the file, and our config with Atlas's own fields is read back equal."""
    cfg = ContrieverConfig(**fields)
    write_json(tmp_path / "config.json", retriever_json(cfg))
    assert retriever_config(str(tmp_path)) == cfg
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, transformers.BertConfig)
    assert (config.hidden_size, config.intermediate_size) == (cfg.d_model, cfg.d_ff)
    write_json(tmp_path / "config.json", retriever_json(cfg) | {"normalize": "yes"})
    with pytest.raises(UserError, match="normalize is 'yes'; this program knows True, False"):
        retriever_config(str(tmp_path))


@pytest.mark.parametrize("files", [("tokenizer.json", "tokenizer_config.json"), ("spiece.model",)])
def test_transformers_loads_the_tokenizers(weights, tmp_path, golden, files):
    """AutoTokenizer of each folder gives our ids, and tokenizer_config.json has no fields of this machine."""
    (tmp_path / "reader").mkdir()
    for file in files:
        shutil.copy(golden / "assets" / "reader" / file, tmp_path / "reader")
    weights = dataclasses.replace(weights, tokenizer=Tokenizer.load(tmp_path / "reader"))
    write_huggingface(tmp_path / "out", weights, ignore_bytes)
    for name, tokenizer in (("reader", weights.tokenizer), ("retriever", weights.retriever_tokenizer)):
        auto_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / name)
        for text in ("question: Who? answer: <extra_id_0>", "naïve 25 x 6", "", " two  spaces "):
            ids = tokenizer.add_special_tokens(tokenizer.ids([text])[0])
            assert auto_tokenizer(text)["input_ids"] == ids
            if name == "reader":
                assert auto_tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
        assert "local" not in (tmp_path / "out" / name / "tokenizer_config.json").read_text()
