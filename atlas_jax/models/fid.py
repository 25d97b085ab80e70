"""Fusion-in-Decoder (arXiv 2007.01282): the encoder reads each passage alone, the decoder reads all of them at once.

Axes: `b` queries, `n` passages of a query, `l` tokens of a passage, `t` target tokens, `d` model, `v` vocabulary,
`r` rows of decoder inputs: r / b consecutive rows, such as beams, share a row of the source; `p` positions in the
decoder's cache, `s` source (n * l), `h` heads, `k` head width, `depth` layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from atlas_jax.mesh import BATCH_AXES, constrain, params_are_sharded
from atlas_jax.models.stack import gather_module
from atlas_jax.models.t5 import CrossAttention, Decoder, EncodedSource, Encoder, EncoderStates, KeyValues, T5Config


class ReaderBatch(NamedTuple):
    """Token ids of a batch for the reader."""

    passages: Int[Array, "b n l"]  # query and passage together
    mask: Bool[Array, "b n l"]
    target: Int[Array, "b t"]
    target_mask: Bool[Array, "b t"]  # true for the tokens that count in the loss


class DecoderOutput(NamedTuple):
    """Output of the teacher-forced decoder."""

    logits: Float[Array, "r t v"]  # float32
    cross_attention: CrossAttention | None  # summed over the layers; None unless `with_cross_attention`


def group_by_query(x: Float[Array, "bn l d"], n: int) -> Float[Array, "b n l d"]:
    """Groups rows of passages by query, n consecutive rows each."""
    return x.reshape(-1, n, *x.shape[1:])


def fuse(x: Float[Array, "b n l d"]) -> Float[Array, "b n*l d"]:
    """Concatenates the passages of each query into one sequence for cross-attention."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


class FiD(nnx.Module):
    """The reader: a T5 whose decoder attends to all n passages of a query."""

    def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(1.0)
        self.embed = nnx.Embed(cfg.vocab_size, cfg.d_model, dtype=cfg.dtype, embedding_init=init, rngs=rngs)
        self.encoder = Encoder(cfg, rngs=rngs)
        self.decoder = Decoder(cfg, rngs=rngs)
        self.lm_head = (
            None
            if cfg.tied
            else nnx.Linear(
                cfg.d_model,
                cfg.vocab_size,
                use_bias=False,
                dtype=cfg.dtype,
                kernel_init=nnx.initializers.normal(cfg.d_model**-0.5),
                preferred_element_type=jnp.float32,
                rngs=rngs,
            )
        )
        self.cfg = cfg

    def encoder_states(
        self,
        passages: Int[Array, "b n l"],
        mask: Bool[Array, "b n l"],
        *,
        rngs: nnx.Rngs | None = None,
        remat: bool = False,
    ) -> Float[Array, "b n l d"]:
        """Encodes each passage on its own; a row of ids holds query and passage as one text."""
        b, n, length = passages.shape
        rows = self._embed_tokens(passages.reshape(b * n, length))
        states = group_by_query(self.encoder(rows, mask.reshape(b * n, length), rngs=rngs, remat=remat), n)
        return constrain(states, BATCH_AXES, "passages")

    def encode(self, passages: Int[Array, "b n l"], mask: Bool[Array, "b n l"]) -> EncodedSource:
        """Encodes the passages once, for any number of `decode` calls."""
        return self.decoder.project_source(fuse(self.encoder_states(passages, mask)), mask.reshape(mask.shape[0], -1))

    def decode(
        self,
        inputs: Int[Array, "r t"],
        source: EncodedSource,
        *,
        past: KeyValues | list[KeyValues] | None = None,
        position: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "r t v"], KeyValues | list[KeyValues]]:
        """Returns float32 logits of the token after each input, and the self-attention cache (see `Decoder`)."""
        x, present = self.decoder(self._embed_tokens(inputs), source, past=past, position=position)
        return self._logits(x), present

    def gather_params(self, source: EncodedSource) -> tuple["FiD", EncodedSource]:
        """Returns reader and source with all-gathered parameters, for use within `mesh.params_gathered`."""
        if not params_are_sharded():
            return self, source
        reader = gather_module(self, "reader/", self.cfg.dtype)
        return reader, source._replace(layers=reader.decoder.layers)

    def teacher_forced(
        self,
        inputs: Int[Array, "r t"],
        source: EncoderStates,
        *,
        rngs: nnx.Rngs | None = None,
        remat: bool = False,
        with_cross_attention: bool = False,
    ) -> DecoderOutput:
        """Returns logits of whole targets by teacher forcing; keys and values of the source are not cached."""
        x, cross_attention = self.decoder.teacher_forced(
            self._embed_tokens(inputs), source, rngs=rngs, remat=remat, with_cross_attention=with_cross_attention
        )
        return DecoderOutput(self._logits(x), cross_attention)

    def _embed_tokens(self, ids: Int[Array, "r t"]) -> Float[Array, "r t d"]:
        return gather_module(self.embed, "reader/embed/", self.cfg.dtype)(ids)

    def _logits(self, x: Float[Array, "r t d"]) -> Float[Array, "r t v"]:
        if self.lm_head is not None:
            # Gathered as float32, so that its gradient is made in float32
            return gather_module(self.lm_head, "reader/lm_head/", jnp.float32)(x)
        # T5 1.0: the embedding is also the output matrix, scaled as in Mesh TensorFlow
        kernel = gather_module(self.embed, "reader/embed/", self.cfg.dtype).embedding[...].astype(x.dtype)
        return jnp.einsum("btd,vd->btv", x * self.cfg.d_model**-0.5, kernel, preferred_element_type=jnp.float32)

    def empty_cache(self, source: EncodedSource, rows: int, length: int) -> KeyValues | list[KeyValues]:
        """Returns a decoder cache of zeros, for `rows` rows of `length` positions."""

        def zeros(x: Float[Array, "*depth b h s k"]) -> Float[Array, "*depth r h p k"]:
            return jnp.zeros((*x.shape[:-4], rows, x.shape[-3], length, x.shape[-1]), x.dtype)

        return jax.tree.map(zeros, source.cross_kv)


def shift_right(target: Int[Array, "b t"], pad_id: int) -> Int[Array, "b t"]:
    """Returns the decoder inputs of a target: the pad token, then the target without its last token."""
    return jnp.pad(target[:, :-1], ((0, 0), (1, 0)), constant_values=pad_id)


def token_losses(
    logits: Float[Array, "b t v"], target: Int[Array, "b t"], mask: Bool[Array, "b t"]
) -> Float[Array, "b t"]:
    """Cross-entropy of each target token in nats, 0 where the mask is false."""
    target_logits = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - target_logits, 0.0)
