"""AdamW for reader and retriever, their schedules, and the clip that they share."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from atlas_jax.config import OptimConfig

Params = dict[str, Array]  # float32, by our paths
FLOOR = 0.1  # the share of the highest rate at which the linear schedule starts, and at which both curves end
NOT_ZERO = 1e-6  # Reference: added to the norm that the clip divides by


class Learner(NamedTuple):
    """Parameters that learn, and what their AdamW remembers."""

    params: Params
    moments: Any


def share_of_rate(cfg: OptimConfig, update: Any, xp: Any = jnp) -> Any:
    """The share of the highest learning rate that the update after `update` others takes.

    Reference: the three schedules as they are, of which `cosine` and `fixed` start at 0. `xp` is the array module:
    numpy has float64, for the figure that is logged.
    """
    rising = update / max(1, cfg.warmup_steps)
    done = (update - cfg.warmup_steps) / max(1, cfg.total_steps - cfg.warmup_steps)
    match cfg.scheduler:
        case "linear":
            rising = (1 - FLOOR) * rising + FLOOR
            falling = xp.maximum(0.0, 1.0 + (FLOOR - 1) * done)
        case "cosine":
            falling = FLOOR + (1 - FLOOR) * xp.cos(0.5 * math.pi * done)
        case "fixed":
            falling = xp.ones_like(done)
    return xp.where(update < cfg.warmup_steps, rising, falling)


def rate(cfg: OptimConfig, highest: float, updates: int) -> float:
    """The learning rate after so many updates, as a number to log."""
    return highest * float(share_of_rate(cfg, np.float64(updates), np))


def _adamw(cfg: OptimConfig) -> optax.GradientTransformation:
    """The step of AdamW (arXiv 1711.05101) before it is multiplied by minus the learning rate."""
    return optax.chain(
        optax.scale_by_adam(b1=0.9, b2=cfg.beta2, eps=cfg.epsilon), optax.add_decayed_weights(cfg.weight_decay)
    )


def start(cfg: OptimConfig, params: Params) -> Learner:
    """Parameters that have not learnt yet."""
    return Learner(params, _adamw(cfg).init(params))


def learn(cfg: OptimConfig, learner: Learner, gradients: Params, rate: Float[Array, ""]) -> Learner:
    """One update."""
    steps, moments = _adamw(cfg).update(gradients, learner.moments, learner.params)
    return Learner(jax.tree.map(lambda p, step: p - rate * step, learner.params, steps), moments)


def clip_factor(cfg: OptimConfig, norm: Float[Array, ""]) -> Float[Array, ""]:
    """What a gradient of this norm is multiplied by, so that its norm is at most --clip."""
    return jnp.minimum(1.0, cfg.clip / (norm + NOT_ZERO))
