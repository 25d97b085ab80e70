"""Generates answers with a cache of the decoder's keys and values: greedy, or beam search."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from atlas_jax.models.fid import FiD
from atlas_jax.models.t5 import EncodedSource, KeyValues

FREE = -1  # in a prompt: a position whose token is generated

Cache = KeyValues | list[KeyValues]
Prompt = (
    Int[Array, "b p"] | None
)  # tokens to start with, after the start token; `FREE` behind the end of a shorter prompt


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Settings of generation; lengths count the start token."""

    max_length: int = 128
    min_length: int = 0
    beams: int = 1
    length_penalty: float = 1.0  # beam search divides log-probabilities by length ** length_penalty
    eos_id: int = 1
    pad_id: int = 0  # also the start token
    vocabulary: int | None = None  # only token ids below it are generated


def generate(reader: FiD, source: EncodedSource, cfg: GenerationSettings, prompt: Prompt = None) -> Int[Array, "b m"]:
    """Start token, answer and padding, `max_length` tokens in all."""
    return (greedy if cfg.beams == 1 else beam_search)(reader, source, cfg, prompt)


def _allowed(
    scores: Float[Array, "b ... v"], position: Int[Array, ""], cfg: GenerationSettings, prompt: Prompt
) -> Float[Array, "b ... v"]:
    """Scores of the token that follows `position`, -inf for tokens that the settings or the prompt exclude there."""
    token = jnp.arange(scores.shape[-1])
    ruled_out = (token == cfg.eos_id) & (position + 1 < cfg.min_length)
    if cfg.vocabulary is not None:
        ruled_out |= token >= cfg.vocabulary
    if prompt is None:
        return jnp.where(_like(ruled_out, scores), -jnp.inf, scores)
    given = jnp.pad(prompt, ((0, 0), (0, cfg.max_length)), constant_values=FREE)
    given = jax.lax.dynamic_slice_in_dim(given, position, 1, axis=1)
    ruled_out = jnp.where(given == FREE, ruled_out[None], token[None] != given)
    return jnp.where(ruled_out.reshape(ruled_out.shape[0], *[1] * (scores.ndim - 2), -1), -jnp.inf, scores)


def _like(x: Bool[Array, " v"], scores: Float[Array, "b ... v"]) -> Bool[Array, "... v"]:
    return x.reshape(*[1] * (scores.ndim - 1), -1)


class _Greedy(NamedTuple):
    position: Int[Array, ""]
    tokens: Int[Array, "b m"]
    cache: Cache
    done: Bool[Array, " b"]


def greedy(reader: FiD, source: EncodedSource, cfg: GenerationSettings, prompt: Prompt = None) -> Int[Array, "b m"]:
    """Generates the most likely next token until `</s>`."""
    batch = source.mask.shape[0]

    def step(state: _Greedy) -> _Greedy:
        inputs = jax.lax.dynamic_slice_in_dim(state.tokens, state.position, 1, axis=1)
        logits, cache = reader.decode(inputs, source, past=state.cache, position=state.position)
        chosen = jnp.argmax(_allowed(logits[:, 0], state.position, cfg, prompt), axis=-1).astype(jnp.int32)
        chosen = jnp.where(state.done, cfg.pad_id, chosen)
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, chosen[:, None], state.position + 1, axis=1)
        return _Greedy(state.position + 1, tokens, cache, state.done | (chosen == cfg.eos_id))

    def unfinished(state: _Greedy) -> Bool[Array, ""]:
        return (state.position + 1 < cfg.max_length) & ~state.done.all()

    tokens = jnp.full((batch, cfg.max_length), cfg.pad_id, jnp.int32)
    cache = reader.empty_cache(source, batch, cfg.max_length)
    return jax.lax.while_loop(unfinished, step, _Greedy(jnp.int32(0), tokens, cache, jnp.zeros(batch, bool))).tokens


class _Beams(NamedTuple):
    position: Int[Array, ""]
    tokens: Int[Array, "b w m"]  # w beams
    scores: Float[Array, "b w"]  # log-probabilities
    cache: Cache  # b * w rows
    finished: Int[Array, "b w m"]  # the best finished answers
    finished_scores: Float[Array, "b w"]  # with the length penalty, best first; -inf: none yet
    done: Bool[Array, " b"]  # no beam can still beat the finished answers


def beam_search(
    reader: FiD, source: EncodedSource, cfg: GenerationSettings, prompt: Prompt = None
) -> Int[Array, "b m"]:
    """The answer with the highest log-probability / length ** length_penalty that beam search finds.

    Equal to Hugging Face's (version 4.49) without early stopping: each step takes the best 2w continuations, finishes
    those that end in `</s>` among the first w, and continues the best w others.
    """
    batch, w = source.mask.shape[0], cfg.beams

    def penalised(scores: Float[Array, "b ..."], length: Int[Array, ""]) -> Float[Array, "b ..."]:
        return scores / length.astype(jnp.float32) ** cfg.length_penalty

    def step(state: _Beams) -> _Beams:
        inputs = jax.lax.dynamic_slice_in_dim(state.tokens, state.position, 1, axis=2).reshape(batch * w, 1)
        logits, cache = reader.decode(inputs, source, past=state.cache, position=state.position)
        logs = _allowed(jax.nn.log_softmax(logits.reshape(batch, w, -1)), state.position, cfg, prompt)
        scores, indices = jax.lax.top_k((state.scores[..., None] + logs).reshape(batch, -1), 2 * w)
        beam, token = indices // logs.shape[-1], (indices % logs.shape[-1]).astype(jnp.int32)
        tokens = jnp.take_along_axis(state.tokens, beam[..., None], axis=1)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[..., None], state.position + 1, axis=2)
        ends = token == cfg.eos_id
        length = state.position + 1  # not counting the start token

        ended = jnp.where(ends[:, :w] & ~state.done[:, None], penalised(scores[:, :w], length), -jnp.inf)
        finished_scores, finished = _best(w, (state.finished_scores, ended), (state.finished, tokens[:, :w]))
        alive_scores, alive = jax.lax.top_k(jnp.where(ends, -jnp.inf, scores), w)
        rows = (jnp.take_along_axis(beam, alive, axis=1) + w * jnp.arange(batch)[:, None]).reshape(-1)
        return _Beams(
            state.position + 1,
            jnp.take_along_axis(tokens, alive[..., None], axis=1),
            alive_scores,
            jax.tree.map(lambda x: jnp.take(x, rows, axis=-4), cache),
            finished,
            finished_scores,
            state.done | (finished_scores[:, -1] >= penalised(scores[:, 0], length)),
        )

    def unfinished(state: _Beams) -> Bool[Array, ""]:
        return (state.position + 1 < cfg.max_length) & ~state.done.all()

    nothing = jnp.full((batch, w, cfg.max_length), cfg.pad_id, jnp.int32)
    none = jnp.full((batch, w), -jnp.inf)
    first = jnp.zeros((batch, w)).at[:, 1:].set(-1e9)  # all beams are equal at first, so only one may continue
    cache = reader.empty_cache(source, batch * w, cfg.max_length)
    start = _Beams(jnp.int32(0), nothing, first, cache, nothing, none, jnp.zeros(batch, bool))
    end = jax.lax.while_loop(unfinished, step, start)
    cut = jnp.where(end.done[:, None], -jnp.inf, penalised(end.scores, end.position))
    return _best(1, (end.finished_scores, cut), (end.finished, end.tokens))[1][:, 0]


def _best(
    count: int, scores: tuple[Float[Array, "b _"], ...], tokens: tuple[Int[Array, "b _ m"], ...]
) -> tuple[Float[Array, "b c"], Int[Array, "b c m"]]:
    """The `count` answers with the highest scores, best first; of equal scores the earlier."""
    best, indices = jax.lax.top_k(jnp.concatenate(scores, axis=1), count)
    return best, jnp.take_along_axis(jnp.concatenate(tokens, axis=1), indices[..., None], axis=1)
