"""One training step of arXiv 2208.03299, section 2: a pure function of (state, batch, key), compiled in `setup.py`.

`joint_loss` adds the reader's cross-entropy to the retriever's loss; the retriever learns from `gold_scores`, which say
how much each passage helps the reader to write the target. Axes: `b` queries, `n` passages of a query, `l` tokens of a
passage, `t` target, `d` model.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from atlas_jax.config import GoldMode, OptimConfig
from atlas_jax.mesh import ROW_AXES, constrain
from atlas_jax.models.atlas import AtlasConfig, AtlasModel, Retriever, build_model
from atlas_jax.models.fid import FiD, ReaderBatch, fuse, shift_right, token_losses
from atlas_jax.models.t5 import EncoderStates
from atlas_jax.training.attention_stats import correlations
from atlas_jax.training.losses import (
    attention_gold,
    emdr_loss,
    kl_to_gold,
    leave_one_out_gold,
    perplexity_gold,
    single_passage_logits,
    token_weights,
)
from atlas_jax.training.optimizer import Params, TrainableParams, adamw_update, clip_factor, schedule

Metrics = dict[str, Array]


class RetrieverBatch(NamedTuple):
    """Retriever tokens of the queries and of their passages."""

    queries: Int[Array, "b q"]
    query_mask: Bool[Array, "b q"]
    passages: Int[Array, "b n p"]
    passage_mask: Bool[Array, "b n p"]


class Batch(NamedTuple):
    """The queries of a step with their passages, tokenized for the reader and, if it is trained, for the retriever."""

    reader: ReaderBatch
    query_lengths: Int[Array, " b"]  # length of each query in reader tokens; the query precedes the passage
    retriever: RetrieverBatch | None  # None: this step trains the reader alone


class TrainState(NamedTuple):
    """Everything that a step changes."""

    reader: TrainableParams
    retriever: TrainableParams | None  # None: the run does not train it
    frozen: Params  # parameters that the run does not train
    gradients: Params | None  # with --accumulation_steps: their sum since the last update
    updates: Int[Array, ""]  # number of updates so far, which the learning rate schedules count

    @property
    def params(self) -> Params:
        """All parameters, by path."""
        return self.frozen | self.reader.params | (self.retriever.params if self.retriever else {})


class Averaging(NamedTuple):
    """How a run averages its loss and clips its gradients. A checkpoint holds it, under these names."""

    loss_group: int  # consecutive queries whose target tokens share a mean loss
    separate_clip: bool  # clip the gradients of reader and retriever each by its own norm, not by the norm of both


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The constants of a run that the compiled step depends on."""

    model: AtlasConfig
    optim: OptimConfig
    gold: GoldMode
    temperature_score: float
    temperature_gold: float
    averaging: Averaging
    n_context: int  # passages that the reader is trained on; the retriever is trained on all of a batch
    pad_id: int
    eos_id: int
    text_maxlength: int
    dropout: bool
    query_side: bool  # the passage encoder is frozen, and so runs without dropout
    remat_reader: bool
    remat_retriever: bool
    stats: bool  # add the correlations of --compute_crossattention_stats to the metrics


def train_step(
    state: TrainState, batch: Batch, key: Key[Array, ""], cfg: StepConfig, *, update: bool
) -> tuple[TrainState, Metrics]:
    """Returns the state after one batch, and its metrics.

    Without `update` the gradients are only added to `state.gradients`. The retriever is trained if the batch holds its
    tokens. If the loss or the norm of the gradient is not finite (`metrics["bad"]` is 1), no parameter changes and the
    accumulated gradients are reset.
    """
    trained = state.reader.params | (state.retriever.params if state.retriever and batch.retriever else {})

    def loss_fn(trained: Params) -> tuple[Float[Array, ""], Metrics]:
        model = build_model(state.params | trained, cfg.model)
        return joint_loss(model, batch, nnx.Rngs(dropout=key) if cfg.dropout else None, cfg)

    (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained)
    if state.gradients is not None:
        gradients = {path: total + gradients.get(path, 0.0) for path, total in state.gradients.items()}
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    metrics |= {"loss/train_loss": loss, "bad": 1.0 - finite, "updates": state.updates}
    if not update:
        accumulated = {path: jnp.where(finite, total, 0.0) for path, total in gradients.items()}
        return state._replace(gradients=accumulated), metrics

    relative_rate = schedule(cfg.optim, state.updates.astype(jnp.float32))

    def updated(part: TrainableParams, peak_rate: float) -> TrainableParams:
        own = {path: gradients[path] for path in part.params}
        factor = clip_factor(cfg.optim, optax.tree.norm(own) if cfg.averaging.separate_clip else norm)
        clipped = {path: factor * gradient for path, gradient in own.items()}
        return adamw_update(cfg.optim, part, clipped, peak_rate * relative_rate, finite)

    new_state = state._replace(
        reader=updated(state.reader, cfg.optim.lr),
        gradients=None if state.gradients is None else jax.tree.map(jnp.zeros_like, state.gradients),
        updates=state.updates + finite,
    )
    if state.retriever and batch.retriever:
        new_state = new_state._replace(retriever=updated(state.retriever, cfg.optim.lr_retriever))
    return new_state, metrics | {"grad_norm": norm}


def joint_loss(
    model: AtlasModel, batch: Batch, rngs: nnx.Rngs | None, cfg: StepConfig
) -> tuple[Float[Array, ""], Metrics]:
    """The reader's cross-entropy per target token, plus the retriever's loss if the batch trains it.

    Tokens are averaged over each group of --loss_group queries, and then over groups.
    """
    reader, reader_batch = model.reader, batch.reader
    assert reader is not None
    n = min(cfg.n_context, reader_batch.passages.shape[1])
    states = reader.encoder_states(
        reader_batch.passages[:, :n], reader_batch.mask[:, :n], rngs=rngs, remat=cfg.remat_reader
    )
    source = EncoderStates(fuse(states), reader_batch.mask[:, :n].reshape(len(reader_batch.mask), 1, -1))
    inputs = shift_right(reader_batch.target, cfg.pad_id)
    with_stats = cfg.stats and batch.retriever is not None
    logits, cross_attention = reader.teacher_forced(
        inputs, source, rngs=rngs, remat=cfg.remat_reader, with_cross_attention=with_stats
    )
    losses = token_losses(logits, reader_batch.target, reader_batch.target_mask)
    reader_loss = (losses.sum(-1) * token_weights(reader_batch.target_mask, cfg.averaging.loss_group)).sum()
    metrics = {"loss/reader_loss": reader_loss}
    if batch.retriever is None or model.retriever is None:
        return reader_loss, metrics
    scores = retriever_scores(model.retriever, batch.retriever, rngs, cfg)
    loss, gold = retriever_loss(_without_gradient(reader), states, scores, reader_batch, cfg)
    if cross_attention is not None and gold is not None:
        metrics |= correlations(
            jax.lax.stop_gradient(cross_attention),
            reader_batch,
            batch.query_lengths,
            gold[:, :n],
            layers=reader.cfg.num_decoder_layers,
            eos_id=cfg.eos_id,
            text_maxlength=cfg.text_maxlength,
        )
    return reader_loss + loss, metrics | {"loss/retriever_loss": loss}


def retriever_scores(
    retriever: Retriever, batch: RetrieverBatch, rngs: nnx.Rngs | None, cfg: StepConfig
) -> Float[Array, "b n"]:
    """The retriever's score of each passage: q.p / sqrt(d)."""
    b, n, _ = batch.passages.shape
    queries = retriever(batch.queries, batch.query_mask, side="query", rngs=rngs, remat=cfg.remat_retriever)
    rows = (constrain(x.reshape(b * n, -1), ROW_AXES) for x in (batch.passages, batch.passage_mask))
    passage_rngs = None if cfg.query_side else rngs
    passages = retriever(*rows, side="passage", rngs=passage_rngs, remat=cfg.remat_retriever).reshape(b, n, -1)
    return jnp.einsum("bd,bnd->bn", queries, passages) * queries.shape[-1] ** -0.5


def retriever_loss(
    reader: FiD,
    states: Float[Array, "b m l d"],
    scores: Float[Array, "b n"],
    reader_batch: ReaderBatch,
    cfg: StepConfig,
) -> tuple[Float[Array, ""], Float[Array, "b n"] | None]:
    """Returns the retriever's loss and the gold scores it was computed from, None for EMDR2.

    `states` are the reader's encoder states of the first m passages, made with dropout if the run has any.
    """
    states = jax.lax.stop_gradient(states)
    if cfg.dropout:  # gold scores are computed without dropout
        states = reader.encoder_states(reader_batch.passages, reader_batch.mask)
    elif (rest := reader_batch.passages[:, states.shape[1] :]).shape[1]:
        states = jnp.concatenate([states, reader.encoder_states(rest, reader_batch.mask[:, states.shape[1] :])], axis=1)
    temperatures = cfg.temperature_score, cfg.temperature_gold
    if cfg.gold == "emdr":
        logits = single_passage_logits(reader, states, reader_batch.mask, reader_batch.target, cfg.pad_id)
        weights = token_weights(reader_batch.target_mask, cfg.averaging.loss_group)
        return emdr_loss(scores, logits, reader_batch.target, reader_batch.target_mask, weights, *temperatures), None
    gold = gold_scores(reader, states, reader_batch, cfg)
    return kl_to_gold(scores, gold, *temperatures), gold


def gold_scores(
    reader: FiD, states: Float[Array, "b n l d"], reader_batch: ReaderBatch, cfg: StepConfig
) -> Float[Array, "b n"]:
    """The gold score of each passage by --gold_score_mode: how much it helps the reader to write the target."""
    match cfg.gold:
        case "ppmean":
            logits = single_passage_logits(reader, states, reader_batch.mask, reader_batch.target, cfg.pad_id)
            return perplexity_gold(logits, reader_batch.target, reader_batch.target_mask)
        case "loop":
            return leave_one_out_gold(
                reader, states, reader_batch.mask, reader_batch.target, reader_batch.target_mask, cfg.pad_id
            )
        case "evalnormsum":
            source = EncoderStates(fuse(states), reader_batch.mask.reshape(len(reader_batch.mask), 1, -1))
            inputs = shift_right(reader_batch.target, cfg.pad_id)
            cross_attention = reader.teacher_forced(inputs, source, with_cross_attention=True).cross_attention
            assert cross_attention is not None
            return attention_gold(
                cross_attention.norms, reader_batch.mask, reader_batch.target_mask, reader.cfg.num_decoder_layers
            )
        case "emdr":
            raise ValueError("EMDR2 has no gold scores: `retriever_loss` computes its loss from logits")


def _without_gradient(reader: FiD) -> FiD:
    """The reader with `stop_gradient` on all parameters."""
    graph, params = nnx.split(reader)
    return nnx.merge(graph, jax.tree.map(jax.lax.stop_gradient, params))
