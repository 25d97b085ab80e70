"""AdamW of reader and retriever, the learning rate schedules, and the gradient clip that both share."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from atlas_jax.config import OptimConfig

Params = dict[str, Array]  # float32, by path
B1 = 0.9  # decay of the first moment; that of the second is --beta2
FLOOR = 0.1  # relative rate at which `linear` starts, and at which `linear` and `cosine` end
CLIP_EPSILON = 1e-6  # Reference: added to the norm that the clip divides by


class TrainableParams(NamedTuple):
    """Parameters with their AdamW moments."""

    params: Params
    moments: optax.ScaleByAdamState


def schedule(cfg: OptimConfig, update: Any, xp: Any = jnp) -> Any:
    """The learning rate of an update relative to its peak, 0 to 1; `update` counts from 0.

    Reference: formulas as there; `cosine` and `fixed` start at 0. `xp` is the array module: numpy computes the
    logged value in float64.
    """
    warmup = update / max(1, cfg.warmup_steps)
    done = (update - cfg.warmup_steps) / max(1, cfg.total_steps - cfg.warmup_steps)
    match cfg.scheduler:
        case "linear":
            warmup = (1 - FLOOR) * warmup + FLOOR
            decay = xp.maximum(0.0, 1.0 + (FLOOR - 1) * done)
        case "cosine":
            decay = FLOOR + (1 - FLOOR) * xp.cos(0.5 * math.pi * done)
        case "fixed":
            decay = xp.ones_like(done)
    return xp.where(update < cfg.warmup_steps, warmup, decay)


def learning_rate(cfg: OptimConfig, peak: float, updates: int) -> float:
    """The learning rate of the update that follows `updates` others, for the log."""
    return peak * float(schedule(cfg, np.float64(updates), np))


def init_optimizer(params: Params) -> TrainableParams:
    """The parameters with moments of 0."""
    return TrainableParams(params, optax.scale_by_adam().init(params))


def adamw_update(
    cfg: OptimConfig,
    part: TrainableParams,
    gradients: Params,
    learning_rate: Float[Array, ""],
    finite: Bool[Array, ""],
) -> TrainableParams:
    """One AdamW update (arXiv 1711.05101) with decoupled weight decay on every parameter; none unless `finite`."""
    params, old_moments = part
    moments = optax.ScaleByAdamState(
        count=old_moments.count + 1,
        mu=optax.tree.update_moment(gradients, old_moments.mu, B1, 1),
        nu=optax.tree.update_moment(gradients, old_moments.nu, cfg.beta2, 2),
    )
    # Without the barrier XLA would copy the moments, to read them before and after they are overwritten
    moments = jax.lax.optimization_barrier(jax.tree.map(functools.partial(jnp.where, finite), moments, old_moments))
    means = optax.tree.bias_correction(moments.mu, B1, moments.count)
    squares = optax.tree.bias_correction(moments.nu, cfg.beta2, moments.count)

    def updated(p: Array, mean: Array, square: Array) -> Array:
        return jnp.where(
            finite, p - learning_rate * (mean / (jnp.sqrt(square) + cfg.epsilon) + cfg.weight_decay * p), p
        )

    return TrainableParams(jax.tree.map(updated, params, means, squares), moments)


def clip_factor(cfg: OptimConfig, norm: Float[Array, ""]) -> Float[Array, ""]:
    """The factor that limits the norm of a gradient to --clip."""
    return jnp.minimum(1.0, cfg.clip / (norm + CLIP_EPSILON))
