"""One evaluation step: the encoder runs once; its states serve the loss, the choices and the generated answer."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from atlas_jax.evaluation.generation import GenerationSettings, Prompt, generate
from atlas_jax.mesh import params_gathered
from atlas_jax.models.fid import FiD, ReaderBatch, shift_right, token_losses

CHOICE_POSITION = 1  # decoder position that predicts the letter, after <extra_id_0> at position 0


class ReaderOutput(NamedTuple):
    """The reader's output for a batch; on the devices, then on the host."""

    loss: Float[Array | np.ndarray, " b"]  # cross-entropy, summed over the tokens in the target's mask
    loss_tokens: Int[Array | np.ndarray, " b"]  # number of these tokens
    choice_logits: Float[Array | np.ndarray, "b c"]  # logits of the choices' tokens where the letter is predicted
    generated: Int[Array | np.ndarray, "b m"]  # start token, answer, padding


def eval_step(
    reader: FiD,
    batch: ReaderBatch,
    choices: Int[Array, " c"],
    prompt: Prompt,
    positions: Int[Array, " b"] | None,
    cfg: GenerationSettings,
) -> ReaderOutput:
    """Loss of the targets, logits of the choices, and generated answers of a batch.

    `positions`: where the decoder predicts the letter of each target; None: at CHOICE_POSITION.
    """
    reader, source = reader.gather_params(reader.encode(batch.passages, batch.mask))
    with params_gathered():
        logits, _ = reader.decode(shift_right(batch.target, cfg.pad_id), source)
        generated = generate(reader, source, cfg, prompt)
    at_letter = logits[:, CHOICE_POSITION]
    if positions is not None:
        at_letter = jnp.take_along_axis(logits, positions[:, None, None], axis=1)[:, 0]
    return ReaderOutput(
        token_losses(logits, batch.target, batch.target_mask).sum(-1),
        batch.target_mask.sum(-1),
        jnp.take(at_letter, choices, axis=-1),
        generated,
    )
