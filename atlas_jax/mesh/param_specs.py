"""PARAM_SPECS: which axis of each parameter is sharded over which axes of the mesh."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

AXES = ("data", "fsdp", "passages", "model")
BATCH_AXES = ("data", "fsdp")  # shard the queries of a batch
ROW_AXES = (*BATCH_AXES, "passages")  # shard rows of (query, passage) pairs
PARAM_AXES = ("fsdp", "passages")  # shard parameters; they are gathered before use
MODEL_AXIS = "model"  # shards parameters and the products that use them

Spec = tuple[Any, ...]  # for each axis of an array: the mesh axis or axes that shard it, or None

_READER_LAYER = r"(?:reader/(?:en|de)coder/layers/)?"  # optional: a path may be relative to its layer
_ATTENTION = _READER_LAYER + r"(?:self_|cross_)?attn/"
_RETRIEVER = r"(?:retriever/(?:query_|passage_)?encoder/)"
_BERT_LAYER = rf"(?:{_RETRIEVER}layers/)?"
PARAM_SPECS: tuple[tuple[str, Spec], ...] = (  # path, spec of one layer; stacked layers have one more axis in front
    (_ATTENTION + r"[qkv]/kernel", (PARAM_AXES, MODEL_AXIS, None)),  # d h k
    (_ATTENTION + r"o/kernel", (MODEL_AXIS, None, PARAM_AXES)),  # h k d
    (_READER_LAYER + r"mlp/(?:gate|up)/kernel", (PARAM_AXES, MODEL_AXIS)),  # d f
    (_READER_LAYER + r"mlp/down/kernel", (MODEL_AXIS, PARAM_AXES)),  # f d
    (r"reader/embed/embedding", (MODEL_AXIS, PARAM_AXES)),  # v d
    (r"reader/lm_head/kernel", (PARAM_AXES, MODEL_AXIS)),  # d v
    (_BERT_LAYER + r"[qkv]/kernel", (PARAM_AXES, None, None)),  # d h k
    (_BERT_LAYER + r"o/kernel", (None, None, PARAM_AXES)),  # h k d
    (_BERT_LAYER + r"up/kernel", (PARAM_AXES, None)),  # d f
    (_BERT_LAYER + r"down/kernel", (None, PARAM_AXES)),  # f d
    (_RETRIEVER + r"(?:words|positions)/embedding", (None, PARAM_AXES)),  # v d
    # Replicated, because small: norms, biases, relative position buckets, the two token types
    (r"(?:.*/)?(?:\w+_norm/(?:scale|bias)|[qkvo]/bias|(?:up|down)/bias)", ()),
    (r"reader/(?:en|de)coder/position_bias/embed/embedding", ()),
    (_RETRIEVER + r"token_types/embedding", ()),
)


def param_spec(path: str, ndim: int) -> Spec:
    """The spec of a parameter with `ndim` axes; KeyError unless exactly one row of PARAM_SPECS matches its path."""
    matching = [spec for pattern, spec in PARAM_SPECS if re.fullmatch(pattern, path)]
    if len(matching) != 1:
        raise KeyError(f"{path}: {len(matching)} rows of PARAM_SPECS match it, not one")
    return (None,) * (ndim - len(matching[0])) + matching[0]


def sharded_sizes(shapes: Mapping[str, Any]) -> dict[str, set[int]]:
    """The sizes that `fsdp` (for all of PARAM_AXES) and `model` should divide: those of the parameter axes they shard.

    `shapes` maps paths to arrays or shapes.
    """
    sizes = defaultdict(set)
    for path, x in shapes.items():
        for axes, n in zip(param_spec(path, len(x.shape)), x.shape, strict=True):
            if axes:
                sizes[MODEL_AXIS if axes == MODEL_AXIS else "fsdp"].add(n)
    return dict(sizes)


def uses_compute_dtype(path: str) -> bool:
    """Whether a parameter is used in the type of --precision, as matrices are but for the retriever's embeddings."""
    return path.endswith(("kernel", "reader/embed/embedding"))


def fit_spec(spec: Spec, shape: tuple[int, ...], mesh_sizes: Mapping[str, int]) -> PartitionSpec:
    """The spec without the mesh axes that do not divide a dimension.

    Of several axes for one dimension the longest prefix whose product divides it is kept. Dimensions that the spec does
    not name are replicated.
    """
    named = zip(spec, shape, strict=False)
    return PartitionSpec(*(_dividing_axes(axes, n, mesh_sizes) for axes, n in named))


def _dividing_axes(axes: str | tuple[str, ...] | None, n: int, mesh_sizes: Mapping[str, int]) -> tuple[str, ...] | None:
    chosen: list[str] = []
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        n, rest = divmod(n, mesh_sizes[axis])
        if rest:
            break
        chosen.append(axis)
    return tuple(chosen) or None
