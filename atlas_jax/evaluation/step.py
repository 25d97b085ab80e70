"""One batch read: the encoder runs once, and its states serve the loss, the choices and the answer."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from atlas_jax.evaluation.generation import GenerationSettings, Prompt, generate
from atlas_jax.mesh import params_gathered
from atlas_jax.models.fid import FiD, ReaderBatch, shift_right, token_losses


class ReaderOutput(NamedTuple):
    """What the reader makes of it; on the devices, then on the host."""

    loss: Float[Array | np.ndarray, " b"]  # cross-entropy, summed over the tokens that count
    loss_tokens: Int[Array | np.ndarray, " b"]  # their number
    choice_logits: Float[Array | np.ndarray, "b c"]  # of the choices' tokens, after the target's first one
    generated: Int[Array | np.ndarray, "b m"]  # start token, answer, padding


CHOICE_POSITION = 1  # the decoder position whose logits tell the letter: position 0 is the sentinel's


def read(
    reader: FiD, batch: ReaderBatch, choices: Int[Array, " c"], prompt: Prompt, cfg: GenerationSettings
) -> ReaderOutput:
    """Loss of the targets, logits of the choices, and a generated answer, out of one pass of the encoder."""
    reader, source = reader.gather(reader.encode(batch.passages, batch.mask))
    with params_gathered():
        logits, _ = reader.decode(shift_right(batch.target, cfg.pad_id), source)
        generated = generate(reader, source, cfg, prompt)
    return ReaderOutput(
        token_losses(logits, batch.target, batch.target_mask).sum(-1),
        batch.target_mask.sum(-1),
        jnp.take(logits[:, CHOICE_POSITION], choices, axis=-1),
        generated,
    )
