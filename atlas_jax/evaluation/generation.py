"""Writing an answer: greedy search, with the decoder's keys and values kept."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from atlas_jax.models.fid import FiD
from atlas_jax.models.t5 import KeyValues, Source

FREE = -1  # in a prompt: the search chooses this token


@dataclasses.dataclass(frozen=True)
class Generation:
    """How to write; lengths count the start token."""

    max_length: int = 128
    min_length: int = 0
    eos_id: int = 1
    pad_id: int = 0  # the start token too
    vocabulary: int | None = None  # only tokens below it are chosen


class _State(NamedTuple):
    position: Int[Array, ""]
    tokens: Int[Array, "b m"]
    cache: KeyValues | list[KeyValues]
    done: Bool[Array, " b"]


def greedy(reader: FiD, source: Source, cfg: Generation, prompt: Int[Array, "b p"] | None = None) -> Int[Array, "b m"]:
    """The likeliest next token until `</s>`: the start token, the answer, padding up to `max_length`.

    A `prompt` gives the first tokens after the start token, `FREE` where it has ended.
    """
    batch = source.mask.shape[0]
    tokens = jnp.full((batch, cfg.max_length), cfg.pad_id, jnp.int32)

    def step(state: _State) -> _State:
        inputs = jax.lax.dynamic_slice_in_dim(state.tokens, state.position, 1, axis=1)
        logits, cache = reader.decode(inputs, source, past=state.cache, position=state.position)
        too_short = state.position + 1 < cfg.min_length
        logits = logits[:, 0, : cfg.vocabulary].at[:, cfg.eos_id].add(jnp.where(too_short, -jnp.inf, 0.0))
        chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if prompt is not None:
            padded = jnp.pad(prompt, ((0, 0), (0, cfg.max_length)), constant_values=FREE)
            given = jax.lax.dynamic_slice_in_dim(padded, state.position, 1, axis=1)[:, 0]
            chosen = jnp.where(given == FREE, chosen, given)
        chosen = jnp.where(state.done, cfg.pad_id, chosen)
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, chosen[:, None], state.position + 1, axis=1)
        return _State(state.position + 1, tokens, cache, state.done | (chosen == cfg.eos_id))

    def unfinished(state: _State) -> Bool[Array, ""]:
        return (state.position + 1 < cfg.max_length) & ~state.done.all()

    start = _State(jnp.int32(0), tokens, reader.empty_cache(source, cfg.max_length), jnp.zeros(batch, bool))
    return jax.lax.while_loop(unfinished, step, start).tokens
