"""Contriever (arXiv 2112.09118): a BERT encoder; the mean of its token states is the vector of a text."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from atlas_jax.models.dropout import dropout
from atlas_jax.models.stack import StackedLayer, gather_module, scan, stack
from atlas_jax.models.t5 import MASKED_LOGIT, map_rows

MAX_POSITIONS = 512  # position embeddings that BERT has


@dataclasses.dataclass(frozen=True)
class ContrieverConfig:
    """Shape and computation of the encoder; the defaults are those of facebook/contriever, BERT base."""

    d_model: int = 768
    num_heads: int = 12
    d_ff: int = 3072
    num_layers: int = 12
    vocab_size: int = 30522
    max_positions: int = MAX_POSITIONS
    type_vocab_size: int = 2
    layer_norm_epsilon: float = 1e-12
    norm: Literal["atlas", "standard"] = "atlas"  # "atlas": the second moment is not centred, see `LayerNorm`
    pooling: Literal["average", "sqrt", "cls"] = "average"  # sum / tokens, sum / sqrt(tokens), or the first token
    normalize: bool = False  # scale vectors to L2 norm 1, for encoders that were trained so
    dropout: float = 0.0
    for_cpu: bool = False  # inference one row at a time, so that activations stay in a CPU's cache
    dtype: Any = jnp.float32


class LayerNorm(nnx.Module):
    """Layer norm in float32: standard or, for weights trained by the reference, with the uncentred second moment."""

    def __init__(self, cfg: ContrieverConfig, *, rngs: nnx.Rngs):
        del rngs
        self.scale = nnx.Param(jnp.ones(cfg.d_model))
        self.bias = nnx.Param(jnp.zeros(cfg.d_model))
        self.cfg = cfg

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        # Reference: mean(x^2), not mean((x - mean)^2); the published weights were trained with it
        moment = jnp.square(x if self.cfg.norm == "atlas" else centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(moment + self.cfg.layer_norm_epsilon)
        return (y * self.scale.reshape(1, 1, -1) + self.bias.reshape(1, 1, -1)).astype(self.cfg.dtype)


class BertLayer(StackedLayer):
    """BERT layer: self-attention and MLP, each followed by a residual connection and a layer norm."""

    def __init__(self, cfg: ContrieverConfig, *, rngs: nnx.Rngs):
        d, h, f = cfg.d_model, cfg.num_heads, cfg.d_ff
        k = d // h
        init = nnx.initializers.normal(0.02)
        einsum = functools.partial(nnx.Einsum, dtype=cfg.dtype, kernel_init=init, rngs=rngs)
        self.q = einsum("bld,dhk->bhlk", (d, h, k), (h, k))
        self.k = einsum("bld,dhk->bhlk", (d, h, k), (h, k))
        self.v = einsum("bld,dhk->bhlk", (d, h, k), (h, k))
        self.o = einsum("bhlk,hkd->bld", (h, k, d), (d,))
        self.attn_norm = LayerNorm(cfg, rngs=rngs)
        self.up = einsum("bld,df->blf", (d, f), (f,))
        self.down = einsum("blf,fd->bld", (f, d), (d,))
        self.mlp_norm = LayerNorm(cfg, rngs=rngs)
        self.rate, self.dtype = cfg.dropout, cfg.dtype

    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b l d"]:
        q = self.q(x)
        logits = jnp.einsum("bhtk,bhsk->bhts", q, self.k(x), preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, MASKED_LOGIT))
        weights = dropout(weights, self.rate, rngs).astype(x.dtype)
        y = self.o(jnp.einsum("bhts,bhsk->bhtk", weights, self.v(x)))
        x = self.attn_norm(x + dropout(y, self.rate, rngs))
        y = self.down(jax.nn.gelu(self.up(x), approximate=False))
        return self.mlp_norm(x + dropout(y, self.rate, rngs))


class Contriever(nnx.Module):
    """Embeds token ids: one vector per text."""

    def __init__(self, cfg: ContrieverConfig, *, rngs: nnx.Rngs):
        embed = functools.partial(
            nnx.Embed, features=cfg.d_model, embedding_init=nnx.initializers.normal(0.02), rngs=rngs
        )
        self.words = embed(cfg.vocab_size)
        self.positions = embed(cfg.max_positions)
        self.token_types = embed(cfg.type_vocab_size)  # all tokens are of type 0
        self.embed_norm = LayerNorm(cfg, rngs=rngs)
        self.layers = stack(lambda rngs: BertLayer(cfg, rngs=rngs), cfg.num_layers, rngs=rngs)
        self.cfg = cfg

    def __call__(
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"],
        *,
        rngs: nnx.Rngs | None = None,
        remat: bool = False,
    ) -> Float[Array, "b d"]:
        """Returns float32 vectors; a text without tokens has the vector 0 (unless pooled by `cls` or normalized)."""
        cfg = self.cfg
        words = gather_module(self.words, "retriever/encoder/words/", jnp.float32)
        positions = gather_module(self.positions, "retriever/encoder/positions/", jnp.float32).embedding
        x = words(ids) + positions[None, : ids.shape[1]] + self.token_types.embedding[None, :1]
        x = dropout(self.embed_norm(x), cfg.dropout, rngs)

        def body(layer: BertLayer, x: Array, _: None, rngs: nnx.Rngs | None) -> tuple[Array, None]:
            if cfg.for_cpu and rngs is None:
                return map_rows(layer, x, mask), None
            return layer(x, mask, rngs=rngs), None

        x, _ = scan(body, self.layers, x, rngs=rngs, remat=remat)
        vectors = self._pool(x.astype(jnp.float32), mask)
        return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True) if cfg.normalize else vectors

    def _pool(self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"]) -> Float[Array, "b d"]:
        if self.cfg.pooling == "cls":
            return x[:, 0]
        count = jnp.maximum(mask.sum(-1, keepdims=True), 1).astype(jnp.float32)
        total = jnp.where(mask[..., None], x, 0.0).sum(1)
        return total / (jnp.sqrt(count) if self.cfg.pooling == "sqrt" else count)
