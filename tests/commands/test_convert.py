"""`atlas convert`: every form into every other, bit for bit, a part at a time."""

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
from atlas_jax.checkpoints.export import exported
from atlas_jax.checkpoints.formats import orbax_arrays
from atlas_jax.checkpoints.formats.checksum import checksum
from atlas_jax.checkpoints.formats.safetensors_file import open_safetensors, write_safetensors
from atlas_jax.checkpoints.formats.torch_reader import load_torch
from atlas_jax.checkpoints.pretrained import folder_weights
from atlas_jax.checkpoints.store import Weights
from atlas_jax.checkpoints.weights import map_weights, weight_entries
from atlas_jax.commands import convert
from atlas_jax.config import READERS
from atlas_jax.errors import UserError
from atlas_jax.models.atlas import AtlasConfig, param_shapes
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5_CONFIGS
from atlas_jax.storage import lazy_array
from atlas_jax.storage.lazy_array import StackedViews
from tests.checkpoints.formats import pickles
from tests.checkpoints.test_weights import their_shape

CHECKPOINTS = ("initial", "linear", "fixed_queryside")


@pytest.fixture(scope="module")
def run(golden):
    """Converts; the models are those of the goldens unless said otherwise."""

    def convert_(output: Path, **flags: object) -> Path:
        assets = golden / "assets"
        named = {"reader_model_type": assets / "reader", "retriever_model_path": assets / "retriever", **flags}
        convert.main(
            [text for flag, value in named.items() for text in (f"--{flag}", str(value))] + ["--output", str(output)]
        )
        return output

    return convert_


@pytest.fixture(scope="module")
def converted(run, golden, tmp_path_factory) -> dict[str, Path]:
    """The golden checkpoints, in our form."""
    folder = tmp_path_factory.mktemp("ours")
    return {name: run(folder / name, model_path=golden / f"checkpoint_{name}") for name in CHECKPOINTS}


def bits(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.name, array.shape, array.tobytes()


def assert_same(one, other) -> None:
    assert set(one) == set(other)
    for name in one:
        assert bits(one[name]) == bits(other[name]), name


# -- There and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_reference_comes_back(run, converted, golden, tmp_path, name):
    """reference -> ours -> reference is the same tensors under the same names, the step and what loading asks for."""
    back = load_torch(run(tmp_path / "back", model_path=converted[name], to="reference") / "model.pth.tar")
    source = load_torch(golden / f"checkpoint_{name}" / "model.pth.tar")
    assert_same(back["model"], source["model"])
    assert back["step"] == source["step"]
    assert set(back) == set(source)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_hugging_face_comes_back(run, converted, golden, tmp_path, name):
    """ours -> Hugging Face -> ours: all parameters, shapes and token ids; of two encoders, each."""
    folder = run(tmp_path / "hf", model_path=converted[name], to="huggingface")
    before = store.load(converted[name])
    encoders = {"query_encoder", "passage_encoder"} if before.cfg.untied else {"retriever"}
    assert {path.name for path in folder.iterdir()} == {"reader", *encoders}
    for encoder in encoders:
        flags = {"reader_model_type": folder / "reader", "retriever_model_path": folder / encoder}
        after = store.load(run(tmp_path / f"again-{encoder}", **flags))
        there = "encoder" if encoder == "retriever" else encoder
        renamed = {path.replace(f"retriever/{there}/", "retriever/encoder/"): x for path, x in before.params.items()}
        assert_same(after.params, {path: renamed[path] for path in after.params})
        assert after.cfg == dataclasses.replace(before.cfg, untied=False)
        for one, other in (
            (after.tokenizer, before.tokenizer),
            (after.retriever_tokenizer, before.retriever_tokenizer),
        ):
            assert one.ids(["What is 25 x 6? <extra_id_0>"]) == other.ids(["What is 25 x 6? <extra_id_0>"])
            assert one.fingerprint == other.fingerprint


def test_a_tied_t5(run, golden, tmp_path):
    """T5 1.0: Hugging Face -> reference and ours -> Hugging Face; the output is the input's array, stored once."""
    flags = {"reader_model_type": golden / "t5_1_0"}
    model = load_torch(run(tmp_path / "reference", to="reference", **flags) / "model.pth.tar")["model"]
    assert np.shares_memory(model["reader.lm_head.weight"], model["reader.shared.weight"])
    again = run(tmp_path / "ours", model_path=tmp_path / "reference", **flags)
    folder = run(tmp_path / "hf", model_path=again, to="huggingface", reader_model_type="")
    assert_same(folder_weights(str(folder / "reader")), folder_weights(str(golden / "t5_1_0")))
    config = json.loads((folder / "reader/config.json").read_text())
    assert (config["tie_word_embeddings"], config["feed_forward_proj"]) == (True, "relu")


def test_ours_again_leaves_the_optimizer_behind(converted, tiny_weights, tmp_path):
    """A training's checkpoint, converted in its own place, keeps weights, step and index."""
    folder = tmp_path / "trained"
    trained = dataclasses.replace(tiny_weights, step=5, index="5eed")
    store.save(folder, trained, store.ResumeState({"mu": np.ones(3, np.float32)}, {"position": 1}))
    convert.main(["--model_path", str(folder), "--output", str(folder)])
    found = store.load(folder)
    assert_same(found.params, tiny_weights.params)
    assert (found.step, found.index, store.load_resume_state(folder)) == (5, "5eed", None)
    assert [path.name for path in tmp_path.iterdir()] == ["trained"]


def test_the_layer_norm_survives_and_is_warned_of(run, converted, golden, tmp_path, caplog):
    """Atlas's own is said in config.json and aloud; a standard one is not warned of, and comes back."""
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


# -- What Hugging Face folders hold ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bin", "safetensors shards", "bin shards", "bfloat16"])
def test_forms_of_hugging_face_folders(run, golden, tmp_path, form):
    """pytorch_model.bin, files that an index names, and half precision, widened exactly."""
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
    for path, linked in expected.items():
        assert bits(params[path]) == bits(linked.read()), path


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": {"shared.weight": "../model.safetensors"}}, "names ../model.safetensors"),
        ({"weight_map": {"shared.weight": "gone.safetensors"}}, "names gone.safetensors"),
    ],
)
def test_an_index_that_misleads(golden, tmp_path, index, said):
    """An index without files, to a file elsewhere, to one that is missing: the index is named."""
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match=said) as caught:
        folder_weights(str(tmp_path))
    assert str(caught.value).startswith(f"{file}: ")


# -- A part at a time --------------------------------------------------------------------------------------------------


def test_no_more_than_parts_are_read(converted, golden, tmp_path, monkeypatch):
    """With parts of 2 KB: nothing larger is ever asked for, the checkpoint is the same, and so are its checksums."""
    source = load_torch(golden / "checkpoint_initial" / "model.pth.tar")["model"]
    whole = store.load(converted["initial"])
    asked: list[int] = []
    take = StackedViews.take

    def counted(self, index=()):
        part = take(self, index)
        asked.append(part.nbytes)
        return part

    monkeypatch.setattr(lazy_array, "PART", 2048)
    monkeypatch.setattr(StackedViews, "take", counted)
    linked = map_weights(source, whole.cfg, where="FILE")
    assert asked == []
    told: list[int] = []
    store.save(
        tmp_path / "small", Weights(linked, whole.cfg, whole.tokenizer, whole.retriever_tokenizer), tell=told.append
    )
    assert max(asked) < 2 * 2048
    assert sum(told) == sum(asked) == sum(array.nbytes for array in whole.params.values())
    small = store.load(tmp_path / "small")
    assert_same(small.params, whole.params)
    sums = [
        json.loads((folder / "atlas.json").read_text())["checksums"]
        for folder in (tmp_path / "small", converted["initial"])
    ]
    assert sums[0] == sums[1]
    assert sums[0]["params"] == {path: checksum(array) for path, array in whole.params.items()}


def test_orbax_alone_reads_it(converted):
    """What Orbax's own checkpointer restores is what was written."""
    folder = converted["linear"] / "params"
    with ocp.StandardCheckpointer() as checkpointer:
        there = checkpointer.metadata(folder).item_metadata
        found = checkpointer.restore(folder, {name: np.zeros(x.shape, x.dtype) for name, x in there.items()})
    assert_same(found, store.load(converted["linear"]).params)


def test_what_orbax_alone_wrote_is_read(converted, tmp_path):
    """Orbax's own format, one database of compressed arrays, as our checkpoints once were."""
    params = store.load(converted["initial"]).params
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", dict(params))
    assert (tmp_path / "params/manifest.ocdbt").is_file()
    sums = {path: checksum(array) for path, array in params.items()}
    found = orbax_arrays.open_arrays(tmp_path / "params", sums)
    assert_same({name: array.read() for name, array in found.items()}, params)


@pytest.mark.parametrize("to", ["orbax", "huggingface", "reference"])
def test_a_damaged_source_is_found_on_the_way(run, converted, tmp_path, to):
    """A flipped bit in our checkpoint: the array is named, and nothing is left of what was begun."""
    source = Path(shutil.copytree(converted["initial"], tmp_path / "source"))
    largest = max((path for path in (source / "params").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match=f"{source}/params: .* is not what was saved"):
        run(tmp_path / "out", model_path=source, to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("to", ["orbax", "huggingface", "reference"])
def test_too_little_room(run, converted, tmp_path, monkeypatch, to):
    """It is said before anything is written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(UserError, match=r"needs 0\.0 GB, but 0\.0 GB are left there; free some space"):
        run(tmp_path / "out", model_path=converted["initial"], to=to)
    assert list(tmp_path.iterdir()) == []


def test_exports_replace_nothing(run, converted, tmp_path):
    """An --output that is there is refused, and so is none."""
    (tmp_path / "out").mkdir()
    for to in ("huggingface", "reference"):
        with pytest.raises(UserError, match="out: is there; choose a new folder"):
            run(tmp_path / "out", model_path=converted["initial"], to=to)
    with pytest.raises(UserError, match="--output is missing"):
        convert.main(["--model_path", str(converted["initial"])])


# -- The published sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("untied", [False, True])
def test_every_published_model_fits(name, untied):
    """The true shapes of each published reader and the Contriever: all is taken once, both ways, without memory."""
    cfg = AtlasConfig(T5_CONFIGS[name], ContrieverConfig(), untied)
    number = np.float32(0)
    source = {e.name: np.broadcast_to(number, their_shape(e.name, cfg)) for e in weight_entries(cfg)}
    linked = map_weights(source, cfg, where="FILE")
    shapes = param_shapes(cfg)
    assert {path: x.shape for path, x in linked.items()} == {path: s.shape for path, s in shapes.items()}
    layers = Counter(e.path for e in weight_entries(cfg) if not e.alias)
    assert layers == {path: len(x.views) for path, x in linked.items()}
    back = exported(linked, cfg, aliases=True)
    assert {name: x.shape for name, x in back.items()} == {name: x.shape for name, x in source.items()}
    once = {id(x): x for x in back.values()}.values()
    assert sum(x.size for x in once) == sum(s.size for s in shapes.values()) == parameters(cfg)


def parameters(cfg: AtlasConfig) -> int:
    """Counted from the papers' shapes: matrices and vectors of a T5 and of a BERT."""
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


def test_loading_takes_each_array_once(converted, monkeypatch):
    """What a run loads is read array by array, each once."""
    read: list[str] = []
    original = orbax_arrays.Stored.read

    def counted(self, index=()):
        read.append(self.name)
        return original(self, index)

    monkeypatch.setattr(orbax_arrays.Stored, "read", counted)
    weights = store.load(converted["initial"])
    assert isinstance(weights, Weights)
    assert len(read) == len(set(read)) == len(weights.params)
