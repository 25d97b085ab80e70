"""ATLAS: a retriever that embeds queries and passages, and a reader that answers from the retrieved passages."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from atlas_jax.models.contriever import Contriever, ContrieverConfig
from atlas_jax.models.fid import FiD
from atlas_jax.models.t5 import T5Config
from atlas_jax.storage.lazy_array import ArrayLike


@dataclasses.dataclass(frozen=True)
class AtlasConfig:
    """Configs of both models; with `untied`, queries and passages have separate encoders."""

    reader: T5Config | None  # None: retrieval only
    retriever: ContrieverConfig | None  # None: passages come with the questions
    untied: bool = False

    def with_computation(self, **changes: Any) -> "AtlasConfig":
        """Returns a copy with `dtype`, `dropout` or `for_cpu` replaced in both models' configs; no shape changes."""
        reader = dataclasses.replace(self.reader, **changes) if self.reader else None
        retriever = dataclasses.replace(self.retriever, **changes) if self.retriever else None
        return dataclasses.replace(self, reader=reader, retriever=retriever)


class Retriever(nnx.Module):
    """Contriever for queries and passages: one encoder for both or, if `untied`, one for each."""

    def __init__(self, cfg: ContrieverConfig, *, untied: bool, rngs: nnx.Rngs):
        if untied:
            self.query_encoder = Contriever(cfg, rngs=rngs)
            self.passage_encoder = Contriever(cfg, rngs=rngs)
        else:
            self.encoder = Contriever(cfg, rngs=rngs)
        self.untied = untied

    def encoder_of(self, side: Literal["query", "passage"]) -> Contriever:
        """Returns the encoder of queries or of passages."""
        if not self.untied:
            return self.encoder
        return self.query_encoder if side == "query" else self.passage_encoder

    def __call__(
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"],
        *,
        side: Literal["query", "passage"],
        rngs: nnx.Rngs | None = None,
        remat: bool = False,
    ) -> Float[Array, "b d"]:
        """Embeds a batch of queries or of passages, in float32."""
        return self.encoder_of(side)(ids, mask, rngs=rngs, remat=remat)


class AtlasModel(nnx.Module):
    """The pair of reader and retriever; either is None where `cfg` has no config for it."""

    def __init__(self, cfg: AtlasConfig, *, rngs: nnx.Rngs):
        self.reader = FiD(cfg.reader, rngs=rngs) if cfg.reader else None
        self.retriever = Retriever(cfg.retriever, untied=cfg.untied, rngs=rngs) if cfg.retriever else None
        self.cfg = cfg


def param_shapes(cfg: AtlasConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of every parameter by path, such as `reader/embed/embedding`, without allocating any."""
    model = nnx.eval_shape(lambda: AtlasModel(cfg, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): jax.ShapeDtypeStruct(v.shape, v.dtype) for path, v in flat}


@functools.cache
def _abstract_model(cfg: AtlasConfig) -> tuple[Any, Any]:
    """Returns the graph definition of a model and its flat state by path, shapes only: nothing is allocated."""
    graph, state = nnx.split(nnx.eval_shape(lambda: AtlasModel(cfg, rngs=nnx.Rngs(0))))
    return graph, nnx.to_flat_state(state)


def build_model(
    params: Mapping[str, ArrayLike | jax.Array | jax.ShapeDtypeStruct],
    cfg: AtlasConfig,
    place: Callable[[str, Any], jax.Array] | None = None,
) -> AtlasModel:
    """Returns a model with these parameters, by path; `place(path, array)`, if given, puts each on its devices."""
    graph, flat = _abstract_model(cfg)
    named = [("/".join(map(str, path)), path, variable) for path, variable in flat]
    filled = [
        (path, variable.replace(place(name, params[name]) if place else params[name])) for name, path, variable in named
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))
