"""AdamW for reader and retriever, their schedules, and the clip that they share."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from atlas_jax.config import OptimConfig

Params = dict[str, Array]  # float32, by our paths
B1 = 0.9  # decay of the mean; that of the square is --beta2
FLOOR = 0.1  # the share of the highest rate at which the linear schedule starts, and at which both curves end
NOT_ZERO = 1e-6  # Reference: added to the norm that the clip divides by


class TrainableParams(NamedTuple):
    """Parameters that learn, and what their AdamW remembers."""

    params: Params
    moments: optax.ScaleByAdamState


def schedule(cfg: OptimConfig, update: Any, xp: Any = jnp) -> Any:
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


def learning_rate(cfg: OptimConfig, highest: float, updates: int) -> float:
    """The learning rate after so many updates, as a number to log."""
    return highest * float(schedule(cfg, np.float64(updates), np))


def init_optimizer(params: Params) -> TrainableParams:
    """Parameters that have not learnt yet."""
    return TrainableParams(params, optax.scale_by_adam().init(params))


def adamw_update(
    cfg: OptimConfig,
    learner: TrainableParams,
    gradients: Params,
    learning_rate: Float[Array, ""],
    good: Bool[Array, ""],
) -> TrainableParams:
    """One update of AdamW (arXiv 1711.05101), or none unless `good`."""
    params, before = learner
    moments = optax.ScaleByAdamState(
        count=before.count + 1,
        mu=optax.tree.update_moment(gradients, before.mu, B1, 1),
        nu=optax.tree.update_moment(gradients, before.nu, cfg.beta2, 2),
    )
    # The barrier lets parameters change after the moments, which without it XLA copies to be read in both places
    moments = jax.lax.optimization_barrier(jax.tree.map(functools.partial(jnp.where, good), moments, before))
    means = optax.tree.bias_correction(moments.mu, B1, moments.count)
    squares = optax.tree.bias_correction(moments.nu, cfg.beta2, moments.count)

    def after(p: Array, mean: Array, square: Array) -> Array:
        return jnp.where(good, p - learning_rate * (mean / (jnp.sqrt(square) + cfg.epsilon) + cfg.weight_decay * p), p)

    return TrainableParams(jax.tree.map(after, params, means, squares), moments)


def clip_factor(cfg: OptimConfig, norm: Float[Array, ""]) -> Float[Array, ""]:
    """What a gradient of this norm is multiplied by, so that its norm is at most --clip."""
    return jnp.minimum(1.0, cfg.clip / (norm + NOT_ZERO))
