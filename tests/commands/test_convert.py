"""`atlas convert`: each format is converted into each other bit for bit, a part at a time."""

import dataclasses
import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from atlas_jax.checkpoints import store
from atlas_jax.checkpoints.export import export_arrays
from atlas_jax.checkpoints.formats import orbax_arrays
from atlas_jax.checkpoints.formats.checksum import checksum
from atlas_jax.checkpoints.formats.safetensors_file import open_safetensors, write_safetensors
from atlas_jax.checkpoints.formats.torch_reader import load_torch
from atlas_jax.checkpoints.pretrained import folder_weights
from atlas_jax.checkpoints.store import Weights
from atlas_jax.checkpoints.weights import map_weights, weight_entries
from atlas_jax.commands import convert
from atlas_jax.commands.main import main
from atlas_jax.config import READERS
from atlas_jax.errors import UserError
from atlas_jax.models.atlas import AtlasConfig, param_shapes
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5_CONFIGS
from atlas_jax.storage import lazy_array
from atlas_jax.storage.lazy_array import StackedViews
from tests.checkpoints.formats import pickles
from tests.checkpoints.test_weights import their_shape
from tests.commands.sample_evaluation import SAMPLE

CHECKPOINTS = ("initial", "linear", "fixed_queryside")


@pytest.fixture(scope="module")
def run(golden):
    """A function that runs `atlas convert` on the golden models, unless `flags` name others, and returns --output."""

    def run_convert(output: Path, **flags: object) -> Path:
        assets = golden / "assets"
        all_flags = {"reader_model_type": assets / "reader", "retriever_model_path": assets / "retriever", **flags}
        convert.main(
            [text for flag, value in all_flags.items() for text in (f"--{flag}", str(value))]
            + ["--output", str(output)]
        )
        return output

    return run_convert


@pytest.fixture(scope="module")
def converted(run, golden, tmp_path_factory) -> dict[str, Path]:
    """The golden checkpoints, converted to Orbax."""
    folder = tmp_path_factory.mktemp("ours")
    return {name: run(folder / name, model_path=golden / f"checkpoint_{name}") for name in CHECKPOINTS}


def bits(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.name, array.shape, array.tobytes()


def assert_same(arrays, expected) -> None:
    assert set(arrays) == set(expected)
    for name in arrays:
        assert bits(arrays[name]) == bits(expected[name]), name


# -- Round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_reference_to_orbax_and_back_is_the_identity(run, converted, golden, tmp_path, name):
    """The tensors, their names, the step and the other keys of the file are those of the reference checkpoint."""
    back = load_torch(run(tmp_path / "back", model_path=converted[name], to="reference") / "model.pth.tar")
    source = load_torch(golden / f"checkpoint_{name}" / "model.pth.tar")
    assert_same(back["model"], source["model"])
    assert back["step"] == source["step"]
    assert set(back) == set(source)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_orbax_to_hugging_face_and_back_is_the_identity(run, converted, golden, tmp_path, name):
    """Parameters, shapes and token ids are the same; of untied encoders, those of each."""
    folder = run(tmp_path / "hf", model_path=converted[name], to="huggingface")
    before = store.load(converted[name])
    encoders = {"query_encoder", "passage_encoder"} if before.cfg.untied else {"retriever"}
    assert {path.name for path in folder.iterdir()} == {"reader", *encoders}
    for encoder in encoders:
        flags = {"reader_model_type": folder / "reader", "retriever_model_path": folder / encoder}
        after = store.load(run(tmp_path / f"again-{encoder}", **flags))
        module = "encoder" if encoder == "retriever" else encoder
        renamed = {path.replace(f"retriever/{module}/", "retriever/encoder/"): x for path, x in before.params.items()}
        assert_same(after.params, {path: renamed[path] for path in after.params})
        assert after.cfg == dataclasses.replace(before.cfg, untied=False)
        for tokenizer, expected in (
            (after.tokenizer, before.tokenizer),
            (after.retriever_tokenizer, before.retriever_tokenizer),
        ):
            assert tokenizer.ids(["What is 25 x 6? <extra_id_0>"]) == expected.ids(["What is 25 x 6? <extra_id_0>"])
            assert tokenizer.fingerprint == expected.fingerprint


def test_a_t5_with_tied_embeddings_stores_them_once(run, golden, tmp_path):
    """T5 1.0, Hugging Face -> reference -> Orbax -> Hugging Face: lm_head is the array of the input embedding."""
    flags = {"reader_model_type": golden / "t5_1_0"}
    model = load_torch(run(tmp_path / "reference", to="reference", **flags) / "model.pth.tar")["model"]
    assert np.shares_memory(model["reader.lm_head.weight"], model["reader.shared.weight"])
    again = run(tmp_path / "ours", model_path=tmp_path / "reference", **flags)
    folder = run(tmp_path / "hf", model_path=again, to="huggingface", reader_model_type="")
    assert_same(folder_weights(str(folder / "reader")), folder_weights(str(golden / "t5_1_0")))
    config = json.loads((folder / "reader/config.json").read_text())
    assert (config["tie_word_embeddings"], config["feed_forward_proj"]) == (True, "relu")


def test_a_training_checkpoint_converted_in_place_loses_its_optimizer(converted, tiny_weights, tmp_path):
    """--output is the --model_path: weights, step and index fingerprint are kept, the resume state is removed."""
    folder = tmp_path / "trained"
    trained = dataclasses.replace(tiny_weights, step=5, index="5eed")
    store.save(folder, trained, store.ResumeState({"mu": np.ones(3, np.float32)}, {"position": 1}))
    convert.main(["--model_path", str(folder), "--output", str(folder)])
    loaded = store.load(folder)
    assert_same(loaded.params, tiny_weights.params)
    assert (loaded.step, loaded.index, store.load_resume_state(folder)) == (5, "5eed", None)
    assert [path.name for path in tmp_path.iterdir()] == ["trained"]


def test_the_layer_norm_is_kept_and_atlas_s_own_is_warned_of(run, converted, golden, tmp_path, caplog):
    """Atlas's layer norm is written to config.json, with a warning; a standard one is kept without a warning."""
    with caplog.at_level(logging.WARNING):
        folder = run(tmp_path / "hf", model_path=converted["initial"], to="huggingface")
    assert "BertModel computes the standard one" in caplog.text
    assert json.loads((folder / "retriever/config.json").read_text())["layer_norm"] == "atlas"
    caplog.clear()
    changed = {"norm": "standard", "pooling": "cls", "normalize": True}
    weights = store.load(converted["initial"])
    cfg = dataclasses.replace(weights.cfg.retriever, **changed)
    weights = dataclasses.replace(weights, cfg=dataclasses.replace(weights.cfg, retriever=cfg))
    store.save(tmp_path / "standard", weights)
    folder = run(tmp_path / "hf2", model_path=tmp_path / "standard", to="huggingface")
    assert "BertModel" not in caplog.text
    again = run(tmp_path / "again", reader_model_type=folder / "reader", retriever_model_path=folder / "retriever")
    assert store.load_config(again)[0].retriever == cfg


# -- Formats of Hugging Face folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bin", "safetensors shards", "bin shards", "bfloat16"])
def test_hugging_face_weights_are_read_from_every_format(run, golden, tmp_path, form):
    """pytorch_model.bin, shards that an index file names, and bfloat16, which is cast to float32 exactly."""
    folder = Path(shutil.copytree(golden / "assets/reader", tmp_path / "reader"))
    source = {name: array.copy() for name, array in open_safetensors(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    halves = [dict(list(source.items())[part::2]) for part in (0, 1)]
    if form == "bin":
        pickles.save(folder / "pytorch_model.bin", source)
    elif form == "bfloat16":
        source = {name: array.astype(ml_dtypes.bfloat16) for name, array in source.items()}
        write_safetensors(folder / "model.safetensors", source, lambda count: None)
    else:
        stem, end = ("model", "safetensors") if form.startswith("safe") else ("pytorch_model", "bin")
        files = [f"{stem}-0000{n}-of-00002.{end}" for n in (1, 2)]
        for file, half in zip(files, halves, strict=True):
            if end == "bin":
                pickles.save(folder / file, half)
            else:
                write_safetensors(folder / file, half, lambda count: None)
        places = {name: file for file, half in zip(files, halves, strict=True) for name in half}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": places}))
    params = store.load(run(tmp_path / "ours", reader_model_type=folder)).params
    expected = map_weights(
        {f"reader.{name}": array for name, array in source.items()},
        AtlasConfig(store.load_config(tmp_path / "ours")[0].reader, None),
        where="",
    )
    for path, lazy in expected.items():
        assert bits(params[path]) == bits(lazy.read()), path


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": {"shared.weight": "../model.safetensors"}}, "names ../model.safetensors"),
        ({"weight_map": {"shared.weight": "gone.safetensors"}}, "names gone.safetensors"),
    ],
)
def test_a_bad_shard_index_is_named(golden, tmp_path, index, message):
    """A shard index without a weight_map, with a file outside the folder, or with a missing file."""
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match=message) as caught:
        folder_weights(str(tmp_path))
    assert str(caught.value).startswith(f"{file}: ")


# -- A part at a time --------------------------------------------------------------------------------------------------


def test_weights_are_read_in_parts(converted, golden, tmp_path, monkeypatch):
    """With parts of 2 KB, no read is as large as two parts; the written checkpoint and its checksums are the same."""
    source = load_torch(golden / "checkpoint_initial" / "model.pth.tar")["model"]
    whole = store.load(converted["initial"])
    read_sizes: list[int] = []
    read_once = StackedViews.read_once

    def recorded(self, index=()):
        part = read_once(self, index)
        read_sizes.append(part.nbytes)
        return part

    monkeypatch.setattr(lazy_array, "CHUNK_BYTES", 2048)
    monkeypatch.setattr(StackedViews, "read_once", recorded)
    lazy = map_weights(source, whole.cfg, where="FILE")
    assert read_sizes == []
    written_sizes: list[int] = []
    store.save(
        tmp_path / "small",
        Weights(lazy, whole.cfg, whole.tokenizer, whole.retriever_tokenizer),
        on_bytes=written_sizes.append,
    )
    assert max(read_sizes) < 2 * 2048
    assert sum(written_sizes) == sum(read_sizes) == sum(array.nbytes for array in whole.params.values())
    small = store.load(tmp_path / "small")
    assert_same(small.params, whole.params)
    checksums = [
        json.loads((folder / "atlas.json").read_text())["checksums"]
        for folder in (tmp_path / "small", converted["initial"])
    ]
    assert checksums[0] == checksums[1]
    assert checksums[0]["params"] == {path: checksum(array) for path, array in whole.params.items()}


def test_orbax_s_own_checkpointer_restores_the_parameters(converted):
    """`StandardCheckpointer` restores the arrays that `atlas convert` wrote."""
    folder = converted["linear"] / "params"
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata
        restored = checkpointer.restore(folder, {name: np.zeros(x.shape, x.dtype) for name, x in metadata.items()})
    assert_same(restored, store.load(converted["linear"]).params)


def test_checkpoints_in_orbax_s_ocdbt_format_are_read(converted, tmp_path):
    """OCDBT, one database of compressed arrays, is the format of older checkpoints of this package."""
    params = store.load(converted["initial"]).params
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", dict(params))
    assert (tmp_path / "params/manifest.ocdbt").is_file()
    checksums = {path: checksum(array) for path, array in params.items()}
    arrays = orbax_arrays.open_arrays(tmp_path / "params", checksums)
    assert_same({name: array.read() for name, array in arrays.items()}, params)


@pytest.mark.parametrize("to", ["orbax", "huggingface", "reference"])
def test_a_damaged_checkpoint_is_detected_while_converting(run, converted, tmp_path, to):
    """A flipped bit in an Orbax checkpoint: the message names the array, and no output is left."""
    source = Path(shutil.copytree(converted["initial"], tmp_path / "source"))
    largest = max((path for path in (source / "params").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match=f"{source}/params: .* is not what was saved"):
        run(tmp_path / "out", model_path=source, to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("to", ["orbax", "huggingface", "reference"])
def test_too_little_disk_space_is_refused_before_writing(run, converted, tmp_path, monkeypatch, to):
    """The message has the bytes needed and the bytes free, and no file is written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(UserError, match=r"needs 0\.0 GB, but 0\.0 GB are left there; free some space"):
        run(tmp_path / "out", model_path=converted["initial"], to=to)
    assert list(tmp_path.iterdir()) == []


def test_exports_do_not_replace_an_existing_folder(run, converted, tmp_path):
    """An --output with content is refused, an empty one is not; a missing --output is."""
    (tmp_path / "out").mkdir()
    run(tmp_path / "out", model_path=converted["initial"], to="reference")
    for to in ("huggingface", "reference"):
        with pytest.raises(UserError, match="out: is there; choose a new folder"):
            run(tmp_path / "out", model_path=converted["initial"], to=to)
    with pytest.raises(UserError, match="--output is missing"):
        convert.main(["--model_path", str(converted["initial"])])


# -- The published sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("untied", [False, True])
def test_every_published_model_is_mapped_both_ways(name, untied):
    """At the shapes of each published reader and of Contriever, every array and parameter is used exactly once.

    The arrays are broadcast zeros, which take no memory.
    """
    cfg = AtlasConfig(T5_CONFIGS[name], ContrieverConfig(), untied)
    zero = np.float32(0)
    source = {e.name: np.broadcast_to(zero, their_shape(e.name, cfg)) for e in weight_entries(cfg)}
    params = map_weights(source, cfg, where="FILE")
    shapes = param_shapes(cfg)
    assert {path: x.shape for path, x in params.items()} == {path: s.shape for path, s in shapes.items()}
    arrays_per_path = Counter(e.path for e in weight_entries(cfg) if not e.alias)
    assert arrays_per_path == {path: len(x.views) for path, x in params.items()}
    back = export_arrays(params, cfg, aliases=True)
    assert {name: x.shape for name, x in back.items()} == {name: x.shape for name, x in source.items()}
    distinct = {id(x): x for x in back.values()}.values()
    assert sum(x.size for x in distinct) == sum(s.size for s in shapes.values()) == parameter_count(cfg)


def parameter_count(cfg: AtlasConfig) -> int:
    """Number of parameters of a T5 and of a BERT, from the shapes in the papers."""
    t5, bert = cfg.reader, cfg.retriever
    assert t5
    assert bert
    attention = 4 * t5.d_model * t5.num_heads * t5.head_dim
    mlp = (3 if t5.gated else 2) * t5.d_model * t5.d_ff
    encoder = t5.num_layers * (attention + mlp + 2 * t5.d_model)
    decoder = t5.num_decoder_layers * (2 * attention + mlp + 3 * t5.d_model)
    embeddings = (1 if t5.tied else 2) * t5.vocab_size * t5.d_model
    reader = encoder + decoder + embeddings + 2 * t5.d_model + 2 * t5.relative_buckets * t5.num_heads
    d, f = bert.d_model, bert.d_ff
    layer = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 2 * 2 * d
    retriever = (bert.vocab_size + bert.max_positions + bert.type_vocab_size) * d + 2 * d + bert.num_layers * layer
    return reader + retriever * (2 if cfg.untied else 1)


def test_loading_reads_each_array_once(converted, monkeypatch):
    """`store.load` reads array by array, each array exactly once."""
    read_names: list[str] = []
    original_read = orbax_arrays.StoredArray.read

    def recorded(self, index=()):
        read_names.append(self.name)
        return original_read(self, index)

    monkeypatch.setattr(orbax_arrays.StoredArray, "read", recorded)
    weights = store.load(converted["initial"])
    assert isinstance(weights, Weights)
    assert len(read_names) == len(set(read_names)) == len(weights.params)


# -- Refusals and output -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--model_path", str(SAMPLE / "model")], ["--output is missing", "--inspect"]),
        (["--output", "x", "--modle_path", "y"], ["--modle_path", "see atlas convert --help"]),
        (["--output", "x", "--model_path", str(SAMPLE / "model")], ["--reader_model_type is missing", "t5-base"]),
        (["--output", str(SAMPLE), "--reader_model_type", str(SAMPLE / "reader")], [SAMPLE, "choose a new folder"]),
        (["--output", "x", "--reader_model_type", "t5-bse"], ["t5-bse", "; "]),
        (["--output", "x", "--model_path", "nowhere"], ["--model_path nowhere: no such folder", "model.pth.tar"]),
        (["--output", "x", "--model_path", ".", "--reader_model_type", "t5-base"], ["neither model.pth.tar nor"]),
    ],
)
def test_bad_flags_are_refused(assert_refused, tmp_path, monkeypatch, argv, parts):
    """Missing, unknown and wrong flags: exit status 2, one line, and no folder is created."""
    monkeypatch.chdir(tmp_path)
    assert_refused(["convert", *argv], *parts)
    assert list(tmp_path.iterdir()) == []


def test_bad_outputs_are_refused_before_any_file_is_opened(assert_refused, tmp_path):
    """An unknown --to, no --output, an --output that exists, and an --inspect path without weights."""
    argv = ["convert", "--model_path", str(SAMPLE / "model"), "--reader_model_type", str(SAMPLE / "reader"),
            "--retriever_model_path", str(SAMPLE / "retriever")]  # fmt: skip
    assert_refused(
        [*argv, "--output", str(tmp_path / "out"), "--to", "gguf"], "--to: invalid choice: 'gguf'", "huggingface"
    )
    assert_refused(argv, "--output is missing: name the folder to write, or --inspect PATH to only look")
    (tmp_path / "there" / "own").mkdir(parents=True)
    assert_refused(
        [*argv, "--output", str(tmp_path / "there"), "--to", "reference"], "there: is there; choose a new folder"
    )
    assert_refused(
        ["convert", "--inspect", str(tmp_path / "there")], "there: holds nothing known here; give the folder of a"
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]


def test_inspect_and_help_print_to_stdout(capsys):
    """`--inspect` prints the kind of checkpoint; `--help` has an example of each format."""
    assert main(["convert", "--inspect", str(SAMPLE / "model")]) == 0
    assert "kind: a checkpoint of the PyTorch reference\n" in capsys.readouterr().out
    assert main(["convert", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(example in text for example in ("--to huggingface", "--to reference", "--inspect models/atlas/xxl"))
