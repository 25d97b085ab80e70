"""Correlations of cross-attention with the gold scores, for --compute_crossattention_stats.

Axes: `b` queries, `n` passages, `l` tokens of a passage, `t` target, `s` all of a query's tokens (n*l).
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from atlas_jax.models.fid import ReaderBatch
from atlas_jax.models.t5 import CrossAttention
from atlas_jax.training.losses import ATTENTION_NORMALIZER

TOP = (5, 10, 20)  # tokens of a passage with the largest values


def correlations(
    cross_attention: CrossAttention,
    reader_batch: ReaderBatch,
    query_lengths: Int[Array, " b"],
    gold: Float[Array, "b n"],
    *,
    layers: int,
    eos_id: int,
    text_maxlength: int,
) -> dict[str, Array]:
    """Pearson correlations, by metric name, of `gold` with each way to sum a passage's attention; 0 if undefined.

    Reference: its 24 statistics. `cross_attention` is summed over the decoder's layers.
    """
    n = gold.shape[1]
    ids, mask = reader_batch.passages[:, :n], reader_batch.mask[:, :n]
    metrics = {}
    for kind, values in cross_attention._asdict().items():
        by_passage = values.reshape(*values.shape[:2], -1, mask.shape[-1])[:, :, :n]
        for name, summed in _sums(
            by_passage, ids, mask, reader_batch.target_mask, query_lengths, layers, eos_id, text_maxlength
        ):
            metrics[f"corr/{kind}{name}"] = jnp.nan_to_num(jnp.corrcoef(gold.reshape(-1), summed.reshape(-1))[0, 1])
    return metrics


def _sums(
    values: Float[Array, "b t n l"],
    ids: Int[Array, "b n l"],
    mask: Bool[Array, "b n l"],
    target_mask: Bool[Array, "b t"],
    query_lengths: Int[Array, " b"],
    layers: int,
    eos_id: int,
    text_maxlength: int,
) -> Iterator[tuple[str, Float[Array, "b n"]]]:
    """The attention to each passage summed in eight ways: name and sums."""
    values = jnp.where(mask[:, None], values, 0.0)
    first = values[:, 0]
    values = jnp.where(target_mask[:, :, None, None], values, 0.0)
    targets = layers * target_mask.sum(1)[:, None]
    padded = jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, max(0, text_maxlength - values.shape[-1]))))
    for k in TOP:  # Reference: among the padding too, which counts as 0
        yield f"top{k}", jax.lax.top_k(padded, min(k, padded.shape[-1]))[0].sum((1, 3)) / (k * targets)
    by_token = values.sum(1)
    tokens = mask.sum(-1)
    beyond = jnp.arange(ids.shape[-1])[None, None, :] >= query_lengths[:, None, None]
    yield "nosep", jnp.where(ids == eos_id, by_token, 0.0).sum(-1) / (ATTENTION_NORMALIZER * targets)
    yield "first", first.sum(-1) / (layers * tokens)
    yield "sum", by_token.sum(-1) / (ATTENTION_NORMALIZER * targets)
    yield "avg", by_token.sum(-1) / (tokens * targets)
    yield "woquery", jnp.where(beyond, by_token, 0.0).sum(-1) / (ATTENTION_NORMALIZER * targets)
