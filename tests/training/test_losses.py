"""How losses are averaged over the tokens of several queries; `test_step` compares the losses with the reference."""

import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.training.losses import token_weights

MASK = np.arange(4) < np.array([[1], [3], [4], [2]])
LOSSES = np.arange(16.0).reshape(4, 4)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_groups_are_averaged_apart(group):
    """The mean over groups of the mean over a group's tokens; the groups matter, as the targets differ in length."""
    groups = [slice(start, start + group) for start in range(0, 4, group)]
    expected = np.mean([LOSSES[rows][MASK[rows]].mean() for rows in groups])
    found = (jnp.where(MASK, LOSSES, 0.0).sum(-1) * token_weights(jnp.asarray(MASK), group)).sum()
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert group == 4 or abs(expected - LOSSES[MASK].mean()) > 0.1


def test_a_group_without_tokens_counts_as_zero():
    """As in a batch whose targets are cut to nothing: no division by 0."""
    weights = token_weights(jnp.asarray(MASK & (np.arange(4) > 1)[:, None]), 2)
    assert weights.tolist() == [0.5, 0.5, pytest.approx(1 / 12), pytest.approx(1 / 12)]
