"""One training step: read, judge, compare, update. A pure function of (state, batch, key)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from atlas_jax.checkpoints.weights import build_model
from atlas_jax.config import GoldMode, OptimConfig
from atlas_jax.evaluation.step import ReaderBatch, token_losses
from atlas_jax.mesh import ROW_AXES, constrain
from atlas_jax.models.atlas import Atlas, AtlasConfig, Retriever
from atlas_jax.models.fid import FiD, fuse, shift_right
from atlas_jax.models.t5 import EncoderStates
from atlas_jax.training.attention_stats import correlations
from atlas_jax.training.losses import (
    attention_gold,
    emdr_loss,
    kl_to_gold,
    leave_one_out_gold,
    perplexity_gold,
    single_passage_logits,
)
from atlas_jax.training.optimizer import Params, TrainableParams, adamw_update, clip_factor, schedule

Metrics = dict[str, Array]


class RetrieverBatch(NamedTuple):
    """What the retriever is given."""

    queries: Int[Array, "b q"]
    query_mask: Bool[Array, "b q"]
    passages: Int[Array, "b n p"]
    passage_mask: Bool[Array, "b n p"]


class Batch(NamedTuple):
    """What a step learns from: for each query the same passages, as the reader and as the retriever sees them."""

    reader: ReaderBatch
    query_lengths: Int[Array, " b"]  # reader tokens of each query, which come before those of its passage
    retriever: RetrieverBatch | None  # none: only the reader learns


class TrainState(NamedTuple):
    """All that a step changes."""

    reader: TrainableParams
    retriever: TrainableParams | None  # none: it does not learn
    frozen: Params  # what does not learn
    gradients: Params | None  # with --accumulation_steps, their sum since the last update
    updates: Int[Array, ""]  # how many there were: the schedules go by them

    @property
    def params(self) -> Params:
        """All parameters, by path."""
        return self.frozen | self.reader.params | (self.retriever.params if self.retriever else {})


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What is constant over a run."""

    model: AtlasConfig
    optim: OptimConfig
    gold: GoldMode
    temperature_score: float
    temperature_gold: float
    n_context: int  # passages that the reader learns from; the retriever learns from all
    pad_id: int
    eos_id: int
    text_maxlength: int
    dropout: bool
    query_side: bool  # the passage encoder does not learn, and so runs without dropout
    remat_reader: bool
    remat_retriever: bool
    stats: bool  # tell how far cross-attention agrees with the judgement


def train_step(
    state: TrainState, batch: Batch, key: Key[Array, ""], cfg: StepConfig, *, update: bool
) -> tuple[TrainState, Metrics]:
    """The state after one batch. Without `update` its gradients are only added to the sum.

    The retriever learns where the batch has its side. A step whose losses or gradients are not finite (`bad` is 1)
    changes no parameter, and the sum starts anew.
    """
    learns = state.reader.params | (state.retriever.params if state.retriever and batch.retriever else {})

    def loss_fn(learns: Params) -> tuple[Float[Array, ""], Metrics]:
        model = build_model(state.params | learns, cfg.model)
        return joint_loss(model, batch, nnx.Rngs(dropout=key) if cfg.dropout else None, cfg)

    (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(learns)
    if state.gradients is not None:
        gradients = {path: total + gradients.get(path, 0.0) for path, total in state.gradients.items()}
    norm = optax.tree.norm(gradients)
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    metrics |= {"loss/train_loss": loss, "bad": 1.0 - good, "updates": state.updates}
    if not update:
        kept = {path: jnp.where(good, total, 0.0) for path, total in gradients.items()}
        return state._replace(gradients=kept), metrics

    share, factor = schedule(cfg.optim, state.updates.astype(jnp.float32)), clip_factor(cfg.optim, norm)

    def learnt(learner: TrainableParams, highest: float) -> TrainableParams:
        clipped = {path: factor * gradients[path] for path in learner.params}
        return adamw_update(cfg.optim, learner, clipped, highest * share, good)

    after = state._replace(
        reader=learnt(state.reader, cfg.optim.lr),
        gradients=None if state.gradients is None else jax.tree.map(jnp.zeros_like, state.gradients),
        updates=state.updates + good,
    )
    if state.retriever and batch.retriever:
        after = after._replace(retriever=learnt(state.retriever, cfg.optim.lr_retriever))
    return after, metrics | {"grad_norm": norm}


def joint_loss(model: Atlas, batch: Batch, rngs: nnx.Rngs | None, cfg: StepConfig) -> tuple[Float[Array, ""], Metrics]:
    """The reader's loss, and the retriever's distance from the reader's judgement where it learns."""
    reader, read = model.reader, batch.reader
    assert reader is not None
    n = min(cfg.n_context, read.passages.shape[1])
    states = reader.states(read.passages[:, :n], read.mask[:, :n], rngs=rngs, remat=cfg.remat_reader)
    source = EncoderStates(fuse(states), read.mask[:, :n].reshape(len(read.mask), 1, -1))
    inputs = shift_right(read.target, cfg.pad_id)
    stats = cfg.stats and batch.retriever is not None
    logits, looks = reader.teacher_forced(inputs, source, rngs=rngs, remat=cfg.remat_reader, looks=stats)
    losses = token_losses(logits, read.target, read.target_mask)
    reader_loss = losses.sum() / jnp.maximum(read.target_mask.sum(), 1)
    metrics = {"loss/reader_loss": reader_loss}
    if batch.retriever is None or model.retriever is None:
        return reader_loss, metrics
    scores = retriever_scores(model.retriever, batch.retriever, rngs, cfg)
    retriever_loss, gold = retriever_loss_and_gold(_stopped(reader), states, scores, read, cfg)
    if looks is not None and gold is not None:
        metrics |= correlations(
            jax.lax.stop_gradient(looks),
            read,
            batch.query_lengths,
            gold[:, :n],
            layers=reader.cfg.num_decoder_layers,
            eos_id=cfg.eos_id,
            text_maxlength=cfg.text_maxlength,
        )
    return reader_loss + retriever_loss, metrics | {"loss/retriever_loss": retriever_loss}


def retriever_scores(
    retriever: Retriever, batch: RetrieverBatch, rngs: nnx.Rngs | None, cfg: StepConfig
) -> Float[Array, "b n"]:
    """What the retriever thinks of each passage: q.p / sqrt(d)."""
    b, n, _ = batch.passages.shape
    queries = retriever(batch.queries, batch.query_mask, side="query", rngs=rngs, remat=cfg.remat_retriever)
    rows = (constrain(x.reshape(b * n, -1), ROW_AXES) for x in (batch.passages, batch.passage_mask))
    noise = None if cfg.query_side else rngs
    passages = retriever(*rows, side="passage", rngs=noise, remat=cfg.remat_retriever).reshape(b, n, -1)
    return jnp.einsum("bd,bnd->bn", queries, passages) * queries.shape[-1] ** -0.5


def retriever_loss_and_gold(
    reader: FiD, states: Float[Array, "b m l d"], scores: Float[Array, "b n"], read: ReaderBatch, cfg: StepConfig
) -> tuple[Float[Array, ""], Float[Array, "b n"] | None]:
    """The retriever's loss, and the judgement, which for EMDR2 is not one number a passage.

    `states` are of the first m passages, as they were when the reader learnt.
    """
    states = jax.lax.stop_gradient(states)
    temperatures = cfg.temperature_score, cfg.temperature_gold
    if cfg.dropout:  # the judgement is made without
        states = reader.states(read.passages, read.mask)
    elif (rest := read.passages[:, states.shape[1] :]).shape[1]:
        states = jnp.concatenate([states, reader.states(rest, read.mask[:, states.shape[1] :])], axis=1)
    match cfg.gold:
        case "emdr":
            logits = single_passage_logits(reader, states, read.mask, read.target, cfg.pad_id)
            return emdr_loss(scores, logits, read.target, read.target_mask, *temperatures), None
        case "ppmean":
            logits = single_passage_logits(reader, states, read.mask, read.target, cfg.pad_id)
            gold = perplexity_gold(logits, read.target, read.target_mask)
        case "loop":
            gold = leave_one_out_gold(reader, states, read.mask, read.target, read.target_mask, cfg.pad_id)
        case "evalnormsum":
            source = EncoderStates(fuse(states), read.mask.reshape(len(read.mask), 1, -1))
            looks = reader.teacher_forced(shift_right(read.target, cfg.pad_id), source, looks=True).looks
            assert looks is not None
            gold = attention_gold(looks.norms, read.mask, read.target_mask, reader.cfg.num_decoder_layers)
    return kl_to_gold(scores, gold, *temperatures), gold


def _stopped(reader: FiD) -> FiD:
    """The reader without a gradient."""
    graph, params = nnx.split(reader)
    return nnx.merge(graph, jax.tree.map(jax.lax.stop_gradient, params))
