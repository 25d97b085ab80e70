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
from atlas_jax.models.attention import attend, attention_logits
from atlas_jax.models.dropout import Places, Seeds, dropout
from atlas_jax.models.linear import Linear
from atlas_jax.models.packing import Packing
from atlas_jax.models.position_bias import PositionBias
from atlas_jax.models.stack import StackedLayer, scan, stack, unstack


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
    mask: Bool[Array, "n #q l"]  # q: 1, or all target positions folded into the row
    packing: Packing | None = None  # if given, `states` are packed tokens of texts that are read one by one


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
        linear = functools.partial(Linear, dtype=cfg.dtype, rngs=rngs)
        normal = nnx.initializers.normal
        # Mesh TensorFlow's initial scale: attention logits of unit variance without a 1/sqrt(k)
        self.q = linear((d,), (h, k), kernel_init=normal((d * k) ** -0.5))
        self.k = linear((d,), (h, k), kernel_init=normal(d**-0.5))
        self.v = linear((d,), (h, k), kernel_init=normal(d**-0.5))
        self.o = linear((h, k), (d,), kernel_init=normal((h * k) ** -0.5))
        self.rate = cfg.dropout

    def keys_values(self, source: Float[Array, "b s d"], packing: Packing | None = None) -> KeyValues:
        """Projects the source to keys and values, which a cache can hold; with `packing`, packed tokens to texts."""
        return KeyValues(_heads_first(self.k(source), packing), _heads_first(self.v(source), packing))

    def __call__(
        self,
        x: Float[Array, "b q d"],
        source: KeyValues,
        bias: Float[Array, "#n #h t s"] | None,
        mask: Bool[Array, "#n #t s"],
        *,
        seeds: Seeds | None = None,
        packing: Packing | None = None,
    ) -> Float[Array, "b q d"]:
        """With `packing`, `x` and the result are packed tokens of `n` texts that each attend to their own source."""
        seed = seeds.next() if seeds is not None and self.rate else None
        queries = _heads_first(self.q(x), packing)
        y = attend(queries, source.keys, source.values, bias, mask[:, None], seed, self.rate).swapaxes(1, 2)
        return self.o(packing.pack(y) if packing else y)

    def head_means(self, x: Float[Array, "b t d"], source: KeyValues, mask: Bool[Array, "#b #t s"]) -> CrossAttention:
        """Returns attention logits, weights and weights times value norms, averaged over the heads."""
        logits = attention_logits(_heads_first(self.q(x), None), source.keys, None, mask[:, None])
        weights = jax.nn.softmax(logits)
        value_norms = jnp.linalg.norm(source.values.astype(jnp.float32), axis=-1)
        return CrossAttention(
            logits.mean(1), weights.mean(1), jnp.einsum("bhts,bhs->bts", weights, value_norms) / value_norms.shape[1]
        )


def _heads_first(x: Float[Array, "b t h k"], packing: Packing | None) -> Float[Array, "n h l k"]:
    """The layout of `attend`; with `packing`, packed tokens become padded texts."""
    return (packing.unpack(x) if packing else x).swapaxes(1, 2)


class MLP(nnx.Module):
    """Feed-forward block: two matrices and a ReLU (1.0), or three with a gate of GELU's tanh approximation (1.1)."""

    def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs):
        d, f = cfg.d_model, cfg.d_ff
        linear = functools.partial(Linear, dtype=cfg.dtype, rngs=rngs)
        normal = nnx.initializers.normal
        self.gate = linear((d,), (f,), kernel_init=normal(d**-0.5)) if cfg.gated else None
        self.up = linear((d,), (f,), kernel_init=normal(d**-0.5))
        self.down = linear((f,), (d,), kernel_init=normal(f**-0.5))
        self.rate = cfg.dropout

    def __call__(
        self, x: Float[Array, "b t d"], *, seeds: Seeds | None = None, places: Places | None = None
    ) -> Float[Array, "b t d"]:
        if self.gate is None:
            hidden = jax.nn.relu(self.up(x))
        else:
            gate = jax.nn.gelu(self.gate(x).astype(jnp.float32), approximate=True).astype(x.dtype)
            hidden = gate * self.up(x)
        return self.down(dropout(hidden, self.rate, seeds, places))


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
        bias: Float[Array, "1 h l l"],
        mask: Bool[Array, "n 1 l"],
        *,
        seeds: Seeds | None = None,
        packing: Packing | None = None,
    ) -> Float[Array, "b s d"]:
        places = packing.places() if packing else None
        x = constrain(x, ROW_AXES)
        y = self.attn_norm(x)
        y = self.attn(y, self.attn.keys_values(y, packing), bias, mask, seeds=seeds, packing=packing)
        x = x + dropout(y, self.rate, seeds, places)
        return x + dropout(self.mlp(self.mlp_norm(x), seeds=seeds, places=places), self.rate, seeds, places)


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
        seeds: Seeds | None = None,
        with_cross_attention: bool = False,
    ) -> LayerOutput:
        """Applies the layer; `present` is `past` with the keys and values of `x` written at `position` and after."""
        y = self.self_attn_norm(x)
        present = self.self_attn.keys_values(y)
        if past is not None:
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=position, axis=2)
            present = KeyValues(write(past.keys, present.keys), write(past.values, present.values))
        x = x + dropout(self.self_attn(y, present, bias, mask, seeds=seeds), self.rate, seeds)
        # Rows that share a source are folded into the target axis; valid as cross-attention has no position bias
        y = self.cross_attn_norm(x).reshape(cross_mask.shape[0], -1, x.shape[-1])
        cross_attention = self.cross_attn.head_means(y, cross_kv, cross_mask) if with_cross_attention else None
        y = self.cross_attn(y, cross_kv, None, cross_mask, seeds=seeds).reshape(x.shape)
        x = x + dropout(y, self.rate, seeds)
        x = x + dropout(self.mlp(self.mlp_norm(x), seeds=seeds), self.rate, seeds)
        return LayerOutput(x, present, cross_attention)


def _position_bias(cfg: T5Config, *, bidirectional: bool, rngs: nnx.Rngs) -> PositionBias:
    shape = cfg.relative_buckets, cfg.num_heads
    options: dict[str, Any] = {
        "max_distance": cfg.relative_max_distance,
        "bidirectional": bidirectional,
        "scale": cfg.d_model**-0.5,
    }
    return PositionBias(*shape, **options, rngs=rngs)


class Encoder(nnx.Module):
    """T5's encoder: embedded tokens to states after the final norm."""

    def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs):
        self.position_bias = _position_bias(cfg, bidirectional=True, rngs=rngs)
        self.layers = stack(lambda rngs: EncoderLayer(cfg, rngs=rngs), cfg.num_layers, rngs=rngs)
        self.final_norm = _norm(cfg, rngs)
        self.rate = cfg.dropout
        self.for_cpu = cfg.for_cpu

    def __call__(
        self,
        x: Float[Array, "b s d"],
        mask: Bool[Array, "b s"],
        *,
        seeds: Seeds | None = None,
        remat: bool = False,
        packing: Packing | None = None,
    ) -> Float[Array, "b s d"]:
        """Returns the states of each text; with `packing` of its tokens only, and 0 at the padding."""
        positions = jnp.arange(x.shape[1])
        bias = self.position_bias(positions, positions)
        places = packing.places() if packing else None
        x = packing.pack(x) if packing else x

        def body(layer: EncoderLayer, x: Array, _: None, seeds: Seeds | None) -> tuple[Array, None]:
            def of_row(x: Array, mask: Array, packing: Packing | None) -> Array:
                return layer(x, bias, mask[0], packing=packing)

            if self.for_cpu and seeds is None:
                return map_rows(of_row, x, mask.reshape(len(x), -1, 1, mask.shape[-1]), packing), None
            return layer(x, bias, mask[:, None], seeds=seeds, packing=packing), None

        x, _ = scan(body, self.layers, dropout(x, self.rate, seeds, places), seeds=seeds, remat=remat)
        x = dropout(self.final_norm(x), self.rate, seeds, places)
        return packing.unpack(x) if packing else x


class Decoder(nnx.Module):
    """T5's decoder: embedded target tokens and a source to states after the final norm."""

    def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs):
        self.position_bias = _position_bias(cfg, bidirectional=False, rngs=rngs)
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
            layer: DecoderLayer, x: Array, xs: tuple[KeyValues, KeyValues | None], _: Seeds | None
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
        seeds: Seeds | None = None,
        remat: bool = False,
        with_cross_attention: bool = False,
    ) -> tuple[Float[Array, "r t d"], CrossAttention | None]:
        """Returns states of whole targets and, if `with_cross_attention`, the sum of `head_means` over the layers."""
        positions = jnp.arange(x.shape[1])
        bias = self.position_bias(positions, positions)
        causal = (positions[None, :] <= positions[:, None])[None]
        zeros = jnp.zeros((len(source.mask), x.shape[0] * x.shape[1] // len(source.mask), source.mask.shape[2]))
        total = CrossAttention(zeros, zeros, zeros) if with_cross_attention else None

        def body(layer: DecoderLayer, carry: Any, _: None, seeds: Seeds | None) -> tuple[Any, None]:
            x, total = carry
            cross_kv = layer.cross_attn.keys_values(source.states, source.packing)
            out = layer(
                *(x, None, 0, cross_kv, bias, causal, source.mask),
                seeds=seeds,
                with_cross_attention=with_cross_attention,
            )
            return (out.x, jax.tree.map(jnp.add, total, out.cross_attention)), None

        (x, total), _ = scan(body, self.layers, (dropout(x, self.rate, seeds), total), seeds=seeds, remat=remat)
        return dropout(self.final_norm(x), self.rate, seeds), total
