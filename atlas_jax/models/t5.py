"""T5 1.0 and 1.1 (arXiv 1910.10683, 2002.05202): the encoder and the decoder, layers stacked and scanned.

Axes: `b` batch, `t` queries of an attention (in the decoder: target), `s` its source, `d` model, `h` heads, `k` head
width, `f` MLP, `r` rows of decoder inputs (one or more for each row of the source), `p` positions in the decoder's
cache, `depth` layers. Dropout is on exactly when `rngs` are given.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from atlas_jax.mesh import ROW_AXES, constrain
from atlas_jax.models.dropout import dropout
from atlas_jax.models.stack import StackedLayer, scan, stack, unstack

MASKED_LOGIT = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape and computation of a T5. 1.1 is `gated` (GELU) and not `tied`; 1.0 is `tied` and not `gated` (ReLU)."""

    d_model: int
    num_heads: int
    head_dim: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    vocab_size: int = 32128
    gated: bool = True
    tied: bool = False  # the embedding is also the output matrix
    relative_buckets: int = 32
    relative_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dropout: float = 0.0
    for_cpu: bool = False  # inference tuned for CPU caches: encoder row by row, decoder layers unstacked
    dtype: Any = jnp.float32  # matrix products and residuals; norms, softmax and logits are float32


def _t5(d_model: int, num_heads: int, head_dim: int, d_ff: int, layers: int, *, v1_1: bool) -> T5Config:
    return T5Config(d_model, num_heads, head_dim, d_ff, layers, layers, gated=v1_1, tied=not v1_1)


_V1_1 = {
    "base": _t5(768, 12, 64, 2048, 12, v1_1=True),
    "large": _t5(1024, 16, 64, 2816, 24, v1_1=True),
    "xl": _t5(2048, 32, 64, 5120, 24, v1_1=True),
    "xxl": _t5(4096, 64, 64, 10240, 24, v1_1=True),
}
T5_CONFIGS = {  # the published shapes, listed here so that they need no download
    "t5-small": _t5(512, 8, 64, 2048, 6, v1_1=False),
    "t5-base": _t5(768, 12, 64, 3072, 12, v1_1=False),
    "t5-large": _t5(1024, 16, 64, 4096, 24, v1_1=False),
    "t5-3b": _t5(1024, 32, 128, 16384, 24, v1_1=False),
    "t5-11b": _t5(1024, 128, 128, 65536, 24, v1_1=False),
    **{f"google/t5-v1_1-{size}": cfg for size, cfg in _V1_1.items()},
    **{f"google/t5-{size}-lm-adapt": cfg for size, cfg in _V1_1.items()},
}


class KeyValues(NamedTuple):
    """Keys and values of the source of an attention."""

    keys: Float[Array, "*depth b h s k"]
    values: Float[Array, "*depth b h s k"]


class EncodedSource(NamedTuple):
    """Encoder states as the cross-attention keys and values of every layer, for repeated use by `Decoder.__call__`."""

    layers: "DecoderLayer | list[DecoderLayer]"  # the decoder's; a list (unstacked) with `for_cpu`
    cross_kv: KeyValues | list[KeyValues]  # stacked or a list, as `layers`
    mask: Bool[Array, "b s"]


class EncoderStates(NamedTuple):
    """Encoder states for one teacher-forced pass: keys and values are projected layer by layer and not cached."""

    states: Float[Array, "b s d"]
    mask: Bool[Array, "b #q s"]  # q: 1, or all target positions folded into the row


class CrossAttention(NamedTuple):
    """Attention of each target position to each source position, averaged over the heads."""

    scores: Float[Array, "b t s"]  # attention logits
    probs: Float[Array, "b t s"]  # attention weights
    norms: Float[Array, "b t s"]  # attention weights times the L2 norms of the values


class LayerOutput(NamedTuple):
    """Output of a decoder layer."""

    x: Float[Array, "r t d"]
    present: KeyValues  # keys and values of the self-attention, cached ones included
    cross_attention: CrossAttention | None  # None unless `with_cross_attention`


def map_rows(function: Callable[..., Array], *args: Any) -> Array:
    """Applies `function` to arrays with a common leading axis, one row after the other."""
    return jax.lax.map(lambda row: function(*jax.tree.map(lambda x: x[None], row))[0], args)


class Attention(nnx.Module):
    """T5 attention: no biases and no 1/sqrt(k); position enters only through `bias`."""

    def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs):
        d, h, k = cfg.d_model, cfg.num_heads, cfg.head_dim
        einsum = functools.partial(nnx.Einsum, dtype=cfg.dtype, rngs=rngs)
        normal = nnx.initializers.normal
        # Mesh TensorFlow's initial scale: attention logits of unit variance without a 1/sqrt(k)
        self.q = einsum("btd,dhk->bhtk", (d, h, k), kernel_init=normal((d * k) ** -0.5))
        self.k = einsum("bsd,dhk->bhsk", (d, h, k), kernel_init=normal(d**-0.5))
        self.v = einsum("bsd,dhk->bhsk", (d, h, k), kernel_init=normal(d**-0.5))
        self.o = einsum("bhtk,hkd->btd", (h, k, d), kernel_init=normal((h * k) ** -0.5))
        self.rate = cfg.dropout

    def keys_values(self, source: Float[Array, "b s d"]) -> KeyValues:
        """Projects the source to keys and values, which a cache can hold."""
        return KeyValues(self.k(source), self.v(source))

    def logits(
        self,
        x: Float[Array, "b t d"],
        keys: Float[Array, "b h s k"],
        bias: Float[Array, "#b #h t s"] | None,
        mask: Bool[Array, "#b #t s"],
    ) -> Float[Array, "b h t s"]:
        """Returns the float32 input of the softmax: `bias` is added, masked positions are MASKED_LOGIT."""
        logits = jnp.einsum("bhtk,bhsk->bhts", self.q(x), keys, preferred_element_type=jnp.float32)
        if bias is not None:
            logits = logits + bias
        return jnp.where(mask[:, None], logits, MASKED_LOGIT)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        source: KeyValues,
        bias: Float[Array, "#b #h t s"] | None,
        mask: Bool[Array, "#b #t s"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b t d"]:
        logits = self.logits(x, source.keys, bias, mask)
        weights = dropout(jax.nn.softmax(logits), self.rate, rngs).astype(x.dtype)
        return self.o(jnp.einsum("bhts,bhsk->bhtk", weights, source.values))

    def head_means(self, x: Float[Array, "b t d"], source: KeyValues, mask: Bool[Array, "#b #t s"]) -> CrossAttention:
        """Returns attention logits, weights and weights times value norms, averaged over the heads."""
        logits = self.logits(x, source.keys, None, mask)
        weights = jax.nn.softmax(logits)
        value_norms = jnp.linalg.norm(source.values.astype(jnp.float32), axis=-1)
        return CrossAttention(
            logits.mean(1), weights.mean(1), jnp.einsum("bhts,bhs->bts", weights, value_norms) / value_norms.shape[1]
        )


class MLP(nnx.Module):
    """Feed-forward block: two matrices and a ReLU (1.0), or three with a gate of GELU's tanh approximation (1.1)."""

    def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs):
        d, f = cfg.d_model, cfg.d_ff
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=cfg.dtype, rngs=rngs)
        normal = nnx.initializers.normal
        self.gate = linear(d, f, kernel_init=normal(d**-0.5)) if cfg.gated else None
        self.up = linear(d, f, kernel_init=normal(d**-0.5))
        self.down = linear(f, d, kernel_init=normal(f**-0.5))
        self.rate = cfg.dropout

    def __call__(self, x: Float[Array, "b t d"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b t d"]:
        if self.gate is None:
            hidden = jax.nn.relu(self.up(x))
        else:
            gate = jax.nn.gelu(self.gate(x).astype(jnp.float32), approximate=True).astype(x.dtype)
            hidden = gate * self.up(x)
        return self.down(dropout(hidden, self.rate, rngs))


def _norm(cfg: T5Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(cfg.d_model, epsilon=cfg.layer_norm_epsilon, dtype=cfg.dtype, rngs=rngs)


class EncoderLayer(StackedLayer):
    """Pre-norm self-attention and MLP with residual connections."""

    def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs):
        self.attn_norm = _norm(cfg, rngs)
        self.attn = Attention(cfg, rngs=rngs)
        self.mlp_norm = _norm(cfg, rngs)
        self.mlp = MLP(cfg, rngs=rngs)
        self.rate, self.dtype = cfg.dropout, cfg.dtype

    def __call__(
        self,
        x: Float[Array, "b s d"],
        bias: Float[Array, "#b h s s"],
        mask: Bool[Array, "b 1 s"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b s d"]:
        x = constrain(x, ROW_AXES)
        y = self.attn_norm(x)
        x = x + dropout(self.attn(y, self.attn.keys_values(y), bias, mask, rngs=rngs), self.rate, rngs)
        return x + dropout(self.mlp(self.mlp_norm(x), rngs=rngs), self.rate, rngs)


class DecoderLayer(StackedLayer):
    """Pre-norm causal self-attention, cross-attention to the encoder states and MLP, with residual connections."""

    def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs):
        self.self_attn_norm = _norm(cfg, rngs)
        self.self_attn = Attention(cfg, rngs=rngs)
        self.cross_attn_norm = _norm(cfg, rngs)
        self.cross_attn = Attention(cfg, rngs=rngs)
        self.mlp_norm = _norm(cfg, rngs)
        self.mlp = MLP(cfg, rngs=rngs)
        self.rate, self.dtype = cfg.dropout, cfg.dtype

    def __call__(
        self,
        x: Float[Array, "r t d"],
        past: KeyValues | None,
        position: Int[Array, ""] | int,
        cross_kv: KeyValues,
        bias: Float[Array, "1 h t p"],
        mask: Bool[Array, "1 t p"],
        cross_mask: Bool[Array, "b #q s"],
        *,
        rngs: nnx.Rngs | None = None,
        with_cross_attention: bool = False,
    ) -> LayerOutput:
        """Applies the layer; `present` is `past` with the keys and values of `x` written at `position` and after."""
        y = self.self_attn_norm(x)
        present = self.self_attn.keys_values(y)
        if past is not None:
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=position, axis=2)
            present = KeyValues(write(past.keys, present.keys), write(past.values, present.values))
        x = x + dropout(self.self_attn(y, present, bias, mask, rngs=rngs), self.rate, rngs)
        # Rows that share a source are folded into the target axis; valid as cross-attention has no position bias
        y = self.cross_attn_norm(x).reshape(cross_mask.shape[0], -1, x.shape[-1])
        cross_attention = self.cross_attn.head_means(y, cross_kv, cross_mask) if with_cross_attention else None
        y = self.cross_attn(y, cross_kv, None, cross_mask, rngs=rngs).reshape(x.shape)
        x = x + dropout(y, self.rate, rngs)
        x = x + dropout(self.mlp(self.mlp_norm(x), rngs=rngs), self.rate, rngs)
        return LayerOutput(x, present, cross_attention)


def relative_bucket(
    distance: Int[Array, "..."], *, bidirectional: bool, buckets: int, max_distance: int
) -> Int[Array, "..."]:
    """Returns T5's bucket of a distance (key position minus query position), arXiv 1910.10683 section 2.1.

    Half of the buckets hold one distance each, the others grow logarithmically up to `max_distance`. `bidirectional`:
    half of the buckets are for later keys; otherwise all later keys share bucket 0.
    """
    offset = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    log_ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / jnp.log(max_distance / exact)
    log_bucket = jnp.minimum(exact + (log_ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return offset + jnp.where(distance < exact, distance, log_bucket)


class PositionBias(nnx.Module):
    """Relative position bias, shared by all layers of the encoder or of the decoder."""

    def __init__(self, cfg: T5Config, *, bidirectional: bool, rngs: nnx.Rngs):
        init = nnx.initializers.normal(cfg.d_model**-0.5)
        self.embed = nnx.Embed(cfg.relative_buckets, cfg.num_heads, embedding_init=init, rngs=rngs)
        self.bucket = functools.partial(
            relative_bucket,
            bidirectional=bidirectional,
            buckets=cfg.relative_buckets,
            max_distance=cfg.relative_max_distance,
        )

    def __call__(self, queries: Int[Array, " t"], keys: Int[Array, " s"]) -> Float[Array, "1 h t s"]:
        """Returns each head's bias for these positions of queries and keys."""
        bias = self.embed(self.bucket(keys[None, :] - queries[:, None]))
        return bias.transpose(2, 0, 1)[None].astype(jnp.float32)


class Encoder(nnx.Module):
    """T5's encoder: embedded tokens to states after the final norm."""

    def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs):
        self.position_bias = PositionBias(cfg, bidirectional=True, rngs=rngs)
        self.layers = stack(lambda rngs: EncoderLayer(cfg, rngs=rngs), cfg.num_layers, rngs=rngs)
        self.final_norm = _norm(cfg, rngs)
        self.rate = cfg.dropout
        self.for_cpu = cfg.for_cpu

    def __call__(
        self,
        x: Float[Array, "b s d"],
        mask: Bool[Array, "b s"],
        *,
        rngs: nnx.Rngs | None = None,
        remat: bool = False,
    ) -> Float[Array, "b s d"]:
        positions = jnp.arange(x.shape[1])
        bias = self.position_bias(positions, positions)

        def body(layer: EncoderLayer, x: Array, _: None, rngs: nnx.Rngs | None) -> tuple[Array, None]:
            if self.for_cpu and rngs is None:
                return map_rows(lambda x, mask: layer(x, bias, mask), x, mask[:, None]), None
            return layer(x, bias, mask[:, None], rngs=rngs), None

        x, _ = scan(body, self.layers, dropout(x, self.rate, rngs), rngs=rngs, remat=remat)
        return dropout(self.final_norm(x), self.rate, rngs)


class Decoder(nnx.Module):
    """T5's decoder: embedded target tokens and a source to states after the final norm."""

    def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs):
        self.position_bias = PositionBias(cfg, bidirectional=False, rngs=rngs)
        self.layers = stack(lambda rngs: DecoderLayer(cfg, rngs=rngs), cfg.num_decoder_layers, rngs=rngs)
        self.final_norm = _norm(cfg, rngs)
        self.rate = cfg.dropout
        self.for_cpu = cfg.for_cpu

    def project_source(self, states: Float[Array, "b s d"], mask: Bool[Array, "b s"]) -> EncodedSource:
        """Projects the encoder's states to the cross-attention keys and values of every layer."""
        layers = unstack(self.layers) if self.for_cpu else self.layers
        xs = [None] * len(layers) if isinstance(layers, list) else None
        _, cross_kv = scan(lambda layer, _, __, ___: (None, layer.cross_attn.keys_values(states)), layers, None, xs)
        return EncodedSource(layers, cross_kv, mask)

    def __call__(
        self,
        x: Float[Array, "r t d"],
        source: EncodedSource,
        *,
        past: KeyValues | list[KeyValues] | None = None,
        position: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "r t d"], KeyValues | list[KeyValues]]:
        """Returns states of the tokens at `position` and after, and the self-attention's keys and values so far.

        `past` is a cache of fixed length, filled up to `position`; without it, `x` is the whole target.
        """
        queries = position + jnp.arange(x.shape[1])
        keys = queries if past is None else jnp.arange(jax.tree.leaves(past)[0].shape[-2])
        bias = self.position_bias(queries, keys)
        causal = (keys[None, :] <= queries[:, None])[None]

        def body(
            layer: DecoderLayer, x: Array, xs: tuple[KeyValues, KeyValues | None], _: nnx.Rngs | None
        ) -> tuple[Array, KeyValues]:
            cross_kv, past = xs
            out = layer(x, past, position, cross_kv, bias, causal, source.mask[:, None])
            return out.x, out.present

        xs: Any = (source.cross_kv, past)
        if isinstance(source.layers, list):
            no_past: list[KeyValues | None] = [None] * len(source.layers)
            xs = list(zip(source.cross_kv, past or no_past, strict=True))
        x, present = scan(body, source.layers, x, xs)
        return self.final_norm(x), present

    def teacher_forced(
        self,
        x: Float[Array, "r t d"],
        source: EncoderStates,
        *,
        rngs: nnx.Rngs | None = None,
        remat: bool = False,
        with_cross_attention: bool = False,
    ) -> tuple[Float[Array, "r t d"], CrossAttention | None]:
        """Returns states of whole targets and, if `with_cross_attention`, the sum of `head_means` over the layers."""
        positions = jnp.arange(x.shape[1])
        bias = self.position_bias(positions, positions)
        causal = (positions[None, :] <= positions[:, None])[None]
        zeros = jnp.zeros(
            (source.states.shape[0], x.shape[0] * x.shape[1] // source.states.shape[0], source.states.shape[1])
        )
        total = CrossAttention(zeros, zeros, zeros) if with_cross_attention else None

        def body(layer: DecoderLayer, carry: Any, _: None, rngs: nnx.Rngs | None) -> tuple[Any, None]:
            x, total = carry
            cross_kv = layer.cross_attn.keys_values(source.states)
            out = layer(
                *(x, None, 0, cross_kv, bias, causal, source.mask), rngs=rngs, with_cross_attention=with_cross_attention
            )
            return (out.x, jax.tree.map(jnp.add, total, out.cross_attention)), None

        (x, total), _ = scan(body, self.layers, (dropout(x, self.rate, rngs), total), rngs=rngs, remat=remat)
        return dropout(self.final_norm(x), self.rate, rngs), total
