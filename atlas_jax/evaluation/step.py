"""One evaluation step: the encoder runs once; its states serve the loss, the choices and the generated answer."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from atlas_jax.evaluation.generation import GenerationSettings, Prompt, generate
from atlas_jax.mesh import params_gathered
from atlas_jax.models.fid import FiD, ReaderBatch, shift_right, token_losses

CHOICE_POSITION = 1  # decoder position whose logits choose the letter; position 0 predicts <extra_id_0>


class ReaderOutput(NamedTuple):
    """The reader's output for a batch; on the devices, then on the host."""

    loss: Float[Array | np.ndarray, " b"]  # cross-entropy, summed over the tokens in the target's mask
    loss_tokens: Int[Array | np.ndarray, " b"]  # number of these tokens
    choice_logits: Float[Array | np.ndarray, "b c"]  # logits of the choices' tokens at CHOICE_POSITION
    generated: Int[Array | np.ndarray, "b m"]  # start token, answer, padding


def eval_step(
    reader: FiD, batch: ReaderBatch, choices: Int[Array, " c"], prompt: Prompt, cfg: GenerationSettings
) -> ReaderOutput:
    """Loss of the targets, logits of the choices, and generated answers of a batch."""
    reader, source = reader.gather_params(reader.encode(batch.passages, batch.mask))
    with params_gathered():
        logits, _ = reader.decode(shift_right(batch.target, cfg.pad_id), source)
        generated = generate(reader, source, cfg, prompt)
    return ReaderOutput(
        token_losses(logits, batch.target, batch.target_mask).sum(-1),
        batch.target_mask.sum(-1),
        jnp.take(logits[:, CHOICE_POSITION], choices, axis=-1),
        generated,
    )
