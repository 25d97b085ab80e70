"""Gold scores, by which the reader rates passages, and the losses that distil them into the retriever.

Axes: `b` queries, `n` passages of a query, `l` tokens of a passage, `t` target, `v` vocabulary. The formulas are those
of arXiv 2208.03299, section 2.2. Gold scores are computed without dropout, and no gradient flows through them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from atlas_jax.mesh import ROW_AXES, constrain
from atlas_jax.models.fid import FiD, fuse, shift_right, token_losses
from atlas_jax.models.t5 import EncoderStates

ATTENTION_NORMALIZER = 256  # Reference: cross-attention sums are divided by this, however long a passage is


def token_weights(mask: Bool[Array, "b t"], group: int) -> Float[Array, " b"]:
    """The weight of each target token of a query in the mean over groups of the mean over a group's tokens.

    A group is `group` consecutive queries. Reference: each device averages over the tokens of its own queries, and
    gradients are averaged over devices.
    """
    tokens = mask.sum(-1).reshape(-1, group).sum(-1)  # of each group
    return jnp.repeat(1.0 / (len(tokens) * jnp.maximum(tokens, 1)), group)


def mean_loss(losses: Float[Array, "b t"], mask: Bool[Array, "b t"]) -> Float[Array, " b"]:
    """Mean loss of each target over the tokens in `mask`."""
    return losses.sum(-1) / jnp.maximum(mask.sum(-1), 1)


def single_passage_logits(
    reader: FiD, states: Float[Array, "b n l d"], mask: Bool[Array, "b n l"], target: Int[Array, "b t"], pad_id: int
) -> Float[Array, "b n t v"]:
    """Logits of the target when the decoder reads one passage at a time; `states` are encoder states."""
    b, n, length, d = states.shape
    source = EncoderStates(states.reshape(b * n, length, d), mask.reshape(b * n, 1, length))
    inputs = constrain(jnp.repeat(shift_right(target, pad_id), n, axis=0), ROW_AXES)
    logits = reader.teacher_forced(inputs, source).logits
    return logits.reshape(b, n, *logits.shape[1:])


def perplexity_gold(
    logits: Float[Array, "b n t v"], target: Int[Array, "b t"], target_mask: Bool[Array, "b t"]
) -> Float[Array, "b n"]:
    """PDist (`ppmean`): minus the mean loss of the target given each passage alone."""
    b, n = logits.shape[:2]
    rows = [jnp.repeat(x, n, axis=0) for x in (target, target_mask)]
    return -mean_loss(token_losses(logits.reshape(b * n, *logits.shape[2:]), *rows), rows[1]).reshape(b, n)


def attention_gold(
    weighted_norms: Float[Array, "b t s"], mask: Bool[Array, "b n l"], target_mask: Bool[Array, "b t"], layers: int
) -> Float[Array, "b n"]:
    """ADist (`evalnormsum`): cross-attention weights times the norms of values, summed over a passage's tokens.

    `weighted_norms` are these products, summed over the decoder's `layers` and averaged over heads.
    """
    by_passage = jnp.where(mask[:, None], weighted_norms.reshape(*weighted_norms.shape[:2], *mask.shape[1:]), 0.0).sum(
        -1
    )
    total = jnp.where(target_mask[:, :, None], by_passage, 0.0).sum(1)
    return total / (ATTENTION_NORMALIZER * layers * target_mask.sum(-1, keepdims=True))


def leave_one_out_gold(
    reader: FiD,
    states: Float[Array, "b n l d"],
    mask: Bool[Array, "b n l"],
    target: Int[Array, "b t"],
    target_mask: Bool[Array, "b t"],
    pad_id: int,
) -> Float[Array, "b n"]:
    """LOOP (`loop`): the mean loss of the target given all passages but this one."""
    (b, n, length), t = mask.shape, target.shape[1]
    others = mask[:, None] & ~jnp.eye(n, dtype=bool)[None, :, :, None]  # "b left_out n l"
    source_mask = jnp.broadcast_to(others.reshape(b, n, 1, n * length), (b, n, t, n * length))
    source = EncoderStates(fuse(states), source_mask.reshape(b, n * t, n * length))
    inputs, targets, target_masks = (
        jnp.repeat(x, n, axis=0) for x in (shift_right(target, pad_id), target, target_mask)
    )
    losses = token_losses(reader.teacher_forced(inputs, source).logits, targets, target_masks)
    return mean_loss(losses, target_masks).reshape(b, n)


def kl_to_gold(
    scores: Float[Array, "b n"], gold: Float[Array, "b n"], temperature_score: float, temperature_gold: float
) -> Float[Array, ""]:
    """KL(gold || retriever) between distributions over a query's passages.

    Reference: the mean over all elements (queries x passages), not over queries alone.
    """
    target = jax.nn.softmax(gold / temperature_gold)
    log_ratio = jax.nn.log_softmax(gold / temperature_gold) - jax.nn.log_softmax(scores / temperature_score)
    return jnp.where(target > 0, target * log_ratio, 0.0).mean()


def emdr_loss(
    scores: Float[Array, "b n"],
    logits: Float[Array, "b n t v"],
    target: Int[Array, "b t"],
    target_mask: Bool[Array, "b t"],
    weights: Float[Array, " b"],
    temperature_score: float,
    temperature_gold: float,
) -> Float[Array, ""]:
    """EMDR2 (arXiv 2106.05346): minus the log-likelihood per token, marginalised over passages at each token.

    `logits` are those of `single_passage_logits`, `weights` the `token_weights` by which tokens are averaged.
    """
    scaled = logits / temperature_gold
    chosen = jnp.take_along_axis(scaled, target[:, None, :, None], axis=-1)[..., 0]
    log_prob = chosen - jax.nn.logsumexp(scaled, axis=-1)  # "b n t"
    log_score = jax.nn.log_softmax(scores / temperature_score)
    likelihood = jax.nn.logsumexp(log_prob + log_score[..., None], axis=1)
    return -(jnp.where(target_mask, likelihood, 0.0).sum(-1) * weights).sum()
