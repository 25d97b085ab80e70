"""Weight names: rules from the reference's names and layouts to our parameter paths and layouts, for both directions.

`{n}` in a rule's name is a layer number; our layers are stacked, so the layer is the leading axis of our array. Layouts
are einops patterns over one layer.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import einops
import jax
import numpy as np

from atlas_jax.errors import UserError
from atlas_jax.models.atlas import AtlasConfig, param_shapes
from atlas_jax.models.t5 import T5Config
from atlas_jax.storage.lazy_array import (
    ArrayLike,
    LazyArray,
    Slices,
    StackedViews,
    arrays_equal,
    contiguous,
    read,
    read_once,
)

Params = dict[str, np.ndarray]  # our parameter path, such as "reader/encoder/layers/attn/q/kernel", -> array


class WeightRule(NamedTuple):
    """Maps one weight name of the reference to one of our parameter paths, with the einops pattern between them."""

    name: str
    path: str
    layout: str
    alias: bool = False  # another name of an array: stands in for it, or is equal to it, or is absent


SPLIT, MERGE = "(h k) d -> d h k", "d (h k) -> h k d"
TRANSPOSE = "o i -> i o"
VECTOR, MATRIX, HEADS = "d -> d", "v d -> v d", "(h k) -> h k"


def _attention_rules(name: str, path: str) -> list[WeightRule]:
    return [WeightRule(f"{name}.{projection}.weight", f"{path}/{projection}/kernel", SPLIT) for projection in "qkv"] + [
        WeightRule(f"{name}.o.weight", f"{path}/o/kernel", MERGE)
    ]


def _mlp_rules(name: str, path: str, *, gated: bool) -> list[WeightRule]:
    up = [("wi_0", "gate"), ("wi_1", "up")] if gated else [("wi", "up")]
    return [
        WeightRule(f"{name}.{layer}.weight", f"{path}/{our_layer}/kernel", TRANSPOSE)
        for layer, our_layer in [*up, ("wo", "down")]
    ]


def reader_rules(cfg: T5Config) -> list[WeightRule]:
    """Rules for T5, whose names Hugging Face and the reference share."""
    encoder, decoder = "encoder.block.{n}.layer", "decoder.block.{n}.layer"
    relative = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return [
        WeightRule("shared.weight", "embed/embedding", MATRIX),
        WeightRule("encoder.embed_tokens.weight", "embed/embedding", MATRIX, alias=True),
        WeightRule("decoder.embed_tokens.weight", "embed/embedding", MATRIX, alias=True),
        WeightRule("lm_head.weight", "embed/embedding", MATRIX, alias=True)
        if cfg.tied
        else WeightRule("lm_head.weight", "lm_head/kernel", TRANSPOSE),
        WeightRule(f"encoder.{relative}", "encoder/position_bias/embed/embedding", MATRIX),
        *_attention_rules(f"{encoder}.0.SelfAttention", "encoder/layers/attn"),
        WeightRule(f"{encoder}.0.layer_norm.weight", "encoder/layers/attn_norm/scale", VECTOR),
        *_mlp_rules(f"{encoder}.1.DenseReluDense", "encoder/layers/mlp", gated=cfg.gated),
        WeightRule(f"{encoder}.1.layer_norm.weight", "encoder/layers/mlp_norm/scale", VECTOR),
        WeightRule("encoder.final_layer_norm.weight", "encoder/final_norm/scale", VECTOR),
        WeightRule(f"decoder.{relative}", "decoder/position_bias/embed/embedding", MATRIX),
        *_attention_rules(f"{decoder}.0.SelfAttention", "decoder/layers/self_attn"),
        WeightRule(f"{decoder}.0.layer_norm.weight", "decoder/layers/self_attn_norm/scale", VECTOR),
        *_attention_rules(f"{decoder}.1.EncDecAttention", "decoder/layers/cross_attn"),
        WeightRule(f"{decoder}.1.layer_norm.weight", "decoder/layers/cross_attn_norm/scale", VECTOR),
        *_mlp_rules(f"{decoder}.2.DenseReluDense", "decoder/layers/mlp", gated=cfg.gated),
        WeightRule(f"{decoder}.2.layer_norm.weight", "decoder/layers/mlp_norm/scale", VECTOR),
        WeightRule("decoder.final_layer_norm.weight", "decoder/final_norm/scale", VECTOR),
    ]


def _dense_rules(name: str, path: str, layouts: tuple[str, str]) -> list[WeightRule]:
    return [
        WeightRule(f"{name}.weight", f"{path}/kernel", layouts[0]),
        WeightRule(f"{name}.bias", f"{path}/bias", layouts[1]),
    ]


def _layer_norm_rules(name: str, path: str) -> list[WeightRule]:
    return [WeightRule(f"{name}.weight", f"{path}/scale", VECTOR), WeightRule(f"{name}.bias", f"{path}/bias", VECTOR)]


def retriever_rules() -> list[WeightRule]:
    """Rules for BERT, whose names Hugging Face and the reference share."""
    layer = "encoder.layer.{n}"
    return [
        WeightRule("embeddings.word_embeddings.weight", "words/embedding", MATRIX),
        WeightRule("embeddings.position_embeddings.weight", "positions/embedding", MATRIX),
        WeightRule("embeddings.token_type_embeddings.weight", "token_types/embedding", MATRIX),
        *_layer_norm_rules("embeddings.LayerNorm", "embed_norm"),
        *_dense_rules(f"{layer}.attention.self.query", "layers/q", (SPLIT, HEADS)),
        *_dense_rules(f"{layer}.attention.self.key", "layers/k", (SPLIT, HEADS)),
        *_dense_rules(f"{layer}.attention.self.value", "layers/v", (SPLIT, HEADS)),
        *_dense_rules(f"{layer}.attention.output.dense", "layers/o", (MERGE, VECTOR)),
        *_layer_norm_rules(f"{layer}.attention.output.LayerNorm", "layers/attn_norm"),
        *_dense_rules(f"{layer}.intermediate.dense", "layers/up", (TRANSPOSE, VECTOR)),
        *_dense_rules(f"{layer}.output.dense", "layers/down", (TRANSPOSE, VECTOR)),
        *_layer_norm_rules(f"{layer}.output.LayerNorm", "layers/mlp_norm"),
    ]


UNUSED = (  # patterns of names in published files that our models do not use
    r"embeddings\.position_ids$",  # a buffer: 0, 1, 2, ...
    r"(^|\.)pooler\.dense\.(weight|bias)$",  # BERT's head; Contriever takes the mean over tokens
    r"(^|\.)(cls|qa_outputs|classifier|classification_head)\.",  # heads of models that were trained for other tasks
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",  # T5 1.0 has it and ignores it
)


def encoder_names(*, untied: bool) -> dict[str, str]:
    """Maps the reference's names of the retriever's encoders to ours."""
    if not untied:
        return {"contriever": "encoder"}
    return {"query_contriever": "query_encoder", "passage_contriever": "passage_encoder"}


class WeightEntry(NamedTuple):
    """One array of the reference's file and the parameter, or the layer of a stacked parameter, that it maps to."""

    name: str
    path: str
    layer: int | None  # None: the whole parameter
    layout: str
    alias: bool
    sizes: dict[str, int]  # sizes of the axes that the layout splits or merges


def _expand(
    rules: list[WeightRule], prefix: str, path: str, depth: Mapping[str, int], heads: int
) -> Iterator[WeightEntry]:
    for rule in rules:
        layered = "{n}" in rule.name
        count = depth[rule.path.split("/")[0]] if layered else 1
        sizes = {"h": heads} if "(h k)" in rule.layout else {}
        for n in range(count):
            name = prefix + rule.name.replace("{n}", str(n))
            yield WeightEntry(name, f"{path}/{rule.path}", n if layered else None, rule.layout, rule.alias, sizes)


def weight_entries(cfg: AtlasConfig) -> list[WeightEntry]:
    """Lists every array of a reference checkpoint with this configuration."""
    entries: list[WeightEntry] = []
    if cfg.reader:
        depth = {"encoder": cfg.reader.num_layers, "decoder": cfg.reader.num_decoder_layers}
        entries += _expand(reader_rules(cfg.reader), "reader.", "reader", depth, cfg.reader.num_heads)
    if cfg.retriever:
        for reference_name, our_name in encoder_names(untied=cfg.untied).items():
            depth, heads = {"layers": cfg.retriever.num_layers}, cfg.retriever.num_heads
            entries += _expand(retriever_rules(), f"retriever.{reference_name}.", f"retriever/{our_name}", depth, heads)
    return entries


def _join_names(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def import_weights(source: Mapping[str, np.ndarray], cfg: AtlasConfig, *, where: str) -> Params:
    """Converts the reference's arrays to our parameters, in float32; raises what `map_weights` raises."""
    return {path: lazy.read() for path, lazy in map_weights(source, cfg, where=where).items()}


def map_weights(source: Mapping[str, np.ndarray], cfg: AtlasConfig, *, where: str) -> dict[str, StackedViews]:
    """Maps our parameter paths to lazy float32 arrays over the reference's arrays, each of which is used once.

    UserError, naming the file `where`, if names are missing or unexpected, a shape does not fit `cfg`, or two names of
    one parameter have different values. Only that comparison reads values.
    """
    entries = _with_stand_ins(weight_entries(cfg), source)
    names = {e.name for e in entries}
    missing = [e.name for e in entries if e.name not in source and not e.alias]
    unexpected = [name for name in source if name not in names and not any(re.search(p, name) for p in UNUSED)]
    if missing or unexpected:
        problems = [f"it lacks {_join_names(missing)}"] if missing else []
        problems += [f"nothing takes {_join_names(unexpected)}"] if unexpected else []
        problem = f"not the weights of this model: {'; '.join(problems)}"
        raise UserError(f"{where}: {problem}; check {_flags_of(missing + unexpected)}")
    shapes = param_shapes(cfg)
    views: dict[str, list[np.ndarray]] = {path: [] for path in shapes}  # one per layer, in order, or a single one
    aliases: list[tuple[WeightEntry, np.ndarray]] = []
    for e in entries:
        if e.name in source:
            view = _rearranged_view(source[e.name], _entry_shape(shapes, e), e, where)
            if e.alias:
                aliases.append((e, view))
            else:
                views[e.path].append(view)
    for e, view in aliases:
        if not arrays_equal(views[e.path][0], view):
            raise UserError(
                f"{where}: {e.name} differs from {e.path}, but this model has one array for both; "
                "check --reader_model_type (T5 1.0 ties its output to its input, 1.1 does not)"
            )
    stacked = {e.path for e in entries if e.layer is not None}
    return {path: StackedViews(views[path], np.dtype(s.dtype), stacked=path in stacked) for path, s in shapes.items()}


def _with_stand_ins(entries: list[WeightEntry], source: Mapping[str, np.ndarray]) -> list[WeightEntry]:
    """The entries, where an alias that is there takes the place of a name that is not.

    Hugging Face writes T5's embedding under any of its names: `shared`, `encoder.embed_tokens`, `decoder.embed_tokens`.
    """
    absent = {e.path for e in entries if not e.alias and e.name not in source}
    stand_ins = {e.path: e.name for e in reversed(entries) if e.alias and e.path in absent and e.name in source}
    return [e._replace(alias=e.name != stand_ins[e.path]) if e.path in stand_ins else e for e in entries]


def _flags_of(names: list[str]) -> str:
    """The flags that name the models of these weights."""
    flags = {"reader.": "--reader_model_type", "retriever.": "--retriever_model_path"}
    named = [flag for prefix, flag in flags.items() if any(name.startswith(prefix) for name in names)]
    return " and ".join(named or flags.values())


def _entry_shape(shapes: Mapping[str, jax.ShapeDtypeStruct], entry: WeightEntry) -> tuple[int, ...]:
    """Returns the shape of the parameter, or of one layer if the parameter is stacked."""
    shape = tuple(shapes[entry.path].shape)
    return shape if entry.layer is None else shape[1:]


def _rearranged_view(array: np.ndarray, shape: tuple[int, ...], entry: WeightEntry, where: str) -> np.ndarray:
    """Returns a view of the reference's array in our layout; UserError unless that has the shape `shape`."""
    try:
        rearranged = einops.rearrange(array, entry.layout, **entry.sizes)
    except einops.EinopsError:
        rearranged = array
    if rearranged.shape == shape:
        return rearranged
    expected = einops.rearrange(
        np.broadcast_to(np.float32(0), shape), _inverse_layout(entry.layout), **entry.sizes
    ).shape
    raise UserError(
        f"{where}: {entry.name} has shape {tuple(array.shape)}, this model needs {tuple(expected)}; "
        f"check {_flags_of([entry.name])}"
    )


def _inverse_layout(layout: str) -> str:
    source, target = layout.split(" -> ")
    return f"{target} -> {source}"


def export_weights(params: Mapping[str, np.ndarray], cfg: AtlasConfig) -> dict[str, np.ndarray]:
    """Converts our parameters to the reference's names and layouts; an alias equals the array that it names."""
    return {e.name: ExportedArray(params[e.path], e).read() for e in weight_entries(cfg)}


class ExportedArray(LazyArray):
    """An array of the reference's file, computed from one of our parameters when it is read."""

    def __init__(self, parameter: ArrayLike, entry: WeightEntry):
        self.parameter, self.entry, self.dtype = parameter, entry, np.dtype(parameter.dtype)
        our_shape = tuple(parameter.shape if entry.layer is None else parameter.shape[1:])
        self.shape = self._rearrange(np.broadcast_to(np.zeros((), self.dtype), our_shape)).shape

    def read(self, index: Slices = ()) -> np.ndarray:
        return self._export(read, index)

    def read_once(self, index: Slices = ()) -> np.ndarray:
        return self._export(read_once, index)

    def _export(self, fetch: Callable[[ArrayLike, Slices], np.ndarray], index: Slices) -> np.ndarray:
        layer = self.entry.layer
        array = fetch(self.parameter, ()) if layer is None else fetch(self.parameter, (slice(layer, layer + 1),))[0]
        return contiguous(self._rearrange(array), index)

    def _rearrange(self, array: np.ndarray) -> np.ndarray:
        return einops.rearrange(array, _inverse_layout(self.entry.layout), **self.entry.sizes)


def hub_name(name: str) -> str:
    """The usual name of a weight that Hugging Face's files may call otherwise: with a prefix, or as old BERTs did."""
    name = re.sub(r"^(module\.|model\.|bert\.|auto_model\.)+", "", name)
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{'weight' if m[1] == 'gamma' else 'bias'}", name)


def strip_module_prefix(source: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Strips the `module.` that PyTorch's data-parallel wrappers insert into names."""
    return {re.sub(r"(^|(?<=\.))module\.", "", name): array for name, array in source.items()}


def is_untied(source: Mapping[str, np.ndarray]) -> bool:
    """Whether the reference's weights have separate encoders for queries and passages."""
    return any(name.startswith("retriever.query_contriever.") for name in source)
