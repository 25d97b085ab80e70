"""`--refresh_index` of a run whose passage encoder is not trained."""

import dataclasses
import logging

import pytest

from atlas_jax.training.index_refresh import is_refresh_due, report_unused_refresh

FROZEN, UNTRAINED = "with --query_side_retriever_training", "without --train_retriever"


@pytest.mark.parametrize(
    ("refresh", "train", "query_side", "cause"),
    [
        ("100", True, True, FROZEN),
        ("0-100:10,100-1000000:500", True, True, FROZEN),
        ("100", False, False, UNTRAINED),
        ("100", True, False, None),  # refreshes
        ("-1", True, True, None),  # was not asked to
        ("100000000000", True, True, None),  # nor by a step after the last one, as a published script has it
    ],
)
def test_a_run_says_that_nothing_is_refreshed(tiny_config, caplog, refresh, train, query_side, cause):
    """One line with the flag and the cause, if the flag asks for a refresh and none comes."""
    caplog.set_level(logging.INFO, logger="atlas_jax")
    distill = dataclasses.replace(tiny_config.distill, train_retriever=train, refresh_index=refresh)
    retrieval = dataclasses.replace(tiny_config.retrieval, query_side_retriever_training=query_side)
    config = dataclasses.replace(tiny_config, distill=distill, retrieval=retrieval)
    report_unused_refresh(config)
    line = f"--refresh_index {refresh}: nothing is refreshed; the passage encoder does not change {cause}"
    assert caplog.messages == ([line] if cause else [])
    due = [step for step in range(config.optim.total_steps) if is_refresh_due(config, step)]
    assert bool(due) == (refresh == "100" and train and not query_side)
