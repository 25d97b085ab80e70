"""The names of weights: the reference's on the left, ours on the right, and how the axes of one become the other's.

`{n}` is a layer's number; ours are stacked, so the layer is the leading axis of the array. Layouts are einops patterns
over one layer. Each table serves both directions.
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
    take,
)

Params = dict[str, np.ndarray]  # our path, as in "reader/encoder/layers/attn/q/kernel", to the array


class WeightRule(NamedTuple):
    """One weight of the reference and its place with us."""

    name: str
    path: str
    layout: str
    alias: bool = False  # a second name of the same array: may be absent, must be equal


SPLIT, MERGE = "(h k) d -> d h k", "d (h k) -> h k d"
TRANSPOSE = "o i -> i o"
VECTOR, MATRIX, HEADS = "d -> d", "v d -> v d", "(h k) -> h k"


def _attention(name: str, path: str) -> list[WeightRule]:
    return [WeightRule(f"{name}.{x}.weight", f"{path}/{x}/kernel", SPLIT) for x in "qkv"] + [
        WeightRule(f"{name}.o.weight", f"{path}/o/kernel", MERGE)
    ]


def _mlp(name: str, path: str, *, gated: bool) -> list[WeightRule]:
    up = [("wi_0", "gate"), ("wi_1", "up")] if gated else [("wi", "up")]
    return [WeightRule(f"{name}.{x}.weight", f"{path}/{ours}/kernel", TRANSPOSE) for x, ours in [*up, ("wo", "down")]]


def reader_rows(cfg: T5Config) -> list[WeightRule]:
    """T5 as Hugging Face and the reference name it."""
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
        *_attention(f"{encoder}.0.SelfAttention", "encoder/layers/attn"),
        WeightRule(f"{encoder}.0.layer_norm.weight", "encoder/layers/attn_norm/scale", VECTOR),
        *_mlp(f"{encoder}.1.DenseReluDense", "encoder/layers/mlp", gated=cfg.gated),
        WeightRule(f"{encoder}.1.layer_norm.weight", "encoder/layers/mlp_norm/scale", VECTOR),
        WeightRule("encoder.final_layer_norm.weight", "encoder/final_norm/scale", VECTOR),
        WeightRule(f"decoder.{relative}", "decoder/position_bias/embed/embedding", MATRIX),
        *_attention(f"{decoder}.0.SelfAttention", "decoder/layers/self_attn"),
        WeightRule(f"{decoder}.0.layer_norm.weight", "decoder/layers/self_attn_norm/scale", VECTOR),
        *_attention(f"{decoder}.1.EncDecAttention", "decoder/layers/cross_attn"),
        WeightRule(f"{decoder}.1.layer_norm.weight", "decoder/layers/cross_attn_norm/scale", VECTOR),
        *_mlp(f"{decoder}.2.DenseReluDense", "decoder/layers/mlp", gated=cfg.gated),
        WeightRule(f"{decoder}.2.layer_norm.weight", "decoder/layers/mlp_norm/scale", VECTOR),
        WeightRule("decoder.final_layer_norm.weight", "decoder/final_norm/scale", VECTOR),
    ]


def _dense(name: str, path: str, layouts: tuple[str, str]) -> list[WeightRule]:
    return [
        WeightRule(f"{name}.weight", f"{path}/kernel", layouts[0]),
        WeightRule(f"{name}.bias", f"{path}/bias", layouts[1]),
    ]


def _layer_norm(name: str, path: str) -> list[WeightRule]:
    return [WeightRule(f"{name}.weight", f"{path}/scale", VECTOR), WeightRule(f"{name}.bias", f"{path}/bias", VECTOR)]


def retriever_rows() -> list[WeightRule]:
    """BERT as Hugging Face and the reference name it."""
    layer = "encoder.layer.{n}"
    return [
        WeightRule("embeddings.word_embeddings.weight", "words/embedding", MATRIX),
        WeightRule("embeddings.position_embeddings.weight", "positions/embedding", MATRIX),
        WeightRule("embeddings.token_type_embeddings.weight", "token_types/embedding", MATRIX),
        *_layer_norm("embeddings.LayerNorm", "embed_norm"),
        *_dense(f"{layer}.attention.self.query", "layers/q", (SPLIT, HEADS)),
        *_dense(f"{layer}.attention.self.key", "layers/k", (SPLIT, HEADS)),
        *_dense(f"{layer}.attention.self.value", "layers/v", (SPLIT, HEADS)),
        *_dense(f"{layer}.attention.output.dense", "layers/o", (MERGE, VECTOR)),
        *_layer_norm(f"{layer}.attention.output.LayerNorm", "layers/attn_norm"),
        *_dense(f"{layer}.intermediate.dense", "layers/up", (TRANSPOSE, VECTOR)),
        *_dense(f"{layer}.output.dense", "layers/down", (TRANSPOSE, VECTOR)),
        *_layer_norm(f"{layer}.output.LayerNorm", "layers/mlp_norm"),
    ]


UNUSED = (  # names that published files carry and no model of ours needs
    r"embeddings\.position_ids$",  # a buffer: 0, 1, 2, ...
    r"(^|\.)pooler\.dense\.(weight|bias)$",  # BERT's head; Contriever takes the mean over tokens
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",  # of the first T5, unused
)


def retriever_names(*, untied: bool) -> dict[str, str]:
    """The reference's names of the encoders and ours."""
    if not untied:
        return {"contriever": "encoder"}
    return {"query_contriever": "query_encoder", "passage_contriever": "passage_encoder"}


class WeightEntry(NamedTuple):
    """One array of the reference's file: its name, where it goes (a layer of a stacked array, or all of it), how."""

    name: str
    path: str
    layer: int | None
    layout: str
    alias: bool
    sizes: dict[str, int]  # of the axes that a layout splits


def _expand(
    rows: list[WeightRule], prefix: str, path: str, depth: Mapping[str, int], heads: int
) -> Iterator[WeightEntry]:
    for row in rows:
        layered = "{n}" in row.name
        count = depth[row.path.split("/")[0]] if layered else 1
        sizes = {"h": heads} if "(h k)" in row.layout else {}
        for n in range(count):
            name = prefix + row.name.replace("{n}", str(n))
            yield WeightEntry(name, f"{path}/{row.path}", n if layered else None, row.layout, row.alias, sizes)


def weight_entries(cfg: AtlasConfig) -> list[WeightEntry]:
    """Every array that the reference's checkpoint of this shape holds."""
    found: list[WeightEntry] = []
    if cfg.reader:
        depth = {"encoder": cfg.reader.num_layers, "decoder": cfg.reader.num_decoder_layers}
        found += _expand(reader_rows(cfg.reader), "reader.", "reader", depth, cfg.reader.num_heads)
    if cfg.retriever:
        for theirs, ours in retriever_names(untied=cfg.untied).items():
            depth, heads = {"layers": cfg.retriever.num_layers}, cfg.retriever.num_heads
            found += _expand(retriever_rows(), f"retriever.{theirs}.", f"retriever/{ours}", depth, heads)
    return found


def _list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def import_weights(source: Mapping[str, np.ndarray], cfg: AtlasConfig, *, where: str) -> Params:
    """The reference's arrays as our parameters, float32; errors are those of `map_weights`."""
    return {path: linked.read() for path, linked in map_weights(source, cfg, where=where).items()}


def map_weights(source: Mapping[str, np.ndarray], cfg: AtlasConfig, *, where: str) -> dict[str, StackedViews]:
    """Our parameters, float32, to be read out of the reference's arrays; every name used once, each parameter filled.

    Raises UserError, naming the file `where`, if names are missing or left over, a shape is not that of `cfg`, or two
    names of one parameter differ: only for that, something is read.
    """
    wanted = weight_entries(cfg)
    names = {e.name for e in wanted}
    missing = [e.name for e in wanted if e.name not in source and not e.alias]
    left_over = [name for name in source if name not in names and not any(re.search(p, name) for p in UNUSED)]
    if missing or left_over:
        said = [f"it lacks {_list(missing)}"] if missing else []
        said += [f"nothing takes {_list(left_over)}"] if left_over else []
        raise UserError(
            f"{where}: not the weights of this model: {'; '.join(said)}; "
            "check --reader_model_type and --retriever_model_path"
        )
    shapes = param_shapes(cfg)
    views: dict[str, list[np.ndarray]] = {path: [] for path in shapes}  # of a stacked parameter in the layers' order
    aliases: list[tuple[WeightEntry, np.ndarray]] = []
    for e in wanted:
        if e.name in source:
            view = _view(source[e.name], _shape(shapes, e), e, where)
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
    stacked = {e.path for e in wanted if e.layer is not None}
    return {path: StackedViews(views[path], np.dtype(s.dtype), stacked=path in stacked) for path, s in shapes.items()}


def _shape(shapes: Mapping[str, jax.ShapeDtypeStruct], entry: WeightEntry) -> tuple[int, ...]:
    """That of a whole parameter of ours, or of a layer of it."""
    shape = tuple(shapes[entry.path].shape)
    return shape if entry.layer is None else shape[1:]


def _view(array: np.ndarray, shape: tuple[int, ...], entry: WeightEntry, where: str) -> np.ndarray:
    """An array of the reference's with its axes as ours; UserError if it is not of our shape then."""
    try:
        value = einops.rearrange(array, entry.layout, **entry.sizes)
    except einops.EinopsError:
        value = array
    if value.shape == shape:
        return value
    theirs = einops.rearrange(np.broadcast_to(np.float32(0), shape), _inverse(entry.layout), **entry.sizes).shape
    raise UserError(
        f"{where}: {entry.name} has shape {tuple(array.shape)}, this model needs {tuple(theirs)}; "
        "check --reader_model_type and --retriever_model_path"
    )


def _inverse(layout: str) -> str:
    ours, theirs = layout.split(" -> ")
    return f"{theirs} -> {ours}"


def export_weights(params: Mapping[str, np.ndarray], cfg: AtlasConfig) -> dict[str, np.ndarray]:
    """Our parameters under the reference's names and in its layouts; aliases are equal."""
    return {e.name: ExportedArray(params[e.path], e).read() for e in weight_entries(cfg)}


class ExportedArray(LazyArray):
    """One array of the reference's, to be made of a parameter of ours."""

    def __init__(self, parameter: ArrayLike, entry: WeightEntry):
        self.parameter, self.entry, self.dtype = parameter, entry, np.dtype(parameter.dtype)
        ours = tuple(parameter.shape if entry.layer is None else parameter.shape[1:])
        self.shape = self._rearranged(np.broadcast_to(np.zeros((), self.dtype), ours)).shape

    def read(self, index: Slices = ()) -> np.ndarray:
        return self._made_of(read, index)

    def take(self, index: Slices = ()) -> np.ndarray:
        return self._made_of(take, index)

    def _made_of(self, bring: Callable[[ArrayLike, Slices], np.ndarray], index: Slices) -> np.ndarray:
        layer = self.entry.layer
        ours = bring(self.parameter, ()) if layer is None else bring(self.parameter, (slice(layer, layer + 1),))[0]
        return contiguous(self._rearranged(ours), index)

    def _rearranged(self, ours: np.ndarray) -> np.ndarray:
        return einops.rearrange(ours, _inverse(self.entry.layout), **self.entry.sizes)


def strip_module_prefix(source: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names without the `module.` that PyTorch's data-parallel wrappers put in."""
    return {re.sub(r"(^|(?<=\.))module\.", "", name): array for name, array in source.items()}


def is_untied(source: Mapping[str, np.ndarray]) -> bool:
    """Whether these weights hold an encoder each for queries and passages."""
    return any(name.startswith("retriever.query_contriever.") for name in source)
