"""The weight rules use every array of the reference once and fill every parameter of our models once."""

import functools
from collections import Counter
from pathlib import Path

import einops
import numpy as np
import pytest

from atlas_jax.checkpoints.formats.torch_reader import load_torch
from atlas_jax.checkpoints.pretrained import KNOWN_RETRIEVERS, folder_weights, reader_config, retriever_config
from atlas_jax.checkpoints.weights import (
    UNUSED,
    export_weights,
    hub_name,
    import_weights,
    is_untied,
    map_weights,
    strip_module_prefix,
    weight_entries,
)
from atlas_jax.config import READERS
from atlas_jax.errors import UserError
from atlas_jax.models.atlas import AtlasConfig, param_shapes
from atlas_jax.models.t5 import T5_CONFIGS

CHECKPOINTS = ("initial", "linear", "fixed_queryside")
CONTRIEVER = KNOWN_RETRIEVERS["facebook/contriever"]
PUBLISHED_SIZES = {  # numbers of parameters, as the papers and Hugging Face count them: a tied array once
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "google/t5-v1_1-base": 247_577_856,
    "google/t5-v1_1-large": 783_150_080,
    "google/t5-v1_1-xl": 2_849_757_184,
    "google/t5-v1_1-xxl": 11_135_332_352,
}


def golden_config(golden: Path, name: str) -> AtlasConfig:
    """Returns the config of a golden checkpoint's models."""
    assets = golden / "assets"
    return AtlasConfig(
        reader_config(f"{assets}/reader"), retriever_config(f"{assets}/retriever"), untied=name == "fixed_queryside"
    )


def golden_arrays(golden: Path, name: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a golden checkpoint by the reference's names."""
    return dict(load_torch(golden / f"checkpoint_{name}" / "model.pth.tar")["model"])


def t5_1_0(golden: Path) -> tuple[dict[str, np.ndarray], AtlasConfig]:
    """Returns the arrays and the config of a tied T5 with ReLU, as Hugging Face saves it."""
    folder = str(golden / "t5_1_0")
    arrays = folder_weights(folder)
    assert arrays
    return {f"reader.{key}": array for key, array in arrays.items()}, AtlasConfig(reader_config(folder), None)


def refusal(source: dict[str, np.ndarray], cfg: AtlasConfig, flag: str = "--re") -> str:
    with pytest.raises(UserError) as caught:
        import_weights(source, cfg, where="FILE")
    message = str(caught.value)
    assert message.startswith("FILE: ")
    assert f"; check {flag}" in message
    assert "\n" not in message
    return message


def fill_with_numbers(source: dict[str, np.ndarray], cfg: AtlasConfig) -> tuple[dict[str, np.ndarray], int]:
    """Returns arrays of the same shapes filled with 1, 2, 3, ..., repeated only in aliases, and the last number."""
    filled, count = {}, 0
    paths = {e.name: (e.path, e.layer) for e in weight_entries(cfg)}
    aliased: dict[object, np.ndarray] = {}
    for name, array in source.items():
        if name not in paths:
            filled[name] = array
            continue
        target = paths[name]
        if target not in aliased:
            aliased[target] = (count + 1 + np.arange(array.size, dtype=np.float32)).reshape(array.shape)
            count += array.size
        filled[name] = aliased[target]
    assert count < 2**24  # float32 holds them all
    return filled, count


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_number_arrives_exactly_once(golden, name):
    """Importing a checkpoint filled with 1, 2, 3, ... fills every parameter, and each number arrives once."""
    cfg = golden_config(golden, name)
    source, count = fill_with_numbers(golden_arrays(golden, name), cfg)
    params = import_weights(source, cfg, where="FILE")
    assert {path: array.shape for path, array in params.items()} == {p: s.shape for p, s in param_shapes(cfg).items()}
    arrived = np.sort(np.concatenate([array.reshape(-1) for array in params.values()]))
    np.testing.assert_array_equal(arrived, 1 + np.arange(count, dtype=np.float32))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_name_is_used_exactly_once(golden, name):
    """The rules have each array of the file once, but for unused names; names that the file lacks are aliases."""
    cfg, source = golden_config(golden, name), golden_arrays(golden, name)
    name_counts = Counter(e.name for e in weight_entries(cfg))
    assert set(name_counts.values()) == {1}
    assert {key for key in source if key not in name_counts} == {key for key in source if key.endswith("position_ids")}
    assert {e.name for e in weight_entries(cfg) if e.name not in source} <= {
        e.name for e in weight_entries(cfg) if e.alias
    }
    assert is_untied(source) == cfg.untied
    targets = Counter((e.path, e.layer) for e in weight_entries(cfg) if not e.alias)
    assert set(targets.values()) == {1}
    layers = Counter(path for path, layer in targets if layer is not None)
    assert {p: s.shape[0] for p, s in param_shapes(cfg).items() if p in layers} == layers
    assert {path for path, _ in targets} == set(param_shapes(cfg))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_missing_and_unexpected_names_are_refused(golden, name, monkeypatch):
    """An import with any one name missing or unexpected is refused and names it; one name of an array may be absent."""
    monkeypatch.setattr("atlas_jax.checkpoints.weights.param_shapes", functools.cache(param_shapes))  # for speed
    cfg, source = golden_config(golden, name), golden_arrays(golden, name)
    optional = {e.name for e in weight_entries(cfg) if e.alias} | {"reader.shared.weight"}
    optional |= {key for key in source if key.endswith("position_ids")}
    assert len(optional) == 5 if cfg.untied else 4
    for key in source:
        remaining = {other: array for other, array in source.items() if other != key}
        if key in optional:
            import_weights(remaining, cfg, where="FILE")
        else:
            assert f"it lacks {key};" in refusal(remaining, cfg)
    for extra in ("reader.encoder.block.3.layer.0.layer_norm.weight", "retriever.contriever.x", "reader.module", ""):
        assert f"nothing takes {extra};" in refusal(source | {extra: np.zeros(1, np.float32)}, cfg)
    assert any(pattern.startswith(r"(^|\.)pooler") for pattern in UNUSED)  # harmless, so no refusal:
    import_weights(source | {"retriever.contriever.pooler.dense.bias": np.zeros(1, np.float32)}, cfg, where="FILE")


def test_a_message_about_many_names_is_short(golden):
    """A file of 1000 unexpected names is refused in one line of bounded length."""
    message = refusal({f"x.{n}": np.zeros(1, np.float32) for n in range(1000)}, golden_config(golden, "initial"))
    assert "and 996 more" in message
    assert len(message) < 1000


@pytest.mark.parametrize("name", ["initial", "fixed_queryside"])
def test_a_changed_shape_is_refused_with_both_shapes(golden, name, monkeypatch):
    """An array that is longer or has another rank is refused; the message has its shape and the expected one."""
    monkeypatch.setattr("atlas_jax.checkpoints.weights.param_shapes", functools.cache(param_shapes))  # for speed
    cfg, source = golden_config(golden, name), golden_arrays(golden, name)
    for key, array in source.items():
        if key.endswith("position_ids"):
            continue
        longer = np.concatenate([array, array[:1]])
        flag = "--retriever_model_path" if key.startswith("retriever.") else "--reader_model_type"
        message = refusal(source | {key: longer}, cfg, flag)
        assert f"{key} has shape {longer.shape}, this model needs {array.shape};" in message
    key = "reader.encoder.block.0.layer.0.SelfAttention.q.weight"
    for changed in (source[key][None], source[key].reshape(-1), source[key].T[:, :-1]):
        assert f"{key} has shape {changed.shape}, this model needs (64, 64);" in refusal(source | {key: changed}, cfg)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_import_then_export_is_bit_exact(golden, name):
    """export_weights(import_weights(x)) equals x bit for bit, with the same names, aliases included."""
    cfg, source = golden_config(golden, name), golden_arrays(golden, name)
    exported = export_weights(import_weights(source, cfg, where="FILE"), cfg)
    assert set(exported) == {key for key in source if not key.endswith("position_ids")}
    for key, array in exported.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array.view(np.uint32), source[key].view(np.uint32))


def test_half_precision_is_widened_exactly(golden):
    """Files in float16 give float32 parameters with exactly the same values."""
    cfg, source = golden_config(golden, "initial"), golden_arrays(golden, "initial")
    half = {key: array.astype(np.float16) for key, array in source.items()}
    for path, array in import_weights(half, cfg, where="FILE").items():
        assert array.dtype == np.float32, path
    exported = export_weights(import_weights(half, cfg, where="FILE"), cfg)
    key = "reader.decoder.block.2.layer.2.DenseReluDense.wo.weight"
    np.testing.assert_array_equal(exported[key], half[key].astype(np.float32))


def test_data_parallel_prefixes_are_stripped(golden):
    """`module.` before or inside names, as PyTorch's wrappers insert it, is removed, but not from `my_module`."""
    source = golden_arrays(golden, "initial")
    for wrap in (
        lambda key: f"module.{key}",
        lambda key: key.replace(".", ".module.", 1),
        lambda key: "module." + key.replace(".", ".module.", 1),
    ):
        wrapped = {wrap(key): array for key, array in source.items()}
        assert list(strip_module_prefix(wrapped)) == list(source)
        assert all(a is b for a, b in zip(strip_module_prefix(wrapped).values(), source.values(), strict=True))
    assert list(strip_module_prefix({"reader.my_module.weight": np.zeros(1)})) == ["reader.my_module.weight"]
    untied = golden_arrays(golden, "fixed_queryside")
    assert is_untied(strip_module_prefix({f"module.{key}": array for key, array in untied.items()}))


def test_an_alias_that_differs_is_refused(golden):
    """embed_tokens and a tied T5's lm_head must equal the shared embedding; an untied lm_head may differ."""
    cfg, source = golden_config(golden, "initial"), golden_arrays(golden, "initial")
    for key in ("reader.encoder.embed_tokens.weight", "reader.decoder.embed_tokens.weight"):
        changed = source[key].copy()
        changed[7, 3] += 1e-3
        assert f"{key} differs from reader/embed/embedding" in refusal(source | {key: changed}, cfg)
    head = "reader.lm_head.weight"
    assert not np.array_equal(source[head], source["reader.shared.weight"])  # untied: both are used
    tied, tied_cfg = t5_1_0(golden)
    shared = tied["reader.shared.weight"]
    import_weights(tied | {head: shared.copy()}, tied_cfg, where="FILE")
    assert f"{head} differs" in refusal(tied | {head: shared + 1}, tied_cfg)


def test_t5_1_0_fills_every_parameter(golden):
    """T5 1.0, tied, with ReLU and unequal depths, is imported number by number; its unused bias may be present."""
    source, cfg = t5_1_0(golden)
    assert cfg.reader
    assert (cfg.reader.tied, cfg.reader.gated) == (True, False)
    assert (cfg.reader.num_layers, cfg.reader.num_decoder_layers) == (2, 3)
    filled, count = fill_with_numbers(source, cfg)
    params = import_weights(filled, cfg, where="FILE")
    arrived = np.sort(np.concatenate([array.reshape(-1) for array in params.values()]))
    np.testing.assert_array_equal(arrived, 1 + np.arange(count, dtype=np.float32))
    assert "reader/lm_head/kernel" not in params
    unused = "reader.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    import_weights(source | {unused: np.zeros((32, 5), np.float32)}, cfg, where="FILE")
    required = unused.replace("decoder", "encoder").replace("1.EncDec", "0.Self")
    assert f"it lacks {required};" in refusal({key: array for key, array in source.items() if key != required}, cfg)


def their_shape(name: str, cfg: AtlasConfig) -> tuple[int, ...]:
    """Returns the shape of an array of the reference by its name; PyTorch's Linear is (out, in)."""
    model, remainder = name.split(".", 1)
    last = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if model == "reader":
        t5 = cfg.reader
        assert t5
        inner = t5.num_heads * t5.head_dim
        if last in ("q", "k", "v"):
            return inner, t5.d_model
        return {
            "o": (t5.d_model, inner),
            **dict.fromkeys(("wi", "wi_0", "wi_1"), (t5.d_ff, t5.d_model)),
            "wo": (t5.d_model, t5.d_ff),
            **dict.fromkeys(("shared", "embed_tokens", "lm_head"), (t5.vocab_size, t5.d_model)),
            "relative_attention_bias": (t5.relative_buckets, t5.num_heads),
            **dict.fromkeys(("layer_norm", "final_layer_norm"), (t5.d_model,)),
        }[last]
    bert = cfg.retriever
    assert bert
    out = bert.d_ff if "intermediate" in remainder else bert.d_model
    if name.endswith("bias") or "LayerNorm" in remainder:
        return (out,)
    rows = {
        "word_embeddings": bert.vocab_size,
        "position_embeddings": bert.max_positions,
        "token_type_embeddings": bert.type_vocab_size,
    }
    if last in rows:
        return rows[last], bert.d_model
    return out, bert.d_ff if "output" in remainder and "attention" not in remainder else bert.d_model


@pytest.mark.parametrize("name", T5_CONFIGS)
def test_every_published_shape_fits(name):
    """Each entry's layout maps PyTorch's shape to ours for every published size, without allocating arrays."""
    cfg = AtlasConfig(T5_CONFIGS[name], CONTRIEVER, untied=True)
    our_shapes = param_shapes(cfg)
    for e in weight_entries(cfg):
        array = np.broadcast_to(np.float32(0), their_shape(e.name, cfg))  # a view of one scalar
        mapped_shape = einops.rearrange(array, e.layout, **e.sizes).shape
        expected = our_shapes[e.path].shape
        assert mapped_shape == (expected if e.layer is None else expected[1:]), e.name
    assert {e.path for e in weight_entries(cfg)} == set(our_shapes)


def test_computed_shapes_are_those_of_the_files(golden):
    """The shapes that `their_shape` computes from names are those in the reference's own files."""
    for name in CHECKPOINTS:
        cfg = golden_config(golden, name)
        for key, array in golden_arrays(golden, name).items():
            if not key.endswith("position_ids"):
                assert their_shape(key, cfg) == array.shape, key


@pytest.mark.parametrize("name", T5_CONFIGS)
def test_readers_have_the_published_sizes(name):
    """Each published T5 has the published number of parameters."""
    cfg = AtlasConfig(T5_CONFIGS[name], None)
    base_name = name.removesuffix("-lm-adapt").replace("google/t5-", "google/t5-v1_1-") if "lm-adapt" in name else name
    assert sum(shape.size for shape in param_shapes(cfg).values()) == PUBLISHED_SIZES[base_name]


def test_the_contriever_has_the_published_size():
    """Contriever has 109 million parameters, BERT base without its pooler; untied, twice as many."""
    assert sum(shape.size for shape in param_shapes(AtlasConfig(None, CONTRIEVER)).values()) == 108_891_648
    untied = AtlasConfig(None, CONTRIEVER, untied=True)
    assert sum(shape.size for shape in param_shapes(untied).values()) == 2 * 108_891_648


def test_help_lists_the_readers_with_known_configs():
    """READERS, which --help lists, are exactly the readers with known configs, in the same order."""
    assert tuple(T5_CONFIGS) == READERS


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_each_name_of_the_embedding_is_enough(golden, tiny_weights, tied, name):
    """safetensors' save_model keeps one of the names of a shared array, and which one is chance."""
    arrays, cfg = t5_1_0(golden) if tied else (golden_arrays(golden, "initial"), golden_config(golden, "initial"))
    expected = import_weights(arrays, cfg, where="file")["reader/embed/embedding"]
    names = [f"reader.{n}.weight" for n in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")]
    names += ["reader.lm_head.weight"] if tied else []
    embedding = arrays["reader.shared.weight"]
    for other in names:
        arrays.pop(other, None)
    with pytest.raises(UserError, match=r"it lacks reader\.shared\.weight; check --reader_model_type$"):
        map_weights(arrays, cfg, where="file")
    found = import_weights(arrays | {f"reader.{name}": embedding}, cfg, where="file")
    np.testing.assert_array_equal(found["reader/embed/embedding"], expected)
    others = {f"reader.{name}": embedding, names[names[0] == f"reader.{name}"]: embedding + 1}
    with pytest.raises(UserError, match="differs from reader/embed/embedding"):
        map_weights(arrays | others, cfg, where="file")


def test_old_and_prefixed_names_of_bert_and_heads_are_read(golden):
    """gamma and beta for weight and bias, prefixes, and heads that no retriever needs, are no obstacle."""
    folder = golden / "assets" / "retriever"
    arrays = folder_weights(str(folder))
    assert hub_name("bert.embeddings.LayerNorm.gamma") == "embeddings.LayerNorm.weight"
    assert hub_name("module.bert.encoder.layer.0.output.LayerNorm.beta") == "encoder.layer.0.output.LayerNorm.bias"
    assert {hub_name(f"model.{name}") for name in arrays} == arrays.keys()
    heads = ("cls.predictions.bias", "cls.seq_relationship.weight", "qa_outputs.weight", "classifier.bias")
    named = {f"retriever.contriever.{name}": array for name, array in arrays.items()}
    cfg = AtlasConfig(None, retriever_config(str(folder)))
    extra = {f"retriever.contriever.{name}": np.zeros(2) for name in heads}
    assert map_weights(named | extra, cfg, where="file").keys() == map_weights(named, cfg, where="file").keys()
    with pytest.raises(UserError, match=r"nothing takes retriever\.contriever\.x; check --retriever_model_path$"):
        map_weights(named | {"retriever.contriever.x": np.zeros(2)}, cfg, where="file")
