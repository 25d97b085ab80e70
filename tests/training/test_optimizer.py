"""AdamW and its schedules, against PyTorch's formulas written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.config import OptimConfig
from atlas_jax.training.optimizer import adamw_update, clip_factor, init_optimizer, learning_rate, schedule


def test_updates_equal_adamw():
    """Three updates equal the paper's algorithm 2 in float64, decay decoupled; one that is not finite is skipped."""
    cfg = OptimConfig(weight_decay=0.1, beta2=0.99, epsilon=1e-3)
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 2)).astype(np.float32), "b": rng.normal(size=4).astype(np.float32)}
    learner = init_optimizer({path: jnp.asarray(x) for path, x in params.items()})
    expected = {path: x.astype(np.float64) for path, x in params.items()}
    m, v = ({path: np.zeros_like(x) for path, x in expected.items()} for _ in range(2))
    for t in range(1, 4):
        gradients = {path: rng.normal(size=x.shape).astype(np.float32) for path, x in params.items()}
        device_gradients = {path: jnp.asarray(g) for path, g in gradients.items()}
        learner = adamw_update(cfg, learner, device_gradients, jnp.float32(0.05), jnp.bool(True))
        nan_gradients = {path: g * jnp.nan for path, g in device_gradients.items()}
        skipped = adamw_update(cfg, learner, nan_gradients, jnp.float32(0.05), jnp.bool(False))
        for after, before in zip(jax.tree.leaves(skipped), jax.tree.leaves(learner), strict=True):
            np.testing.assert_array_equal(after, before)
        for path, g in gradients.items():
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = 0.99 * v[path] + 0.01 * g.astype(np.float64) ** 2
            step = (m[path] / (1 - 0.9**t)) / (np.sqrt(v[path] / (1 - 0.99**t)) + 1e-3)
            expected[path] = expected[path] * (1 - 0.05 * 0.1) - 0.05 * step
    for path, x in expected.items():
        np.testing.assert_allclose(learner.params[path], x, rtol=1e-5, atol=1e-6)
        assert np.abs(x - params[path]).max() > 0.05


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("linear", [0.1, 0.325, 0.55, 0.775, 1.0, 0.85, 0.7, 0.55, 0.4, 0.25]),
        ("fixed", [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.0, 0.25, 0.5, 0.75, 1.0, 0.969333, 0.879423, 0.736396, 0.55, 0.332937]),
    ],
)
def test_schedules_equal_the_reference(scheduler, rates):
    """Ten updates, four of them warm-up; the logged rate is the device's up to float32 rounding."""
    cfg = OptimConfig(total_steps=10, warmup_steps=4, scheduler=scheduler)
    assert [learning_rate(cfg, 1.0, n) for n in range(10)] == pytest.approx(rates, abs=1e-6)
    assert [float(schedule(cfg, jnp.float32(n))) for n in range(10)] == pytest.approx(rates, abs=1e-6)
    assert learning_rate(cfg, 3e-5, 5) == 3e-5 * learning_rate(cfg, 1.0, 5)


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "fixed"])
def test_a_schedule_without_warmup_or_all_warmup_is_finite(scheduler):
    """The defaults are 1,000 steps with 1,000 of warm-up; 0 is possible too."""
    for warmup in (0, 5):
        cfg = OptimConfig(total_steps=5, warmup_steps=warmup, scheduler=scheduler)
        assert all(0 <= learning_rate(cfg, 1.0, n) <= 1 for n in range(6))


def test_the_clip_shortens_long_gradients_only():
    """A norm of 4 is cut to 1, one of 0.5 stays."""
    cfg = OptimConfig(clip=1.0)
    assert float(clip_factor(cfg, jnp.float32(4.0))) == pytest.approx(0.25, rel=1e-5)
    assert float(clip_factor(cfg, jnp.float32(0.5))) == 1.0
